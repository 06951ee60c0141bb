"""Which positions become final in a denoising step, for one row."""

import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int


def top(
    confidence_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], quota: Int[Array, ""]
) -> Bool[Array, " L"]:
    """The `quota` eligible positions with the highest confidence, the leftmost among equals.

    All eligible positions if there are fewer than `quota`; never one that is not eligible.
    """
    order_L = jnp.argsort(jnp.where(eligible_L, -confidence_L, jnp.inf), stable=True)
    rank_L = (
        jnp.zeros_like(order_L)
        .at[order_L]
        .set(jnp.arange(order_L.shape[0], dtype=order_L.dtype), unique_indices=True)
    )
    return eligible_L & (rank_L < quota)
