"""Where each row stands: what it may fill now, when it leaves a block, what it computes next."""

import functools

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.cache.base import Row
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Bool, Int


def unfinished(setup: Setup, state: DecodeState) -> Bool[Array, ""]:
    """Whether there is a row that has not left its last block, and a forward to spend on it."""
    limit = setup.most_forwards
    if setup.numbers.max_forwards is not None:
        limit = jnp.minimum(setup.numbers.max_forwards, limit)
    return jnp.any(state.block_B < setup.geo.num_blocks) & (state.nfe < limit)


def rows(setup: Setup, state: DecodeState) -> tuple[Row, Int[Array, " B"]]:
    """The rows as cache methods see them, stacked over B, and the most that each may commit now."""
    geo = setup.geo
    masked_BL = _masked(setup, state.tokens_BL)
    end_B = geo.prompt + (state.block_B + 1) * geo.block
    inside_BL = jnp.arange(geo.length)[None] < end_B[:, None]
    running_B = state.block_B < geo.num_blocks
    open_BL = masked_BL & inside_BL & running_B[:, None]
    eligible_BL = open_BL & _wanted(setup, state.tokens_BL)
    if setup.decode.fill_past_eos:
        eligible_BL = open_BL & jnp.any(eligible_BL, axis=-1, keepdims=True)
    if state.passed_BL is not None:
        eligible_BL = eligible_BL & ~state.passed_BL
    # An early end does not slow the pace: masks behind it count as if they were to be filled.
    least_B, most_B = setup.schedule.bounds(
        state.block_masks_B, _block_masks(masked_BL, state.block_B, geo), state.block_step_B
    )
    stacked = Row(
        tokens_L=state.tokens_BL,
        valid_L=setup.valid_BL,
        masked_L=masked_BL,
        eligible_L=eligible_BL,
        quota=jnp.zeros_like(least_B) if setup.decode.measure.thinned else least_B,
        order_L=setup.order_BL(state.nfe),
        block=state.block_B,
        block_step=state.block_step_B,
        step=state.step_B,
    )
    return jax.vmap(functools.partial(setup.method.restrict, geo=geo))(stacked), most_B


def enter(setup: Setup, state: DecodeState) -> DecodeState:
    """Brings a fresh state to its first block and chooses what its first forward computes."""
    before = state._replace(block_B=state.block_B - 1)
    return _choose(setup, _to_block(setup, state, _next_block(setup, before)))


def advance(setup: Setup, state: DecodeState) -> DecodeState:
    """Moves rows to the next step of their block, or to their next block, and chooses again."""
    geo, decode = setup.geo, setup.decode
    block_step_B = state.block_step_B + 1
    done_B = state.block_B >= geo.num_blocks
    wanted_BL = _masked(setup, state.tokens_BL) & _wanted(setup, state.tokens_BL)
    leave_B = full_B = _block_masks(wanted_BL, state.block_B, geo) == 0
    if geo.steps is not None and not decode.parallel:
        out_of_steps_B = block_step_B >= geo.steps_per_block
        if not decode.leave_early:
            leave_B = out_of_steps_B & (full_B if decode.ban_mask else True)
        elif not decode.ban_mask:
            leave_B = full_B | out_of_steps_B
    if setup.lockstep:
        leave_B = jnp.broadcast_to(jnp.all(leave_B | done_B), leave_B.shape)
    leave_B = leave_B & ~done_B
    moved = _to_block(setup, state, _next_block(setup, state))
    return _choose(
        setup,
        state._replace(
            block_B=jnp.where(leave_B, moved.block_B, state.block_B),
            block_step_B=jnp.where(leave_B, moved.block_step_B, block_step_B),
            block_masks_B=jnp.where(leave_B, moved.block_masks_B, state.block_masks_B),
        ),
    )


def _to_block(setup: Setup, state: DecodeState, block_B: Int[Array, " B"]) -> DecodeState:
    """The state in which every row begins the given block."""
    masked_BL = _masked(setup, state.tokens_BL)
    return state._replace(
        block_B=block_B,
        block_step_B=jnp.zeros_like(block_B),
        block_masks_B=_block_masks(masked_BL, block_B, setup.geo),
    )


def _choose(setup: Setup, state: DecodeState) -> DecodeState:
    """Asks the method what the next forward computes; rows with nothing to fill compute nothing."""
    stacked, _ = rows(setup, state)
    select = functools.partial(setup.method.select, geo=setup.geo)
    active_B = jnp.any(stacked.eligible_L, axis=-1)
    selected_BL = jax.vmap(select)(state.memory, stacked) & setup.valid_BL & active_B[:, None]
    variant = setup.method.variant_id(stacked, selected_BL, setup.geo)
    return state._replace(selected_BL=selected_BL, variant=variant)


def _masked(setup: Setup, tokens_BL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Masks where the canvas may change."""
    masked_BL = (tokens_BL == setup.model.config.mask_id) & setup.valid_BL
    if setup.decode.infill:
        return masked_BL
    return masked_BL & (jnp.arange(setup.geo.length) >= setup.geo.prompt)[None]


def _wanted(setup: Setup, tokens_BL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Positions that have a say in the answer: those before its end, where that is looked for."""
    if not setup.decode.stop_until_eos:
        return jnp.ones(tokens_BL.shape, bool)
    generated_L = jnp.arange(setup.geo.length) >= setup.geo.prompt
    ends_BL = (tokens_BL == setup.eos_id) & generated_L[None]
    return jnp.cumsum(ends_BL, axis=-1) == 0


def _masks_per_block(masked_BL: Bool[Array, "B L"], geo: Geometry) -> Int[Array, "B blocks"]:
    """Masks in each block; those inside the prompt belong to the first."""
    counts_BL = masked_BL.astype(jnp.int32)
    blocks = (masked_BL.shape[0], geo.num_blocks, geo.block)
    counts = counts_BL[:, geo.prompt :].reshape(blocks).sum(axis=-1)
    return counts.at[:, 0].add(counts_BL[:, : geo.prompt].sum(axis=-1))


def _block_masks(
    masked_BL: Bool[Array, "B L"], block_B: Int[Array, " B"], geo: Geometry
) -> Int[Array, " B"]:
    """Masks in one block of each row; 0 for a row that is done."""
    counts = jnp.pad(_masks_per_block(masked_BL, geo), ((0, 0), (0, 1)))
    return queries.gather(counts, block_B[:, None])[:, 0]


def _next_block(setup: Setup, state: DecodeState) -> Int[Array, " B"]:
    """The block that a row goes on to, beyond all in which nothing is to be filled."""
    blocks = setup.geo.num_blocks
    if not setup.decode.leave_early:
        return state.block_B + 1
    wanted_BL = _masked(setup, state.tokens_BL) & _wanted(setup, state.tokens_BL)
    open_Bb = _masks_per_block(wanted_BL, setup.geo) > 0
    if setup.lockstep:
        open_Bb = jnp.broadcast_to(jnp.any(open_Bb, axis=0)[None], open_Bb.shape)
    later_Bb = open_Bb & (jnp.arange(blocks)[None] > state.block_B[:, None])
    first_B = jnp.argmax(later_Bb, axis=-1).astype(state.block_B.dtype)
    return jnp.where(jnp.any(later_Bb, axis=-1), first_B, jnp.full_like(first_B, blocks))
