"""Classifier-free guidance: away from what the model would say without the prompt.

Every row has a second, unconditional copy, in which everything that was given is masked (LLaDA,
arXiv 2502.09992, appendix A.2). Both go through the network with the same set of positions, each
with a cache of its own, so that any cache method can be guided; what it looks at are the guided
confidences, and of the network the conditional copy.
"""

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int, PyTree


def with_copy(rows: PyTree) -> PyTree:
    """Each array `[B, ...]` twice, as `[2 B, ...]`: all rows, then their unconditional copies."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), rows)


def without_copy(rows: PyTree) -> PyTree:
    """The conditional half of arrays `[2 B, ...]`."""
    return jax.tree.map(lambda leaf: leaf[: leaf.shape[0] // 2], rows)


def canvases(
    tokens_BL: Int[Array, "B L"], committed_BL: Bool[Array, "B L"], mask_id: int
) -> Int[Array, "B2 L"]:
    """The canvases of all rows, then those of the copies, where only what was generated is left."""
    blank_BL = jnp.where(committed_BL, tokens_BL, jnp.asarray(mask_id, tokens_BL.dtype))
    return jnp.concatenate([tokens_BL, blank_BL])


def combine(
    conditional: Float[Array, "B W V"],
    unconditional: Float[Array, "B W V"],
    cfg_scale: Float[Array, ""],
) -> Float[Array, "B W V"]:
    """Guided logits: at scale w, unconditional + (w + 1) (conditional - unconditional)."""
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)
