"""How many tokens a step commits, against hand-made tables and what the originals commit."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax import schedule
from dlm_jax.config import DecodeConfig


def committed(name: str, masks: int, **arguments) -> list[int]:
    """Tokens per step when a block of `masks` masks is filled."""
    config = DecodeConfig(gen_length=masks, schedule=name, **arguments)
    geo = config.geometry(prompt=1, shift=0)
    chosen = schedule.SCHEDULES[name](
        geo, eps=config.eps, num_transfer_tokens=config.num_transfer_tokens
    )
    left, counts = masks, []
    for step in range(geo.steps or chosen.forwards(masks)):
        quota = chosen.quota(*(jnp.asarray([value], jnp.int32) for value in (masks, left, step)))
        counts.append(min(int(quota[0]), left))
        left -= counts[-1]
    assert left == 0
    return counts


def test_even_puts_the_remainder_first():
    assert committed("even", 8, steps=3) == [3, 3, 2]
    assert committed("even", 4, steps=4) == [1, 1, 1, 1]
    assert committed("even", 3, steps=5) == [1, 1, 1, 0, 0]


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


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps=st.integers(1, 512), eps=st.floats(1e-4, 0.5))
def test_time_shares_are_those_of_evenly_falling_times(steps, eps):
    shares = schedule.time_shares(steps, eps)
    times = np.linspace(1, eps, steps + 1)
    assert shares.dtype == np.float32 and shares[-1] == 1
    np.testing.assert_allclose(shares[:-1], (1 - times[1:] / times[:-1])[:-1], atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(masks=st.integers(1, 40), steps=st.integers(1, 50), data=st.data())
def test_every_schedule_fills_the_block_in_the_forwards_it_promises(masks, steps, data):
    name = data.draw(st.sampled_from(sorted(schedule.SCHEDULES)))
    arguments = dict(num_transfer_tokens=min(steps, 7)) if name == "fixed" else dict(steps=steps)
    counts = committed(name, masks, **arguments)
    config = DecodeConfig(gen_length=masks, schedule=name, **arguments)
    chosen = schedule.SCHEDULES[name](
        config.geometry(prompt=1, shift=0), eps=1e-3, num_transfer_tokens=config.num_transfer_tokens
    )
    assert sum(counts[: chosen.forwards(masks)]) == masks
