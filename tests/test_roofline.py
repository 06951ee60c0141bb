"""Counted products against counts by hand, and the limits of the 8B models against known ones."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import roofline
from counted_flops import BLOCK, DECODE, G, L, P, flops_by_hand
from roofline import Ceilings, Product
from tiny_models import prompts, small_config

from dlm_jax import cache as cache_lib
from dlm_jax import models
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.models import Transformer


def step_products(method, config, dtype=jnp.float32):
    shapes = random_weights.shapes(config, jnp.dtype(dtype))
    return roofline.step_products(Transformer(config), shapes, prompts(3, P), DECODE, method)


def step_flops(method, config):
    return [roofline.total_flops(products) for products in step_products(method, config)]


def test_products_in_loops_and_branches():
    x_MK, x_KN = jnp.ones((3, 5)), jnp.ones((5, 7))

    def once(_):
        return jnp.einsum("MK,KN->MN", x_MK, x_KN)

    def flops(function):
        products, _ = roofline.find_products(jax.make_jaxpr(function)(jnp.float32(1)).jaxpr)
        return roofline.total_flops(products)

    assert flops(once) == 2 * 3 * 5 * 7
    assert flops(jax.jit(once)) == flops(jax.checkpoint(once)) == flops(once)
    assert flops(jax.vmap(once, axis_size=4, in_axes=None)) == flops(once)
    assert flops(
        lambda x: jnp.einsum("BMK,BKN->BMN", jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7)))
    ) == (4 * flops(once))
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c, once(c)), x, length=6)) == 6 * flops(once)
    assert flops(lambda x: jax.lax.cond(x > 0, once, lambda x: jnp.zeros((3, 7)), x)) == flops(once)
    with pytest.raises(ValueError, match="unknown length"):
        flops(lambda x: jax.lax.while_loop(lambda c: c < 9, lambda c: c + once(c).sum(), x))


def test_bytes_of_weights_and_of_rows():
    """A layer of attention by hand: what is read once, what per row, and what is never written."""
    Q, K, H, D = 3, 2, 5, 7

    def layer(kernel, x_QD, k_KLH):
        flat = jnp.asarray(kernel, jnp.bfloat16).reshape(D, K * H)  # still a weight
        q_QKH = jnp.matmul(x_QD, flat).reshape(Q, K, H)
        scores_KQL = jnp.einsum("QKH,KLH->KQL", q_QKH, k_KLH, preferred_element_type=jnp.float32)
        mass_KQL = jax.jit(jnp.exp)(scores_KQL - jnp.max(scores_KQL, axis=-1, keepdims=True))
        total_KQ1 = jnp.sum(mass_KQL, axis=-1, keepdims=True)
        out = jnp.einsum("KQL,KLH->QKH", mass_KQL.astype(jnp.bfloat16), k_KLH)
        out = out / jnp.moveaxis(total_KQ1, 0, 1).astype(jnp.bfloat16)
        return jnp.matmul(out.reshape(Q, K * H), flat.T)

    half = jnp.bfloat16
    shapes = [jax.ShapeDtypeStruct(shape, half) for shape in ((D, K, H), (Q, D), (K, L, H))]
    jaxpr = jax.make_jaxpr(layer)(*shapes).jaxpr
    products, (result,) = roofline.find_products(jaxpr, ["weight", None, None])
    kernel, flat, queries, keys = 2 * D * K * H, 2 * Q * D, 2 * Q * K * H, 2 * K * L * H
    assert products == [
        Product(2 * Q * D * K * H, kernel, flat + queries),
        Product(2 * K * Q * L * H, 0, queries + keys),
        Product(2 * K * Q * L * H, 0, keys + queries),
        Product(2 * Q * D * K * H, kernel, queries + flat),
    ]
    assert result is None
    everything = roofline.find_products(jaxpr)[0]  # unknown operands are read for every row
    assert [product.weight_bytes for product in everything] == [0] * 4
    assert everything[0].row_bytes == kernel + flat + queries


def test_limit_of_products():
    ceilings = Ceilings(flops=100.0, bytes=10.0)
    products = [Product(50, 20, 1), Product(400, 2, 3)]
    assert ceilings.seconds(products, 1) == 2.1 + 4.0  # bytes, then FLOPs
    assert ceilings.seconds(products, 8) == 4.0 + 32.0
    assert roofline.total_flops(products, 8) == 8 * 450
    assert roofline.total_bytes(products, 8) == 22 + 8 * 4


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_steps(family):
    config = small_config(family)
    full = flops_by_hand(config, L, read=BLOCK)
    assert step_flops(cache_lib.NoCache(), config) == [full]
    assert step_flops(cache_lib.Dual(), config) == [flops_by_hand(config, BLOCK, read=BLOCK), full]
    sizes = {path: np.prod(shape) for path, shape in models.param_shapes(config).items()}
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        for products in step_products(cache_lib.Dual(), config, dtype):
            assert sum(product.weight_bytes for product in products) == itemsize * kernels


def test_a_tied_head_is_a_weight():
    products = step_products(cache_lib.NoCache(), small_config(tied_head=True))[0]
    config = small_config()
    assert products[-1].weight_bytes == 4 * config.vocab_size * config.width


def test_steps_that_refresh_part_of_a_layer():
    config, one_layer = small_config(), small_config(num_layers=1)
    changed = G // 2
    flops = step_flops(cache_lib.DLLMCache(rou=0.5), config)
    values = 2 * config.width * config.num_kv_heads * config.head_dim  # of one position
    full = flops_by_hand(one_layer, L, read=BLOCK, narrow=False)  # the first layer always is
    # Values of the whole response, or of everything, tell what changed.
    assert flops == [
        full + flops_by_hand(one_layer, changed, read=0, narrow=False) + (G - changed) * values,
        full + flops_by_hand(one_layer, P + changed, read=0, narrow=False) + (G - changed) * values,
        full + flops_by_hand(one_layer, G, read=0, narrow=False),
        flops_by_hand(config, L, read=BLOCK, narrow=False),
    ]


@pytest.mark.parametrize(
    "preset, cached_ms, full_ms",
    [
        ("llada-8b-instruct", {1: 3.68, 8: 5.86, 32: 23.4}, {1: 18.6, 8: 147, 32: 588}),
        ("dream-v0-instruct-7b", {1: 3.37, 8: 4.72, 32: 18.9}, {1: 17.2, 8: 135, 32: 541}),
    ],
)
def test_limits_of_the_large_models(preset, cached_ms, full_ms):
    """Against sums over the linear layers, attention and the head, made without the program.

    512 + 512 positions in bfloat16, logits for a block of 32, 790 TFLOP/s and 4.3 TB/s. Layers are
    all alike, so that two of them tell the others.
    """
    config = models.PRESETS[preset]
    decode = DecodeConfig(gen_length=512, block_length=32, steps=512)
    steps = []
    for layers in (1, 2):
        cut = dataclasses.replace(config, num_layers=layers)
        shapes = random_weights.shapes(cut, jnp.dtype("bfloat16"))
        prompt = np.zeros((1, 512), np.int32)
        steps.append(
            roofline.step_products(Transformer(cut), shapes, prompt, decode, cache_lib.Dual())
        )
    ceilings = Ceilings(flops=790e12, bytes=4.3e12)
    for which, wanted in enumerate((cached_ms, full_ms)):
        for batch, ms in wanted.items():
            one, two = (1e3 * ceilings.seconds(found[which], batch) for found in steps)
            assert one + (config.num_layers - 1) * (two - one) == pytest.approx(ms, rel=0.02)


def test_a_rate_is_that_of_the_best_run(monkeypatch):
    monkeypatch.setattr(roofline, "_ENOUGH_S", 0.02)
    slow = iter([0.05])

    def work(x):
        time.sleep(0.005 + next(slow, 0.0))
        return x

    rate = roofline._rate(work, jnp.zeros(()), 10)
    assert 200 < rate <= 2000


def test_measured_ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "_RUNS", 1)
    flops, byte_rate = roofline.measure_ceilings(jnp.dtype("float32"))
    assert 1e8 < flops < 1e14  # of any CPU; that a run takes no time or forever would show
    assert 1e8 < byte_rate < 1e13
