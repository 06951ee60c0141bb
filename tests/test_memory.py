"""What compiled generations need in memory, by the compiler's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from xla import compile_as_users_do

from dlm_jax import cache as cache_lib
from dlm_jax import models
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.models import Transformer

B, P, G = 8, 512, 512
MIB = 2**20


def needed(name: str, **changes) -> tuple[int, int, int]:
    """Bytes of temporaries, of what the method keeps, and of the weights: from shapes alone."""
    config = dataclasses.replace(models.PRESETS["bench-60m"], **changes)
    model, method = Transformer(config), cache_lib.make(name)
    alg = "random" if name == "dkv-greedy" else None
    decode = DecodeConfig.for_model(config, gen_length=G, alg=alg)
    ids, key = jax.ShapeDtypeStruct((B, P), jnp.int32), jax.random.key(0)
    params = jax.eval_shape(model.init, key, jnp.zeros((1, 1), jnp.int32))["params"]
    geo = decode.geometry(prompt=P, shift=config.shift)
    kept = jax.eval_shape(lambda: method.init_cache(model, geo, jnp.float32))

    def run(params, ids):
        return diffusion_generate(params, model, ids, key=key, decode=decode, cache=method)

    stats = compile_as_users_do(jax.jit(run).lower(params, ids)).memory_analysis()

    def size(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert stats.argument_size_in_bytes < size(params) + MIB
    return stats.temp_size_in_bytes, B * size(kept), size(params)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("none", "dual") else pytest.param(name, marks=pytest.mark.slow)
        for name in cache_lib.METHODS
    ],
)
def test_a_generation_needs_little_more_than_weights_and_cache(name):
    """Nothing of the size of the weights, and no activations of the whole batch.

    Attention scores of the whole batch alone would be 256 MiB, and logits at all generated
    positions 500 MiB. d2Cache reads its attention weights, two rows at a time, and logits in groups
    of 256 MiB.
    """
    temporary, kept, weights = needed(name)
    assert (kept == 0) == (name == "none") and weights > 200 * MIB
    allowed = 600 if name == "d2cache" else 200
    assert temporary - kept < allowed * MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual", "d2cache"])
def test_layers_share_their_activations(name):
    """Another layer needs its weights and its cache, and hardly anything else."""
    small = dict(width=64, head_dim=32, num_heads=2, num_kv_heads=2, mlp_width=64, vocab_size=32000)
    few, few_kept, _ = needed(name, **small, num_layers=2)
    more, more_kept, _ = needed(name, **small, num_layers=6)
    assert more_kept == 3 * few_kept
    per_layer = (more - more_kept - few + few_kept) / 4
    turn = 2 * (P + G) * 64 * 4  # the hidden states of two rows
    assert per_layer < turn / 2
