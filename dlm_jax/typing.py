"""The letters for axes, and the array types that public signatures are written in.

Every shape in the project is spelled with these letters, in names (`tokens_BL`), in einsums
(`"BKXH,BKLH->BKXL"`) and in annotations:

| letter | axis |
|---|---|
| B | batch, one row per sequence; `B2` twice as many, with the copies of guidance |
| C | some rows of a batch, computed together |
| P | prompt slots, left-padded |
| G | generated slots |
| A | slots of a given answer, right-padded |
| L | sequence slots, `L = P + G` or `L = P + A`; also the slots of a KV cache |
| Q | query slots that enter the network in one denoising step, `Q <= L` |
| W | positions whose logits are read in one denoising step |
| D | model width |
| F | hidden width of the feed-forward network |
| N | query heads |
| K | key and value heads |
| R | query heads per key head, `R = N / K` |
| X | queries that meet the same keys, `X = R Q` |
| H | width of one head |
| V | vocabulary |
| S | a stretch of slots, such as a block; in a likelihood, masked copies of a row |
| T | model forwards of one generation, or of one likelihood |

The layer axis is always spelled out as `layers`. Annotations are documentation in production and
are checked in the tests only.
"""

from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Array", "ArrayOrNumpy", "Bool", "DTypeLike", "Float", "Int", "Key", "Params", "PyTree"]

ArrayOrNumpy = Array | np.ndarray
"""What public functions take where they return a JAX array."""
Params = dict[str, Any]
"""A nested dict of arrays, as `Transformer.init(...)["params"]` returns it."""
PyTree = Any
"""Any JAX pytree."""
