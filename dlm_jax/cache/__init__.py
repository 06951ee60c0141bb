"""Cache methods by name. A new method is one module and one line in `METHODS`."""

import dataclasses
from typing import TYPE_CHECKING, Any

from dlm_jax.decoding.table import Table

if TYPE_CHECKING:
    from dlm_jax.cache.base import CacheMethod
    from dlm_jax.cache.d2cache import D2Cache
    from dlm_jax.cache.dkv import DKVPD, DKVDecode, DKVGreedy, DKVPrefill
    from dlm_jax.cache.dllm_cache import DLLMCache
    from dlm_jax.cache.fast_dllm import Dual, Prefix
    from dlm_jax.cache.none import NoCache

__all__ = [
    "METHODS",
    "CacheMethod",
    "D2Cache",
    "DKVDecode",
    "DKVGreedy",
    "DKVPD",
    "DKVPrefill",
    "DLLMCache",
    "Dual",
    "NoCache",
    "Prefix",
    "make",
]

METHODS: "Table[type[CacheMethod]]" = Table(
    __name__,
    {
        "none": "none.NoCache",
        "dkv-decode": "dkv.DKVDecode",
        "dkv-greedy": "dkv.DKVGreedy",
        "dkv-prefill": "dkv.DKVPrefill",
        "dkv-pd": "dkv.DKVPD",
        "prefix": "fast_dllm.Prefix",
        "dual": "fast_dllm.Dual",
        "dllm": "dllm_cache.DLLMCache",
        "d2cache": "d2cache.D2Cache",
    },
)
"""Name -> class."""


def __getattr__(name: str) -> Any:
    return METHODS.export(name, {"CacheMethod": "base.CacheMethod"})


def make(name: str, **parameters: Any) -> "CacheMethod":
    """A cache method by name.

    Raises:
      ValueError: the name or a parameter is unknown; what there is is listed.
    """
    if name not in METHODS:
        raise ValueError(f"cache is {name!r}; it must be one of {', '.join(METHODS)}.")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for parameter in parameters:
        if parameter not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ValueError(f"The cache {name!r} has no argument {parameter!r}; {takes}.")
    return METHODS[name](**parameters)
