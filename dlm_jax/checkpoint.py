"""Opens a model: weights in files -> `Checkpoint`.

Four things can be opened: a directory in the Hugging Face layout, a directory that
`convert/hf_to_orbax.py` made of one, an embedded model by name, and a checkpoint of the Hugging
Face hub by name. In each case configuration and headers are checked first, and then the weights go
to their devices piece by piece, so that the host holds little more than one piece: a tensor, or a
part of a converted directory.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import models
from dlm_jax import tokenizer as tokenizer_lib
from dlm_jax.models import Config, Transformer
from dlm_jax.models import attention as attention_lib
from dlm_jax.typing import Array, Params, PyTree
from dlm_jax.weights import hub, lora
from dlm_jax.weights.converted import Converted, is_converted
from dlm_jax.weights.files import check_fetched
from dlm_jax.weights.layout import CONFIG, DTYPES, parts, read_config
from dlm_jax.weights.source import Source

_ASSETS = Path(__file__).parent / "assets"
# A tokenizer may take the end of a turn for its end of text; the model's own is another.
_TURN_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|role_end|>", "<end_of_turn>"}


class Checkpoint(NamedTuple):
    """A model ready to run.

    Attributes:
      config: shapes and special tokens.
      params: the `params` argument of `model.apply({"params": params}, ...)`.
      tokenizer: the tokenizer beside the weights, or None if there is none.
      attention: whose attention the model computes with, one of `attention.IMPLEMENTATIONS`.
    """

    config: Config
    params: Params
    tokenizer: Any
    attention: str = "auto"

    @property
    def model(self) -> Transformer:
        return Transformer(self.config, attention=self.attention)


def load(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    shardings: PyTree = None,
    adapter: str | Path | None = None,
    attention: str = "auto",
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
      attention: `cudnn` for the fused kernel that GPUs have in 16 bits, `xla` for what every device
        computes, `auto` for the first where it is there and agrees with the second.

    Raises:
      FileNotFoundError: no such directory or model, or a file is missing in it.
      OSError: it cannot be fetched from the hub.
      ValueError: configuration, tokenizer and weights do not fit each other, a file is damaged, or
        an argument is wrong. Every error is one sentence.
    """
    directory, dtype = find(path_or_name), as_dtype(dtype)
    attention_lib.check(attention, dtype or jnp.bfloat16)
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError("attention is 'cudnn', which only GPUs have; take 'auto' or 'xla'.")
    stored = inspect(directory, adapter)
    by_path = _shardings_by_path(shardings, stored.shapes)
    tokenizer = open_tokenizer(directory, stored.config)
    flat: dict[str, Array] = {}
    for paths in parts(stored.shapes).values():
        flat |= stored.place(paths, dtype, by_path)
        attention_lib.check(attention, flat[paths[0]].dtype)
    return Checkpoint(stored.config, models.unflatten(flat), tokenizer, attention)


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


def locate(path_or_name: str | Path) -> Path | None:
    """As `find`, but without the embedded models; None if there is none.

    Raises:
      OSError, ValueError: as `find`.
    """
    return hub.locate(path_or_name, check=read_config)


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
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _check_tokenizer(directory: Path, config: Config, tokenizer: Any) -> None:
    """Refuses a tokenizer whose special tokens are not the model's.

    What ends a turn need not end the text. What pads is never seen, so another one is only told.
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
    pad = tokenizer.pad_token_id
    if pad not in (None, config.pad_id, *ends) and config.pad_id not in ends:
        warnings.warn(
            f"{directory}: {CONFIG} says that pad_token_id is {config.pad_id}, and the tokenizer's "
            f"is {pad}; nothing attends to padding, so that answers are the same.",
            stacklevel=3,
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
