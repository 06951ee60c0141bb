"""How many tokens a denoising step commits.

A schedule is a pure function of a row's progress in its block: `(masks at the block's start, masks
now, step within the block) -> quota`. What cannot depend on data is a numpy table made once.
Should a block still hold masks after its last step, because a cache did not let all of a quota be
read, they are filled as fast as can be.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Int


class Schedule(NamedTuple):
    """One row of `SCHEDULES`.

    Attributes:
      quota: see the module's docstring; vectorised over rows.
      forwards: forwards that fill a block of the given number of masks.
      most: the largest quota in doing so.
    """

    quota: Callable[[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]], Int[Array, " B"]]
    forwards: Callable[[int], int]
    most: Callable[[int], int]


def even(geo: Geometry, **_: object) -> Schedule:
    """LLaDA's: a block's masks split evenly over its steps, the remainder first."""
    steps = geo.steps_per_block

    def quota(start_B: Array, masks_B: Array, step_B: Array) -> Array:
        share_B = start_B // steps + (step_B < start_B % steps).astype(start_B.dtype)
        return jnp.where(step_B < steps, share_B, masks_B)

    return Schedule(quota, lambda masks: min(steps, masks), lambda masks: -(-masks // steps))


def timestep(geo: Geometry, *, eps: float, **_: object) -> Schedule:
    """Dream's: times fall evenly from 1 to `eps`; a step from t to s commits 1 - s/t of the masks.

    The product is truncated to an integer, so early steps may commit nothing; the last takes all.
    """
    shares = time_shares(geo.steps_per_block, eps)
    share = jnp.asarray(shares)

    def quota(start_B: Array, masks_B: Array, step_B: Array) -> Array:
        del start_B
        step_B = jnp.minimum(step_B, share.shape[0] - 1)
        return jnp.floor(masks_B.astype(jnp.float32) * share[step_B]).astype(jnp.int32)

    def most(masks: int) -> int:
        largest = 0
        for part in shares:
            taken = int(np.floor(np.float32(masks) * part))
            largest, masks = max(largest, taken), masks - taken
        return largest

    return Schedule(quota, lambda masks: geo.steps_per_block, most)


def fixed(geo: Geometry, *, num_transfer_tokens: int, **_: object) -> Schedule:
    """A constant number of tokens per step, until the block is full."""
    del geo

    def quota(start_B: Array, masks_B: Array, step_B: Array) -> Array:
        del start_B, step_B
        return jnp.minimum(num_transfer_tokens, masks_B)

    return Schedule(
        quota,
        lambda masks: -(-masks // num_transfer_tokens),
        lambda masks: min(masks, num_transfer_tokens),
    )


SCHEDULES: dict[str, Callable[..., Schedule]] = {"even": even, "timestep": timestep, "fixed": fixed}
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
