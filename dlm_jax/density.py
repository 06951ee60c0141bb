"""Certainty density: how much is known around a position (d2Cache, arXiv 2509.23094, eq. 3)."""

import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float


def certainty_density(
    known_G: Bool[Array, " G"], sigma: float | int | Float[Array, ""]
) -> Float[Array, " G"]:
    """Gaussian-weighted share of known positions around each generated position of one row.

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
