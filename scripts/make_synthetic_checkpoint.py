"""Writes a checkpoint with a model's true tensor names and shapes, but random weights.

    python scripts/make_synthetic_checkpoint.py --preset llada-8b-instruct --layers 2 --dst DIR

In the Hugging Face layout, in shards with an index like the published checkpoints. For measuring
the converter and for tests of sizes; the values are plausible (normal, finite), not a trained
model. Memory stays at one tensor.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from dlm_jax import models
from dlm_jax.models import Config, hf

_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
_POOL = 1 << 22
_STD = 0.02


def write_checkpoint(
    directory: Path,
    config: Config,
    *,
    dtype: str = "BF16",
    shard_bytes: int = 5 << 30,
    seed: int = 0,
) -> int:
    """Writes config.json, shards and their index to a new `directory`.

    Args:
      directory: must not exist.
      config: the model.
      dtype: "BF16" or "F32".
      shard_bytes: a shard is closed before it would grow beyond this.
      seed: of the weights.

    Returns:
      Bytes of all tensors.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(models.config_to_hf(config), indent=2))
    shapes = models.param_shapes(config)
    tensors = {
        name: hf.torch_shape(path, shapes[path])
        for path, name in models.weight_names(config).items()
    }
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(_POOL, np.float32) * _STD).astype(_DTYPES[dtype])
    shards = list(_split(tensors, pool.dtype.itemsize, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, {name: tensors[name] for name in names}, dtype, pool, rng)
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in tensors.values()) * pool.dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _split(
    tensors: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * itemsize
        if names and size + nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _write_shard(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    dtype: str,
    pool: np.ndarray,
    rng: np.random.Generator,
) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * pool.dtype.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            # The pool again and again, from another place for every tensor.
            start, left = int(rng.integers(_POOL)), math.prod(shape)
            while left > 0:
                piece = pool[start : start + left]
                file.write(piece.view(np.uint8).data)
                start, left = 0, left - len(piece)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llada-8b-instruct", choices=sorted(models.PRESETS))
    parser.add_argument("--layers", type=int, help="default: as in the preset")
    parser.add_argument("--dtype", default="BF16", choices=sorted(_DTYPES))
    parser.add_argument("--dst", type=Path, required=True)
    args = parser.parse_args(argv)
    config = models.PRESETS[args.preset]
    try:
        if args.layers is not None:
            config = dataclasses.replace(config, num_layers=args.layers)
        total = write_checkpoint(args.dst, config, dtype=args.dtype)
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}."
        print(f"make_synthetic_checkpoint.py: {sentence}", file=sys.stderr)
        return 2
    print(f"{args.dst}: {total / 1e9:.2f} GB, {config.num_layers} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
