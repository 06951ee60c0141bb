"""One denoising step: from a state to the next.

The step is ids in, ids out. It knows no model, no cache method and no strategy by name: whatever
stays constant is in `Setup`, whatever evolves in `DecodeState`. The drivers that repeat it are in
`loop.py`; the diagram of what happens in it opens `dlm_jax/decoding/__init__.py`.
"""

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.cache.base import StepShape
from dlm_jax.decoding import progress
from dlm_jax.decoding.forward import Seen, forward
from dlm_jax.decoding.predict import Predictions, predict, propose
from dlm_jax.decoding.rows import Chance, Observation, Row, per_row
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.typing import Array, Bool, Int, PyTree


def step(setup: Setup, state: DecodeState, shape: StepShape) -> DecodeState:
    """One denoising step: computes what was selected, commits tokens, selects anew."""
    with jax.named_scope(shape.scope):
        return _step(setup, state, shape)


def _step(setup: Setup, state: DecodeState, shape: StepShape) -> DecodeState:
    mask_id, rows = setup.model.config.mask_id, state.rows

    # What the model would put where.
    seen = forward(setup, state, shape)
    predictions, strategy_memory = predict(setup, state._replace(cache=()), seen)

    # Commit, and revoke.
    strategy_memory, chosen_BL, revoked_BL = _decide(
        setup, state, seen, predictions, strategy_memory
    )
    look_up = jax.vmap(queries.look_up, (0, 0, None))
    proposed_BL = look_up(predictions.token, seen.place_BL, mask_id)
    tokens_BL = jnp.where(chosen_BL, proposed_BL, rows.tokens_BL)
    # Where the mask token is not banned it may be chosen; the position is then still a mask.
    committed_BL = chosen_BL & (tokens_BL != mask_id)
    tokens_BL = jnp.where(revoked_BL, mask_id, tokens_BL)
    committed_at_BL = jnp.where(committed_BL, state.nfe, state.committed_at_BL)
    committed_at_BL = jnp.where(revoked_BL, -1, committed_at_BL)
    confidence_BL = look_up(predictions.confidence, seen.place_BL, -jnp.inf)
    confidence_BL = jnp.where(seen.read_BL, confidence_BL, -jnp.inf)
    told_BL = jnp.where(committed_BL, confidence_BL, state.confidence_BL)
    wanted_BW = seen.slot_BW < setup.geo.length
    broken_B = jnp.any(wanted_BW & ~predictions.finite, axis=-1) & (state.not_finite_at_B < 0)

    # Remember.
    def observe(row: Row, memory: PyTree, *observed: PyTree) -> PyTree:
        return setup.method.observe(memory, row, Observation(*observed), setup.geo)

    memory = per_row(observe)(
        rows,
        state.memory,
        state.selected_BL,
        seen.read_BL,
        chosen_BL,
        confidence_BL,
        tokens_BL,
        seen.acc,
    )
    if_active = jax.vmap(_if)
    state = _record(setup, state, seen.acc, tokens_BL)._replace(
        rows=rows._replace(tokens_BL=tokens_BL),
        committed_at_BL=committed_at_BL,
        confidence_BL=jnp.where(committed_at_BL < 0, 0.0, told_BL),
        not_finite_at_B=jnp.where(broken_B, state.nfe, state.not_finite_at_B),
        nfe=state.nfe + 1,
        strategy_memory=if_active(rows.active_B, strategy_memory, state.strategy_memory),
        memory=if_active(rows.active_B, memory, state.memory),
        cache=seen.cache,
    )
    return progress.advance(setup, state)


def _decide(
    setup: Setup, state: DecodeState, seen: Seen, predictions: Predictions, strategy_memory: PyTree
) -> tuple[PyTree, Bool[Array, "B L"], Bool[Array, "B L"]]:
    """The strategy's memory after the step, what is committed, and what becomes a mask again."""
    strategy, geo = setup.strategy, setup.geo
    given_BL = setup.transfer_BL(state.nfe)

    def decide(
        row: Row,
        memory: PyTree,
        read_L: Array,
        packed: tuple[Array, Array],
        predictions: Predictions,
        chance: Chance,
    ) -> tuple[PyTree, Array, Array]:
        proposal = propose(setup, row, read_L, packed, predictions, chance)
        memory, chosen_L = strategy.choose(memory, row, proposal, geo)
        chosen_L = chosen_L & proposal.candidate_L
        if not strategy.revokes:
            return memory, chosen_L, jnp.zeros_like(chosen_L)
        return memory, chosen_L, strategy.revoke(row, proposal, chosen_L, geo) & row.committed_L

    chances = Chance(setup.key_B, state.rows.step_B, setup.position_BL)
    packed = (seen.slot_BW, seen.place_BL)
    memory, chosen_BL, revoked_BL = per_row(decide)(
        state.rows, strategy_memory, seen.read_BL, packed, predictions, chances
    )
    if given_BL is not None:
        chosen_BL = seen.read_BL & state.rows.eligible_BL & given_BL
    return memory, chosen_BL, revoked_BL


def _if(active: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, old)


def _record(
    setup: Setup, state: DecodeState, acc: PyTree, tokens_BL: Int[Array, "B L"]
) -> DecodeState:
    """Writes down what this forward computed, and where wanted the canvas after it."""
    config = setup.model.config

    def sets(selected_L: Array, acc: PyTree) -> tuple[Array, ...]:
        return setup.method.layer_sets(selected_L, acc, config)

    layer_sets = jax.vmap(sets)(state.selected_BL, acc)
    counts = [jnp.sum(set_BL, axis=-1, dtype=jnp.float32) for set_BL in layer_sets]
    asked_B = setup.copies * sum(counts, jnp.zeros((), jnp.float32)) / len(counts)

    def put(values_TBL: Array, value_BL: Array) -> Array:
        return values_TBL.at[state.nfe].set(value_BL)

    state = state._replace(
        asked_TB=state.asked_TB.at[state.nfe].set(asked_B),
        shape_T=state.shape_T.at[state.nfe].set(state.shape),
    )
    if state.computed_TBL is not None:
        state = state._replace(computed_TBL=put(state.computed_TBL, state.selected_BL))
    if state.layer_sets is not None:
        state = state._replace(layer_sets=tuple(map(put, state.layer_sets, layer_sets)))
    if state.canvas_TBL is not None:
        state = state._replace(canvas_TBL=put(state.canvas_TBL, tokens_BL))
    return state
