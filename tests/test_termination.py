"""How many forwards a generation takes: every answer by itself, with numbers worked out by hand."""

import dataclasses
from typing import NamedTuple

import jax
import pytest
from tiny_models import prompts, small

from dlm_jax.cache import CacheMethod, NoCache, make
from dlm_jax.decoding import termination
from dlm_jax.decoding.blocks import Blocks, Window
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.start import start
from dlm_jax.decoding.strategies import STRATEGIES, Klass, Random, Threshold, Wino

PROMPT, GEN, BLOCK, LENGTH = 4, 12, 4, 16
"""Three blocks of four."""


class Answers(NamedTuple):
    known: bool
    most: int
    with_steps: bool


@dataclasses.dataclass(frozen=True)
class Slow(NoCache):
    """May keep a step from filling as much as the schedule wants."""

    @property
    def partial(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Sliding(NoCache):
    """Lets a step fill a few of the leftmost masks."""

    size: int = 2

    def blocks(self, blocks: Blocks) -> Blocks:
        return Window(blocks.geo, self.size)


def answers(method: CacheMethod = NoCache(), **arguments) -> Answers:  # noqa: B008
    decode = DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)
    blocks = method.blocks(Blocks(decode.geometry(prompt=PROMPT, shift=0)))
    return Answers(
        termination.is_known(decode, method, blocks),
        termination.most_forwards(decode, method, blocks),
        termination.ends_with_steps(decode),
    )


class TestSchedule:
    """Of a strategy that commits what it says: it alone decides."""

    @pytest.mark.parametrize(
        ("arguments", "most"),
        [
            ({}, 12),  # a token per step
            (dict(steps=6), 6),
            (dict(steps=9), 9),  # 3 steps for 4 masks
            (dict(steps=24), 12),  # 8 steps for 4 masks, left as soon as they are full
            (dict(steps=1, block_length=None), 1),
            (dict(schedule="timestep", steps=6), 6),
            (dict(schedule="timestep", steps=24), 24),  # some commit nothing, the last one all
            (dict(schedule="fixed"), 12),
            (dict(schedule="fixed", num_transfer_tokens=3), 6),  # 3 and 1
            (dict(schedule="fixed", num_transfer_tokens=9), 3),
            (dict(schedule="fixed", num_transfer_tokens=5, block_length=None), 3),
        ],
        ids=str,
    )
    def test_is_known_and_counts(self, arguments, most):
        assert answers(**arguments) == Answers(True, most, False)

    def test_all_steps_are_made_where_a_block_is_not_left_early(self):
        assert answers(leave_early=False) == Answers(True, 12, True)
        assert answers(leave_early=False, steps=24) == Answers(True, 24, True)
        assert answers(leave_early=False, schedule="timestep", steps=24) == Answers(True, 24, True)
        # A schedule that counts tokens has no others.
        fixed = dict(leave_early=False, schedule="fixed", num_transfer_tokens=3)
        assert answers(**fixed) == Answers(True, 6, True)


class TestStrategy:
    @pytest.mark.parametrize(
        "arguments",
        [
            dict(threshold=0.9),
            dict(threshold=0.9, num_transfer_tokens=4),  # the most is not the usual
            dict(threshold=0.9, schedule="capped", steps=6),
            dict(threshold=0.9, leave_early=False),
            dict(threshold=0.9, schedule="capped", steps=24, leave_early=False),
            dict(factor=1.0),
            dict(gamma=0.1),
            dict(strategy=Klass(Threshold(0.9))),
            dict(strategy=Wino()),
        ],
        ids=str,
    )
    def test_one_that_looks_at_data_takes_a_forward_per_mask_at_most(self, arguments):
        assert answers(**arguments) == Answers(False, 12, False)

    def test_one_that_fills_more_or_less_than_the_schedule_says_is_not_known(self):
        assert answers(alg="origin", steps=6) == Answers(False, 6, False)
        assert answers(alg="origin", steps=24) == Answers(False, 24, False)
        # Nor need it be, where all steps are made.
        assert answers(alg="origin", steps=24, leave_early=False) == Answers(True, 24, True)

    @pytest.mark.parametrize("redrawn", [False, True])
    def test_an_order_changes_nothing(self, redrawn):
        strategy = Random(redrawn=redrawn)
        assert answers(strategy=strategy) == Answers(True, 12, False)
        assert answers(strategy=strategy, steps=6) == Answers(True, 6, False)

    @pytest.mark.parametrize("kind", STRATEGIES.values(), ids=list(STRATEGIES))
    def test_data_never_decide_how_much_where_it_is_exact(self, kind):
        assert not (kind.exact and kind.adaptive)


class TestCanvas:
    def test_infilling_is_of_as_many_masks_as_there_are(self):
        """The first block holds 4 to 8 of them, and how many is not known."""
        fixed = dict(infill=True, schedule="fixed", num_transfer_tokens=3)
        assert answers(**fixed) == Answers(False, 3 + 2 + 2, False)
        assert answers(infill=True, steps=9) == Answers(False, 9, False)
        assert answers(infill=True, steps=24) == Answers(False, 8 + 4 + 4, False)
        assert answers(infill=True, threshold=0.9) == Answers(False, 16, False)
        assert answers(infill=True, gen_length=0, block_length=None) == Answers(False, 4, False)
        # All steps are made, whatever there is to fill.
        assert answers(infill=True, steps=24, leave_early=False) == Answers(True, 24, True)

    def test_a_window_that_is_smaller_than_a_step_wants_slows_the_pace(self):
        fixed = dict(block_length=None, schedule="fixed", num_transfer_tokens=3)
        assert answers(Sliding(size=3), **fixed) == Answers(True, 4, False)
        assert answers(Sliding(size=2), **fixed) == Answers(False, 4 + LENGTH, False)
        even = dict(block_length=None, steps=6)
        assert answers(Sliding(size=2), **even) == Answers(True, 6, False)
        assert answers(Sliding(size=1), **even) == Answers(False, 6 + LENGTH, False)
        late = dict(even, leave_early=False)
        assert answers(Sliding(size=1), **late) == Answers(False, 6 + LENGTH, True)


class TestCacheMethod:
    def test_one_that_may_fall_short_makes_every_position_late_at_worst(self):
        assert answers(Slow()) == Answers(False, 12 + LENGTH, False)
        assert answers(Slow(), steps=6) == Answers(False, 6 + LENGTH, False)
        assert answers(Slow(), steps=24, leave_early=False) == Answers(False, 24 + LENGTH, True)
        assert answers(Slow(), threshold=0.9) == Answers(False, 12 + LENGTH, False)

    @pytest.mark.parametrize(
        ("method", "partial"),
        [
            (make("none"), False),
            (make("dual"), False),
            (make("dual", block_start="first-column"), True),
            (make("prefix", block_start="first-column"), True),
            (make("d2cache"), True),
            (make("dllm"), False),
            (make("dkv-decode"), False),
        ],
        ids=str,
    )
    def test_which_of_the_methods_do(self, method, partial):
        assert method.partial == partial
        expected = Answers(False, 6 + LENGTH, False) if partial else Answers(True, 6, False)
        assert answers(method, steps=6) == expected


class TestMaskToken:
    """Where it is not banned, a model may choose it for ever."""

    def test_blocks_are_left_after_their_steps(self):
        assert answers(ban_mask=False) == Answers(False, 12, True)
        assert answers(ban_mask=False, steps=6) == Answers(False, 6, True)
        assert answers(ban_mask=False, steps=24) == Answers(False, 24, True)
        assert answers(ban_mask=False, steps=24, leave_early=False) == Answers(True, 24, True)

    def test_what_counts_no_steps_gives_up(self):
        fixed = dict(ban_mask=False, schedule="fixed", num_transfer_tokens=3)
        assert answers(**fixed) == Answers(False, 6 + LENGTH, True)
        assert answers(ban_mask=False, threshold=0.9) == Answers(False, 12 + LENGTH, False)
        capped = dict(ban_mask=False, threshold=0.9, schedule="capped", steps=6)
        assert answers(**capped) == Answers(False, 12 + LENGTH, False)
        # No later for a cache method that may fall short as well.
        assert answers(Slow(), **fixed).most == 6 + LENGTH


class TestEnds:
    def test_a_limit_is_data_and_bounds_nothing_beforehand(self):
        assert answers(max_forwards=3) == Answers(False, 12, False)
        assert answers(max_forwards=99, steps=24, leave_early=False) == Answers(False, 24, True)

    def test_an_end_of_the_text_that_is_looked_for_comes_at_any_time(self):
        assert answers(stop_until_eos=True) == Answers(False, 12, False)
        assert answers(stop_until_eos=True, steps=6) == Answers(False, 6, False)
        assert answers(stop_until_eos=True, threshold=0.9) == Answers(False, 12, False)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (NoCache(), dict(steps=6)),
        (NoCache(), dict(infill=True, threshold=0.9)),
        (Slow(), dict(steps=24, leave_early=False)),
        (Sliding(size=1), dict(block_length=None, steps=6)),
        (make("d2cache"), dict(alg="entropy")),
    ],
    ids=str,
)
def test_a_generation_says_the_same(method, arguments):
    """Its buffers are as long."""
    decode = DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)
    model, params = small("llada")
    setup, state = start(
        params, model, prompts(1, PROMPT), key=jax.random.key(0), decode=decode, cache=method
    )
    known, most, _ = answers(method, **arguments)
    assert (setup.fixed_length, setup.most_forwards) == (known, most)
    assert state.shape_T.shape == (most,)
