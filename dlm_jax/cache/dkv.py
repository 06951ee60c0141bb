"""dKV-Cache (arXiv 2505.15781): a token's K/V are kept from one step after it was decoded.

A token's representation still changes in the step after it is decoded, the first one that sees it;
from then on it hardly does. `DKVDecode`, `DKVPrefill` and `DKVPD` compute everything that is not
such a token, or not the prompt; `DKVGreedy` computes only what the next tokens need.

Where a token is predicted from the position before it (Dream), a position is needed as long as its
successor is a mask. Hence the shift of the sets.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dlm_jax import ranking
from dlm_jax.cache.base import GRAIN, CacheMethod, StepShape, buckets, round_up
from dlm_jax.cache.runs import Plan, Repeat, Run
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import Observation, Row
from dlm_jax.decoding.settings import check_whole
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Config, sources
from dlm_jax.typing import Array, Bool, Int, PyTree

SHIFT_TYPES = ("un", "un_right")


def settled(row: Row, geo: Geometry, shift_type: str | None) -> Bool[Array, " L"]:
    """Positions whose K/V may be kept from the step after the next on.

    Without a shift, what is decoded. With `un`, the default, what has a decoded successor, even if
    it is itself still a mask; with `un_right`, what is decoded and has a decoded successor. Nobody
    reads the output of the last position, which is kept from the second step on (`un`), or along
    with its predecessor (`un_right`).
    """
    decoded_L = ~row.masked_L
    if not geo.shift:
        return decoded_L
    next_L = jnp.roll(decoded_L, -geo.shift)
    first_L = next_L.at[-1].set(decoded_L[-1])
    if shift_type == "un_right":
        both_L = decoded_L & next_L
        later_L = both_L.at[-1].set(both_L[-2])
    else:
        later_L = next_L.at[-1].set(True)
    settled_L = jnp.where(row.step == 0, first_L, later_L)
    # A row's first token has no predecessor and waits for its own output.
    return settled_L & ~sources(row.masked_L, row.valid_L, geo.shift)


@dataclasses.dataclass(frozen=True)
class DKVDecode(CacheMethod):
    """dKV-Cache-Decode: computes what was not decoded before the previous step.

    Memory: what was settled before the previous step.

    Attributes:
      cache_steps: everything is computed in every so manieth step; counted within a block, whose
        first two steps are full as well, or with a shift over the whole generation.
      shift_type: for models with a shift, `un` (the default) or `un_right`; see `settled`.
    """

    cache_steps: int = 8
    shift_type: str | None = None

    name: ClassVar[str] = "dkv-decode"
    lockstep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("cache_steps", self.cache_steps, 1)
        _check_shift_type(self.shift_type)

    def check_settings(self, config: Config, decode: DecodeConfig) -> None:
        _check_shift(config, self.shift_type)

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        return _shrinking(geo)

    def init(self, geo: Geometry) -> PyTree:
        return jnp.zeros(geo.length, bool)

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        if geo.shift:
            full = row.step % self.cache_steps == 0
        else:
            full = (row.block_step <= 1) | (row.block_step % self.cache_steps == 0)
        return full | ~memory

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        return settled(row, geo, self.shift_type)


@dataclasses.dataclass(frozen=True)
class DKVPrefill(CacheMethod):
    """dKV-Cache-Prefill: keeps the prompt from the first step on, and computes the rest.

    Memory: the prompt, as far as nobody waits for its outputs.
    """

    name: ClassVar[str] = "dkv-prefill"
    lockstep: ClassVar[bool] = True

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        return buckets([geo.gen + geo.shift], geo)

    def plan(self, geo: Geometry, forwards: int) -> Plan:
        full = len(self.step_shapes(geo)) - 1
        return (Run(full, 1), Run(0, forwards * geo.num_blocks - 1))

    def init(self, geo: Geometry) -> Bool[Array, " L"]:
        return jnp.zeros(geo.length, bool)

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        return ~memory

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        return jnp.where(row.step == 0, settled(row, geo, None), memory)


@dataclasses.dataclass(frozen=True)
class DKVPD(DKVDecode):
    """dKV-Cache-PD: keeps the prompt from the first step on, and decoded tokens between refreshes.

    Memory: the prompt, as far as nobody waits for its outputs, and what was settled before the
    previous step.

    Attributes:
      cache_steps: everything but the prompt is computed in every so manieth step of the generation.
      shift_type: as in `DKVDecode`.
    """

    cache_steps: int = 4

    name: ClassVar[str] = "dkv-pd"

    def init(self, geo: Geometry) -> PyTree:
        nothing_L = jnp.zeros(geo.length, bool)
        return dict(prompt_L=nothing_L, settled_L=nothing_L)

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        refresh = row.step % self.cache_steps == 0
        return ~jnp.where(refresh, memory["prompt_L"], memory["settled_L"])

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        settled_L = settled(row, geo, self.shift_type)
        prompt_L = jnp.where(row.step == 0, settled_L, memory["prompt_L"])
        return dict(prompt_L=prompt_L, settled_L=settled_L)


@dataclasses.dataclass(frozen=True)
class DKVGreedy(CacheMethod):
    """dKV-Cache-Greedy: computes the tokens just decoded, what the next need, and a window there.

    The next tokens must be known before the step, so the order must be drawn in advance. With a
    shift, what the next tokens need are their predecessors, and the window lies around those.

    Memory: what the previous step filled, and what was masked before it.

    Attributes:
      cache_steps: everything is computed in every so manieth step of a block, from the first on.
      window_size: masks to be computed around each position that the next tokens need, the nearest
        first and the left one before the right one.
    """

    cache_steps: int = 2
    window_size: int = 4

    name: ClassVar[str] = "dkv-greedy"
    lockstep: ClassVar[bool] = True
    needs_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("cache_steps", self.cache_steps, 1)
        check_whole("window_size", self.window_size, 0)

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        return buckets([geo.most_per_step * (2 + self.window_size)], geo)

    def plan(self, geo: Geometry, forwards: int) -> Plan:
        full = len(self.step_shapes(geo)) - 1
        periods, rest = divmod(forwards, self.cache_steps)
        period = (Run(full, 1), Run(0, self.cache_steps - 1))
        last = (Run(full, min(1, rest)), Run(0, max(0, rest - 1)))
        return (Repeat((Repeat(period, periods), *last), geo.num_blocks),)

    def init(self, geo: Geometry) -> PyTree:
        nothing_L = jnp.zeros(geo.length, bool)
        return dict(chosen_L=nothing_L, masked_L=nothing_L)

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        needed_L = sources(row.next_L, row.valid_L, geo.shift)
        chosen_L = memory["chosen_L"] | needed_L
        refresh = row.block_step % self.cache_steps == 0
        return refresh | self._with_windows(chosen_L, memory["masked_L"], row, geo)

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        return dict(chosen_L=obs.chosen_L, masked_L=row.masked_L)

    def _with_windows(
        self, chosen_L: Bool[Array, " L"], masked_L: Bool[Array, " L"], row: Row, geo: Geometry
    ) -> Bool[Array, " L"]:
        """Adds, for one of the next tokens after the other, the nearest masks not yet chosen."""
        slot_L = jnp.arange(geo.length)
        place_L = ranking.rank(-row.order_L, row.eligible_L)

        def add(i: Int[Array, ""], chosen_L: Array) -> Array:
            token = jnp.argmax(place_L == i)
            centre = token - geo.shift
            offset_L = slot_L - centre
            distance_L = jnp.where(offset_L < 0, -2 * offset_L - 1, 2 * offset_L)
            free_L = masked_L & ~chosen_L & row.next_L[token]
            nearest_L = ranking.top(
                -distance_L.astype(jnp.float32), free_L, jnp.int32(self.window_size)
            )
            return chosen_L | nearest_L

        tokens = geo.most_per_step if self.window_size else 0
        return jax.lax.fori_loop(0, tokens, add, chosen_L)


def _shrinking(geo: Geometry) -> tuple[StepShape, ...]:
    """Step shapes for what is left of the generated part, and of its predecessors."""
    largest = round_up(geo.gen + geo.shift)
    return buckets(range(GRAIN, largest + 1, GRAIN), geo)


def _check_shift_type(shift_type: str | None) -> None:
    if shift_type == "right":
        raise ValueError(
            "shift_type is 'right', which drops positions while they are still needed to predict "
            "the next token; take 'un_right'."
        )
    if shift_type not in (None, *SHIFT_TYPES):
        raise ValueError(f"shift_type is {shift_type!r}; it must be {' or '.join(SHIFT_TYPES)}.")


def _check_shift(config: Config, shift_type: str | None) -> None:
    if shift_type is not None and not config.shift:
        raise ValueError(
            f"shift_type is {shift_type!r}, but {config.family} predicts a token at its own "
            "position and has no shift; leave shift_type out."
        )
