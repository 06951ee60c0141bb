"""What a generation consists of: its constants, and what evolves from step to step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import queries
from dlm_jax.cache.base import CacheMethod, StepShape
from dlm_jax.cache.runs import Plan, Run, bodies, present
from dlm_jax.decoding import termination
from dlm_jax.decoding.blocks import Blocks
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import ORDER, Chance, Rows
from dlm_jax.decoding.sampler import Debias
from dlm_jax.decoding.schedule import Schedule
from dlm_jax.decoding.settings import register
from dlm_jax.decoding.strategies import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Transformer
from dlm_jax.queries import Slots
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Key, Params, PyTree

LogitsProcessor = Callable[..., Array]
"""`(tokens_BL, logits_BWV, step) -> logits_BWV`; see `diffusion_generate`."""


class Draws(NamedTuple):
    """Random choices given from outside instead of drawn from the key; None draws.

    T are model forwards; forwards beyond the last given one use that.
    """

    order: ArrayOrNumpy | None = None
    """[B, L] for the strategy `random`: the lower, the earlier a position is filled. [T, B, L] if
    it draws a new order in every forward."""
    transfer: ArrayOrNumpy | None = None
    """[T, B, L] bool for the strategy `origin` and for `alg_temp`: what each forward fills. What
    none of the schedule's steps fills stays a mask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays constant over a generation; `start.start` makes one.

    A pytree, of which model, method, geometry and logits_processor are structure.
    """

    model: Transformer
    method: CacheMethod
    geo: Geometry
    logits_processor: LogitsProcessor | None
    decode: DecodeConfig
    params: Params
    slots: Slots
    key_B: Key[Array, " B"]
    draws: Draws
    token_freq_V: Float[Array, " V"] | None

    @property
    def strategy(self) -> Strategy:
        return self.decode.strategy

    @property
    def blocks(self) -> Blocks:
        """Which masks a step may fill."""
        return self.method.blocks(Blocks(self.geo))

    @property
    def schedule(self) -> Schedule:
        return self.decode.make_schedule(self.geo)

    @property
    def copies(self) -> int:
        """Rows that the network computes for each row of the batch."""
        return 2 if self.decode.guided else 1

    @property
    def debias(self) -> Debias | None:
        """What calibrates confidences, where the frequencies of the tokens are given."""
        if self.token_freq_V is None:
            return None
        return Debias(self.token_freq_V, self.decode.clip_alpha)

    @property
    def widths(self) -> np.ndarray:
        """Query slots per row of each step shape, mean over the layers."""
        method, config, geo = self.method, self.model.config, self.geo
        widths = [method.width(shape, config, geo) for shape in method.step_shapes(geo)]
        shadows = geo.block if self.strategy.shadows else 0
        return self.copies * (np.asarray(widths, np.float32) + shadows)

    @property
    def lockstep(self) -> bool:
        wanted = self.decode.lockstep
        return self.method.lockstep if wanted is None else wanted

    @property
    def fixed_length(self) -> bool:
        """Whether the number of forwards is known beforehand."""
        return termination.is_known(self.decode, self.method, self.blocks)

    @property
    def plan(self) -> Plan:
        """The step shapes of all forwards; empty where they hang on data, or need many bodies."""
        decode, geo, shapes = self.decode, self.geo, len(self.method.step_shapes(self.geo))
        if not self.fixed_length:
            return ()
        if shapes == 1:
            return (Run(0, self.most_forwards),)
        # Every row must have something to fill in every forward, and in its block alone.
        steady = decode.leave_early and decode.strategy.exact and self.draws.transfer is None
        if not steady or decode.infill or not decode.ban_mask:
            return ()
        found = present(self.method.plan(geo, self.most_forwards // geo.num_blocks))
        return found if bodies(found) <= max(geo.step_shapes, shapes) else ()

    @property
    def most_forwards(self) -> int:
        """T, the number of forwards if `fixed_length`, else an upper bound."""
        return termination.most_forwards(self.decode, self.method, self.blocks)

    def readout_width(self, shape: StepShape) -> int:
        """W, the most positions whose logits are read in a step of this shape."""
        decode, geo = self.decode, self.geo
        if self.strategy.shadows:
            return geo.block
        if decode.ban_mask and not (self.method.reads_ahead or self.strategy.reads_ahead):
            most = self.blocks.sizes[0]
        else:
            most = geo.fillable
        # A row's first token and the second can be read from the same output.
        return min(most, shape.capacity + geo.shift)

    @property
    def position_BL(self) -> Int[Array, "B L"]:
        """Rotary positions."""
        return queries.positions(self.slots.valid_BL)

    def order_BL(self, nfe: Int[Array, ""], step_B: Int[Array, " B"]) -> Float[Array, "B L"]:
        """The order of a forward, where one is drawn in advance; see `Row.order_L`."""
        order = self.draws.order
        if not self.strategy.ordered:
            return jnp.zeros(self.slots.valid_BL.shape, jnp.float32)
        if order is None:
            return self.draw_order(step_B, ORDER)
        return jnp.asarray(order if order.ndim == 2 else _at(order, nfe), jnp.float32)

    def draw_order(self, step_B: Int[Array, " B"], purpose: int) -> Float[Array, "B L"]:
        """A random order of all positions; a row's depends on its key and the step."""
        chances = Chance(self.key_B, step_B, self.position_BL)
        return jax.vmap(lambda chance: chance.uniform_L(purpose))(chances)

    def transfer_BL(self, nfe: Int[Array, ""]) -> Bool[Array, "B L"] | None:
        """What this forward fills, where that is given; else None."""
        transfer = self.draws.transfer
        return None if transfer is None else jnp.asarray(_at(transfer, nfe), bool)


register(Setup, ["decode", "params", "slots", "key_B", "draws", "token_freq_V"])


class DecodeState(NamedTuple):
    """What evolves from step to step."""

    # canvas
    rows: Rows
    """The rows as the next step finds them: tokens, what may be filled, where they stand."""
    committed_at_BL: Int[Array, "B L"]
    confidence_BL: Float[Array, "B L"]
    """Of the tokens when they were committed."""
    not_finite_at_B: Int[Array, " B"]
    """The first forward that did not say of numbers what comes next; -1 as long as all did."""
    # progress
    nfe: Int[Array, ""]
    block_masks_B: Int[Array, " B"]
    """Masks of the row's block when the row entered it."""
    strategy_memory: PyTree
    # cache
    selected_BL: Bool[Array, "B L"]
    """What the next forward computes."""
    shape: Int[Array, ""]
    """Which step shape the next forward has."""
    memory: PyTree
    """The cache method's."""
    cache: tuple[PyTree, ...]
    # records
    asked_TB: Float[Array, "T B"]
    """Positions whose queries the method asked for in each forward, mean over the layers."""
    shape_T: Int[Array, " T"]
    """The step shape of each forward; -1 for those that are still to come."""
    computed_TBL: Bool[Array, "T B L"] | None
    layer_sets: tuple[Bool[Array, "T B L"], ...] | None
    """The same for each layer."""
    canvas_TBL: Int[Array, "T B L"] | None
    """The canvas after each forward, where `committed_at_BL` cannot tell it."""


def _at(values_T: ArrayOrNumpy, nfe: Int[Array, ""]) -> Array:
    return jnp.asarray(values_T).at[nfe].get(mode="clip")
