"""Where each row stands: what it may fill next, when it leaves a block, what it computes."""

import functools

import jax
import jax.numpy as jnp

from dlm_jax.decoding import termination
from dlm_jax.decoding.rows import Row, Rows, per_row
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.typing import Array, Bool, Int, PyTree


def unfinished(setup: Setup, state: DecodeState) -> Bool[Array, ""]:
    """Whether there is a row that has not left its last block, and a forward to spend on it."""
    limit = setup.most_forwards
    if setup.decode.max_forwards is not None:
        limit = jnp.minimum(setup.decode.max_forwards, limit)
    return jnp.any(state.rows.block_B < setup.geo.num_blocks) & (state.nfe < limit)


def enter(setup: Setup, state: DecodeState) -> DecodeState:
    """Brings a fresh state to its first block and chooses what its first forward computes."""
    before_B = state.rows.block_B - 1
    block_B, masks_B = _next_block(setup, state.rows.tokens_BL, before_B)
    return _prepare(
        setup,
        state._replace(
            rows=state.rows._replace(block_B=block_B, block_step_B=jnp.zeros_like(block_B)),
            block_masks_B=masks_B,
        ),
    )


def advance(setup: Setup, state: DecodeState) -> DecodeState:
    """Moves rows to the next step of their block, or to their next block, and prepares that step.

    Of the rows, only the tokens are those after the step that was made.
    """
    geo, decode, rows = setup.geo, setup.decode, state.rows
    block_step_B = rows.block_step_B + 1
    done_B = rows.block_B >= geo.num_blocks
    left_BL = jax.vmap(functools.partial(_left, setup))(rows.tokens_BL, rows.valid_BL)
    full_B = jax.vmap(setup.blocks.count_in)(left_BL, rows.block_B) == 0
    leave_B = full_B
    if geo.steps is not None and not setup.strategy.adaptive:
        out_of_steps_B = block_step_B >= geo.steps_per_block
        if not decode.leave_early:
            leave_B = out_of_steps_B & (full_B if decode.ban_mask else True)
        elif termination.ends_with_steps(decode):
            leave_B = full_B | out_of_steps_B
    if setup.lockstep:
        leave_B = jnp.broadcast_to(jnp.all(leave_B | done_B), leave_B.shape)
    leave_B = leave_B & ~done_B
    next_B, masks_B = _next_block(setup, rows.tokens_BL, rows.block_B)
    return _prepare(
        setup,
        state._replace(
            rows=rows._replace(
                block_B=jnp.where(leave_B, next_B, rows.block_B),
                block_step_B=jnp.where(leave_B, 0, block_step_B),
                step_B=rows.step_B + rows.active_B.astype(jnp.int32),
            ),
            block_masks_B=jnp.where(leave_B, masks_B, state.block_masks_B),
        ),
    )


def _prepare(setup: Setup, state: DecodeState) -> DecodeState:
    """Works out what the next step may do with each row, and what its forward computes."""
    method, geo, given = setup.method, setup.geo, state.rows
    order_BL = setup.order_BL(state.nfe, given.step_B)
    rows = Rows(
        *per_row(functools.partial(_row, setup))(
            given._replace(order_BL=order_BL, committed_BL=state.committed_at_BL >= 0),
            state.block_masks_B,
            state.strategy_memory,
            state.memory,
        )
    )

    def select(row: Row, memory: PyTree) -> tuple[Bool[Array, " L"], Bool[Array, " shapes"]]:
        selected_L = method.select(memory, row, geo) & row.valid_L & jnp.any(row.eligible_L)
        return selected_L, method.serves(row, selected_L, geo)

    selected_BL, serves_Bs = per_row(select)(rows, state.memory)
    shape = jnp.argmax(jnp.all(serves_Bs, axis=0)).astype(jnp.int32)
    return state._replace(rows=rows, selected_BL=selected_BL, shape=shape)


def _row(
    setup: Setup,
    row: Row,
    block_masks: Int[Array, ""],
    strategy_memory: PyTree,
    memory: PyTree,
) -> Row:
    """What a row, of which only tokens and place are up to date, may do in the next step."""
    blocks, strategy, method, geo = setup.blocks, setup.strategy, setup.method, setup.geo
    masked_L = blocks.masked(row.tokens_L, row.valid_L, setup.model.config.mask_id)
    open_L = blocks.eligible(masked_L, row.block)
    eligible_L = open_L & _before_end(setup, row.tokens_L)
    if setup.decode.fill_past_eos:
        eligible_L = open_L & jnp.any(eligible_L)
    # An early end does not slow the pace: masks behind it count as if they were to be filled.
    pace = (block_masks, blocks.count_in(masked_L, row.block), row.block_step)
    least, most = setup.schedule.bounds(*pace)
    row = row._replace(
        masked_L=masked_L,
        eligible_L=eligible_L,
        attended_L=row.valid_L,
        least=least,
        most=most,
        share=setup.schedule.share(*pace),
    )
    row = _narrowed(row, strategy.restrict(strategy_memory, row, geo))
    row = _narrowed(row, method.restrict(memory, row, geo))
    return row._replace(next_L=strategy.next(row))


def _narrowed(row: Row, restricted: Row) -> Row:
    """What `restrict` may decide of a row."""
    return row._replace(
        eligible_L=row.eligible_L & restricted.eligible_L,
        attended_L=row.attended_L & restricted.attended_L,
        least=restricted.least,
        most=restricted.most,
    )


def _left(
    setup: Setup, tokens_L: Int[Array, " L"], valid_L: Bool[Array, " L"]
) -> Bool[Array, " L"]:
    """Masks of a row that are still to be filled."""
    masked_L = setup.blocks.masked(tokens_L, valid_L, setup.model.config.mask_id)
    return masked_L & _before_end(setup, tokens_L)


def _before_end(setup: Setup, tokens_L: Int[Array, " L"]) -> Bool[Array, " L"]:
    """Positions that have a say in the answer: those before its end, where that is looked for."""
    if not setup.decode.stop_until_eos:
        return jnp.ones(tokens_L.shape, bool)
    generated_L = jnp.arange(setup.geo.length) >= setup.geo.prompt
    ends = setup.decode.ends_of_text(setup.model.config)
    ended_L = functools.reduce(jnp.logical_or, [tokens_L == end for end in ends])
    return jnp.cumsum(ended_L & generated_L) == 0


def _next_block(
    setup: Setup, tokens_BL: Int[Array, "B L"], block_B: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The block that a row goes on to, beyond all in which nothing is to be filled; its masks."""
    blocks, number, valid_BL = setup.blocks, setup.geo.num_blocks, setup.slots.valid_BL
    if not setup.decode.leave_early:
        next_B = block_B + 1
    else:
        wanted_BL = jax.vmap(functools.partial(_left, setup))(tokens_BL, valid_BL)
        open_Bb = jax.vmap(blocks.count)(wanted_BL) > 0
        if setup.lockstep:
            open_Bb = jnp.broadcast_to(jnp.any(open_Bb, axis=0)[None], open_Bb.shape)
        later_Bb = open_Bb & (jnp.arange(number)[None] > block_B[:, None])
        first_B = jnp.argmax(later_Bb, axis=-1).astype(block_B.dtype)
        next_B = jnp.where(jnp.any(later_Bb, axis=-1), first_B, jnp.full_like(first_B, number))
    mask_id = setup.model.config.mask_id
    masked_BL = jax.vmap(blocks.masked, (0, 0, None))(tokens_BL, valid_BL, mask_id)
    return next_B, jax.vmap(blocks.count_in)(masked_BL, next_B)
