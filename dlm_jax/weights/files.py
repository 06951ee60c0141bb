"""The tensors of a Hugging Face directory, a few rows at a time: the layer below `checkpoint.py`.

`open_weights` reads nothing but headers: it learns every tensor's name, shape and dtype and proves
that the files are whole before any long work starts. `Tensor.read_into` then fills an array that
the caller made, whatever its strides and dtype, so that transposing and casting cost no second
copy. Files are read and not mapped: mapped pages count as resident memory and would pile up.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_SHARDED = "pytorch_model.bin", "pytorch_model.bin.index.json"

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What Git LFS leaves in the place of a file that it has not fetched.
_POINTER = b"version https://git-lfs"
# Bits of an exponent that only infinities and NaN have.
_EXPONENTS = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}
# In front of all names: what the tools that wrapped the model have left.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
# What is read at a time. Small enough for the processor's cache, which makes transposing fast.
_CHUNK_BYTES = 1 << 19
# Alignment at which JAX's CPU backend adopts an array instead of copying it.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor in a file, not read yet.

    Attributes:
      label: file and name, for error messages.
      shape: its shape.
      dtype: its dtype in the file.
      chunks: iterates over its rows (along the first axis), a few at a time; a chunk is only valid
        until the next one.
    """

    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    def read_into(self, out: np.ndarray) -> None:
        """Reads and casts the tensor into `out`, of the same shape and any strides and dtype.

        Raises:
          ValueError: the file ends early, a value is not finite, or too large for float16.
        """
        row = 0
        for chunk in self.chunks():
            if not _is_finite(chunk):
                raise ValueError(
                    f"{self.label} has values that are not finite (NaN or infinite); the file is "
                    "damaged, or the model's training has diverged."
                )
            out[row : row + len(chunk)] = self._cast(chunk, out.dtype)
            row += len(chunk)

    def _cast(self, chunk: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype == chunk.dtype or dtype != np.float16:
            return chunk.astype(dtype, copy=False)
        with np.errstate(over="ignore"):
            cast = chunk.astype(dtype)
        if not _is_finite(cast):
            raise ValueError(
                f"{self.label} has values beyond the range of float16; take bfloat16 or float32."
            )
        return cast


def _is_finite(chunk: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity."""
    bits = _EXPONENTS.get(chunk.dtype)
    if bits is None:
        return bool(np.isfinite(chunk).all())
    # Ten times as fast as `isfinite`.
    return not chunk.size or bool((chunk.view(np.uint16) & bits).max() < bits)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that `jax.device_put` adopts on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def open_weights(directory: Path) -> dict[str, Tensor]:
    """Tensor name -> tensor, of all weight files in `directory`.

    Reads `model.safetensors`, its sharded form, or (only if PyTorch is installed)
    `pytorch_model.bin` and its sharded form, the first of these that exists.

    What tools that wrap a model put in front of every name (`module.`, `_orig_mod.`) is left out.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file is truncated or not what its name says, or holds a dtype that is not
        supported.
    """
    for single, sharded in ((SINGLE, SHARDED), (TORCH_SINGLE, TORCH_SHARDED)):
        if (directory / single).exists():
            return unwrap(open_file(directory / single))
        if (directory / sharded).exists():
            return unwrap(_merge(_shards(directory / sharded)))
    raise FileNotFoundError(
        f"{directory} holds no weights; it must hold {SINGLE} or {SHARDED} with its shards."
    )


def open_file(path: Path) -> dict[str, Tensor]:
    """Tensor name -> tensor, of one weight file; `ValueError` as `open_weights`."""
    check_fetched(path)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def unwrap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what stands in front of all names because a model was wrapped."""
    while tensors and (
        wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in tensors)), None)
    ):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def check_fetched(path: Path) -> None:
    """Refuses a file that Git has not fetched; one that is missing is fine.

    Raises:
      ValueError: one sentence.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"{path} is a Git LFS pointer; fetch the file itself with `git lfs pull`."
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file holds anything else.
    """
    check_fetched(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


def shard_names(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
      ValueError: it names none.
    """
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} has no weight_map; it must map tensor names to files.")
    return sorted({Path(name).name for name in names})


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must be there."""
    files = [index.parent / name for name in shard_names(index)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent}: {len(missing)} of the {len(files)} weight files that {index.name} "
            f"names are missing, first: {missing[0]}."
        )
    return files


def _merge(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in open_file(file).items():
            if name in tensors:
                raise ValueError(f"{file}: tensor {name} is in an earlier weight file too.")
            tensors[name] = tensor
    return tensors


# --- safetensors: 8 bytes of header length, a JSON header, then the data -------------------------


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    header, start = _safetensors_header(path)
    tensors, end = {}, 0
    for name, entry in header.items():
        label = f"{path}: tensor {name}"
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"{label} has dtype {entry['dtype']}; it must be {', '.join(_DTYPES)}."
            )
        low, high = entry["data_offsets"]
        if high - low != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{label} has {high - low} bytes, which its shape contradicts.")
        end = max(end, high)
        chunks = functools.partial(_safetensors_chunks, path, start + low, shape, dtype)
        tensors[name] = Tensor(label, shape, dtype, chunks)
    size = path.stat().st_size
    if size < start + end:
        raise ValueError(
            f"{path} is truncated: it has {size} bytes, and {start + end} were expected."
        )
    return tensors


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of the header, and where the data starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + length:
            raise ValueError(
                f"{path} is truncated, or no safetensors file: it ends within its header."
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for entry in header.values():
                low, high = entry["data_offsets"]
                if not all(type(n) is int and n >= 0 for n in (low, high, *entry["shape"])):
                    raise ValueError("sizes must be whole numbers")
                if not isinstance(entry["dtype"], str):
                    raise ValueError("a dtype must be a name")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path} is no safetensors file: its header cannot be read."
            ) from error
    return header, 8 + length


def _safetensors_chunks(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    total, row_shape = shape[0], shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    buffer = np.empty((min(total, max(1, _CHUNK_BYTES // row_bytes)), *row_shape), dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for low in range(0, total, len(buffer)):
            chunk = buffer[: total - low]
            _fill(file, chunk.view(np.uint8).reshape(-1), path)
            yield chunk


def _fill(file: Any, flat: np.ndarray, path: Path) -> None:
    """Fills an array of bytes from an unbuffered file, whose reads may come back short."""
    done = 0
    while done < len(flat):
        count = file.readinto(flat[done:].data)
        if not count:
            raise ValueError(f"{path} is truncated.")
        done += count


# --- PyTorch's own format, only where PyTorch is installed ---------------------------------------


def _open_torch(path: Path) -> dict[str, Tensor]:
    dtypes = {f"torch.{dtype.name}": dtype for dtype in _DTYPES.values()}
    tensors = {}
    for name, value in _torch_load(path).items():
        label, kind = f"{path}: tensor {name}", str(getattr(value, "dtype", type(value).__name__))
        if kind not in dtypes:
            raise ValueError(f"{label} has dtype {kind}; it must be {', '.join(dtypes)}.")
        chunks = functools.partial(_torch_chunks, path, name)
        tensors[name] = Tensor(label, tuple(value.shape), dtypes[kind], chunks)
    return tensors


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{path} is in PyTorch's own format, and PyTorch is not installed; install torch, or "
            f"give a directory with {SINGLE}."
        ) from error
    try:
        # Tensors only: a pickle could run code.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, older than PyTorch 1.6, or holds more than "
            f"tensors."
        ) from error


def _torch_chunks(path: Path, name: str) -> Iterator[np.ndarray]:
    import torch  # pyright: ignore[reportMissingImports]

    # Opened anew for each tensor, so that the mapped pages of the last one are given back.
    tensor = _torch_load(path)[name]
    row_bytes = max(1, tensor[0].numel() * tensor.element_size())
    rows = max(1, _CHUNK_BYTES // row_bytes)
    for low in range(0, len(tensor), rows):
        chunk = tensor[low : low + rows].contiguous()
        if chunk.dtype == torch.bfloat16:
            yield chunk.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield chunk.numpy()
