"""What every cache method must keep, run over the method table.

Two methods that exist only here exercise the parts of the protocol that the shipped ones do not:
K/V buffers, several step shapes, memory.
"""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import prompts, small

from dlm_jax import cache as cache_lib
from dlm_jax import decode as decode_lib
from dlm_jax.cache.base import CacheMethod, Variant
from dlm_jax.config import DecodeConfig
from dlm_jax.decode import diffusion_generate, diffusion_stream

KEY = jax.random.key(0)
DECODE = DecodeConfig(gen_length=8, block_length=4, steps=8)


@dataclasses.dataclass(frozen=True)
class AlwaysRefresh(CacheMethod):
    """Recomputes everything, through the K/V buffers."""

    name: ClassVar[str] = "always-refresh"

    def select(self, memory, row, geo):
        return row.valid_L


@dataclasses.dataclass(frozen=True)
class EveryOther(CacheMethod):
    """Everything at even steps; at odd ones only what may be filled, with its predecessors."""

    name: ClassVar[str] = "every-other"

    def variants(self, geo):
        return (Variant(2 * geo.block), Variant(geo.length))

    def init(self, geo):
        return jnp.zeros((), jnp.int32)

    def select(self, memory, row, geo):
        needed_L = row.eligible_L | jnp.roll(row.eligible_L, -1)
        return needed_L | (memory % 2 == 0)

    def observe(self, memory, row, obs, geo):
        return memory + 1


METHODS = [*cache_lib.METHODS.values(), AlwaysRefresh, EveryOther]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request) -> CacheMethod:
    return request.param()


def generate(family, prompt, mask=None, **arguments):
    model, params = small(family)
    arguments = dict(key=KEY, decode=DECODE, record=("computed", "history")) | arguments
    return jax.device_get(diffusion_generate(params, model, prompt, mask, **arguments))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_always_refreshing_equals_no_cache(family):
    prompt, mask = prompts(2, 5), np.array([[False, True, True, True, True], [True] * 5])
    plain = generate(family, prompt, mask)
    buffered = generate(family, prompt, mask, cache=AlwaysRefresh())
    np.testing.assert_array_equal(plain.tokens, buffered.tokens)
    np.testing.assert_array_equal(plain.committed_at, buffered.committed_at)
    np.testing.assert_array_equal(plain.computed, buffered.computed)
    np.testing.assert_allclose(plain.confidence, buffered.confidence, atol=1e-5)


def test_rows_alone_and_in_a_batch(method):
    prompt, mask = (
        prompts(2, 6, seed=2),
        np.array([[False, False, True, True, True, True], [True] * 6]),
    )
    keys = jax.random.split(KEY, 2)
    together = generate("dream", prompt, mask, cache=method, key=keys)
    alone = generate("dream", prompt[:1, 2:], cache=method, key=keys[:1])
    np.testing.assert_array_equal(together.tokens[0, 2:], alone.tokens[0])
    np.testing.assert_array_equal(together.history[:, 0, 2:], alone.history[:, 0])
    np.testing.assert_array_equal(together.computed[:, 0, 2:], alone.computed[:, 0])
    assert not together.computed[:, 0, :2].any()


def test_drivers_agree(method):
    model, params = small("dream")
    prompt = prompts(2, 5)
    args = decode_lib._prepare(params, model, prompt, None, KEY, DECODE, method)
    one = decode_lib._generate(*args, record=("computed",), driver="while")
    if len(method.variants(DECODE.geometry(prompt=5, shift=1))) == 1:
        other = decode_lib._generate(*args, record=("computed",), driver="scan")
        chex.assert_trees_all_equal(one, other)
    frames = list(diffusion_stream(params, model, prompt, key=KEY, decode=DECODE, cache=method))
    assert len(frames) == one.nfe
    np.testing.assert_array_equal(frames[-1].tokens, one.tokens)
    np.testing.assert_array_equal(frames[-1].committed_at, one.committed_at)


def test_a_second_call_compiles_nothing(method, caplog):
    generate("dream", prompts(1, 5), cache=method)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        generate("dream", prompts(1, 5, seed=1), cache=method)
    assert not [text for text in caplog.messages if "_generate" in text]


def test_progress(method):
    """Every forward of an unfinished row computes something that it may fill."""
    out = generate("dream", prompts(1, 5), cache=method)
    assert (out.tokens != 39).all()
    for computed, canvas in zip(out.computed[1:], out.history[:-1], strict=True):
        masked = np.flatnonzero(canvas[0] == 39)
        assert computed[0][masked[0] - 1]  # Dream reads a mask's prediction one slot to the left


def test_a_cached_step_writes_only_what_it_computes():
    model, params = small("dream")
    prompt = prompts(2, 5)
    args = decode_lib._prepare(params, model, prompt, None, KEY, DECODE, EveryOther())
    setup, tokens_BL = decode_lib._setup(*args)
    state = decode_lib.begin(setup, tokens_BL)
    variants = EveryOther().variants(setup.geo)
    for expected in (1, 0, 1, 0):
        before = state
        assert int(state.variant) == expected
        state = decode_lib._jit_step(setup, state, variants[expected])
        kept_BL = ~np.asarray(before.selected_BL)
        assert kept_BL.any() == (expected == 0)
        pairs = list(zip(jax.tree.leaves(before.cache), jax.tree.leaves(state.cache), strict=True))
        for old, new in pairs:
            np.testing.assert_array_equal(np.asarray(old)[kept_BL], np.asarray(new)[kept_BL])
        if expected == 1:  # a refresh sees the tokens committed since the last one
            assert all((np.asarray(old) != np.asarray(new)).any() for old, new in pairs)


def test_the_smallest_step_shape_that_holds_every_row_is_taken():
    geo = DECODE.geometry(prompt=5, shift=0)
    for counts, variant in (([3, 8], 0), ([9, 1], 1), ([13, 13], 1), ([0, 0], 0)):
        chosen = EveryOther().variant_id(jnp.int32(0), jnp.asarray(counts), geo)
        assert int(chosen) == variant


def test_methods_by_name():
    assert cache_lib.make("none") == cache_lib.NoCache()
    for name, words in (("fast", "must be one of none"), ("None", "must be one of none")):
        with pytest.raises(ValueError, match=words):
            cache_lib.make(name)
    with pytest.raises(ValueError, match="no argument 'kp'; it takes no arguments"):
        cache_lib.make("none", kp=3)
