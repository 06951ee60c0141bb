"""One denoising step: from a state to the next.

    select -> pack -> walk over the layers -> hidden states where tokens may be put
           -> candidate and confidence -> which to commit -> observe -> next step or block

The step is ids in, ids out. It knows no model and no cache method by name: whatever is static
(model, decoding configuration, method, geometry) and whatever stays constant is in `Setup`,
whatever evolves in `DecodeState`. The drivers that repeat it are in `decode.py`.
"""

import functools

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.cache.base import Observation, Variant
from dlm_jax.decoding import canvas
from dlm_jax.decoding.commit import commit, revoke
from dlm_jax.decoding.forward import forward
from dlm_jax.decoding.predict import propose
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.decoding.strategies import klass
from dlm_jax.typing import Array, Bool, Int, PyTree


def begin(setup: Setup, tokens_BL: Int[Array, "B L"], record: tuple[str, ...] = ()) -> DecodeState:
    """The state before the first step; `record` as in `diffusion_generate`."""
    geo, decode, config = setup.geo, setup.decode, setup.model.config
    batch = tokens_BL.shape[0]
    zeros_B = jnp.zeros(batch, jnp.int32)
    memory = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (batch, *jnp.shape(leaf))), setup.method.init(geo)
    )
    dtype = setup.params["embed"]["embedding"].dtype
    forwards = setup.most_forwards
    sets_TBL = jnp.zeros((forwards, *tokens_BL.shape), bool)
    # An order goes on even if the candidate was the mask token, where that is not banned.
    ordered = setup.draws.order is not None and setup.draws.order.ndim == 2
    fillable = geo.length if decode.infill else geo.gen
    state = DecodeState(
        tokens_BL=tokens_BL,
        committed_at_BL=jnp.full(tokens_BL.shape, -1, jnp.int32),
        confidence_BL=jnp.zeros(tokens_BL.shape, jnp.float32),
        nfe=jnp.zeros((), jnp.int32),
        step_B=zeros_B,
        block_B=zeros_B,
        block_step_B=zeros_B,
        block_masks_B=zeros_B,
        passed_BL=jnp.zeros(tokens_BL.shape, bool) if ordered and not decode.ban_mask else None,
        stability=(
            klass.begin(batch, fillable, config.vocab_size, decode.kl_history_length)
            if decode.strategy == "klass"
            else None
        ),
        selected_BL=jnp.zeros(tokens_BL.shape, bool),
        variant=jnp.zeros((), jnp.int32),
        memory=memory,
        cache=setup.method.init_cache(config, geo, setup.copies * batch, dtype),
        asked_TB=jnp.zeros((forwards, batch), jnp.float32),
        variant_T=jnp.full(forwards, -1, jnp.int32),
        computed_TBL=sets_TBL if "computed" in record else None,
        layer_sets=(sets_TBL,) * config.num_layers if "computed_layers" in record else None,
        canvas_TBL=(
            jnp.zeros(sets_TBL.shape, jnp.int32)
            if "history" in record and decode.strategy == "wino"
            else None
        ),
    )
    return canvas.enter(setup, state)


def step(setup: Setup, state: DecodeState, variant: Variant) -> DecodeState:
    """One denoising step: computes the selected positions, commits tokens, chooses the next set."""
    method, geo = setup.method, setup.geo
    mask_id = setup.model.config.mask_id
    rows, most_B = canvas.rows(setup, state)
    active_B = jnp.any(rows.eligible_L, axis=-1)

    # Network and candidates: what the model would put where.
    seen = forward(setup, state, rows, variant)
    proposed = propose(setup, state, seen)
    nowhere_BL = jnp.full(state.tokens_BL.shape, -jnp.inf, jnp.float32)
    confidence_BL = queries.scatter(nowhere_BL, proposed.confidence, seen.slot_BW)
    confidence_BL = jnp.where(seen.read_BL, confidence_BL, nowhere_BL)

    # Commit.
    stability = state.stability
    if stability is not None and proposed.tempered is not None:
        stability = klass.update(stability, proposed.tempered, seen.slot_BW, active_B, geo.length)
    commit_BL = commit(setup, state, stability, rows, most_B, seen, proposed)
    tokens_BL = jnp.where(
        commit_BL, queries.scatter(state.tokens_BL, proposed.token, seen.slot_BW), state.tokens_BL
    )
    # Where the mask token is not banned it may be chosen; the position is then still a mask.
    final_BL = commit_BL & (tokens_BL != mask_id)
    committed_at_BL = jnp.where(final_BL, state.nfe, state.committed_at_BL)
    if proposed.standing is not None:
        revoked_BL = revoke(setup, state, rows, commit_BL, seen, proposed.standing)
        tokens_BL = jnp.where(revoked_BL, mask_id, tokens_BL)
        committed_at_BL = jnp.where(revoked_BL, -1, committed_at_BL)

    # Remember.
    obs = Observation(
        state.selected_BL, seen.read_BL, commit_BL, confidence_BL, tokens_BL, seen.acc
    )
    observed = jax.vmap(functools.partial(method.observe, geo=geo))(state.memory, rows, obs)
    state = _record(setup, state, seen.acc, tokens_BL)
    told_BL = jnp.where(final_BL, confidence_BL, state.confidence_BL)
    state = state._replace(
        tokens_BL=tokens_BL,
        committed_at_BL=committed_at_BL,
        confidence_BL=jnp.where(committed_at_BL < 0, 0.0, told_BL),
        nfe=state.nfe + 1,
        passed_BL=None if state.passed_BL is None else state.passed_BL | commit_BL,
        stability=stability,
        step_B=state.step_B + active_B.astype(jnp.int32),
        memory=jax.vmap(_keep_unless)(active_B, observed, state.memory),
        cache=seen.cache,
    )
    return canvas.advance(setup, state)


def _keep_unless(active: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, old)


def _record(
    setup: Setup, state: DecodeState, acc: PyTree, tokens_BL: Int[Array, "B L"]
) -> DecodeState:
    """Writes down what this forward computed, and where wanted the canvas after it."""
    layer_sets = setup.method.layer_sets(state.selected_BL, acc, setup.model.config)
    counts = [jnp.sum(set_BL, axis=-1, dtype=jnp.float32) for set_BL in layer_sets]
    asked_B = setup.copies * sum(counts, jnp.zeros(())) / len(counts)

    def put(values_TBL: Array, value_BL: Array) -> Array:
        return values_TBL.at[state.nfe].set(value_BL)

    state = state._replace(
        asked_TB=state.asked_TB.at[state.nfe].set(asked_B),
        variant_T=state.variant_T.at[state.nfe].set(state.variant),
    )
    if state.computed_TBL is not None:
        state = state._replace(computed_TBL=put(state.computed_TBL, state.selected_BL))
    if state.layer_sets is not None:
        state = state._replace(layer_sets=tuple(map(put, state.layer_sets, layer_sets)))
    if state.canvas_TBL is not None:
        state = state._replace(canvas_TBL=put(state.canvas_TBL, tokens_BL))
    return state
