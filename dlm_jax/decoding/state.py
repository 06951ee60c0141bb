"""What a generation consists of: its constants, and what evolves from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import queries
from dlm_jax.cache.base import CacheMethod, Variant
from dlm_jax.decoding.config import DecodeConfig, Numbers
from dlm_jax.decoding.sampler import Debias
from dlm_jax.decoding.schedule import Schedule
from dlm_jax.decoding.strategies import klass
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
    """[B, L] for the algorithm `random`: the lower, the earlier a position is filled. [T, B, L]: a
    new order in every forward."""
    transfer: ArrayOrNumpy | None = None
    """[T, B, L] bool for the algorithm `origin` and for `alg_temp`: what each forward fills. What
    none of the schedule's steps fills stays a mask."""


def static() -> Any:
    """A dataclass field that belongs to the structure of the pytree."""
    return dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays constant over a generation."""

    model: Transformer = static()
    decode: DecodeConfig = static()
    method: CacheMethod = static()
    geo: Geometry = static()
    logits_processor: LogitsProcessor | None = static()
    params: Params
    slots: Slots
    key_B: Key[Array, " B"]
    draws: Draws
    """`order` is there wherever an order is drawn in advance."""
    numbers: Numbers
    token_freq_V: Float[Array, " V"] | None

    @property
    def valid_BL(self) -> Bool[Array, "B L"]:
        """Slots that hold a token or a mask, not padding."""
        return self.slots.valid_BL

    @property
    def schedule(self) -> Schedule:
        return self.decode.make_schedule(self.geo)

    @property
    def eos_id(self) -> int:
        given = self.decode.eos_id
        return self.model.config.eos_id if given is None else given

    @property
    def copies(self) -> int:
        """Rows that the network computes for each row of the batch."""
        return 2 if self.decode.guided else 1

    @property
    def debias(self) -> Debias | None:
        """What calibrates confidences, where the frequencies of the tokens are given."""
        if self.token_freq_V is None or self.numbers.clip_alpha is None:
            return None
        return Debias(self.token_freq_V, self.numbers.clip_alpha)

    @property
    def widths(self) -> np.ndarray:
        """Query slots per row of each step shape, mean over the layers."""
        method, config, geo = self.method, self.model.config, self.geo
        widths = [method.slots(v, config, geo) for v in method.variants(geo)]
        shadows = geo.block if self.decode.strategy == "wino" else 0
        return self.copies * (np.asarray(widths, np.float32) + shadows)

    @property
    def lockstep(self) -> bool:
        wanted = self.decode.lockstep
        return self.method.lockstep if wanted is None else wanted

    @property
    def fixed_length(self) -> bool:
        """Whether the number of forwards is known beforehand."""
        decode = self.decode
        if self.method.partial or self.numbers.max_forwards is not None:
            return False
        if decode.parallel or decode.stop_until_eos:
            return False
        if self.geo.steps is not None and not decode.leave_early:
            return True
        return decode.ban_mask and not decode.infill and not decode.measure.thinned

    @property
    def most_forwards(self) -> int:
        """T, the number of forwards if `fixed_length`, else an upper bound."""
        decode, geo = self.decode, self.geo
        # One that fills fewer positions than the schedule wants, but at least one, needs more.
        more = geo.length if self.method.partial else 0
        early = decode.parallel or (decode.leave_early and decode.ban_mask)
        if geo.steps is not None and not early:
            return geo.steps + more
        # A rule may find as little as one position to fill.
        forwards = (lambda masks: masks) if decode.parallel else self.schedule.forwards
        first = geo.block + (geo.prompt if decode.infill else 0)
        bound = forwards(first) + (geo.num_blocks - 1) * forwards(geo.block)
        # A model that keeps choosing the mask token would never end.
        return bound + (more if decode.ban_mask else geo.length)

    def readout_width(self, variant: Variant) -> int:
        """W, the most positions whose logits are read in a step of this shape."""
        decode, geo = self.decode, self.geo
        if decode.infill:
            most = geo.length
        elif decode.ban_mask and not self.reads_ahead:
            most = geo.block
        else:
            most = geo.gen
        # A row's first token and the second can be read from the same output.
        return min(most, variant.capacity + geo.shift)

    @property
    def reads_ahead(self) -> bool:
        """Whether logits are wanted of masks that the step may not fill."""
        return self.method.reads_ahead or self.decode.strategy == "klass"

    def order_BL(self, nfe: Int[Array, ""]) -> Float[Array, "B L"] | None:
        """Lower is filled earlier in this forward; None where the order depends on confidence."""
        order = self.draws.order
        if order is None:
            return None
        return jnp.asarray(order if order.ndim == 2 else _at(order, nfe), jnp.float32)

    def transfer_BL(self, nfe: Int[Array, ""]) -> Bool[Array, "B L"] | None:
        """What this forward fills, where that is given; else None."""
        transfer = self.draws.transfer
        return None if transfer is None else jnp.asarray(_at(transfer, nfe), bool)


class DecodeState(NamedTuple):
    """What evolves from step to step."""

    # canvas
    tokens_BL: Int[Array, "B L"]
    committed_at_BL: Int[Array, "B L"]
    confidence_BL: Float[Array, "B L"]
    # progress
    nfe: Int[Array, ""]
    step_B: Int[Array, " B"]
    block_B: Int[Array, " B"]
    block_step_B: Int[Array, " B"]
    block_masks_B: Int[Array, " B"]
    """Masks of the row's block when the row entered it."""
    passed_BL: Bool[Array, "B L"] | None
    """Positions that an order drawn in advance has come to; None where none comes back to them."""
    stability: klass.Stability | None
    """How settled the predictions are, where the strategy wants to know."""
    # cache
    selected_BL: Bool[Array, "B L"]
    """What the next forward computes."""
    variant: Int[Array, ""]
    """The step shape of the next forward."""
    memory: PyTree
    cache: tuple[PyTree, ...]
    # records
    asked_TB: Float[Array, "T B"]
    """Positions whose queries the method asked for in each forward, mean over the layers."""
    variant_T: Int[Array, " T"]
    """The step shape of each forward; -1 for those that are still to come."""
    computed_TBL: Bool[Array, "T B L"] | None
    layer_sets: tuple[Bool[Array, "T B L"], ...] | None
    """The same for each layer."""
    canvas_TBL: Int[Array, "T B L"] | None
    """The canvas after each forward, where `committed_at_BL` cannot tell it."""


def position_keys(
    setup: Setup, step_B: Int[Array, " B"], slot_BW: Int[Array, "B W"], purpose: int = 0
) -> Key[Array, "B W"]:
    """One key per position: a function of row key, the row's step and the rotary position.

    Different purposes have independent keys.
    """
    position_BW = queries.gather(queries.positions(setup.valid_BL), slot_BW)

    def row(key: Array, step: Array, position_W: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), position_W)
        return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) if purpose else keys

    return jax.vmap(row)(setup.key_B, step_B, position_BW)


def draw_order(setup: Setup) -> Float[Array, "B L"] | None:
    """A random order of all positions, where the decoding wants one."""
    if not setup.decode.measure.drawn:
        return None
    batch, length = setup.valid_BL.shape
    slot_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    # No denoising step has this number, so that no noise is correlated with the order.
    key_BL = position_keys(setup, jnp.full(batch, -1, jnp.int32), slot_BL)
    return jax.vmap(jax.vmap(jax.random.uniform))(key_BL)


def _at(values_T: ArrayOrNumpy, nfe: Int[Array, ""]) -> Array:
    return jnp.asarray(values_T).at[nfe].get(mode="clip")
