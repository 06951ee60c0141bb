"""A directory in the Hugging Face layout: config.json, and tensors in files."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlm_jax import models
from dlm_jax.models import Config, hf
from dlm_jax.typing import Array
from dlm_jax.weights import files as weight_files
from dlm_jax.weights import lora
from dlm_jax.weights.files import Tensor
from dlm_jax.weights.layout import check_shapes, read_config

# Buffers that some checkpoints store although they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory in the Hugging Face layout whose configuration and headers fit each other.

    Attributes:
      config: what its config.json says.
      shapes: parameter path -> shape of the parameter.
      tensors: parameter path -> the tensor in the file, in PyTorch's layout.
    """

    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, directory: Path, adapter: str | Path | None = None) -> "Source":
        """Reads config.json and all headers, but no tensor; errors as those of `load`."""
        config = read_config(directory)
        shapes = models.param_shapes(config)
        names = models.weight_names(config)
        tensors = weight_files.open_weights(directory)
        if lora.is_unmerged(tensors):
            raise ValueError(
                f"{directory} holds a PEFT model whose adapter is not merged; give the base model, "
                "and the directory of the adapter with --adapter."
            )
        wanted = {name: hf.torch_shape(path, shapes[path]) for path, name in names.items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        check_shapes(
            directory, {name: found[name] for name in found if not _derived(name, config)}, wanted
        )
        adapter = _adapter(directory, adapter)
        if adapter is not None:
            matrices = [name for path, name in names.items() if path.endswith("/kernel")]
            tensors = lora.merge(tensors, adapter, matrices)
        return cls(config, shapes, {path: tensors[name] for path, name in names.items()})

    def size(self, path: str, dtype: np.dtype | None) -> int:
        """Bytes of a parameter in `dtype`."""
        return math.prod(self.shapes[path]) * (dtype or self.tensors[path].dtype).itemsize

    def read(self, path: str, dtype: np.dtype | None) -> np.ndarray:
        """One parameter, cast to `dtype` (None: as stored)."""
        tensor = self.tensors[path]
        param = weight_files.empty(self.shapes[path], dtype or tensor.dtype)
        tensor.read_into(hf.as_tensor(path, param))
        return param

    def place(
        self, paths: list[str], dtype: np.dtype | None, shardings: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Reads some parameters onto their devices, one at a time."""
        return {path: _put(self.read(path, dtype), shardings[path]) for path in paths}


def _adapter(directory: Path, asked: str | Path | None) -> Path | None:
    """The directory of the adapter that is asked for, or lies beside the weights."""
    beside = directory if (directory / lora.CONFIG).exists() else None
    if asked is None:
        return beside
    adapter = lora.find(asked)
    if beside is not None and adapter.resolve() != beside.resolve():
        raise ValueError(
            f"{directory} has an adapter beside its weights, and {adapter} is asked for; only one "
            f"can be merged, so remove {lora.CONFIG} from {directory}, or leave --adapter out."
        )
    return adapter


def _derived(name: str, config: Config) -> bool:
    """Whether a tensor may be ignored: it follows from the configuration or from another tensor."""
    head = models.FAMILIES[config.family].WEIGHTS["head/kernel"]
    return name.endswith(_DERIVED) or (config.tied_head and name == head)


def _put(param: np.ndarray, sharding: Any) -> Array:
    if sharding is None:
        return jax.device_put(param).block_until_ready()
    # Every device, and every process of a cluster, is handed its own piece only.
    array = jax.make_array_from_callback(param.shape, sharding, lambda index: param[index])
    return array.block_until_ready()
