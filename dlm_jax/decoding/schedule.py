"""How many tokens a denoising step commits.

A schedule is a pure function of a row's progress in its block: `(masks at the block's start, masks
now, step within the block) -> (least, most)`. Where a strategy looks at data, it decides between
the two; everywhere else the least is what is committed. What cannot depend on data is a numpy table
made once. Should a block still hold masks after its last step, because a cache did not let all of a
quota be read, they are filled as fast as can be.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Float, Int

Bounds = Callable[
    [Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]],
    tuple[Int[Array, " B"], Int[Array, " B"]],
]

Share = Callable[[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]], Float[Array, " B"]]


class Schedule(NamedTuple):
    """One row of `SCHEDULES`.

    Attributes:
      bounds: see the module's docstring; vectorised over rows.
      forwards: forwards that fill a block of the given number of masks.
      most: the largest quota in doing so.
      share: the share of the masks that are there which each of a row's steps is to commit, for
        the same arguments; the probability of every mask where they are committed independently.
    """

    bounds: Bounds
    forwards: Callable[[int], int]
    most: Callable[[int], int]
    share: Share


def even(geo: Geometry, **_: object) -> Schedule:
    """LLaDA's: a block's masks split evenly over its steps, the remainder first."""
    steps = geo.steps_per_block

    def bounds(start_B: Array, masks_B: Array, step_B: Array) -> tuple[Array, Array]:
        share_B = start_B // steps + (step_B < start_B % steps).astype(start_B.dtype)
        quota_B = jnp.where(step_B < steps, share_B, masks_B)
        return quota_B, quota_B

    return Schedule(
        bounds,
        lambda masks: min(steps, masks),
        lambda masks: -(-masks // steps),
        _counted(bounds),
    )


def capped(geo: Geometry, **_: object) -> Schedule:
    """Fast-dLLM's on Dream without a cache: at most as far as `even` would be; at least one token.

    What a rule holds back in one step may be committed in a later one. After the last step, what is
    left is tried again until nothing is.
    """
    steps = geo.steps_per_block

    def bounds(start_B: Array, masks_B: Array, step_B: Array) -> tuple[Array, Array]:
        done_B = jnp.minimum(step_B + 1, steps)
        due_B = done_B * (start_B // steps) + jnp.minimum(done_B, start_B % steps)
        least_B = jnp.minimum(1, masks_B)
        return least_B, jnp.maximum(due_B - (start_B - masks_B), least_B)

    return Schedule(bounds, lambda masks: masks, lambda masks: -(-masks // steps), _counted(bounds))


def timestep(geo: Geometry, *, eps: float, **_: object) -> Schedule:
    """Dream's: times fall evenly from 1 to `eps`; a step from t to s commits 1 - s/t of the masks.

    The product is truncated to an integer, so early steps may commit nothing; the last takes all.
    """
    shares = time_shares(geo.steps_per_block, eps)
    table = jnp.asarray(shares)

    def share(start_B: Array, masks_B: Array, step_B: Array) -> Array:
        del start_B, masks_B
        return table[jnp.minimum(step_B, table.shape[0] - 1)]

    def bounds(start_B: Array, masks_B: Array, step_B: Array) -> tuple[Array, Array]:
        share_B = share(start_B, masks_B, step_B)
        quota_B = jnp.floor(masks_B.astype(jnp.float32) * share_B).astype(jnp.int32)
        return quota_B, quota_B

    def most(masks: int) -> int:
        largest = 0
        for part in shares:
            taken = int(np.floor(np.float32(masks) * part))
            largest, masks = max(largest, taken), masks - taken
        return largest

    return Schedule(bounds, lambda masks: geo.steps_per_block, most, share)


def fixed(geo: Geometry, *, num_transfer_tokens: int, **_: object) -> Schedule:
    """A constant number of tokens per step, until the block is full; with a rule, the least."""
    del geo

    def bounds(start_B: Array, masks_B: Array, step_B: Array) -> tuple[Array, Array]:
        del start_B, step_B
        return jnp.minimum(num_transfer_tokens, masks_B), masks_B

    return Schedule(
        bounds,
        lambda masks: -(-masks // num_transfer_tokens),
        lambda masks: min(masks, num_transfer_tokens),
        _counted(bounds),
    )


def _counted(bounds: Bounds) -> Share:
    """The share that a number of tokens amounts to."""

    def share(start_B: Array, masks_B: Array, step_B: Array) -> Array:
        least_B, _ = bounds(start_B, masks_B, step_B)
        return least_B.astype(jnp.float32) / jnp.maximum(masks_B, 1).astype(jnp.float32)

    return share


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "even": even,
    "timestep": timestep,
    "fixed": fixed,
    "capped": capped,
}
"""Name -> `(geometry, **parameters) -> Schedule`; parameters are fields of `DecodeConfig`."""


def time_shares(steps: int, eps: float) -> np.ndarray:
    """Share of the remaining masks that each of Dream's steps commits, float32 `[steps]`.

    The times are rounded as the original rounds them, from both ends to the middle, because the
    truncation of the quota can hang on the last bit.
    """
    one, last = np.float32(1), np.float32(eps)
    delta = (last - one) / np.float32(steps)
    count = np.arange(steps + 1, dtype=np.float32)
    times = np.where(
        np.arange(steps + 1) < (steps + 1) // 2, one + delta * count, last - delta * (steps - count)
    ).astype(np.float32)
    shares = one - times[1:] / times[:-1]
    shares[-1] = one
    return shares
