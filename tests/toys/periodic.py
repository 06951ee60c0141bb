"""A cache method in one file: everything every so often, else the masks that may be filled."""

import dataclasses
from typing import ClassVar

from dlm_jax.cache.base import CacheMethod, buckets
from dlm_jax.decoding.settings import check_whole
from dlm_jax.models.base import sources


@dataclasses.dataclass(frozen=True)
class Periodic(CacheMethod):
    """Computes everything in every `every`-th step of a block."""

    every: int = 4

    name: ClassVar[str] = "periodic"

    def __post_init__(self):
        super().__post_init__()
        check_whole("every", self.every, 1)

    def step_shapes(self, geo):
        return buckets([geo.block + geo.shift], geo)

    def select(self, memory, row, geo):
        needed_L = sources(row.eligible_L, row.valid_L, geo.shift)
        return needed_L | (row.block_step % self.every == 0)
