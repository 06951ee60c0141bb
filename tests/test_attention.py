"""Attention: both layouts of keys and values, tiles, what was attended to, and who computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, small

from dlm_jax import cache
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.models import Transformer, attention
from dlm_jax.models.attention import Heads, HeadsFirst, SlotsFirst

B, Q, L, N, K, H = 2, 5, 7, 4, 2, 8
HEADS = Heads(N, K, H)


def arrays(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q_BQNH = jax.random.normal(keys[0], (B, Q, N, H), dtype)
    k_BLKH, v_BLKH = (jax.random.normal(key, (B, L, K, H), dtype) for key in keys[1:3])
    mask_BQL = jax.random.bernoulli(keys[3], 0.7, (B, Q, L)).at[:, :, 0].set(True)
    return q_BQNH, k_BLKH, v_BLKH, mask_BQL


def by_hand(q_BQNH, k_BLKH, v_BLKH, mask_BQL):
    """In float64, a head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BQNH, k_BLKH, v_BLKH))
    mask = np.broadcast_to(mask_BQL, (B, Q, L))
    out, weights = np.zeros_like(q), np.zeros((N, B, Q, L))
    for n in range(N):
        kv = n // (N // K)
        for b in range(B):
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, kv].T / np.sqrt(H), -np.inf)
            mass = np.exp(scores - scores.max(-1, keepdims=True))
            weights[n, b] = mass / mass.sum(-1, keepdims=True)
            out[b, :, n] = weights[n, b] @ v[b, :, kv]
    return out, weights.mean(0)


@pytest.mark.parametrize("scores", [2**23, 300, 100, 1], ids=lambda size: f"tiles-of-{size}")
@pytest.mark.parametrize("every", [False, True], ids=["a-mask-each", "one-mask"])
def test_attention_is_what_it_says(monkeypatch, scores, every):
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v, mask = arrays()
    mask = mask[:, :1] if every else mask
    out, told = HeadsFirst.of(k, v).attend_and_tell(q, mask)
    wanted, weights = by_hand(q, k, v, mask)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told, weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(HeadsFirst.of(k, v).attend(q, mask), out)


def test_large_attention_never_holds_all_scores(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2**16)
    q, k, v = (jax.ShapeDtypeStruct((1, 256, 8, 16), jnp.bfloat16) for _ in range(3))
    mask = jax.ShapeDtypeStruct((1, 1, 256), jnp.bool_)

    def attend(q, k, v, mask):
        return HeadsFirst.of(k, v).attend_and_tell(q, mask)

    sizes = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(var.aval.size for var in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(attend)(q, k, v, mask).jaxpr)
    assert max(sizes) <= 2 * 2**16 < 8 * 256 * 256


def test_bfloat16_keeps_a_float32_softmax():
    q, k, v, mask = arrays(jnp.bfloat16)
    out, told = HeadsFirst.of(k, v).attend_and_tell(q, mask)
    assert out.dtype == jnp.bfloat16 and told.dtype == jnp.float32
    np.testing.assert_allclose(told.sum(-1), jnp.ones((B, Q)), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, L - 1), unique=True),
    st.sampled_from([HeadsFirst, SlotsFirst]),
    st.booleans(),
)
def test_what_is_written_is_there_in_either_layout(slots, layout, full):
    """Other slots keep what they had; with as many queries as slots each has its own place."""
    _, k, v, _ = arrays()
    _, new_k, new_v, _ = arrays(seed=1)
    kept = layout.of(k, v)
    if full:
        index = np.where(np.isin(np.arange(L), slots), np.arange(L), L)
    else:
        index = np.asarray([*sorted(slots), *[L] * 2][: L - 1])
    index_BQ = jnp.asarray(np.broadcast_to(index, (B, len(index))), jnp.int32)
    there = index[index < L]
    from_BQKH = (lambda x: x[:, np.minimum(index, L - 1)]) if not full else (lambda x: x)
    written = kept.write(index_BQ, k_BQKH=from_BQKH(new_k), v_BQKH=from_BQKH(new_v))
    wanted_v = v.at[:, there].set(new_v[:, there])
    np.testing.assert_array_equal(written.v_BLKH, wanted_v)
    wanted = layout.of(k.at[:, there].set(new_k[:, there]), wanted_v)
    np.testing.assert_array_equal(written, wanted)
    values_only = kept.write(index_BQ, v_BQKH=from_BQKH(new_v))
    np.testing.assert_array_equal(values_only, (kept[0], wanted[1]))


class TestWhoComputes:
    def test_on_a_cpu(self):
        for dtype in (jnp.float32, jnp.bfloat16):
            assert attention.layout("auto", HEADS, dtype) is HeadsFirst
            assert attention.layout("xla", HEADS, dtype) is HeadsFirst
        assert attention.layout("cudnn", HEADS, jnp.bfloat16) is SlotsFirst

    def test_refusals(self):
        with pytest.raises(ValueError, match="'flash'; it must be one of auto, cudnn, xla"):
            attention.layout("flash", HEADS, jnp.bfloat16)
        with pytest.raises(ValueError, match="bfloat16 or float16, not in float32"):
            attention.layout("cudnn", HEADS, jnp.float32)

    @pytest.mark.parametrize("difference", [0.02, np.inf, RuntimeError("no cuDNN")])
    def test_what_disagrees_is_not_used(self, monkeypatch, difference):
        def found(_heads, _dtype):
            if isinstance(difference, Exception):
                raise difference
            return difference

        monkeypatch.setattr(attention, "fused_difference", found)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        attention.fused_agrees.cache_clear()
        try:
            with pytest.warns(UserWarning, match="cuDNN's attention is not used"):
                assert attention.layout("auto", HEADS, jnp.bfloat16) is HeadsFirst
            assert attention.layout("auto", HEADS, jnp.bfloat16) is HeadsFirst  # and tried once
        finally:
            attention.fused_agrees.cache_clear()

    def test_what_agrees_is_used(self, monkeypatch):
        """Also where it is first asked for while something is traced."""
        monkeypatch.setattr(attention, "_fused", plain_for_fused)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        attention.fused_agrees.cache_clear()
        seen = []

        def trace(x):
            seen.append(attention.layout("auto", HEADS, jnp.bfloat16))
            return x

        try:
            jax.jit(trace)(1.0)
        finally:
            attention.fused_agrees.cache_clear()
        assert seen == [SlotsFirst]

    def test_this_machine_has_none(self):
        attention.fused_agrees.cache_clear()
        with pytest.warns(UserWarning, match="does not run here"):
            assert not attention.fused_agrees(HEADS, "bfloat16")
        attention.fused_agrees.cache_clear()


def plain_for_fused(q_BQNH, k_BLKH, v_BLKH, mask_BQL):
    """What cuDNN's would give, on any machine."""
    return HeadsFirst.of(k_BLKH, v_BLKH).attend(q_BQNH, mask_BQL)


@pytest.mark.parametrize("name", ["dual", pytest.param("dllm", marks=pytest.mark.slow)])
def test_a_cache_lies_in_either_layout(monkeypatch, name):
    """The same generation, whichever layout, of rows that are padded."""
    monkeypatch.setattr(attention, "_fused", plain_for_fused)
    model, params = small("dream")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    prompt, mask = prompts(2, 6), np.arange(6)[None] >= [[2], [0]]
    decode = DecodeConfig(gen_length=8, block_length=4, steps=8)
    ours, theirs = (
        diffusion_generate(
            narrow,
            Transformer(model.config, attention=implementation),
            prompt,
            mask,
            key=jax.random.key(0),
            decode=decode,
            cache=cache.make(name),
            record=("state",),
        )
        for implementation in ("xla", "cudnn")
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.committed_at, theirs.committed_at)
    kinds = [
        {type(leaf) for leaf in jax.tree.leaves(out.state.cache, is_leaf=is_kv) if is_kv(leaf)}
        for out in (ours, theirs)
    ]
    assert kinds == [{HeadsFirst}, {SlotsFirst}]
    with pytest.raises(ValueError, match="and the attention of the interrupted call"):
        diffusion_generate(
            narrow,
            Transformer(model.config, attention="xla"),
            prompt,
            mask,
            key=jax.random.key(0),
            decode=decode,
            cache=cache.make(name),
            state=theirs.state,
        )


def is_kv(value) -> bool:
    return isinstance(value, HeadsFirst | SlotsFirst)


def test_a_model_takes_either(monkeypatch):
    """The same logits, whichever layout."""
    monkeypatch.setattr(attention, "_fused", plain_for_fused)
    model, params = small("dream")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens_BL = np.arange(12, dtype=np.int32).reshape(2, 6)
    ours, theirs = (
        Transformer(model.config, attention=name).apply({"params": narrow}, tokens_BL)
        for name in ("xla", "cudnn")
    )
    np.testing.assert_array_equal(ours, theirs)
