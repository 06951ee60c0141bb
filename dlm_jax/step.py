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

from dlm_jax import queries, unmask
from dlm_jax.cache.base import CacheMethod, Observation, Row, Variant
from dlm_jax.config import DecodeConfig, Numbers
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Transformer, readout, source_slot
from dlm_jax.sampler import sample
from dlm_jax.schedule import SCHEDULES, Schedule
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
    numbers: Numbers

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.decode.schedule](
            self.geo, eps=self.decode.eps, num_transfer_tokens=self.decode.num_transfer_tokens
        )

    @property
    def lockstep(self) -> bool:
        wanted = self.decode.lockstep
        return self.method.lockstep if wanted is None else wanted

    @property
    def fixed_length(self) -> bool:
        """Whether the number of forwards is known beforehand."""
        decode = self.decode
        if self.geo.steps is not None and not decode.leave_early:
            return True
        return decode.ban_mask and not decode.infill

    @property
    def max_forwards(self) -> int:
        """T, the number of forwards if `fixed_length`, else an upper bound."""
        decode, geo = self.decode, self.geo
        if geo.steps is not None and not (decode.leave_early and decode.ban_mask):
            return geo.steps
        first = geo.block + (geo.prompt if decode.infill else 0)
        bound = self.schedule.forwards(first) + (geo.num_blocks - 1) * self.schedule.forwards(
            geo.block
        )
        # A model that keeps choosing the mask token would never end.
        return bound if decode.ban_mask else bound + geo.length

    @property
    def readout_width(self) -> int:
        """W, the most positions that a step may fill."""
        decode, geo = self.decode, self.geo
        if decode.infill:
            return geo.length
        return geo.block if decode.ban_mask else geo.gen


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
    # cache
    selected_BL: Bool[Array, "B L"]
    """What the next forward computes."""
    variant: Int[Array, ""]
    """The step shape of the next forward."""
    memory: PyTree
    cache: tuple[PyTree, ...]
    # records
    computed_TBL: Bool[Array, "T B L"] | None


def begin(setup: Setup, tokens_BL: Int[Array, "B L"], record: tuple[str, ...] = ()) -> DecodeState:
    """The state before the first step; `record` as in `diffusion_generate`."""
    geo, batch = setup.geo, tokens_BL.shape[0]
    zeros_B = jnp.zeros(batch, jnp.int32)
    memory = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (batch, *jnp.shape(leaf))), setup.method.init(geo)
    )
    dtype = setup.params["embed"]["embedding"].dtype
    state = DecodeState(
        tokens_BL=tokens_BL,
        committed_at_BL=jnp.full(tokens_BL.shape, -1, jnp.int32),
        confidence_BL=jnp.zeros(tokens_BL.shape, jnp.float32),
        nfe=jnp.zeros((), jnp.int32),
        step_B=zeros_B,
        block_B=zeros_B,
        block_step_B=zeros_B,
        block_masks_B=zeros_B,
        selected_BL=jnp.zeros(tokens_BL.shape, bool),
        variant=jnp.zeros((), jnp.int32),
        memory=memory,
        cache=setup.method.init_cache(setup.model.config, geo, batch, dtype),
        computed_TBL=(
            jnp.zeros((setup.max_forwards, *tokens_BL.shape), bool)
            if "computed" in record
            else None
        ),
    )
    return _choose(setup, state._replace(block_masks_B=_block_masks(setup, state)))


def step(setup: Setup, state: DecodeState, variant: Variant) -> DecodeState:
    """One denoising step: computes the selected positions, commits tokens, chooses the next set."""
    model, geo, config = setup.model, setup.geo, setup.model.config
    rows = _rows(setup, state)

    # Network: only the selected positions.
    query = queries.pack(state.selected_BL, setup.valid_BL, variant.capacity)
    walked: Any = model.apply(
        {"params": setup.params},
        queries.gather(state.tokens_BL, query.index_BQ),
        query,
        state.cache,
        setup.method.init_acc(geo, state.tokens_BL.shape[0]),
        setup.method.layers(variant, config),
        method="walk",
    )
    hidden_BQD, cache, acc = walked

    # Candidates: only at masks that may be filled and whose output was computed.
    slot_BL = jnp.broadcast_to(jnp.arange(geo.length, dtype=jnp.int32), state.tokens_BL.shape)
    source_BL = source_slot(slot_BL, setup.valid_BL, config.shift)
    readable_BL = rows.eligible_L & queries.gather(state.selected_BL, source_BL)
    slot_BW = queries.pack_index(readable_BL, setup.readout_width)
    token_BW, score_BW, confidence_BW = sample(
        readout(model, setup.params, hidden_BQD, query, slot_BW),
        _noise_keys(setup, state, slot_BW),
        alg=setup.decode.alg,
        banned=config.mask_id if setup.decode.ban_mask else None,
        **setup.numbers._asdict(),
    )
    unread_BL = jnp.full(slot_BL.shape, -jnp.inf, jnp.float32)
    confidence_BL = queries.scatter(unread_BL, confidence_BW, slot_BW)

    # Commit.
    quota_B = setup.schedule.quota(
        state.block_masks_B, _block_masks(setup, state), state.block_step_B
    )
    score_BL = queries.scatter(unread_BL, score_BW, slot_BW)
    commit_BL = jax.vmap(unmask.top)(score_BL, readable_BL, quota_B)
    tokens_BL = jnp.where(
        commit_BL, queries.scatter(state.tokens_BL, token_BW, slot_BW), state.tokens_BL
    )
    # Where the mask token is not banned it may be chosen; the position is then still a mask.
    final_BL = commit_BL & (tokens_BL != config.mask_id)

    obs = Observation(state.selected_BL, final_BL, confidence_BL, tokens_BL, acc)
    observe = functools.partial(setup.method.observe, geo=geo)
    computed_TBL = state.computed_TBL
    if computed_TBL is not None:
        computed_TBL = computed_TBL.at[state.nfe].set(state.selected_BL)
    state = state._replace(
        tokens_BL=tokens_BL,
        committed_at_BL=jnp.where(final_BL, state.nfe, state.committed_at_BL),
        confidence_BL=jnp.where(final_BL, confidence_BL, state.confidence_BL),
        nfe=state.nfe + 1,
        step_B=state.step_B + jnp.any(rows.eligible_L, axis=-1).astype(jnp.int32),
        memory=jax.vmap(observe)(state.memory, rows, obs),
        cache=cache,
        computed_TBL=computed_TBL,
    )
    return _choose(setup, _advance(setup, state))


def finished(setup: Setup, state: DecodeState) -> Bool[Array, ""]:
    """Whether every row has left its last block."""
    return jnp.all(state.block_B >= setup.geo.num_blocks)


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
    return Row(
        tokens_L=state.tokens_BL,
        valid_L=setup.valid_BL,
        masked_L=masked_BL,
        eligible_L=masked_BL & inside_BL & running_B[:, None],
        block=state.block_B,
        block_step=state.block_step_B,
        step=state.step_B,
    )


def _advance(setup: Setup, state: DecodeState) -> DecodeState:
    """Moves rows to the next step of their block, or to their next block."""
    geo, decode = setup.geo, setup.decode
    block_step_B = state.block_step_B + 1
    done_B = state.block_B >= geo.num_blocks
    leave_B = _block_masks(setup, state) == 0
    if geo.steps is not None:
        out_of_steps_B = block_step_B >= geo.steps_per_block
        leave_B = (leave_B | out_of_steps_B) if decode.leave_early else out_of_steps_B
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
    counts_B = jnp.sum(selected_BL, axis=-1, dtype=jnp.int32)
    return state._replace(
        selected_BL=selected_BL, variant=setup.method.variant_id(state.nfe, counts_B, setup.geo)
    )


def _noise_keys(setup: Setup, state: DecodeState, slot_BW: Int[Array, "B W"]) -> Key[Array, "B W"]:
    """One key per position: a function of row key, the row's step and the rotary position."""
    position_BW = queries.gather(queries.positions(setup.valid_BL), slot_BW)

    def row(key: Array, step: Array, position_W: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), position_W)

    return jax.vmap(row)(setup.key_B, state.step_B, position_BW)
