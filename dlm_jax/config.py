"""`DecodeConfig`: everything a user chooses about decoding, validated when it is made."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer

from dlm_jax import models
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config
from dlm_jax.sampler import ALGORITHMS
from dlm_jax.schedule import SCHEDULES, Schedule
from dlm_jax.typing import Array, Float, Int


class Numbers(NamedTuple):
    """The values of a `DecodeConfig` that shape nothing, hence traced; None switches one off.

    Switching on or off changes the compiled program, another value does not.
    """

    temperature: Float[Array, ""] | None
    top_p: Float[Array, ""] | None
    top_k: Int[Array, ""] | None
    max_forwards: Int[Array, ""] | None

    def sampling(self) -> dict[str, Any]:
        """What `sampler.sample` wants of them."""
        return dict(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a canvas of masks becomes text. Hashable, hence static under jit.

    The defaults are LLaDA's schedule and confidence on one block; `for_model` takes what the
    original of the model at hand does.

    Attributes:
      gen_length: G, tokens to generate.
      block_length: generated tokens per semi-autoregressive block, filled from left to right; None
        makes one block of everything.
      steps: denoising steps (model forwards) over the whole generation, split evenly over the
        blocks; None means one token per step. Unused by the schedule `fixed`.
      schedule: how many tokens each step commits, a key of `schedule.SCHEDULES`.
      num_transfer_tokens: tokens per step of the schedule `fixed`.
      eps: last time of the schedule `timestep`.
      alg: what a confidence is, a key of `sampler.ALGORITHMS`.
      temperature: 0 takes the most probable token, above 0 samples.
      top_p: nucleus filter in (0, 1]; None switches it off.
      top_k: keeps the k most probable tokens; None switches it off.
      infill: whether masks inside the prompt are to be filled as well; they belong to the first
        block. Costs logits at every position. Without it prompts never change.
      ban_mask: never commit the mask token. Confidences stay normalised over the whole vocabulary.
        The originals do not ban it: a step may then be spent on a position that stays masked.
      leave_early: leave a block as soon as it holds no mask. The original LLaDA and Dream loops do
        not: steps beyond the number of tokens cost a forward and commit nothing.
      max_forwards: stop after this many model forwards, with what is a mask then left a mask; None
        sets no limit. With `record=("state",)` the generation can be resumed.
      lockstep: rows of a batch leave a block together (True) or each by itself (False); None takes
        what suits the cache method. With the mask token banned, a row's tokens do not depend on it.

    Raises:
      ValueError: one sentence that names the argument, its value and what would be right.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    schedule: str = "even"
    num_transfer_tokens: int = 1
    eps: float = 1e-3
    alg: str = "low_confidence"
    temperature: Any = 0.0
    top_p: Any = None
    top_k: Any = None
    infill: bool = False
    ban_mask: bool = True
    leave_early: bool = True
    max_forwards: Any = None
    lockstep: bool | None = None

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("alg", self.alg, ALGORITHMS)
        if self.schedule == "fixed" and self.steps is not None:
            raise ValueError(
                f"steps is {self.steps}, but the schedule 'fixed' counts tokens; leave steps out "
                "and set num_transfer_tokens."
            )
        if self.num_transfer_tokens < 1:
            raise ValueError(
                f"num_transfer_tokens is {self.num_transfer_tokens}; it must be at least 1."
            )
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps is {self.eps}; it must lie between 0 and 1.")
        # Traced numbers are taken as they are.
        if _concrete(self.temperature) and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or above.")
        if _concrete(self.top_p) and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if _concrete(self.top_k) and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1.")
        limit = self.max_forwards
        if _concrete(limit) and (limit != int(limit) or limit < 1):
            raise ValueError(f"max_forwards is {limit}; it must be a whole number from 1 on.")
        self.geometry(prompt=1, shift=0)

    @classmethod
    def for_model(cls, config: Config, **overrides: Any) -> "DecodeConfig":
        """The model family's defaults where an argument is not given or None.

        A default block length is lowered to a divisor of `gen_length`, to no less than half of it;
        if there is none, everything is one block.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        chosen = models.FAMILIES[config.family].DECODE | given
        gen_length = chosen.get("gen_length", cls.gen_length)
        if "block_length" not in given and chosen["block_length"] is not None and gen_length > 0:
            usual = chosen["block_length"]
            fitting = (n for n in range(usual, usual // 2 - 1, -1) if n and gen_length % n == 0)
            chosen["block_length"] = next(fitting, None)
        return cls(**chosen)

    def geometry(self, *, prompt: int, shift: int) -> Geometry:
        """The static shape of a generation after a prompt of `prompt` slots."""
        steps = self.steps
        if steps is None and self.schedule != "fixed":
            steps = self.gen_length
        geo = Geometry(
            prompt=prompt,
            gen=self.gen_length,
            block=self.gen_length if self.block_length is None else self.block_length,
            steps=steps,
            shift=shift,
        )
        first_block = geo.block + (prompt if self.infill else 0)
        return dataclasses.replace(geo, quota=self.make_schedule(geo).most(first_block))

    def make_schedule(self, geo: Geometry) -> Schedule:
        """How many tokens each step of such a generation commits."""
        return SCHEDULES[self.schedule](
            geo, eps=self.eps, num_transfer_tokens=self.num_transfer_tokens
        )

    def split(self) -> tuple["DecodeConfig", Numbers]:
        """The part that shapes the compiled program, and the numbers that do not."""
        sampled = not _concrete(self.temperature) or self.temperature > 0
        nucleus = self.top_p is not None and not (_concrete(self.top_p) and self.top_p >= 1)
        numbers = Numbers(
            temperature=jnp.asarray(self.temperature, jnp.float32) if sampled else None,
            top_p=jnp.asarray(self.top_p, jnp.float32) if nucleus else None,
            top_k=None if self.top_k is None else jnp.asarray(self.top_k, jnp.int32),
            max_forwards=(
                None if self.max_forwards is None else jnp.asarray(self.max_forwards, jnp.int32)
            ),
        )
        off = dict(temperature=0.0, top_p=None, top_k=None, max_forwards=None)
        return dataclasses.replace(self, **off), numbers


def _concrete(value: Any) -> bool:
    return value is not None and not isinstance(value, Tracer)


def _one_of(name: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(table)}.")
