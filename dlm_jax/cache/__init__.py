"""Cache methods by name. A new method is one module and one line in `METHODS`."""

import dataclasses
from typing import Any

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

METHODS: dict[str, type[CacheMethod]] = {
    method.name: method
    for method in (
        NoCache,
        DKVDecode,
        DKVGreedy,
        DKVPrefill,
        DKVPD,
        Prefix,
        Dual,
        DLLMCache,
        D2Cache,
    )
}
"""Name -> class."""


def make(name: str, **parameters: Any) -> CacheMethod:
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
