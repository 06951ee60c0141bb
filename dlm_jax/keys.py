"""PRNG keys: whoever draws something for the rows of a batch has one key per row."""

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Key


def row_keys(key: Array, rows: int) -> Key[Array, " B"]:
    """One key per row.

    A row's key depends on the given one and the row's number, not on how many rows there are.

    Args:
      key: one PRNG key, or one per row [B]; either may be of JAX's older kind, a uint32 array.
      rows: B.

    Raises:
      ValueError: there are keys, but not for so many rows.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (rows,)):
        raise ValueError(
            f"key has shape {key.shape}; it must be one key, or one per row, ({rows},)."
        )
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
