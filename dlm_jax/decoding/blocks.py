"""Which masks a step may fill: the one place that knows of blocks, infilling and windows.

`Blocks` are asked about one row; they are static, and where a row stands is the index of its block.
What they hand out is a set of masks: it reaches strategies and cache methods as `Row.eligible_L`.
"""

import dataclasses

import jax.numpy as jnp

from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A grid of blocks that are filled from left to right; one block if there is only one.

    Masks inside the prompt, where they are to be filled (infilling), belong to the first block.
    """

    geo: Geometry

    def masked(self, tokens_L: Int[Array, " L"], valid_L: Bool[Array, " L"], mask_id: int) -> Array:
        """Masks that are to be filled, in any block."""
        first = self.geo.length - self.geo.fillable
        return (tokens_L == mask_id) & valid_L & (jnp.arange(self.geo.length) >= first)

    def eligible(self, masked_L: Bool[Array, " L"], block: Int[Array, ""]) -> Bool[Array, " L"]:
        """Of these masks, the ones that a step in the given block may fill; none beyond the last.

        Masks that were left behind in earlier blocks are among them.
        """
        geo = self.geo
        inside_L = jnp.arange(geo.length) < geo.prompt + (block + 1) * geo.block
        return masked_L & inside_L & (block < geo.num_blocks)

    def count(self, masked_L: Bool[Array, " L"]) -> Int[Array, " blocks"]:
        """Masks in each block."""
        geo = self.geo
        counts_L = masked_L.astype(jnp.int32)
        counts = counts_L[geo.prompt :].reshape(geo.num_blocks, geo.block).sum(axis=-1)
        if not geo.infill:  # then there are none in the prompt
            return counts
        return counts.at[0].add(counts_L[: geo.prompt].sum())

    def count_in(self, masked_L: Bool[Array, " L"], block: Int[Array, ""]) -> Int[Array, ""]:
        """Masks in one block; 0 beyond the last."""
        return jnp.pad(self.count(masked_L), (0, 1))[block]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The most masks that each block can hold."""
        geo = self.geo
        first = geo.block + (geo.prompt if geo.infill else 0)
        return (first, *(geo.block,) * (geo.num_blocks - 1))

    @property
    def narrow(self) -> bool:
        """Whether a step may fill fewer masks than its block holds and the schedule wants."""
        return False


@dataclasses.dataclass(frozen=True)
class Window(Blocks):
    """In place of blocks, the leftmost masks: the window slides as they are filled.

    Attributes:
      size: how many masks are in it.
    """

    size: int

    def __post_init__(self) -> None:
        if self.geo.num_blocks != 1:
            raise ValueError(
                f"A window slides over one block, and here are {self.geo.num_blocks}; leave "
                "block_length out."
            )

    def eligible(self, masked_L: Bool[Array, " L"], block: Int[Array, ""]) -> Bool[Array, " L"]:
        open_L = super().eligible(masked_L, block)
        return open_L & (jnp.cumsum(open_L) <= self.size)

    @property
    def narrow(self) -> bool:
        return self.size < self.geo.most_per_step
