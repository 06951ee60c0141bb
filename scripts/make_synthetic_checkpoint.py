"""Writes a checkpoint with a model's true tensor names and shapes, but random weights.

    python scripts/make_synthetic_checkpoint.py --preset llada-8b-instruct --layers 2 --dst DIR

In the Hugging Face layout, in shards with an index like the published checkpoints. For measuring
the converter, tests of sizes, and comparisons with other implementations, which must not hang on
ties: norms are about 1, matrices normal with a deviation of 1 / sqrt(inputs), and nothing recurs.
Memory stays at a few million numbers.
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
_PIECE = 1 << 22
"""Numbers that are drawn at a time."""
_SPREAD = 0.02
"""Deviation of norms from 1, and of biases from 0."""


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
    paths = {name: path for path, name in models.weight_names(config).items()}
    tensors = {name: hf.torch_shape(path, shapes[path]) for name, path in paths.items()}
    norms = {name for name, path in paths.items() if path.endswith("/scale")}
    rng = np.random.default_rng(seed)
    itemsize = _DTYPES[dtype].itemsize
    shards = list(_split(tensors, itemsize, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        chosen = {name: tensors[name] for name in names}
        _write_shard(directory / file, chosen, norms, dtype, rng)
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in tensors.values()) * itemsize
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
    norms: set[str],
    dtype: str,
    rng: np.random.Generator,
) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            middle = 1.0 if name in norms else 0.0
            spread = _SPREAD if len(shape) == 1 else 1 / math.sqrt(shape[-1])
            for start in range(0, math.prod(shape), _PIECE):
                count = min(_PIECE, math.prod(shape) - start)
                piece = middle + spread * rng.standard_normal(count, np.float32)
                file.write(piece.astype(_DTYPES[dtype]).view(np.uint8).data)


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
