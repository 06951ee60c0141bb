"""Opens a model: weights in files -> `Checkpoint(config, params, tokenizer)`.

Four things can be opened: a directory in the Hugging Face layout, a directory that
`convert/hf_to_orbax.py` made of one, an embedded model by name, and a checkpoint of the Hugging
Face hub by name. Either way configuration and
headers are checked first, and then the weights go to their devices piece by piece, so that the host
holds little more than one piece: a tensor, or a part of a converted directory. Its layout:

    config.json        as in the source, like the tokenizer's files
    checkpoint.json    path, shape, dtype and checksum of every parameter
    params/embed/      one Orbax checkpoint per top-level entry of the parameters
    params/blocks_0/   ...
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from dlm_jax import models
from dlm_jax import tokenizer as tokenizer_lib
from dlm_jax.models import Config, Transformer, hf
from dlm_jax.typing import Array, Params, PyTree
from dlm_jax.weights import files as weight_files
from dlm_jax.weights import hub, lora
from dlm_jax.weights.files import Tensor, check_fetched, read_json

CONFIG, GENERATION = hf.CONFIG, hf.GENERATION
METADATA, PARAMS = "checkpoint.json", "params"
FORMAT_VERSION = 1

_ASSETS = Path(__file__).parent / "assets"
_DTYPES = {
    dtype.name: dtype
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
}
# A tokenizer may take the end of a turn for its end of text; the model's own is another.
_TURN_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|role_end|>", "<end_of_turn>"}
# Buffers that some checkpoints store although they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq",)


class Checkpoint(NamedTuple):
    """A model ready to run.

    Attributes:
      config: shapes and special tokens.
      params: the `params` argument of `model.apply({"params": params}, ...)`.
      tokenizer: the tokenizer beside the weights, or None if there is none.
    """

    config: Config
    params: Params
    tokenizer: Any

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)


def load(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    shardings: PyTree = None,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Opens a checkpoint directory, an embedded model, or a checkpoint of the Hugging Face hub.

    Args:
      path_or_name: a directory, converted or in the Hugging Face layout; the name of an embedded
        model; or, as a text, `owner/name[@revision]` on the hub, which is fetched unless the hub's
        cache has it.
      dtype: float32, bfloat16 or float16, as a name or a dtype; None keeps what is stored.
      shardings: where the parameters go: None for the default device, one `jax.sharding.Sharding`
        for all, a function of the parameter's path (`blocks_0/q/kernel`) that returns one, or a
        tree of them in the structure of the parameters.
      adapter: directory of a LoRA adapter, which is merged while the weights are read; one that
        lies beside them is merged without being named. Not for a converted model.

    Raises:
      FileNotFoundError: no such directory or model, or a file is missing in it.
      OSError: it cannot be fetched from the hub.
      ValueError: configuration, tokenizer and weights do not fit each other, a file is damaged, or
        an argument is wrong. Every error is one sentence.
    """
    directory, dtype = find(path_or_name), as_dtype(dtype)
    stored = inspect(directory, adapter)
    by_path = _shardings_by_path(shardings, stored.shapes)
    tokenizer = open_tokenizer(directory, stored.config)
    flat: dict[str, Array] = {}
    for paths in parts(stored.shapes).values():
        flat |= stored.place(paths, dtype, by_path)
    return Checkpoint(stored.config, models.unflatten(flat), tokenizer)


def inspect(directory: Path, adapter: str | Path | None = None) -> "Source | Converted":
    """Opens a directory of either layout: configuration and headers, but no weights.

    Args:
      directory: of the model.
      adapter: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    if not is_converted(directory):
        return Source.open(directory, adapter)
    if adapter is not None or (directory / lora.CONFIG).exists():
        raise ValueError(
            f"{directory} is a converted model, into which no adapter can be merged; convert the "
            "model together with it: convert/hf_to_orbax.py --adapter DIR."
        )
    return Converted.open(directory)


def open_tokenizer(directory: Path, config: Config) -> tokenizer_lib.Tokenizer | None:
    """Opens the tokenizer of a model, if it has one.

    Raises:
      ValueError: it cannot be read, or is that of another model; one sentence.
    """
    for name in tokenizer_lib.FILES:
        check_fetched(directory / name)
    tokenizer = tokenizer_lib.open_tokenizer(directory)
    if tokenizer is not None:
        _check_tokenizer(directory, config, tokenizer)
    return tokenizer


def embedded() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob(f"*/{CONFIG}"))


def find(path_or_name: str | Path) -> Path:
    """The directory of a checkpoint: itself, of an embedded model, or of one of the hub.

    Raises:
      FileNotFoundError: there is none.
      OSError, ValueError: the hub was asked, and it cannot be had; see `hub.locate`.
    """
    directory = locate(path_or_name)
    if directory is not None:
        return directory
    if (_ASSETS / path_or_name).is_dir():
        return _ASSETS / path_or_name
    raise FileNotFoundError(
        f"{str(path_or_name)!r} is neither a directory nor an embedded model; embedded are: "
        f"{', '.join(embedded()) or 'none'}; on the hub, a model is named owner/name."
    )


def find_adapter(path_or_name: str | Path) -> Path:
    """The directory of an adapter, or of one of the hub.

    Raises:
      FileNotFoundError: there is none.
      OSError, ValueError: as `find`.
    """
    directory = hub.locate(path_or_name, kind=hub.ADAPTER)
    if directory is None:
        raise FileNotFoundError(
            f"{str(path_or_name)!r} is no directory; an adapter is one, or owner/name on the hub."
        )
    return directory


def locate(path_or_name: str | Path) -> Path | None:
    """As `find`, but without the embedded models; None if there is none.

    Raises:
      OSError, ValueError: as `find`.
    """
    return hub.locate(path_or_name, check=_read_config)


def as_dtype(dtype: Any) -> np.dtype | None:
    """A dtype for parameters, by name or itself; None stays None.

    Raises:
      ValueError: it is none of float32, bfloat16 and float16.
    """
    if dtype is None:
        return None
    name = (
        dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", ""))
    )
    if name not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def parts(paths: Iterable[str]) -> dict[str, list[str]]:
    """Part -> the parameters in it: the unit that is restored at once."""
    grouped: dict[str, list[str]] = {}
    for path in paths:
        grouped.setdefault(path.split("/")[0], []).append(path)
    return grouped


def checksum(array: np.ndarray) -> str:
    """CRC-32 of a contiguous array's bytes."""
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


# --- the Hugging Face layout ---------------------------------------------------------------------


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
        config = _read_config(directory)
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
        _check(
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
    adapter = find_adapter(asked)
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


# --- the converted layout ------------------------------------------------------------------------


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
        config = _read_config(directory)
        shapes, entries = models.param_shapes(config), read_metadata(directory)
        _check(directory, {path: entry.shape for path, entry in entries.items()}, shapes)
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
            path: Entry(tuple(entry["shape"]), _DTYPES[entry["dtype"]], str(entry["crc32"]))
            for path, entry in raw["params"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / METADATA} is damaged; convert the model again.") from error


# --- shared --------------------------------------------------------------------------------------


def _read_config(directory: Path) -> Config:
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


def _check_tokenizer(directory: Path, config: Config, tokenizer: Any) -> None:
    """Refuses a tokenizer whose special tokens are not the model's.

    What pads is never seen, and what ends a turn need not end the text, so neither has to agree.
    """
    ends = (config.eos_id, *config.more_eos_ids)
    for name, ids in (("mask_token_id", (config.mask_id,)), ("eos_token_id", ends)):
        for token in ids:
            if token >= len(tokenizer) and tokenizer.convert_ids_to_tokens(token) is None:
                raise ValueError(
                    f"{directory}: {CONFIG} says that {name} is {token}, but the tokenizer has "
                    f"{len(tokenizer)} tokens; they must be of one model."
                )
    mask = tokenizer.mask_token_id
    if mask is None:
        text = models.FAMILIES[config.family].MASK_TOKEN
        named = tokenizer.convert_tokens_to_ids(text)
        mask = named if named is not None and named != tokenizer.unk_token_id else None
    if mask not in (None, config.mask_id):
        raise ValueError(
            f"{directory}: {CONFIG} says that mask_token_id is {config.mask_id}, but the "
            f"tokenizer's mask token is {mask}; they must be the same."
        )
    end = tokenizer.eos_token_id
    if end is None or end in ends:
        return
    ours = tokenizer.added_tokens_decoder.get(config.eos_id)
    if tokenizer.eos_token in _TURN_ENDS and ours is not None and ours.special:
        return
    raise ValueError(
        f"{directory}: {CONFIG} says that eos_token_id is {' or '.join(map(str, ends))}, but the "
        f"tokenizer's is {end} ({tokenizer.eos_token!r}); they must be the same."
    )


def _check(
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


def _shardings_by_path(
    shardings: PyTree, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Any]:
    """Parameter path -> sharding, from all forms that `load` takes."""
    by_path: Mapping[str, Any]
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        by_path = dict.fromkeys(shapes, shardings)
    elif callable(shardings):
        by_path = {path: shardings(path) for path in shapes}
    else:
        by_path = models.flatten(shardings)
    missing = [path for path in shapes if path not in by_path]
    if missing:
        raise ValueError(
            f"shardings has no entry for {len(missing)} of the {len(shapes)} parameters, first: "
            f"{missing[0]}."
        )
    for path, shape in shapes.items():
        try:
            if by_path[path] is not None:
                by_path[path].shard_shape(shape)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"shardings: {path} has shape {list(shape)}, which {by_path[path]} cannot divide."
            ) from error
    return by_path
