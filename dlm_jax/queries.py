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


class Packed(NamedTuple):
    """A set of positions of each row in a static number Q of entries, at their front and ascending;
    where Q = L, each at its own place.

    Attributes:
      index_BQ: the slot of every entry; L marks an empty one.
      place_BL: the entry of every slot; Q marks one that is not in the set.
    """

    index_BQ: Int[Array, "B Q"]
    place_BL: Int[Array, "B L"]


class Queries(NamedTuple):
    """The positions that enter the network in one forward.

    Attributes:
      index_BQ: absolute slots, ascending where they are not empty; `L` marks an empty query slot.
      place_BL: the query of every slot; Q marks one that is not among them.
      rotary_BQH: `Slots.rotary_BLH` of those slots.
      slots: all slots.
      attended_BL: slots that the queries may attend to, out of the valid ones.
      read_BW: places among the queries, Q for none, whose hidden states the last layer returns;
        None is all of them, and in all other layers.
    """

    index_BQ: Int[Array, "B Q"]
    place_BL: Int[Array, "B L"]
    rotary_BQH: Float[Array, "B Q H"]
    slots: Slots
    attended_BL: Bool[Array, "B L"]
    read_BW: Int[Array, "B W"] | None = None

    @property
    def valid_BL(self) -> Bool[Array, "B L"]:
        return self.slots.valid_BL

    def outputs(self, values_BQx: PyTree) -> PyTree:
        """Of `[B, Q, ...]` arrays, the part that concerns what the layer returns."""
        return values_BQx if self.read_BW is None else gather(values_BQx, self.read_BW)


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
    packed = pack_index(mask_BL, capacity)
    return Queries(*packed, gather(slots.rotary_BLH, packed.index_BQ), slots, attended_BL)


def every(slots: Slots) -> Queries:
    """All slots as queries, padding included: a whole forward without packing, Q = L."""
    shape = slots.valid_BL.shape
    index_BL = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Queries(index_BL, index_BL, slots.rotary_BLH, slots, slots.valid_BL)


def pack_index(mask_BL: Bool[Array, "B L"], capacity: int) -> Packed:
    """The true entries of each row, the leftmost of them if they are more than `capacity`."""
    length = mask_BL.shape[1]
    slot_L = jnp.arange(length, dtype=jnp.int32)
    if capacity == length:
        own_BL = jnp.where(mask_BL, slot_L[None], jnp.int32(length))
        return Packed(own_BL, own_BL)
    place_BL = jnp.where(mask_BL, jnp.cumsum(mask_BL, axis=-1, dtype=jnp.int32) - 1, capacity)
    # Compared with one another, not scattered: on a GPU a single kernel.
    here_BQL = place_BL[:, None, :] == jnp.arange(capacity, dtype=jnp.int32)[None, :, None]
    slot_BQL = jnp.where(here_BQL, slot_L[None, None], jnp.int32(length))
    return Packed(jnp.min(slot_BQL, axis=-1), jnp.minimum(place_BL, capacity))


def gather(values_BLx: PyTree, index_BQ: Int[Array, "B Q"]) -> PyTree:
    """Reads `[B, L, ...]` arrays at the given slots; an empty slot reads the last one."""

    def row(values_Lx: Array, index_Q: Array) -> Array:
        return values_Lx.at[index_Q].get(mode="clip")

    return jax.tree.map(lambda values: jax.vmap(row)(values, index_BQ), values_BLx)


def look_up(values_W: Array, place_L: Int[Array, " L"], fill: float | int) -> Array:
    """For one row, what stands in the entry of every slot, and `fill` where it has none.

    Args:
      values_W: one value for each entry.
      place_L: see `Packed`.
      fill: of the dtype of the values.
    """
    there_L = place_L < values_W.shape[0]
    return jnp.where(
        there_L, values_W.at[place_L].get(mode="clip"), jnp.asarray(fill, values_W.dtype)
    )


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
