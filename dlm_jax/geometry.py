"""The static shape of one generation; every buffer and loop length derives from it."""

import dataclasses

import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Prompt, blocks and denoising steps of one generation, in slots and model forwards.

    Attributes:
      prompt: P, prompt slots (with padding).
      gen: G, generated slots; 0 where only masks in the prompt are filled.
      block: generated slots per block; divides `gen`.
      steps: denoising steps over the whole generation, a multiple of `num_blocks`; None where the
        schedule counts tokens instead.
      shift: the prediction for position p is read at p - shift.
      infill: whether masks inside the prompt are filled as well; they belong to the first block.
      most_per_step: the most tokens that the schedule commits in one step, as long as no step falls
        short.
      step_shapes: the most step shapes that are compiled for sets of different sizes.
    """

    prompt: int
    gen: int
    block: int
    steps: int | None
    shift: int
    infill: bool = False
    most_per_step: int = 1
    step_shapes: int = 6

    def __post_init__(self) -> None:
        if self.prompt < 1:
            raise ValueError(f"The prompt has {self.prompt} slots; at least one token is needed.")
        if self.gen < 0:
            raise ValueError(f"gen_length is {self.gen}; it must be at least 1.")
        fits = self.block >= 1 and self.gen % self.block == 0 if self.gen else self.block == 0
        if not fits:
            raise ValueError(
                f"block_length is {self.block}; it must divide gen_length, {self.gen}, into equal "
                "blocks."
            )
        if self.steps is not None and (self.steps < 1 or self.steps % self.num_blocks):
            raise ValueError(
                f"steps is {self.steps}; it must be a positive multiple of the number of blocks, "
                f"{self.num_blocks} (gen_length {self.gen} / block_length {self.block})."
            )

    @property
    def length(self) -> int:
        """L, all slots."""
        return self.prompt + self.gen

    @property
    def fillable(self) -> int:
        """How many slots, counted from the last, may hold a mask that is to be filled."""
        return self.length if self.infill else self.gen

    @property
    def num_blocks(self) -> int:
        return self.gen // self.block if self.gen else 1

    def in_block(self, block: Int[Array, ""]) -> Bool[Array, " L"]:
        """The generated slots of a block."""
        start, slot_L = self.prompt + block * self.block, jnp.arange(self.length)
        return (slot_L >= start) & (slot_L < start + self.block)

    @property
    def steps_per_block(self) -> int:
        """Denoising steps in which a block is to be filled."""
        if self.steps is None:
            raise ValueError("This generation has no number of steps: its schedule counts tokens.")
        return self.steps // self.num_blocks
