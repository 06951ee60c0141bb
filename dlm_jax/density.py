"""Certainty density: how much is known around a position (d2Cache, arXiv 2509.23094, eq. 3)."""

import jax.numpy as jnp
import numpy as np

from dlm_jax.typing import Array, Bool, Float


def certainty_density(known_G: Bool[Array, " G"], sigma: float | int) -> Float[Array, " G"]:
    """Gaussian-weighted share of known positions around each generated position of one row.

    Everything before the generated part counts as known, for G positions; everything behind it, for
    G positions, is taken to be like its last one.

    Args:
      known_G: generated positions that are not masks.
      sigma: width of the Gaussian, in positions, above 0.
    """
    size = known_G.shape[0]
    # At most 3 G positions in either direction take part; the sum is that of the original.
    weights = np.exp(-(np.arange(-3 * size, 3 * size, dtype=np.float64) ** 2) / (2 * sigma**2))
    weights = weights / weights.sum()
    zero = 3 * size
    place = np.arange(size)
    within_GG = weights[zero + place[:, None] - place[None, :]]
    left_G = weights[zero + place[:, None] + 1 + place[None, :]].sum(axis=1)
    right_G = weights[zero + size - place[:, None] + place[None, :]].sum(axis=1)
    known = known_G.astype(jnp.float32)
    inside_G = jnp.sum(jnp.asarray(within_GG, jnp.float32) * known[None, :], axis=1)
    return (
        inside_G + jnp.asarray(left_G, jnp.float32) + known[-1] * jnp.asarray(right_G, jnp.float32)
    )
