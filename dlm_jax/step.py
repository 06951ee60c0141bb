"""One denoising step, and the state that it takes to the next.

    select -> pack -> walk over the layers -> logits at masks that may be filled
           -> candidate and confidence -> commit as many as the schedule says
           -> observe -> next step or block

The step is ids in, ids out. It knows no model and no cache method by name: whatever is static
(model, decoding configuration, method, geometry) and whatever stays constant is in `Setup`,
whatever evolves in `DecodeState`. The drivers that repeat it are in `decode.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import queries, unmask
from dlm_jax.cache.base import CacheMethod, Observation, Row, Variant
from dlm_jax.config import DecodeConfig, Numbers
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Transformer, readout, source_slot
from dlm_jax.sampler import ALGORITHMS, sample
from dlm_jax.schedule import Schedule
from dlm_jax.typing import Array, Bool, Float, Int, Key, Params, PyTree


def _static() -> Any:
    return dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays constant over a generation."""

    model: Transformer = _static()
    decode: DecodeConfig = _static()
    method: CacheMethod = _static()
    geo: Geometry = _static()
    params: Params
    valid_BL: Bool[Array, "B L"]
    key_B: Key[Array, " B"]
    order_BL: Float[Array, "B L"] | None
    """Lower is filled earlier; None where the order depends on confidence."""
    numbers: Numbers

    @property
    def schedule(self) -> Schedule:
        return self.decode.make_schedule(self.geo)

    @property
    def slots(self) -> np.ndarray:
        """Query slots per row of each step shape, mean over the layers."""
        method, config, geo = self.method, self.model.config, self.geo
        return np.asarray([method.slots(v, config, geo) for v in method.variants(geo)], np.float32)

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
        if self.geo.steps is not None and not decode.leave_early:
            return True
        return decode.ban_mask and not decode.infill

    @property
    def most_forwards(self) -> int:
        """T, the number of forwards if `fixed_length`, else an upper bound."""
        decode, geo = self.decode, self.geo
        # One that fills fewer positions than the schedule wants, but at least one, needs more.
        more = geo.length if self.method.partial else 0
        if geo.steps is not None and not (decode.leave_early and decode.ban_mask):
            return geo.steps + more
        first = geo.block + (geo.prompt if decode.infill else 0)
        bound = self.schedule.forwards(first) + (geo.num_blocks - 1) * self.schedule.forwards(
            geo.block
        )
        # A model that keeps choosing the mask token would never end.
        return bound + (more if decode.ban_mask else geo.length)

    def readout_width(self, variant: Variant) -> int:
        """W, the most positions whose logits are read in a step of this shape."""
        decode, geo = self.decode, self.geo
        if decode.infill:
            most = geo.length
        elif decode.ban_mask and not self.method.reads_ahead:
            most = geo.block
        else:
            most = geo.gen
        # A row's first token and the second can be read from the same output.
        return min(most, variant.capacity + geo.shift)


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


def begin(setup: Setup, tokens_BL: Int[Array, "B L"], record: tuple[str, ...] = ()) -> DecodeState:
    """The state before the first step; `record` as in `diffusion_generate`."""
    geo, batch = setup.geo, tokens_BL.shape[0]
    zeros_B = jnp.zeros(batch, jnp.int32)
    memory = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (batch, *jnp.shape(leaf))), setup.method.init(geo)
    )
    dtype = setup.params["embed"]["embedding"].dtype
    forwards = setup.most_forwards
    sets_TBL = jnp.zeros((forwards, *tokens_BL.shape), bool)
    state = DecodeState(
        tokens_BL=tokens_BL,
        committed_at_BL=jnp.full(tokens_BL.shape, -1, jnp.int32),
        confidence_BL=jnp.zeros(tokens_BL.shape, jnp.float32),
        nfe=jnp.zeros((), jnp.int32),
        step_B=zeros_B,
        block_B=zeros_B,
        block_step_B=zeros_B,
        block_masks_B=zeros_B,
        # An order goes on even if the candidate was the mask token, where that is not banned.
        passed_BL=(
            None
            if setup.order_BL is None or setup.decode.ban_mask
            else jnp.zeros(tokens_BL.shape, bool)
        ),
        selected_BL=jnp.zeros(tokens_BL.shape, bool),
        variant=jnp.zeros((), jnp.int32),
        memory=memory,
        cache=setup.method.init_cache(setup.model.config, geo, batch, dtype),
        asked_TB=jnp.zeros((forwards, batch), jnp.float32),
        variant_T=jnp.full(forwards, -1, jnp.int32),
        computed_TBL=sets_TBL if "computed" in record else None,
        layer_sets=(
            (sets_TBL,) * setup.model.config.num_layers if "computed_layers" in record else None
        ),
    )
    return _choose(setup, state._replace(block_masks_B=_block_masks(setup, state)))


def step(setup: Setup, state: DecodeState, variant: Variant) -> DecodeState:
    """One denoising step: computes the selected positions, commits tokens, chooses the next set."""
    model, method, geo, config = setup.model, setup.method, setup.geo, setup.model.config
    rows = _rows(setup, state)

    # Network: only the selected positions.
    query = queries.pack(state.selected_BL, setup.valid_BL, variant.capacity)
    walked: Any = model.apply(
        {"params": setup.params},
        queries.gather(state.tokens_BL, query.index_BQ),
        query,
        state.cache,
        method.init_acc(rows, query, geo),
        method.layers(variant, config, geo),
        method="walk",
    )
    hidden_BQD, cache, acc = walked

    # Candidates: only at masks whose logits are wanted and whose output was computed.
    slot_BL = jnp.broadcast_to(jnp.arange(geo.length, dtype=jnp.int32), state.tokens_BL.shape)
    source_BL = source_slot(slot_BL, setup.valid_BL, config.shift)
    readable = functools.partial(method.readable, geo=geo)
    read_BL = jax.vmap(readable)(state.memory, rows) & queries.gather(state.selected_BL, source_BL)
    slot_BW = queries.pack_index(read_BL, setup.readout_width(variant))
    token_BW, score_BW, confidence_BW = sample(
        readout(model, setup.params, hidden_BQD, query, slot_BW),
        _keys(setup, state.step_B, slot_BW),
        alg=setup.decode.alg,
        banned=config.mask_id if setup.decode.ban_mask else None,
        **setup.numbers.sampling(),
    )
    unread_BL = jnp.full(slot_BL.shape, -jnp.inf, jnp.float32)
    confidence_BL = queries.scatter(unread_BL, confidence_BW, slot_BW)

    # Commit.
    score_BL = queries.scatter(unread_BL, score_BW, slot_BW)
    if rows.order_L is not None:
        score_BL = -rows.order_L
    commit_BL = jax.vmap(unmask.top)(score_BL, read_BL & rows.eligible_L, rows.quota)
    tokens_BL = jnp.where(
        commit_BL, queries.scatter(state.tokens_BL, token_BW, slot_BW), state.tokens_BL
    )
    # Where the mask token is not banned it may be chosen; the position is then still a mask.
    final_BL = commit_BL & (tokens_BL != config.mask_id)

    # Remember.
    obs = Observation(state.selected_BL, read_BL, commit_BL, confidence_BL, tokens_BL, acc)
    observed = jax.vmap(functools.partial(method.observe, geo=geo))(state.memory, rows, obs)
    active_B = jnp.any(rows.eligible_L, axis=-1)
    state = _record(state, method.layer_sets(state.selected_BL, acc, config))
    state = state._replace(
        tokens_BL=tokens_BL,
        committed_at_BL=jnp.where(final_BL, state.nfe, state.committed_at_BL),
        confidence_BL=jnp.where(final_BL, confidence_BL, state.confidence_BL),
        nfe=state.nfe + 1,
        passed_BL=None if state.passed_BL is None else state.passed_BL | commit_BL,
        step_B=state.step_B + active_B.astype(jnp.int32),
        memory=jax.vmap(_keep_unless)(active_B, observed, state.memory),
        cache=cache,
    )
    return _choose(setup, _advance(setup, state))


def unfinished(setup: Setup, state: DecodeState) -> Bool[Array, ""]:
    """Whether there is a row that has not left its last block, and a forward to spend on it."""
    limit = setup.most_forwards
    if setup.numbers.max_forwards is not None:
        limit = jnp.minimum(setup.numbers.max_forwards, limit)
    return jnp.any(state.block_B < setup.geo.num_blocks) & (state.nfe < limit)


def _keep_unless(active: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, old)


def _record(state: DecodeState, layer_sets: tuple[Bool[Array, "B L"], ...]) -> DecodeState:
    """Writes down what this forward computes."""
    counts = [jnp.sum(set_BL, axis=-1, dtype=jnp.float32) for set_BL in layer_sets]

    def put(sets_TBL: Array, set_BL: Array) -> Array:
        return sets_TBL.at[state.nfe].set(set_BL)

    state = state._replace(
        asked_TB=state.asked_TB.at[state.nfe].set(sum(counts, jnp.zeros(())) / len(counts)),
        variant_T=state.variant_T.at[state.nfe].set(state.variant),
    )
    if state.computed_TBL is not None:
        state = state._replace(computed_TBL=put(state.computed_TBL, state.selected_BL))
    if state.layer_sets is not None:
        state = state._replace(layer_sets=tuple(map(put, state.layer_sets, layer_sets)))
    return state


def _fillable(setup: Setup, tokens_BL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Masks that are to be filled at some time."""
    masked_BL = (tokens_BL == setup.model.config.mask_id) & setup.valid_BL
    if setup.decode.infill:
        return masked_BL
    return masked_BL & (jnp.arange(setup.geo.length) >= setup.geo.prompt)[None]


def _masks_per_block(setup: Setup, tokens_BL: Int[Array, "B L"]) -> Int[Array, "B blocks"]:
    """Masks to be filled in each block; those inside the prompt belong to the first."""
    geo = setup.geo
    masked_BL = _fillable(setup, tokens_BL).astype(jnp.int32)
    counts = masked_BL[:, geo.prompt :].reshape(-1, geo.num_blocks, geo.block).sum(axis=-1)
    return counts.at[:, 0].add(masked_BL[:, : geo.prompt].sum(axis=-1))


def _block_masks(setup: Setup, state: DecodeState) -> Int[Array, " B"]:
    """Masks left in each row's block; 0 for a row that is done."""
    counts = _masks_per_block(setup, state.tokens_BL)
    return queries.gather(jnp.pad(counts, ((0, 0), (0, 1))), state.block_B[:, None])[:, 0]


def _rows(setup: Setup, state: DecodeState) -> Row:
    """The rows as cache methods see them, stacked over B."""
    geo = setup.geo
    masked_BL = _fillable(setup, state.tokens_BL)
    end_B = geo.prompt + (state.block_B + 1) * geo.block
    inside_BL = jnp.arange(geo.length)[None] < end_B[:, None]
    running_B = state.block_B < geo.num_blocks
    eligible_BL = masked_BL & inside_BL & running_B[:, None]
    if state.passed_BL is not None:
        eligible_BL = eligible_BL & ~state.passed_BL
    rows = Row(
        tokens_L=state.tokens_BL,
        valid_L=setup.valid_BL,
        masked_L=masked_BL,
        eligible_L=eligible_BL,
        quota=setup.schedule.quota(
            state.block_masks_B, _block_masks(setup, state), state.block_step_B
        ),
        order_L=setup.order_BL,
        block=state.block_B,
        block_step=state.block_step_B,
        step=state.step_B,
    )
    return jax.vmap(functools.partial(setup.method.restrict, geo=geo))(rows)


def _advance(setup: Setup, state: DecodeState) -> DecodeState:
    """Moves rows to the next step of their block, or to their next block."""
    geo, decode = setup.geo, setup.decode
    block_step_B = state.block_step_B + 1
    done_B = state.block_B >= geo.num_blocks
    leave_B = full_B = _block_masks(setup, state) == 0
    if geo.steps is not None:
        out_of_steps_B = block_step_B >= geo.steps_per_block
        if not decode.leave_early:
            leave_B = out_of_steps_B & (full_B if decode.ban_mask else True)
        elif not decode.ban_mask:
            leave_B = full_B | out_of_steps_B
    if setup.lockstep:
        leave_B = jnp.broadcast_to(jnp.all(leave_B | done_B), leave_B.shape)
    block_B = jnp.where(leave_B & ~done_B, state.block_B + 1, state.block_B)
    state = state._replace(
        block_B=block_B, block_step_B=jnp.where(leave_B, jnp.zeros_like(block_step_B), block_step_B)
    )
    return state._replace(
        block_masks_B=jnp.where(leave_B, _block_masks(setup, state), state.block_masks_B)
    )


def _choose(setup: Setup, state: DecodeState) -> DecodeState:
    """Asks the method what the next forward computes; rows with nothing to fill compute nothing."""
    rows = _rows(setup, state)
    select = functools.partial(setup.method.select, geo=setup.geo)
    active_B = jnp.any(rows.eligible_L, axis=-1)
    selected_BL = jax.vmap(select)(state.memory, rows) & setup.valid_BL & active_B[:, None]
    variant = setup.method.variant_id(rows, selected_BL, setup.geo)
    return state._replace(selected_BL=selected_BL, variant=variant)


def draw_order(setup: Setup) -> Float[Array, "B L"] | None:
    """A random order of all positions, where the decoding wants one."""
    if not ALGORITHMS[setup.decode.alg].drawn:
        return None
    batch, length = setup.valid_BL.shape
    slot_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    # No denoising step has this number, so that no noise is correlated with the order.
    key_BL = _keys(setup, jnp.full(batch, -1, jnp.int32), slot_BL)
    return jax.vmap(jax.vmap(jax.random.uniform))(key_BL)


def _keys(setup: Setup, step_B: Int[Array, " B"], slot_BW: Int[Array, "B W"]) -> Key[Array, "B W"]:
    """One key per position: a function of row key, the row's step and the rotary position."""
    position_BW = queries.gather(queries.positions(setup.valid_BL), slot_BW)

    def row(key: Array, step: Array, position_W: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), position_W)

    return jax.vmap(row)(setup.key_B, step_B, position_BW)
