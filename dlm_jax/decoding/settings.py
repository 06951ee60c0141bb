"""Settings as pytrees: numbers that shape nothing are leaves, everything else is structure.

Another value of a leaf compiles nothing. A leaf that is None is off: switching on or off changes
the structure, hence the program. Settings are validated where a user makes them and not where JAX
rebuilds them from leaves, which may then be anything.
"""

import dataclasses
import functools
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlm_jax.typing import DTypeLike

Number = Any
"""A number, which may be Python's, NumPy's, an array `[]`, or traced."""
T = TypeVar("T")

_DTYPE = "dtype"
"""Where a field's metadata says that it is a leaf, and what it is traced as."""


def number(default: Any = dataclasses.MISSING, *, dtype: DTypeLike = jnp.float32) -> Any:
    """A field that is a leaf."""
    return dataclasses.field(default=default, metadata={_DTYPE: dtype})


def nested(default: Any = dataclasses.MISSING) -> Any:
    """A field that holds settings of its own."""
    return dataclasses.field(default=default, metadata={_DTYPE: None})


@overload
def settings(cls: type[T]) -> type[T]: ...
@overload
def settings(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(number, nested, dataclasses.field))
def settings(cls: Any = None, *, kw_only: bool = False) -> Any:
    """Makes a frozen dataclass of a class, and registers it as a pytree."""
    if cls is None:
        return functools.partial(settings, kw_only=kw_only)
    cls = dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
    leaves = [field.name for field in dataclasses.fields(cls) if _DTYPE in field.metadata]
    return register(cls, leaves)


def register(cls: type[T], leaves: Sequence[str]) -> type[T]:
    """Registers a dataclass as a pytree. JAX rebuilds it without calling its constructor."""
    structure = [field.name for field in dataclasses.fields(cls) if field.name not in leaves]  # type: ignore[arg-type]

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves]
        return keyed, tuple(getattr(value, name) for name in structure)

    def unflatten(static: tuple[Any, ...], children: Any) -> Any:
        value = object.__new__(cls)
        for names, parts in ((leaves, children), (structure, static)):
            for name, part in zip(names, parts, strict=True):
                object.__setattr__(value, name, part)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def traced(value: T) -> T:
    """The same settings with an array `[]` of the right dtype for every number."""

    def leaf(field: dataclasses.Field[Any]) -> Any:
        given, dtype = getattr(value, field.name), field.metadata[_DTYPE]
        if given is None:
            return None
        return traced(given) if dtype is None else jnp.asarray(given, dtype)

    fields = dataclasses.fields(value)  # type: ignore[arg-type]
    leaves = {field.name: leaf(field) for field in fields if _DTYPE in field.metadata}
    same = object.__new__(type(value))
    for field in fields:
        object.__setattr__(same, field.name, leaves.get(field.name, getattr(value, field.name)))
    return same


# --- what a number may be -------------------------------------------------------------------------


def concrete(value: Any) -> bool:
    """Whether something is given and known."""
    return value is not None and not isinstance(value, Tracer)


def positive(value: Any) -> bool:
    """Whether a number that 0 switches off is on; a traced one is."""
    return value is not None and (isinstance(value, Tracer) or bool(value > 0))


def check_number(
    name: str,
    value: Number,
    wanted: str,
    *,
    least: float | int = -sys.float_info.max,
    above: float | int = -math.inf,
    most: float | int = sys.float_info.max,
    optional: bool = False,
) -> None:
    """Refuses what is no number, or known not to lie within limits.

    Args:
      name: what the user calls it.
      value: anything.
      wanted: what would be right, after "it must".
      least: a limit that is within, ...
      above: ... or one that is not.
      most: a limit that is within; infinite numbers are refused unless a limit is.
      optional: whether None is fine, which means off.
    """
    if isinstance(value, Tracer) or (optional and value is None):
        return
    if not _is_one(value, numbers.Real, jnp.integer, jnp.floating):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    known = float(value)  # a narrower type would round the limits
    if not (least <= known <= most and (above == -math.inf or known > above)):
        raise ValueError(f"{name} is {value}; it must {wanted}.")


def _is_one(value: Any, kind: type, *dtypes: Any) -> bool:
    """Whether something is one number: of such a kind, or an array of one of such dtypes."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, dtype) for dtype in dtypes)
    return isinstance(value, kind) and not isinstance(value, bool)


def check_confidence(name: str, value: Number) -> None:
    """Refuses what is no finite number."""
    check_number(name, value, "be a confidence")


def check_whole(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Refuses what is no whole number, or known to be less than `least`; see `check_number`."""
    if isinstance(value, Tracer) or (optional and value is None):
        return
    if not _is_one(value, numbers.Integral, jnp.integer) or value < least:
        raise ValueError(f"{name} is {value}; it must be a whole number from {least} on.")


def check_flag(name: str, value: Any) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
