"""A directory that `convert/hf_to_orbax.py` made:

config.json        as in the source, like the tokenizer's files
checkpoint.json    path, shape, dtype and checksum of every parameter
params/embed/      one Orbax checkpoint per top-level entry of the parameters
params/blocks_0/   ...
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax import models
from dlm_jax.models import Config
from dlm_jax.typing import Array
from dlm_jax.weights.files import read_json
from dlm_jax.weights.layout import DTYPES, check_shapes, parts, read_config

METADATA, PARAMS = "checkpoint.json", "params"
FORMAT_VERSION = 1


class Entry(NamedTuple):
    """What checkpoint.json says about a parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype
    crc32: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted directory whose configuration and list of parameters fit each other.

    Attributes:
      directory: where it is.
      config: what its config.json says.
      shapes: parameter path -> shape.
      entries: parameter path -> shape, dtype and checksum.
    """

    directory: Path
    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, directory: Path) -> "Converted":
        """Reads config.json and checkpoint.json; errors as those of `load`."""
        config = read_config(directory)
        shapes, entries = models.param_shapes(config), read_metadata(directory)
        check_shapes(directory, {path: entry.shape for path, entry in entries.items()}, shapes)
        for part in parts(shapes):
            if not (directory / PARAMS / part).is_dir():
                raise FileNotFoundError(
                    f"{directory} is incomplete: {PARAMS}/{part} is missing in it."
                )
        return cls(directory, config, shapes, entries)

    def place(
        self, paths: list[str], dtype: np.dtype | None, shardings: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Restores one part onto its devices; no sharding means the default device."""
        restored = self.restore(paths, dtype, shardings)
        return {
            path: jax.device_put(restored[path]) if shardings[path] is None else restored[path]
            for path in paths
        }

    def restore(
        self,
        paths: list[str],
        dtype: np.dtype | None = None,
        shardings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Reads one part, as sharded arrays where there is a sharding and in numpy elsewhere.

        Raises:
          ValueError: the part cannot be read.
        """
        import orbax.checkpoint as ocp

        def args(path: str) -> Any:
            kind = dtype or self.entries[path].dtype
            if shardings is None or shardings[path] is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
            return ocp.ArrayRestoreArgs(
                sharding=shardings[path], dtype=kind, global_shape=self.shapes[path]
            )

        name = paths[0].split("/")[0]
        part = (self.directory / PARAMS / name).resolve()
        restore_args = models.unflatten({path: args(path) for path in paths})[name]
        restore = ocp.args.PyTreeRestore(restore_args, restore_args)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(part, args=restore)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise ValueError(
                f"{part} cannot be restored ({reason}); if it is damaged, convert the model again."
            ) from error
        return models.flatten({name: restored})


def is_converted(directory: Path) -> bool:
    """Whether a directory has the converted layout."""
    return (directory / METADATA).exists()


def write_metadata(directory: Path, entries: dict[str, Entry]) -> None:
    """Writes checkpoint.json."""
    params = {
        path: {"shape": list(entry.shape), "dtype": entry.dtype.name, "crc32": entry.crc32}
        for path, entry in entries.items()
    }
    text = json.dumps({"version": FORMAT_VERSION, "params": params}, indent=1)
    (directory / METADATA).write_text(text + "\n", encoding="utf-8")


def read_metadata(directory: Path) -> dict[str, Entry]:
    """The inverse of `write_metadata`.

    Raises:
      ValueError: the file is damaged, or of another version.
    """
    raw = read_json(directory / METADATA)
    if raw.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / METADATA}: version is {raw.get('version')!r}; it must be "
            f"{FORMAT_VERSION}, so convert the model again."
        )
    try:
        return {
            path: Entry(tuple(entry["shape"]), DTYPES[entry["dtype"]], str(entry["crc32"]))
            for path, entry in raw["params"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / METADATA} is damaged; convert the model again.") from error


def checksum(array: np.ndarray) -> str:
    """CRC-32 of a contiguous array's bytes."""
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"
