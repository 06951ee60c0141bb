"""The network's part of a denoising step: from a canvas to logits where tokens may be put."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import guidance, queries, wino
from dlm_jax.cache.base import Row, Variant
from dlm_jax.models.base import readout, source_slot
from dlm_jax.state import DecodeState, Setup
from dlm_jax.typing import Array, Bool, Float, Int, PyTree


class Seen(NamedTuple):
    """What a forward says about the canvas."""

    slot_BW: Int[Array, "B W"]
    """Where logits were read; L marks an unused entry."""
    logits_BWV: Float[Array, "B W V"]
    read_BL: Bool[Array, "B L"]
    """Masks among these slots, as far as their logits were wanted and computed."""
    cache: tuple[PyTree, ...]
    acc: PyTree
    """What the layer functions accumulated, for each row."""


def forward(setup: Setup, state: DecodeState, rows: Row, variant: Variant) -> Seen:
    """The network over the selected positions; logits at masks that are wanted and computed."""
    if setup.decode.strategy == "wino":
        return _shadowed(setup, state, rows)
    model, method, geo, config = setup.model, setup.method, setup.geo, setup.model.config
    slot_BL = jnp.broadcast_to(jnp.arange(geo.length, dtype=jnp.int32), state.tokens_BL.shape)
    readable_BL = jax.vmap(functools.partial(method.readable, geo=geo))(state.memory, rows)
    if setup.decode.strategy == "klass":  # follows every prediction, also those of later blocks
        readable_BL = readable_BL | rows.masked_L
    source_BL = source_slot(slot_BL, setup.valid_BL, config.shift)
    read_BL = readable_BL & queries.gather(state.selected_BL, source_BL)
    slot_BW = queries.pack_index(read_BL, setup.readout_width(variant))

    tokens_BL, selected_BL, valid_BL = state.tokens_BL, state.selected_BL, setup.valid_BL
    wanted_BW = slot_BW
    if setup.decode.guided:  # B is then twice the batch, up to the logits
        tokens_BL = guidance.canvases(tokens_BL, state.committed_at_BL, config.mask_id)
        selected_BL, valid_BL, rows, wanted_BW = guidance.with_copy(
            (selected_BL, valid_BL, rows, wanted_BW)
        )
    query = queries.pack(selected_BL, valid_BL, variant.capacity)
    walked: Any = model.apply(
        {"params": setup.params},
        queries.gather(tokens_BL, query.index_BQ),
        query,
        state.cache,
        method.init_acc(rows, query, geo),
        method.layers(variant, config, geo),
        method="walk",
    )
    hidden_BQD, cache, acc = walked
    logits = readout(model, setup.params, hidden_BQD, query, wanted_BW)
    if setup.numbers.cfg_scale is not None:
        conditional, unconditional = jnp.split(logits, 2)
        logits = guidance.combine(conditional, unconditional, setup.numbers.cfg_scale)
        acc = guidance.without_copy(acc)
    return Seen(slot_BW, logits, read_BL, cache, acc)


def _shadowed(setup: Setup, state: DecodeState, rows: Row) -> Seen:
    """The network over the canvas and a shadow of each row's block; logits all over the block."""
    slot_BS = wino.span(rows.block, jnp.any(rows.eligible_L, axis=-1), setup.geo)
    logits = wino.predict(
        setup.model, setup.params, state.tokens_BL, state.selected_BL, setup.valid_BL, slot_BS
    )
    inside_BL = queries.scatter(
        jnp.zeros_like(rows.masked_L), jnp.ones_like(slot_BS, bool), slot_BS
    )
    return Seen(slot_BS, logits, inside_BL & rows.masked_L, state.cache, ())


def process(setup: Setup, state: DecodeState, seen: Seen) -> Float[Array, "B W V"]:
    """The logits after everything that the user wants to be done to them."""
    logits, hook = seen.logits_BWV, setup.logits_processor
    if setup.decode.suppress:
        logits = logits.at[..., jnp.asarray(setup.decode.suppress)].set(-jnp.inf)
    if hook is None:
        return logits
    located = "positions" in inspect.signature(hook).parameters
    where = dict(positions=seen.slot_BW) if located else {}
    processed = hook(state.tokens_BL, logits, state.nfe, **where)
    if jnp.shape(processed) != logits.shape:
        raise ValueError(
            f"logits_processor returned shape {jnp.shape(processed)}; it must be that of the "
            f"logits, {logits.shape}."
        )
    return processed.astype(jnp.float32)
