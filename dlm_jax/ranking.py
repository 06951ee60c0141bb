"""Which positions become final in a denoising step, for one row.

However a rule looks at confidences, what it takes are the surest positions: it only decides how
many (`sure`, `factored`, `bounded_entropy`), and `top` takes them.
"""

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int


def rank(score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"]) -> Int[Array, " L"]:
    """Place of every position by score, the highest first, the leftmost among equals.

    Eligible positions come before all others.
    """
    # A score may be -inf or not a number, which must still come before what is not eligible.
    score_L = jnp.nan_to_num(score_L, nan=-jnp.inf)
    order_L = jnp.argsort(jnp.where(eligible_L, -score_L, jnp.inf), stable=True)
    return (
        jnp.zeros_like(order_L)
        .at[order_L]
        .set(jnp.arange(order_L.shape[0], dtype=order_L.dtype), unique_indices=True)
    )


def top(
    score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], quota: Int[Array, ""]
) -> Bool[Array, " L"]:
    """The `quota` eligible positions with the highest score, the leftmost among equals.

    All eligible positions if there are fewer than `quota`; never one that is not eligible.
    """
    return eligible_L & (rank(score_L, eligible_L) < quota)


def sure(
    score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], level: Float[Array, ""]
) -> Int[Array, ""]:
    """How many eligible positions reach a score (Fast-dLLM, arXiv 2505.22618, algorithm 1)."""
    return jnp.sum(eligible_L & (score_L >= level), dtype=jnp.int32)


def factored(
    confidence_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], factor: Float[Array, ""]
) -> Int[Array, ""]:
    """The number n up to which (n + 1)(1 - confidence of the n-th surest) stays below `factor`.

    Fast-dLLM, arXiv 2505.22618, theorem 1 turned into a rule.
    """
    sorted_L = jnp.sort(jnp.where(eligible_L, confidence_L, -jnp.inf), descending=True)
    places_L = jnp.arange(2, sorted_L.shape[0] + 2, dtype=sorted_L.dtype)
    return _leading(places_L * (1 - sorted_L) < factor)


def bounded_entropy(
    score_L: Float[Array, " L"],
    entropy_L: Float[Array, " L"],
    eligible_L: Bool[Array, " L"],
    gamma: Float[Array, ""],
) -> Int[Array, ""]:
    """How many of the surest positions depend little on one another (EB-Sampler, 2505.24857).

    Their entropies, the largest one left out, sum up to at most `gamma`, which bounds the error of
    sampling them independently.
    """
    place_L = rank(score_L, eligible_L)
    sorted_L = jnp.zeros_like(entropy_L).at[place_L].set(entropy_L, unique_indices=True)
    bound_L = jnp.cumsum(sorted_L) - jax.lax.cummax(sorted_L)
    within_L = jnp.arange(sorted_L.shape[0]) < jnp.sum(eligible_L)
    return _leading(within_L & (bound_L <= gamma))


def _leading(true_L: Bool[Array, " L"]) -> Int[Array, ""]:
    """How many are true before the first that is not."""
    return jnp.sum(jnp.cumprod(true_L.astype(jnp.int32)), dtype=jnp.int32)


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
