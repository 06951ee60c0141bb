"""The network's part of a denoising step: from a canvas to what predicts the tokens to be put."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.cache.base import Row, Variant
from dlm_jax.decoding import guidance, turns
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.decoding.strategies import wino
from dlm_jax.models.base import LayerFn, readout, source_slot
from dlm_jax.queries import Slots
from dlm_jax.typing import Array, Bool, Float, Int, PyTree


class Seen(NamedTuple):
    """What a forward says about the canvas."""

    slot_BW: Int[Array, "B W"]
    """Where predictions are wanted; L marks an unused entry."""
    hidden_BWD: Float[Array, "B2 W D"]
    """The hidden states that predict these slots; 2 B rows if there are copies for guidance."""
    read_BL: Bool[Array, "B L"]
    """Masks among these slots, as far as they were wanted and computed."""
    cache: tuple[PyTree, ...]
    acc: PyTree
    """What the layer functions accumulated, for each row."""


class Work(NamedTuple):
    """What the network needs to know of each row."""

    tokens_BL: Int[Array, "B L"]
    selected_BL: Bool[Array, "B L"]
    """Positions to compute."""
    slots: Slots
    rows: Row
    slot_BW: Int[Array, "B W"]
    """Where predictions are wanted; L marks an unused entry."""


def forward(setup: Setup, state: DecodeState, rows: Row, variant: Variant) -> Seen:
    """The network over the selected positions, read at masks that are wanted and computed."""
    if setup.decode.strategy == "wino":
        return _shadowed(setup, state, rows)
    method, geo, config = setup.method, setup.geo, setup.model.config
    slot_BL = jnp.broadcast_to(jnp.arange(geo.length, dtype=jnp.int32), state.tokens_BL.shape)
    readable_BL = jax.vmap(functools.partial(method.readable, geo=geo))(state.memory, rows)
    if setup.decode.strategy == "klass":  # follows every prediction, also those of later blocks
        readable_BL = readable_BL | rows.masked_L
    source_BL = source_slot(slot_BL, setup.valid_BL, config.shift)
    read_BL = readable_BL & queries.gather(state.selected_BL, source_BL)
    slot_BW = queries.pack_index(read_BL, setup.readout_width(variant))

    work = Work(state.tokens_BL, state.selected_BL, setup.slots, rows, slot_BW)
    if setup.decode.guided:  # the network sees 2 B rows
        canvas_BL = guidance.canvases(state.tokens_BL, state.committed_at_BL, config.mask_id)
        work = guidance.with_copy(work)._replace(tokens_BL=canvas_BL)
    (hidden_BWD, acc), cache = _compute(setup, work, state.cache, variant)
    if setup.decode.guided:
        acc = guidance.without_copy(acc)
    return Seen(slot_BW, hidden_BWD, read_BL, cache, acc)


def _compute(
    setup: Setup, work: Work, cache: PyTree, variant: Variant
) -> tuple[tuple[Float[Array, "B2 W D"], PyTree], PyTree]:
    """Hidden states that predict the wanted slots, what the layers accumulated, the new cache."""
    method, geo, config = setup.method, setup.geo, setup.model.config
    batch = work.tokens_BL.shape[0]

    def network(
        work: Work, cache: PyTree, layers: tuple[tuple[int, int, LayerFn], ...]
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        query = queries.pack(work.selected_BL, work.slots, variant.capacity)
        walked: Any = setup.model.apply(
            {"params": setup.params},
            queries.gather(work.tokens_BL, query.index_BQ),
            query,
            cache,
            method.init_acc(work.rows, query, geo),
            layers,
            method="walk",
        )
        hidden_BQD, cache, acc = walked
        return (readout(hidden_BQD, query, work.slot_BW, config.shift), acc), cache

    layers = method.layers(variant, config, geo)
    size = turns.rows_per_turn(batch, variant.capacity)
    if size == batch:  # all at once
        return network(work, cache, layers)

    def turn(row_C: Array, cache: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
        part = turns.take(work, row_C)
        real_C = row_C < batch
        part = part._replace(selected_BL=part.selected_BL & real_C[:, None])
        on_rows = [(low, high, turns.on_rows(layer, row_C)) for low, high, layer in layers]
        return network(part, cache, tuple(on_rows))

    alike = (work.tokens_BL, work.selected_BL, work.slots.valid_BL, work.slot_BW)
    twin_B = turns.twins(alike, work.rows.step == 0)
    return turns.by_turns(turn, cache, jnp.any(work.selected_BL, axis=-1), twin_B, size)


def _shadowed(setup: Setup, state: DecodeState, rows: Row) -> Seen:
    """The network over the canvas and a shadow of each row's block, read all over the block."""
    slot_BS = wino.span(rows.block, jnp.any(rows.eligible_L, axis=-1), setup.geo)
    hidden_BSD = wino.predict(
        setup.model, setup.params, state.tokens_BL, state.selected_BL, setup.slots, slot_BS
    )
    inside_BL = queries.scatter(
        jnp.zeros_like(rows.masked_L), jnp.ones_like(slot_BS, bool), slot_BS
    )
    return Seen(slot_BS, hidden_BSD, inside_BL & rows.masked_L, state.cache, ())
