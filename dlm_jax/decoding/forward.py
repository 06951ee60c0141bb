"""The network's part of a denoising step: from a canvas to what predicts the tokens to be put."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.cache.base import StepShape
from dlm_jax.decoding import guidance, shadow, turns
from dlm_jax.decoding.rows import Row, Rows, per_row
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.models.base import LayerFn, readout, source_slot
from dlm_jax.queries import Slots
from dlm_jax.typing import Array, Bool, Float, Int, PyTree

Layers = tuple[tuple[int, int, LayerFn], ...]


class Seen(NamedTuple):
    """What a forward says about the canvas."""

    slot_BW: Int[Array, "B W"]
    """Where predictions are wanted; L marks an unused entry."""
    place_BL: Int[Array, "B L"]
    """The entry of every slot; W marks one at which none is wanted."""
    hidden_BWD: Float[Array, "B2 W D"]
    """The hidden states that predict these slots; 2 B rows if there are copies for guidance."""
    read_BL: Bool[Array, "B L"]
    """Masks among these slots."""
    cache: tuple[PyTree, ...]
    acc: PyTree
    """What the layer functions accumulated, for each row."""


class Work(NamedTuple):
    """What the network needs to know of each row: all of it can be taken a few rows at a time."""

    rows: Rows
    selected_BL: Bool[Array, "B L"]
    """Positions to compute."""
    slots: Slots
    slot_BW: Int[Array, "B W"]
    """Where predictions are wanted; L marks an unused entry."""


def forward(setup: Setup, state: DecodeState, shape: StepShape) -> Seen:
    """The network over the selected positions, read where that is wanted and computed."""
    geo, config, rows = setup.geo, setup.model.config, state.rows
    slot_BL = jnp.broadcast_to(jnp.arange(geo.length, dtype=jnp.int32), rows.tokens_BL.shape)

    def readable(row: Row, memory: PyTree) -> Bool[Array, " L"]:
        return setup.strategy.readable(row, setup.method.readable(memory, row, geo), geo)

    source_BL = source_slot(slot_BL, rows.valid_BL, config.shift)
    computed_BL = queries.gather(state.selected_BL, source_BL)
    wanted_BL = per_row(readable)(rows, state.memory) & computed_BL
    slot_BW, place_BL = queries.pack_index(wanted_BL, setup.readout_width(shape))

    work = Work(rows, state.selected_BL, setup.slots, slot_BW)
    if setup.decode.guided:  # the network sees 2 B rows
        canvas_BL = guidance.canvases(rows.tokens_BL, rows.committed_BL, config.mask_id)
        work = guidance.with_copy(work)
        work = work._replace(rows=work.rows._replace(tokens_BL=canvas_BL))
    (hidden_BWD, acc), cache = _compute(setup, work, state.cache, shape)
    if setup.decode.guided:
        acc = guidance.without_copy(acc)
    read_BL = (place_BL < slot_BW.shape[1]) & rows.masked_BL
    return Seen(slot_BW, place_BL, hidden_BWD, read_BL, cache, acc)


def _compute(
    setup: Setup, work: Work, cache: PyTree, shape: StepShape
) -> tuple[tuple[Float[Array, "B2 W D"], PyTree], PyTree]:
    """Hidden states that predict the wanted slots, what the layers accumulated, the new cache.

    Wide forwards take a few rows at a time.
    """
    batch = work.selected_BL.shape[0]
    layers = setup.method.layers(shape, setup.model.config, setup.geo)
    size = turns.rows_per_turn(batch, shape.capacity)
    if size == batch:  # all at once
        return _network(setup, work, cache, shape, layers)

    def turn(row_C: Array, cache: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
        part = turns.take(work, row_C)
        real_C = row_C < batch
        part = part._replace(selected_BL=part.selected_BL & real_C[:, None])
        on_rows = [(low, high, turns.on_rows(layer, row_C)) for low, high, layer in layers]
        return _network(setup, part, cache, shape, tuple(on_rows))

    rows = work.rows
    alike = (rows.tokens_BL, work.selected_BL, rows.valid_BL, rows.attended_BL, work.slot_BW)
    twin_B = turns.twins(alike, rows.step_B == 0)
    return turns.by_turns(turn, cache, jnp.any(work.selected_BL, axis=-1), twin_B, size)


def _network(
    setup: Setup, work: Work, cache: PyTree, shape: StepShape, layers: Layers
) -> tuple[tuple[Array, PyTree], PyTree]:
    """The same for all rows of `work` at once."""
    model, params, geo, rows = setup.model, setup.params, setup.geo, work.rows
    if setup.strategy.shadows:
        hidden_BWD = shadow.predict(
            model,
            params,
            rows.tokens_BL,
            work.selected_BL,
            rows.attended_BL,
            work.slots,
            work.slot_BW,
        )
        return (hidden_BWD, ()), cache
    query = queries.pack(work.selected_BL, work.slots, rows.attended_BL, shape.capacity)

    def begin(row: Row, index_Q: Int[Array, " Q"]) -> PyTree:
        return setup.method.init_acc(row, index_Q, geo)

    walked: Any = model.apply(
        {"params": params},
        queries.gather(rows.tokens_BL, query.index_BQ),
        query,
        cache,
        per_row(begin)(rows, query.index_BQ),
        layers,
        readout(query, work.slot_BW, model.config.shift),
        method="walk",
    )
    hidden_BWD, cache, acc = walked
    return (hidden_BWD, acc), cache
