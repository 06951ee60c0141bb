"""How many tokens a step commits, against hand-made tables and what the originals commit."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax.decoding import schedule
from dlm_jax.decoding.config import DecodeConfig


def make(name: str, masks: int, **arguments) -> tuple[schedule.Schedule, int | None]:
    """The schedule of a single block of `masks` masks, and its number of steps."""
    rule = dict(threshold=0.5) if name == "capped" else {}
    config = DecodeConfig(gen_length=masks, schedule=name, **rule | arguments)
    geo = config.geometry(prompt=1, shift=0)
    return config.make_schedule(geo), geo.steps


def bounds(chosen: schedule.Schedule, start: int, masks: int, step: int) -> tuple[int, int]:
    least_B, most_B = chosen.bounds(
        *(jnp.asarray([value], jnp.int32) for value in (start, masks, step))
    )
    return int(least_B[0]), int(most_B[0])


def committed(name: str, masks: int, wish=lambda step: 0, **arguments) -> list[int]:
    """Tokens per step when a block of `masks` masks is filled.

    Args:
      wish: how many a rule would commit in each step; without it the least are committed.
    """
    chosen, steps = make(name, masks, **arguments)
    left, counts = masks, []
    while left and len(counts) < max(steps or 0, chosen.forwards(masks)):
        least, most = bounds(chosen, masks, left, len(counts))
        assert 0 <= least <= most
        counts.append(min(max(wish(len(counts)), least), most, left))
        left -= counts[-1]
    assert left == 0
    return counts


def test_even_puts_the_remainder_first():
    assert committed("even", 8, steps=3) == [3, 3, 2]
    assert committed("even", 4, steps=4) == [1, 1, 1, 1]
    assert committed("even", 3, steps=5) == [1, 1, 1]


@pytest.mark.parametrize(
    ("masks", "steps", "eps", "expected"),
    [
        (32, 32, 1e-3, [0] + [1] * 30 + [2]),
        (32, 16, 1e-3, [1] + [2] * 14 + [3]),
        (24, 40, 1e-3, [0] * 17 + [1] * 22 + [2]),
        (40, 20, 0.1, [1] * 5 + [2] * 14 + [7]),
        (9, 1, 1e-3, [9]),
    ],
)
def test_timestep_truncates_like_dream(masks, steps, eps, expected):
    assert committed("timestep", masks, steps=steps, eps=eps) == expected


def test_fixed_counts_tokens():
    assert committed("fixed", 7, num_transfer_tokens=3) == [3, 3, 1]


def test_a_rule_may_commit_everything_with_fixed_and_nothing_extra_otherwise():
    for name, arguments, expected in (
        ("fixed", dict(num_transfer_tokens=3), (3, 7)),
        ("fixed", dict(num_transfer_tokens=9), (7, 7)),
        ("even", dict(steps=2), (4, 4)),
        ("timestep", dict(steps=2), (3, 3)),
        ("capped", dict(steps=2), (1, 4)),
    ):
        assert bounds(make(name, 7, **arguments)[0], 7, 7, 0) == expected


def test_after_the_last_step_whatever_is_left_is_filled():
    assert bounds(make("even", 8, steps=2)[0], 8, 5, 2) == (5, 5)
    assert bounds(make("timestep", 8, steps=2)[0], 8, 5, 4) == (5, 5)
    assert bounds(make("capped", 8, steps=2)[0], 8, 5, 3) == (1, 5)
    for name in sorted(schedule.SCHEDULES):
        assert bounds(make(name, 8)[0], 8, 0, 8) == (0, 0)


def test_capped_lets_a_rule_catch_up_but_not_run_ahead():
    everything, nothing = (lambda step: 8), (lambda step: 0)
    assert committed("capped", 8, everything, steps=3) == [3, 3, 2]
    assert committed("capped", 8, nothing, steps=3) == [1] * 8
    assert committed("capped", 8, [0, 8, 0, 0, 8].__getitem__, steps=3) == [1, 5, 1, 1]
    assert committed("capped", 3, everything, steps=5) == [1, 1, 1]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    masks=st.integers(1, 20),
    steps=st.integers(1, 25),
    wishes=st.lists(st.integers(0, 20), min_size=20, max_size=20),
)
def test_capped_is_never_ahead_of_even(masks, steps, wishes):
    counts = committed("capped", masks, wishes.__getitem__, steps=steps)
    even = committed("even", masks, steps=steps)
    for step in range(len(counts)):
        done, due = sum(counts[: step + 1]), sum(even[: step + 1])
        assert done <= max(due, sum(counts[:step]) + 1)
        # Nothing but the rule holds it back.
        assert done == due or counts[step] <= max(wishes[step], 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps=st.integers(1, 512), eps=st.floats(1e-4, 0.5))
def test_time_shares_are_those_of_evenly_falling_times(steps, eps):
    shares = schedule.time_shares(steps, eps)
    times = np.linspace(1, eps, steps + 1)
    assert shares.dtype == np.float32 and shares[-1] == 1
    np.testing.assert_allclose(shares[:-1], (1 - times[1:] / times[:-1])[:-1], atol=1e-6)


def test_the_share_of_a_step_is_that_of_its_times():
    chosen, _ = make("timestep", 8, steps=4, eps=0.2)
    masks_B = jnp.full(6, 8, jnp.int32)
    share_B = chosen.share(masks_B, masks_B, jnp.arange(6, dtype=jnp.int32))
    np.testing.assert_allclose(share_B, [0.2, 0.25, 1 / 3, 1, 1, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("even", dict(steps=3), [3 / 8, 3 / 5, 1, 0]),
        ("fixed", dict(num_transfer_tokens=3), [3 / 8, 3 / 5, 1, 0]),
        ("capped", dict(steps=3), [1 / 8, 1 / 5, 1 / 2, 0]),
        ("timestep", dict(steps=4, eps=0.2), [0.2, 0.25, 1 / 3, 1]),
    ],
)
def test_the_share_of_a_step_is_what_it_commits_of_what_is_left(name, arguments, expected):
    """The least, where that is counted: of 8, 5, 2 and no masks."""
    chosen, _ = make(name, 8, **arguments)
    share_B = chosen.share(
        jnp.full(4, 8, jnp.int32), jnp.asarray([8, 5, 2, 0]), jnp.arange(4, dtype=jnp.int32)
    )
    np.testing.assert_allclose(share_B, expected, rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(masks=st.integers(1, 40), steps=st.integers(1, 50), data=st.data())
def test_every_schedule_fills_the_block_in_the_forwards_it_promises(masks, steps, data):
    name = data.draw(st.sampled_from(sorted(schedule.SCHEDULES)))
    arguments = dict(num_transfer_tokens=min(steps, 7)) if name == "fixed" else dict(steps=steps)
    counts = committed(name, masks, **arguments)
    chosen, _ = make(name, masks, **arguments)
    assert len(counts) <= chosen.forwards(masks)
    # Cache methods make room for so many.
    if name == "capped":
        assert chosen.most(masks) == max(committed(name, masks, lambda step: 40, **arguments))
    else:
        assert chosen.most(masks) == max(counts)
