"""KLASS (arXiv 2511.05664): only predictions that have settled are committed in parallel.

A prediction has settled when its distribution, compared by Kullback-Leibler divergence with that of
the step before, hardly moved for `kl_history_length` steps. A rule then picks among the settled
ones; where it finds none, the surest are committed, settled or not.
"""

from typing import NamedTuple

import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.typing import Array, Bool, Float, Int


class Stability(NamedTuple):
    """What is known about how predictions move, for the last positions of the canvas.

    S are all generated positions, and those of the prompt where these are filled as well.
    """

    probability_BSV: Float[Array, "B S V"]
    """Of the last step; 0 before the first."""
    divergence_BSh: Float[Array, "B S h"]
    """Of the last steps from the one before, in nats, the newest last."""


def begin(batch: int, size: int, vocabulary: int, history: int) -> Stability:
    """Nothing is known. As in the original, steps that never were count as settled."""
    return Stability(
        jnp.zeros((batch, size, vocabulary), jnp.float32),
        jnp.zeros((batch, size, history), jnp.float32),
    )


def update(
    stability: Stability,
    log_p_BWV: Float[Array, "B W V"],
    slot_BW: Int[Array, "B W"],
    active_B: Bool[Array, " B"],
    length: int,
) -> Stability:
    """What is known after a step; rows that are not active keep what they had.

    Args:
      stability: what was known before.
      log_p_BWV: the predictions that were read, as log-probabilities.
      slot_BW: their slots; L marks an unused entry.
      active_B: rows that take part in the step.
      length: L.

    A position that was not read has, as in the original, a uniform distribution. So it comes to
    rest while a cache leaves it out, and moves when it is computed again.
    """
    batch, size, vocabulary = stability.probability_BSV.shape
    place_BW = jnp.where(slot_BW < length, slot_BW - (length - size), size)
    p_BSV = queries.scatter(
        jnp.full((batch, size, vocabulary), 1.0 / vocabulary), jnp.exp(log_p_BWV), place_BW
    )
    moved = jnp.log(p_BSV + 1e-12) - jnp.log(stability.probability_BSV + 1e-12)
    divergence_BS1 = jnp.sum(p_BSV * moved, axis=-1, keepdims=True)
    divergence_BSh = jnp.concatenate([stability.divergence_BSh[..., 1:], divergence_BS1], axis=-1)
    active_B11 = active_B[:, None, None]
    return Stability(
        jnp.where(active_B11, p_BSV, stability.probability_BSV),
        jnp.where(active_B11, divergence_BSh, stability.divergence_BSh),
    )


def settled(
    stability: Stability, kl_threshold: Float[Array, ""], length: int
) -> Bool[Array, "B L"]:
    """Positions whose prediction moved by less than `kl_threshold` in each of the last steps."""
    size = stability.divergence_BSh.shape[1]
    settled_BS = jnp.all(stability.divergence_BSh < kl_threshold, axis=-1)
    return jnp.pad(settled_BS, ((0, 0), (length - size, 0)))
