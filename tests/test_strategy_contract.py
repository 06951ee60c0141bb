"""What every decoding strategy must keep, run over `STRATEGIES`.

A strategy that is added there is tested from then on; `EXAMPLES` holds arguments for those
that need other ones than 0.5 for every number without a default. All calls of a strategy share
their shapes, so that they share their compiled programs.
"""

import dataclasses

import jax
import numpy as np
import pytest
from strategy_table import KEYS, MASK, ROWS, padding, run
from tiny_models import prompts, small, small_config

from dlm_jax import cache
from dlm_jax.cache import CacheMethod
from dlm_jax.decoding import strategies, termination
from dlm_jax.decoding.blocks import Blocks
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_stream

WIDTH, PADS, SPARED = 9, (3, 6, 4), 3
"""Slots of a prompt, how many of them are padding, and how many a row alone has fewer of both; an
odd number, so that what goes by slots is noticed."""
GEN, BLOCK = 18, 6
PROMPT = prompts(ROWS, WIDTH, seed=17)
VALID = padding(*PADS, length=WIDTH)
EXAMPLES = {"klass": dict(threshold=0.5, kl_threshold=1.0)}
"""Arguments with which a strategy shows what it can do on the small model."""


def make(name: str) -> strategies.Strategy:
    missing = dataclasses.MISSING
    required = [
        field.name
        for field in dataclasses.fields(strategies.STRATEGIES[name])
        if field.default is missing and field.default_factory is missing
    ]
    return strategies.make(name, **EXAMPLES.get(name, dict.fromkeys(required, 0.5)))


def decoding(name: str, **changes) -> DecodeConfig:
    # Rows that wait for one another at the end of a block would commit later than alone.
    sizes = dict(gen_length=GEN, block_length=BLOCK, lockstep=False)
    return DecodeConfig(**sizes | changes, strategy=make(name))


def method_for(decode: DecodeConfig) -> CacheMethod:
    """A cache that keeps something, if the strategy may be combined with it."""
    method = cache.make("dual")
    try:
        method.check(small_config(), decode)
    except ValueError:
        method = cache.make("none")
        method.check(small_config(), decode)
    return method


def generate(decode: DecodeConfig, prompt=PROMPT, valid=VALID, **arguments):
    return run("llada", prompt, valid, decode=decode, cache=method_for(decode), **arguments)


@pytest.fixture(params=strategies.STRATEGIES)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("surest", "threshold", "klass", "wino")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in strategies.STRATEGIES
    ],
)
def test_every_row_is_what_it_is_alone(name):
    """With less padding, the first one with none."""
    decode = decoding(name)
    together = generate(decode)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = generate(decode, PROMPT[one, SPARED:], VALID[one, SPARED:], key=KEYS[one])
        n = int(alone.nfe)
        assert together.steps[row] == alone.steps[0] == n
        for field in ("tokens", "committed_at"):
            np.testing.assert_array_equal(
                getattr(together, field)[row, SPARED:], getattr(alone, field)[0], err_msg=field
            )
        np.testing.assert_array_equal(together.history[:n, row, SPARED:], alone.history[:, 0])
        assert (together.history[n:, row] == together.tokens[row]).all(), "a row that is done stays"
        np.testing.assert_allclose(
            together.confidence[row, SPARED:], alone.confidence[0], rtol=1e-4, atol=1e-6
        )


def test_everything_is_filled_and_nothing_else_is_changed(name):
    decode = decoding(name)
    strategy, method = decode.strategy, method_for(decode)
    out = generate(decode)
    assert (out.tokens[:, WIDTH:] != MASK).all()
    np.testing.assert_array_equal(out.tokens, out.history[-1])
    assert (out.history[:, :, :WIDTH] == PROMPT).all()
    assert (out.committed_at[:, :WIDTH] == -1).all() and (out.committed_at[:, WIDTH:] >= 0).all()
    blocks = method.blocks(Blocks(decode.geometry(prompt=WIDTH, shift=0)))
    assert out.nfe <= termination.most_forwards(decode, method, blocks)
    begun = np.pad(PROMPT, ((0, 0), (0, GEN)), constant_values=MASK)
    before, after = np.concatenate([begun[None], out.history[:-1]]), out.history
    if not strategy.revokes:
        assert (after == before)[before != MASK].all()
    if strategy.adaptive:  # any other one leaves it to the schedule, or to chance
        gained_TB = (before == MASK).sum(-1) - (after == MASK).sum(-1)
        for row, steps in enumerate(out.steps):
            assert (gained_TB[:steps, row] > 0).all()


@pytest.mark.slow
def test_frames_are_those_of_the_generation(name):
    decode, (model, params) = decoding(name), small("llada")
    whole = generate(decode)
    given = dict(key=KEYS, decode=decode, cache=method_for(decode))
    frames = [*map(jax.device_get, diffusion_stream(params, model, PROMPT, VALID, **given))]
    np.testing.assert_array_equal([frame.tokens for frame in frames], whole.history)
    np.testing.assert_array_equal(frames[-1].committed_at, whole.committed_at)
    np.testing.assert_array_equal(frames[-1].steps, whole.steps)


@pytest.mark.slow
def test_an_interrupted_generation_can_be_resumed(name):
    whole = generate(decoding(name))
    record = ("state", "history")
    part = generate(decoding(name, max_forwards=2), record=record)
    assert part.nfe == 2 < whole.nfe and (part.tokens == MASK).any()
    np.testing.assert_array_equal(part.history, whole.history[:2])
    rest = generate(decoding(name), record=record, state=part.state)
    for field in ("tokens", "committed_at", "nfe", "steps", "history"):
        np.testing.assert_array_equal(getattr(rest, field), getattr(whole, field), err_msg=field)
    np.testing.assert_allclose(rest.confidence, whole.confidence, rtol=1e-5)
