"""Wide forwards by turns: a few rows of the batch at a time, and only those that need it.

From about a thousand positions on a forward is bound by arithmetic: more rows at once gain nothing,
but need memory for their activations. By turns a forward needs the memory of one turn, rows that
are done cost nothing, and rows that begin alike (several answers to one prompt) are computed once.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm_jax.models.base import Block, LayerFn
from dlm_jax.queries import Queries
from dlm_jax.typing import Array, Bool, Float, Int, PyTree

POSITIONS = 2048
"""About as many positions go through the network in a turn."""
WIDE = 256
"""Forwards with fewer positions per row are not taken in turns: they have little to save, and a
turn moves the rows' K/V once more."""

Compute = Callable[[Int[Array, " C"], PyTree], tuple[PyTree, PyTree]]
"""`(row_C, cache) -> (out [C, ...], cache)`: the network over some rows; B marks an empty entry."""


def rows_per_turn(batch: int, capacity: int) -> int:
    """C, for a forward over so many query slots per row: even turns of about `POSITIONS`.

    B means that there is nothing to take in turns.
    """
    if capacity < WIDE or batch * capacity <= POSITIONS:
        return batch
    turns = math.ceil(batch / max(1, POSITIONS // capacity))
    return math.ceil(batch / turns)


def twins(alike: tuple[Array, ...], fresh_B: Bool[Array, " B"]) -> Int[Array, " B"]:
    """The first row that equals each row in all arrays `[B, L]`, where both are fresh; else itself.

    Args:
      alike: all that a forward over a fresh row depends on.
      fresh_B: rows that have no history.
    """
    same_BB = fresh_B[:, None] & fresh_B[None]
    for value_BL in alike:
        same_BB = same_BB & jnp.all(value_BL[:, None] == value_BL[None], axis=-1)
    itself_B = jnp.arange(fresh_B.shape[0], dtype=jnp.int32)
    return jnp.where(fresh_B, jnp.argmax(same_BB, axis=-1).astype(jnp.int32), itself_B)


def by_turns(
    compute: Compute,
    cache: PyTree,
    wanted_B: Bool[Array, " B"],
    twin_B: Int[Array, " B"],
    size: int,
) -> tuple[PyTree, PyTree]:
    """Runs `compute` over the wanted rows, `size` of them at a time.

    Args:
      compute: the network over some rows.
      cache: pytree of `[B, ...]` arrays.
      wanted_B: rows to compute; the others keep their cache, and their output is zero.
      twin_B: see `twins`; a row that is not its own twin gets copies.
      size: C, static.

    Returns:
      The outputs `[B, ...]` and the new cache.
    """
    batch = wanted_B.shape[0]
    own_B = twin_B == jnp.arange(batch)

    def listed(member_B: Array) -> tuple[Array, Array]:
        """The rows of a set, B in all entries behind them, and their number."""
        (rows,) = jnp.nonzero(member_B, size=batch + size, fill_value=batch)
        return rows.astype(jnp.int32), jnp.sum(member_B, dtype=jnp.int32)

    def turn(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        out, cache = carry
        row_C = jax.lax.dynamic_slice(computed, (i * size,), (size,))
        some, cache = compute(row_C, cache)
        return put(out, some, row_C), cache

    def copy(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        row_C = jax.lax.dynamic_slice(copied, (i,), (1,))
        return put(carry, take(carry, twin_B.at[row_C].get(mode="clip")), row_C)

    computed, count = listed(wanted_B & own_B)
    copied, copies = listed(wanted_B & ~own_B)
    shapes, _ = jax.eval_shape(compute, computed[:size], cache)
    out = jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype), shapes)
    carry = jax.lax.fori_loop(0, (count + size - 1) // size, turn, (out, cache))
    return jax.lax.fori_loop(0, copies, copy, carry)


def on_rows(layer: LayerFn, row_C: Int[Array, " C"]) -> LayerFn:
    """A layer function that sees some rows of the cache. One layer at a time, so as not to hold
    another copy of the whole cache of these rows."""

    def on_their_cache(
        block: Block, carry: tuple[Array, PyTree], layer_cache: PyTree, queries: Queries
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        hidden, _ = carry
        carry, new = layer(block, carry, take(layer_cache, after(hidden, row_C)), queries)
        return carry, put(layer_cache, new, row_C)

    return on_their_cache


def after(hidden_BQD: Float[Array, "B Q D"], row_C: Int[Array, " C"]) -> Int[Array, " C"]:
    """The same rows, which the compiler cannot know before the hidden states.

    Nothing but the layers before has it take the rows of a layer after those of another. The
    comparison is never true; `optimization_barrier` is gone by the time that XLA's CPU backend
    orders operations.
    """
    return row_C + (hidden_BQD[0, 0, 0] > jnp.inf).astype(row_C.dtype)


def take(values: PyTree, row_C: Int[Array, " C"]) -> PyTree:
    """Some rows of `[B, ...]` arrays; for an empty entry, any."""
    return jax.tree.map(lambda leaf: leaf.at[row_C].get(mode="clip"), values)


def put(values: PyTree, updates: PyTree, row_C: Int[Array, " C"]) -> PyTree:
    """The arrays with these rows replaced; empty entries write nothing."""

    def leaf(value: Array, update: Array) -> Array:
        return value.at[row_C].set(update, mode="drop", unique_indices=True)

    return jax.tree.map(leaf, values, updates)
