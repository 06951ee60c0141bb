"""Block-wise caches of Fast-dLLM (arXiv 2505.22618, section 3.2): prefix and dual cache.

The first denoising step of a block computes the whole sequence. The other steps compute the block,
and with the prefix cache also what follows it, against the K/V of that first step.
"""

import bisect
import dataclasses
import itertools
from typing import ClassVar

import jax.numpy as jnp

from dlm_jax.cache.base import CacheMethod, StepShape, buckets
from dlm_jax.cache.runs import Plan, Repeat, Run
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import Row
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Config, sources
from dlm_jax.typing import Array, Bool, PyTree

BLOCK_STARTS = ("shifted", "first-column")


@dataclasses.dataclass(frozen=True)
class Prefix(CacheMethod):
    """Keeps what stands before the block; the block and all masks behind it are computed.

    Attributes:
      block_start: for models that predict a token from the position before it (Dream). `shifted`
        computes the predecessors of what the block needs, as the d2Cache framework does.
        `first-column` computes the block itself, as Fast-dLLM does: its first position, which
        cannot be predicted from inside, is committed alone in the full step.
    """

    block_start: str = "shifted"

    name: ClassVar[str] = "prefix"
    lockstep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_start not in BLOCK_STARTS:
            raise ValueError(
                f"block_start is {self.block_start!r}; it must be one of {', '.join(BLOCK_STARTS)}."
            )

    def check_settings(self, config: Config, decode: DecodeConfig) -> None:
        if self._first_column and not config.shift:
            raise ValueError(
                "block_start is 'first-column', which is for models that predict a token from the "
                f"position before it; {config.family} does not, so leave block_start out."
            )

    @property
    def partial(self) -> bool:
        return self._first_column

    @property
    def _first_column(self) -> bool:
        return self.block_start == "first-column"

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        return buckets((n * geo.block for n in range(1, geo.num_blocks + 1)), geo)

    def plan(self, geo: Geometry, forwards: int) -> Plan:
        shapes = self.step_shapes(geo)
        full = len(shapes) - 1
        needed = [self._size(block, geo) for block in range(geo.num_blocks)]
        chosen = [bisect.bisect_left([s.capacity for s in shapes], size) for size in needed]
        return tuple(
            Repeat((Run(full, 1), Run(shape, forwards - 1)), len(list(same)))
            for shape, same in itertools.groupby(chosen)
        )

    def _size(self, block: int, geo: Geometry) -> int:
        """Positions that a step of a block computes after its first."""
        return geo.gen - block * geo.block

    def restrict(self, memory: PyTree, row: Row, geo: Geometry) -> Row:
        if not self._first_column:
            return row
        first_L = jnp.arange(geo.length) == geo.prompt + row.block * geo.block
        # Where nothing is generated, there is no first column either.
        full = (row.block_step == 0) & jnp.any(row.eligible_L & first_L)
        return row._replace(
            eligible_L=row.eligible_L & (first_L | ~full), least=jnp.where(full, 1, row.least)
        )

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        del memory
        kept_L = self._window(row, geo)
        if not self._first_column:
            kept_L = sources(kept_L, row.valid_L, geo.shift)
        # Masks inside the prompt, if they are to be filled, count as part of the first block.
        needed_L = sources(row.eligible_L, row.valid_L, geo.shift)
        return kept_L | needed_L | (row.block_step == 0)

    def _window(self, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        """What is computed after the first step of the block."""
        return jnp.arange(geo.length) >= geo.prompt + row.block * geo.block


@dataclasses.dataclass(frozen=True)
class Dual(Prefix):
    """Keeps what stands before and behind the block; only the block is computed.

    `block_start` is as in `Prefix`.
    """

    name: ClassVar[str] = "dual"

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        return buckets([geo.block], geo)

    plan = Prefix.plan

    def _size(self, block: int, geo: Geometry) -> int:
        return geo.block

    def _window(self, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        return geo.in_block(row.block)
