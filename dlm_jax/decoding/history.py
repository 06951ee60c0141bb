"""The canvas at every denoising step, rebuilt from the step at which each position was committed.

Nothing is carried through the decoding loop for it: as long as no strategy revokes a token, the
final tokens and `committed_at` hold the whole history.
"""

import jax.numpy as jnp

from dlm_jax.typing import Array, Int


def rebuild(
    tokens: Int[Array, "B L"], committed_at: Int[Array, "B L"], *, mask_id: int, forwards: int
) -> Int[Array, "T B L"]:
    """The canvas after each of the first `forwards` model forwards.

    Args:
      tokens: the final canvas.
      committed_at: forward in which a position was committed; -1 if it was given, or is still a
      mask.
      mask_id: shown where a position is not committed yet.
      forwards: T, static.
    """
    step_T = jnp.arange(forwards, dtype=committed_at.dtype)[:, None, None]
    return jnp.where(committed_at[None] <= step_T, tokens[None], jnp.asarray(mask_id, tokens.dtype))
