"""Which positions become final in a denoising step, for one row."""

import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int


def rank(score_L: Float[Array, " L"], eligible_L: Bool[Array, " L"]) -> Int[Array, " L"]:
    """Place of every position by score, the highest first, the leftmost among equals.

    Eligible positions come before all others.
    """
    # A score may be -inf, which must still come before what is not eligible.
    score_L = jnp.maximum(score_L, jnp.finfo(score_L.dtype).min)
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
