"""Hooks of strategies and cache methods that no shipped one uses yet, by toys."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import prompts, small

from dlm_jax.cache.base import CacheMethod
from dlm_jax.cache.none import NoCache
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.decoding.settings import Number, number, settings
from dlm_jax.decoding.strategies import Surest

SIZES = dict(gen_length=12, block_length=6, alg="maskgit_plus")
KEYS = jax.random.split(jax.random.key(0), 2)
PROMPT = prompts(2, 6)
MASK = np.array([[False, True, True, True, True, True], [True] * 6])


def run(decode, method=NoCache(), prompt=PROMPT, mask=MASK, **arguments):  # noqa: B008 (immutable)
    model, params = small("llada")
    arguments |= dict(key=KEYS, decode=decode, cache=method)
    out = diffusion_generate(params, model, prompt, mask, **arguments)
    return jax.device_get(out)


@settings
class Favour(Surest):
    """Prefers a token more and more, from step to step."""

    token: int = 3
    bonus: Number = number(1.0)

    name: ClassVar[str] = "favour"
    whole: ClassVar[bool] = True

    def init(self, config, geo):
        return jnp.zeros((), jnp.float32)

    def adjust(self, memory, logits_WV, slot_W, row, geo):
        memory = memory + self.bonus
        return memory, logits_WV.at[:, self.token].add(memory)


def test_a_strategy_changes_logits_and_remembers():
    decode = DecodeConfig(**SIZES, strategy=Favour(bonus=0.5))

    def hook(tokens, logits, step):
        return logits.at[..., 3].add(0.5 * (step + 1).astype(jnp.float32))

    ours = run(decode)
    theirs = run(DecodeConfig(**SIZES), logits_processor=hook)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=1e-6)
    assert (ours.tokens[:, 6:] != run(DecodeConfig(**SIZES)).tokens[:, 6:]).any()


def test_what_it_remembers_is_not_that_of_a_row_that_is_done():
    """One row has more masks than the other, and needs more steps."""
    decode = DecodeConfig(**SIZES, strategy=Favour(bonus=0.25), infill=True)
    prompt = np.where(np.arange(6)[None] < [[0], [4]], 39, PROMPT).astype(np.int32)
    out = run(decode, prompt=prompt, mask=None, record=("state",))
    assert out.steps.tolist() == [12, 16]
    np.testing.assert_allclose(out.state.strategy_memory, out.steps * np.float32(0.25))


@dataclasses.dataclass(frozen=True)
class Nearsighted(NoCache):
    """Neither computes nor attends to anything behind the row's block."""

    name: ClassVar[str] = "nearsighted"

    def restrict(self, memory, row, geo):
        near_L = jnp.arange(geo.length) < geo.prompt + (row.block + 1) * geo.block
        return row._replace(attended_L=row.attended_L & near_L)

    def select(self, memory, row, geo):
        return row.attended_L


@dataclasses.dataclass(frozen=True)
class Shortsighted(Nearsighted):
    """The same, with keys and values of everything in a cache."""

    name: ClassVar[str] = "shortsighted"
    keeps: ClassVar[bool] = True
    init_cache = CacheMethod.init_cache
    layers = CacheMethod.layers

    def select(self, memory, row, geo):
        return row.valid_L


@pytest.mark.parametrize("method", [Nearsighted(), Shortsighted()], ids=lambda method: method.name)
def test_a_cache_method_narrows_what_is_attended_to(method):
    """What is not attended to is as if it were not there."""
    long, short = (DecodeConfig(**SIZES | dict(gen_length=length)) for length in (12, 6))
    narrow, alone = run(long, method), run(short)
    np.testing.assert_array_equal(narrow.tokens[:, :12], alone.tokens)
    np.testing.assert_array_equal(narrow.committed_at[:, :12], alone.committed_at)
    np.testing.assert_allclose(narrow.confidence[:, :12], alone.confidence, rtol=1e-4)
    assert (run(long).confidence[:, 6:12] != narrow.confidence[:, 6:12]).any()


@dataclasses.dataclass(frozen=True)
class Greedy(NoCache):
    """Wants to change what is none of its business."""

    name: ClassVar[str] = "greedy"

    def restrict(self, memory, row, geo):
        everything_L = jnp.ones_like(row.eligible_L)
        return row._replace(
            tokens_L=row.tokens_L * 0, eligible_L=everything_L, attended_L=everything_L
        )


def test_a_restriction_only_restricts():
    ours, plain = run(DecodeConfig(**SIZES), Greedy()), run(DecodeConfig(**SIZES))
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_array_equal(ours.committed_at, plain.committed_at)


@settings
class Reckless(Surest):
    """Chooses and revokes what it may not."""

    name: ClassVar[str] = "reckless"
    schedules: ClassVar[tuple[str, ...]] = ("fixed",)
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    revokes: ClassVar[bool] = True

    def choose(self, memory, row, proposal, geo):
        return memory, jnp.ones_like(proposal.candidate_L)

    def revoke(self, row, proposal, chosen_L, geo):
        return ~row.committed_L


def test_a_choice_is_among_candidates():
    out = run(DecodeConfig(**SIZES, strategy=Reckless()))
    np.testing.assert_array_equal(out.tokens[:, :6], PROMPT)
    assert (out.committed_at[:, 6:] == np.arange(12) // 6).all() and out.nfe == 2
