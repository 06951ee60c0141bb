"""Query sets as padded index arrays: the only module that knows about slots.

Cache methods speak of *sets of positions* (`Bool[L]`). A compiled step needs a static number of
query slots, so a set is packed into `capacity` indices, in ascending order, and the rest is filled
with the sentinel `L`. Gathers clip the sentinel (the value is never used), scatters drop it. At
full capacity every position keeps its own slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int, PyTree


class Slots(NamedTuple):
    """What is known of all slots, and the same in every step.

    Attributes:
      valid_BL: slots that hold a real token or a mask; the others are padding and never attended.
      rotary_BLH: cosines, then sines, of the rotary angles of each slot (`models.base.lay_out`).
    """

    valid_BL: Bool[Array, "B L"]
    rotary_BLH: Float[Array, "B L H"]


class Queries(NamedTuple):
    """The positions that enter the network in one forward.

    Attributes:
      index_BQ: absolute slots, ascending where they are not empty; `L` marks an empty query slot.
      rotary_BQH: `Slots.rotary_BLH` of those slots.
      slots: all slots.
      attended_BL: slots that the queries may attend to, out of the valid ones.
    """

    index_BQ: Int[Array, "B Q"]
    rotary_BQH: Float[Array, "B Q H"]
    slots: Slots
    attended_BL: Bool[Array, "B L"]

    @property
    def valid_BL(self) -> Bool[Array, "B L"]:
        return self.slots.valid_BL


def positions(valid_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Rotary position of every slot: the number of valid slots before it (0 at leading padding)."""
    return jnp.maximum(jnp.cumsum(valid_BL.astype(jnp.int32), axis=-1) - 1, 0)


def pack(
    mask_BL: Bool[Array, "B L"], slots: Slots, attended_BL: Bool[Array, "B L"], capacity: int
) -> Queries:
    """Packs one set of positions per row into `capacity` query slots.

    Args:
      mask_BL: the positions to compute. No row may hold more than `capacity`.
      slots: all slots.
      attended_BL: slots that they may attend to.
      capacity: Q, static.
    """
    index_BQ = pack_index(mask_BL, capacity)
    return Queries(index_BQ, gather(slots.rotary_BLH, index_BQ), slots, attended_BL)


def every(slots: Slots) -> Queries:
    """All slots as queries, padding included: a whole forward without packing, Q = L."""
    shape = slots.valid_BL.shape
    index_BL = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Queries(index_BL, slots.rotary_BLH, slots, slots.valid_BL)


def pack_index(mask_BL: Bool[Array, "B L"], capacity: int) -> Int[Array, "B Q"]:
    """The indices of the true entries of each row, ascending, and L in the rest of `capacity`.

    At the front; at full capacity (L) each at its own place.
    """
    length = mask_BL.shape[1]
    if capacity == length:
        return jnp.where(mask_BL, jnp.arange(length, dtype=jnp.int32)[None], jnp.int32(length))

    def row(mask_L: Array) -> Array:
        return jnp.nonzero(mask_L, size=capacity, fill_value=length)[0].astype(jnp.int32)

    return jax.vmap(row)(mask_BL)


def unpack_index(index_BQ: Int[Array, "B Q"], length: int) -> Int[Array, "B L"]:
    """The inverse of `pack_index`: the query slot that holds a slot, or Q if none does."""
    size = index_BQ.shape[1]
    empty_BL = jnp.full((index_BQ.shape[0], length), size, jnp.int32)
    return scatter(
        empty_BL, jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), index_BQ.shape), index_BQ
    )


def gather(values_BLx: PyTree, index_BQ: Int[Array, "B Q"]) -> PyTree:
    """Reads `[B, L, ...]` arrays at the given slots; an empty slot reads the last one."""

    def row(values_Lx: Array, index_Q: Array) -> Array:
        return values_Lx.at[index_Q].get(mode="clip")

    return jax.tree.map(lambda values: jax.vmap(row)(values, index_BQ), values_BLx)


def scatter_row(values_Lx: Array, updates_Qx: Array, index_Q: Int[Array, " Q"]) -> Array:
    """Writes `[Q, ...]` updates into an `[L, ...]` array; empty slots write nothing."""
    return values_Lx.at[index_Q].set(
        updates_Qx.astype(values_Lx.dtype), mode="drop", unique_indices=True
    )


def scatter(values_BLx: Array, updates_BQx: Array, index_BQ: Int[Array, "B Q"]) -> Array:
    """`scatter_row` for every row of a batch."""
    return jax.vmap(scatter_row)(values_BLx, updates_BQx, index_BQ)


def scatter_heads(values_BKLH: Array, updates_BQKH: Array, index_BQ: Int[Array, "B Q"]) -> Array:
    """`scatter` into an array with the heads before the slots."""

    def row(values_KLH: Array, updates_QKH: Array, index_Q: Array) -> Array:
        return values_KLH.at[:, index_Q].set(
            updates_QKH.swapaxes(0, 1).astype(values_KLH.dtype), mode="drop", unique_indices=True
        )

    return jax.vmap(row)(values_BKLH, updates_BQKH, index_BQ)
