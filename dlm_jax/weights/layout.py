"""What the two layouts of a checkpoint directory share: configuration, names and shapes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dlm_jax import models
from dlm_jax.models import Config, hf
from dlm_jax.weights import lora
from dlm_jax.weights.files import read_json

CONFIG, GENERATION = hf.CONFIG, hf.GENERATION

DTYPES = {
    dtype.name: dtype
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
}
"""Name -> dtype that parameters can have."""


def read_config(directory: Path) -> Config:
    """Reads the configuration.

    Raises:
      FileNotFoundError, ValueError: there is none, or none of a model that is implemented.
    """
    path, generation = directory / CONFIG, directory / GENERATION
    if not path.exists():
        if (directory / lora.CONFIG).exists():
            raise FileNotFoundError(
                f"{directory} is an adapter, and no model; give the base model, and this directory "
                "with --adapter."
            )
        raise FileNotFoundError(
            f"{directory} has no {CONFIG}; it must be a directory in the Hugging Face layout or a "
            f"converted checkpoint."
        )
    raw, more = read_json(path), read_json(generation) if generation.exists() else None
    try:
        return models.config_from_hf(raw, more)
    except TypeError as error:
        raise ValueError(f"{path}: a setting has a value of the wrong type ({error}).") from error


def check_shapes(
    directory: Path, found: dict[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares names and shapes of tensors; all differences go into one error."""
    misshaped = [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": misshaped,
    }
    told = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {kind}, first: {names[0]}"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(f"{directory}: the weights do not fit {CONFIG}: {'; '.join(told)}.")


def parts(paths: Iterable[str]) -> dict[str, list[str]]:
    """Part -> the parameters in it: the unit that is restored at once."""
    grouped: dict[str, list[str]] = {}
    for path in paths:
        grouped.setdefault(path.split("/")[0], []).append(path)
    return grouped
