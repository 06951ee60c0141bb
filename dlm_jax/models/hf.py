"""Between Hugging Face and this library: configuration checks, and one parameter at a time.

PyTorch keeps a linear map as a matrix `[out, in]`; here kernels are `[in, out]` with heads as axes
of their own. Both directions are a transpose and a reshape, one tensor at a time, so that a
converter never holds more than that.
"""

from typing import Any

import numpy as np

from dlm_jax.typing import Array

_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None, False),
    "final_logit_softcapping": (None, False),
    "attn_logit_softcapping": (None, False),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "quantization_config": (None, {}),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1, 1.0),
    "head_dim": (None,),
}


def expect(raw: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    """Refuses by name every setting that would change the network in a way not implemented here.

    Args:
      raw: the parsed config.json.
      supported: setting -> the values that are implemented; an absent setting is fine.

    Raises:
      ValueError: naming the setting, its value and what is supported.
    """
    for name, values in (_NOT_IMPLEMENTED | supported).items():
        if name in raw and raw[name] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise ValueError(
                f"config.json: {name} is {raw[name]!r}, which is not implemented; it must be "
                f"{wanted}."
            )
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise ValueError(
            f"config.json: rope scaling of type {kind!r} is not implemented; rope_scaling must be "
            "null."
        )


def read(raw: dict[str, Any], name: str) -> Any:
    """A required setting.

    Raises:
      ValueError: it is missing or null.
    """
    value = raw.get(name)
    if value is None and name == "rope_theta":
        value = (raw.get("rope_parameters") or {}).get(name)
    if value is None:
        raise ValueError(f"config.json: {name} is missing; it must be given for this model type.")
    return value


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
