"""Between Hugging Face and this library: configuration checks, and one parameter at a time.

PyTorch keeps a linear map as a matrix `[out, in]`; here kernels are `[in, out]` with heads as axes
of their own. Both directions are a transpose and a reshape, one tensor at a time, so that a
converter never holds more than that.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from dlm_jax.typing import Array

CONFIG, GENERATION = "config.json", "generation_config.json"

_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None, False),
    "final_logit_softcapping": (None, False),
    "attn_logit_softcapping": (None, False),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "quantization_config": (None, {}),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1.0, 1),
}
# In rope_scaling and rope_parameters: what leaves the rotary positions as they are.
_PLAIN_ROPE: dict[str, tuple[Any, ...]] = {
    "type": ("default", None),
    "rope_type": ("default", None),
    "factor": (None, 1.0, 1),
    "partial_rotary_factor": (None, 1.0, 1),
}
_MOST = 2**31 - 1
"""Of sizes."""
_MOST_LAYERS = 10_000
"""So that a wrong number is told before shapes of that many layers are worked out."""
_LARGEST = float(np.finfo(np.float32).max)


def expect(raw: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    """Refuses by name every setting that would change the network in a way not implemented here.

    Args:
      raw: the parsed config.json.
      supported: setting -> the values that are implemented; an absent setting is fine.

    Raises:
      ValueError: naming the setting, its value and what is supported.
    """
    for name, values in (_NOT_IMPLEMENTED | supported).items():
        _expect_one(name, raw, name, values)
    kinds = raw.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(f"{CONFIG}: layer_types is {kinds!r}; it must be a list of names.")
    for name in ("dtype", "torch_dtype"):  # not read: the files know theirs
        if not isinstance(raw.get(name), str | None):
            raise ValueError(f"{CONFIG}: {name} is {raw[name]!r}; it must be a name.")
    for layer in kinds or ():
        if layer != "full_attention":
            raise ValueError(
                f"{CONFIG}: layer_types holds {layer!r}, which is not implemented; every layer "
                "must have 'full_attention'."
            )


def _expect_one(label: str, raw: dict[str, Any], name: str, values: tuple[Any, ...]) -> None:
    # By type as well: 1 is not true.
    given = raw.get(name, values[0])
    if not any(type(given) is type(value) and given == value for value in values):
        wanted = " or ".join(repr(value) for value in values)
        raise ValueError(
            f"{CONFIG}: {label} is {given!r}, which is not implemented; it must be {wanted}."
        )


def check_finite(raw: dict[str, Any], file: str) -> None:
    """Refuses NaN and infinity, which JSON does not know but Python reads.

    Raises:
      ValueError: naming the setting.
    """
    for name, value in raw.items():
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
            raise ValueError(f"{file}: {name} is {value!r}; numbers must be finite.")


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def read(raw: dict[str, Any], name: str) -> Any:
    """A required setting.

    Raises:
      ValueError: it is missing or null.
    """
    value = raw.get(name)
    if value is None:
        raise ValueError(f"{CONFIG}: {name} is missing; it must be given for this model type.")
    return value


def whole(
    raw: dict[str, Any], name: str, otherwise: int | None = None, *, most: int = _MOST
) -> int:
    """A size.

    Args:
      raw: the parsed config.json.
      name: of the setting.
      otherwise: the value of a setting that is missing or null; without it, that is refused.
      most: the largest that it can be.

    Raises:
      ValueError: naming the setting.
    """
    if raw.get(name) is None and otherwise is not None:
        return otherwise
    value = read(raw, name)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{CONFIG}: {name} is {value!r}; it must be a whole number from 1 to {most}."
        )
    return value


def layers(raw: dict[str, Any], name: str) -> int:
    """The number of layers; `ValueError` as `whole`."""
    return whole(raw, name, most=_MOST_LAYERS)


def number(raw: dict[str, Any], name: str) -> float:
    """A number above 0, which must be given.

    Raises:
      ValueError: naming the setting.
    """
    return _positive(read(raw, name), name)


def _positive(value: Any, label: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= _LARGEST:
        raise ValueError(
            f"{CONFIG}: {label} is {value!r}; it must be a number above 0 that a float32 can hold."
        )
    return float(value)


def flag(raw: dict[str, Any], name: str) -> bool:
    """A switch that is off where it is missing or null.

    Raises:
      ValueError: naming the setting.
    """
    value = raw.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{CONFIG}: {name} is {value!r}; it must be true or false.")
    return bool(value)


def head_dim(raw: dict[str, Any], width_name: str, heads_name: str) -> int:
    """Width of a head, which is that of the model divided among the heads.

    Raises:
      ValueError: it is not; the settings are named.
    """
    width, heads = whole(raw, width_name), whole(raw, heads_name)
    if width % heads:
        raise ValueError(
            f"{CONFIG}: {width_name} is {width}; it must be a multiple of {heads_name}, {heads}."
        )
    given = whole(raw, "head_dim", width // heads)
    if given != width // heads:
        raise ValueError(
            f"{CONFIG}: head_dim is {given}, which is not implemented; it must be {width_name} / "
            f"{heads_name}, {width // heads}."
        )
    return given


def rope_theta(raw: dict[str, Any]) -> float:
    """Base of the rotary frequencies, from `rope_theta`, `rope_parameters` or `rope_scaling`.

    Raises:
      ValueError: it is missing, they contradict each other, or positions are scaled.
    """
    found = {"rope_theta": raw.get("rope_theta")}
    for setting in ("rope_parameters", "rope_scaling"):
        given = raw.get(setting)
        if given is None or given == {}:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{CONFIG}: {setting} is {given!r}; it must be null or an object.")
        _check_plain(setting, given)
        found[f"{setting}.rope_theta"] = given.get("rope_theta")
    thetas = {label: value for label, value in found.items() if value is not None}
    if not thetas:
        read(raw, "rope_theta")
    (first, theta), *others = ((label, _positive(thetas[label], label)) for label in thetas)
    for label, other in others:
        if other != theta:
            raise ValueError(
                f"{CONFIG}: {first} is {theta}, but {label} is {other}; they must be the same, or "
                "one of them left out."
            )
    return theta


def _check_plain(setting: str, given: dict[str, Any]) -> None:
    """Refuses rotary positions that are anything but plain."""
    kinds = [given[name] for name in ("rope_type", "type") if given.get(name) is not None]
    scaled = {name: value for name, value in given.items() if name != "rope_theta"}
    nested = next((name for name, value in scaled.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(
            f"{CONFIG}: {setting} has {nested}; rotary positions that differ between layers are "
            "not implemented."
        )
    for name in scaled.keys() & {"partial_rotary_factor"}:
        _expect_one(f"{setting}.{name}", given, name, _PLAIN_ROPE[name])
    if not kinds and any(value is not None for value in scaled.values()):
        raise ValueError(
            f"{CONFIG}: {setting} is {given!r}, which has no rope_type; scaled rotary positions "
            "are not implemented, so it must be null."
        )
    if any(kind != "default" for kind in kinds):
        raise ValueError(
            f"{CONFIG}: {setting} is {given!r}; rotary positions of type {kinds[0]!r} are not "
            "implemented, so it must be null."
        )
    for name, value in scaled.items():
        if name in _PLAIN_ROPE:
            _expect_one(f"{setting}.{name}", given, name, _PLAIN_ROPE[name])
        elif value is not None:
            raise ValueError(
                f"{CONFIG}: {setting}.{name} is {value!r}, which is not implemented; leave it out."
            )


# --- special tokens ------------------------------------------------------------------------------


def ends(raw: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """All tokens that end an answer: those of config.json, then those of generation_config.json.

    Raises:
      ValueError: a file says something that is no token id, or there is none.
    """
    size = whole(raw, "embedding_size", whole(raw, "vocab_size"))
    found = [*_ids(raw, CONFIG, size), *_ids(generation, GENERATION, size)]
    return list(dict.fromkeys(found)) or read(raw, "eos_token_id")


def _ids(raw: dict[str, Any], file: str, size: int) -> list[int]:
    given = raw.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int for token in ids) or given == []:
        raise ValueError(
            f"{file}: eos_token_id is {given!r}; it must be a token id or a list of them."
        )
    for token in ids:
        _check_id(token, "eos_token_id", file, size)
    return ids


def _check_id(token: Any, name: str, file: str, size: int) -> None:
    if type(token) is not int:
        raise ValueError(f"{file}: {name} is {token!r}; it must be a token id.")
    if not 0 <= token < size:
        raise ValueError(
            f"{file}: {name} is {token}; it must be a token id below the vocabulary's size, {size}."
        )


def special_ids(raw: dict[str, Any], size: int) -> dict[str, Any]:
    """The special tokens, as arguments of `Config`.

    Args:
      raw: the parsed config.json.
      size: number of tokens.

    Raises:
      ValueError: naming the setting.
    """
    mask = read(raw, "mask_token_id")
    _check_id(mask, "mask_token_id", CONFIG, size)
    eos, *more = ends(raw, {})
    if mask in (eos, *more):
        raise ValueError(
            f"{CONFIG}: mask_token_id and eos_token_id are both {mask}; they must differ."
        )
    pad = raw.get("pad_token_id")
    pad = eos if pad is None else pad
    _check_id(pad, "pad_token_id", CONFIG, size)
    return dict(mask_id=mask, eos_id=eos, more_eos_ids=tuple(more), pad_id=pad)


def eos_token_id(eos_id: int, more_eos_ids: tuple[int, ...]) -> int | list[int]:
    """The inverse of what `special_ids` makes of `eos_token_id`."""
    return [eos_id, *more_eos_ids] if more_eos_ids else eos_id


# --- parameters ----------------------------------------------------------------------------------


def as_tensor(path: str, array: np.ndarray) -> np.ndarray:
    """The parameter at `path` laid out like its checkpoint tensor; a view if it is contiguous.

    Writing a tensor into that view makes the parameter, without a second copy.
    """
    shape = torch_shape(path, array.shape)
    return array.reshape(shape[::-1]).T if path.endswith("/kernel") else array.reshape(shape)


def from_param(path: str, array: np.ndarray | Array) -> np.ndarray:
    """The parameter at `path` as a contiguous checkpoint tensor."""
    return np.ascontiguousarray(as_tensor(path, np.asarray(array)))


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor behind the parameter at `path` with shape `shape`."""
    layer, leaf = path.split("/")[-2:]
    if leaf == "bias":
        return (int(np.prod(shape)),)
    if leaf != "kernel":
        return tuple(shape)
    # The output projection contracts two axes (heads and their width), all others one.
    inputs = 2 if layer == "o" else 1
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
