"""How many forwards a generation takes: whether that is known beforehand, and at most how many.

Everybody involved gives a small answer, and here they are put together:

- the strategy: at most how many forwards fill a block (`Strategy.forwards`), whether every step
  commits exactly what the schedule says (`exact`), whether blocks last until they are full
  (`adaptive`);
- the schedule: how many forwards it needs for so many masks, and its number of steps, if it counts
  these;
- the blocks: how many masks each can hold (`Blocks.sizes`);
- the cache method: whether it may keep a step from filling as much as the schedule wants, though at
  least one position (`CacheMethod.partial`);
- the mask token, where it is not banned: a model may choose it for ever.
"""

from dlm_jax.cache.base import CacheMethod
from dlm_jax.decoding.blocks import Blocks
from dlm_jax.decoding.config import DecodeConfig


def is_known(decode: DecodeConfig, method: CacheMethod, blocks: Blocks) -> bool:
    """Whether a generation takes `most_forwards` whatever the data are."""
    if decode.max_forwards is not None or decode.stop_until_eos:
        return False
    if method.partial or blocks.narrow or decode.strategy.adaptive:
        return False
    if blocks.geo.steps is not None and not decode.leave_early:
        return True  # all steps are made, whether there is something to fill or not
    return decode.strategy.exact and decode.ban_mask and not decode.infill


def most_forwards(decode: DecodeConfig, method: CacheMethod, blocks: Blocks) -> int:
    """T, an upper bound; `max_forwards` apart, which is data."""
    short = method.partial or blocks.narrow
    late = blocks.geo.length if short else 0  # then every position may take a forward of its own
    if blocks.geo.steps is not None and ends_with_steps(decode):
        return blocks.geo.steps + late
    schedule = decode.make_schedule(blocks.geo)
    full = sum(decode.strategy.forwards(schedule, masks) for masks in blocks.sizes)
    # Beyond that a model that keeps choosing the mask token would never end.
    return full + (late if decode.ban_mask else blocks.geo.length)


def ends_with_steps(decode: DecodeConfig) -> bool:
    """Whether a block is left after its denoising steps, full or not, if these are counted."""
    return not decode.strategy.adaptive and not (decode.leave_early and decode.ban_mask)
