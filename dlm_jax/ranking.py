"""Ranks among the positions of one row, and how much is known around each."""

import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int

FEW = 128
"""So many positions are compared with one another, not sorted: one kernel of a GPU and not five."""


def rank(score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"]) -> Int[Array, " L"]:
    """Place of every position by score, the highest first, the leftmost among equals.

    Eligible positions come before all others.
    """
    # A score may be -inf or not a number, which must still come before what is not eligible.
    key_L = jnp.where(eligible_L, -jnp.nan_to_num(score_L, nan=-jnp.inf), jnp.inf)
    if key_L.shape[0] <= FEW:
        slot_L = jnp.arange(key_L.shape[0])
        left_LL = slot_L[None] < slot_L[:, None]
        equal_LL = key_L[None] == key_L[:, None]
        before_LL = (key_L[None] < key_L[:, None]) | (equal_LL & left_LL)
        return jnp.sum(before_LL, axis=-1, dtype=jnp.int32)
    order_L = jnp.argsort(key_L, stable=True)
    return (
        jnp.zeros_like(order_L)
        .at[order_L]
        .set(jnp.arange(order_L.shape[0], dtype=order_L.dtype), unique_indices=True)
    )


def top(
    score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], count: Int[Array, ""]
) -> Bool[Array, " L"]:
    """The `count` eligible positions with the highest score, the leftmost among equals.

    All eligible positions if there are fewer than `count`; never one that is not eligible.
    """
    return eligible_L & (rank(score_L, eligible_L) < count)


def leading(true_L: Bool[Array, " L"]) -> Int[Array, ""]:
    """How many are true before the first that is not."""
    return jnp.sum(jnp.cumprod(true_L.astype(jnp.int32)), dtype=jnp.int32)


def certainty_density(
    known_G: Bool[Array, " G"], sigma: float | int | Float[Array, ""]
) -> Float[Array, " G"]:
    """Gaussian-weighted share of known positions around each generated position of one row
    (certainty density; d2Cache, arXiv 2509.23094, eq. 3).

    Everything before the generated part counts as known, for G positions; everything behind it, for
    G positions, is taken to be like its last one.

    Args:
      known_G: generated positions that are not masks.
      sigma: width of the Gaussian, in positions, above 0.
    """
    size = known_G.shape[0]
    # At most 3 G positions in either direction take part; the sum is that of the original.
    distance = jnp.arange(-3 * size, 3 * size, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * (distance / sigma) ** 2)
    weights = weights / jnp.sum(weights)
    total = jnp.cumsum(weights)
    place_G = 3 * size + jnp.arange(size)
    left_G = total[place_G + size] - total[place_G]
    right_G = jnp.flip(left_G)  # the same distances, counted from the other end
    within_GG = weights[place_G[:, None] - jnp.arange(size)[None]]
    known_GG = jnp.broadcast_to(known_G[None], within_GG.shape)
    inside_G = jnp.sum(within_GG, axis=1, where=known_GG)
    return inside_G + left_G + jnp.where(known_G[-1], right_G, 0.0)
