"""LoRA adapters in the layout of PEFT, merged into the tensors of a model while these are read.

An adapter says of a matrix W `[out, in]` what is to be added, as two thin ones: W + scale * B A.
The result is a `Tensor` like any other, whose rows are summed in float32 as they are read, so that
nothing that loads, shards or converts tensors knows of adapters, and no sum is held in full. DoRA,
besides, gives every row of the sum a length.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax.weights import files, hub
from dlm_jax.weights.files import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_LARGEST = float(np.finfo(np.float32).max)
# Setting -> the values with which it changes nothing; with any other the numbers would differ.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None, {}),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
}
# How A and B began. With others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the base was changed at the
# start of training, and what is saved belongs to a base that is not there.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What says where an adapter is from, how it was trained, or what its tensors show anyway.
_OF_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "runtime_config", "unsloth_fixed", "lora_dropout", "megatron_core"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
    *("ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform"),
    *("init_lora_weights", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora"),
}
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<half>lora_[AB])(?:\.default)?\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


def find(path_or_name: str | Path) -> Path:
    """The directory of an adapter, or of one of the hub.

    Raises:
      FileNotFoundError: there is none.
      OSError, ValueError: the hub was asked, and it cannot be had; see `hub.locate`.
    """
    directory = hub.locate(path_or_name, kind=hub.ADAPTER)
    if directory is None:
        raise FileNotFoundError(
            f"{str(path_or_name)!r} is no directory; an adapter is one, or owner/name on the hub."
        )
    return directory


def is_unmerged(names: Collection[str]) -> bool:
    """Whether tensors are those of a model that PEFT has wrapped, adapter and all."""
    return any(".lora_" in name or ".base_layer." in name for name in names)


def merge(
    tensors: Mapping[str, Tensor], directory: Path, matrices: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of a model with an adapter; no value is read yet.

    Args:
      tensors: name -> tensor of the base model.
      directory: of the adapter.
      matrices: names of the tensors that are linear maps.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it is of a kind that is not implemented, is damaged, or does not fit the model.
    """
    adapter = _Adapter.open(directory)
    modules = {name.removesuffix(".weight"): name for name in matrices}
    merged = dict(tensors)
    for module, parts in adapter.parts.items():
        if module not in modules:
            raise ValueError(
                f"{directory}: the adapter is for {module}, which is no linear map of this model; "
                "give the model that the adapter was trained on."
            )
        base = tensors[modules[module]]
        chunks = functools.partial(adapter.update(module, parts, base.shape).chunks, base)
        merged[modules[module]] = dataclasses.replace(base, chunks=chunks)
    adapter.check_targets(modules)
    return merged


@dataclasses.dataclass(frozen=True)
class _Update:
    """What is done to one matrix: scale * B A is added, and rows get the lengths `magnitude`."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None

    def chunks(self, base: Tensor) -> Iterator[np.ndarray]:
        """The rows of the changed matrix in float32, a few at a time."""
        a, b = _read(self.a), np.float32(self.scale) * _read(self.b)
        magnitude = None if self.magnitude is None else _read(self.magnitude)
        row = 0
        for chunk in base.chunks():
            rows = slice(row, row + len(chunk))
            row = rows.stop
            merged = b[rows] @ a
            merged += chunk.astype(np.float32)
            if magnitude is not None:
                with np.errstate(all="ignore"):  # a row of zeros has no direction: told as NaN
                    merged *= (magnitude[rows] / np.linalg.norm(merged, axis=1))[:, None]
            yield merged


def _read(tensor: Tensor) -> np.ndarray:
    array = np.empty(tensor.shape, np.float32)
    tensor.read_into(array)
    return array


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter's settings and its tensors by the module that they are for.

    Attributes:
      path: of its adapter_config.json.
      raw: what that says.
      parts: module -> `lora_A`, `lora_B` and, with DoRA, `lora_magnitude_vector`.
    """

    path: Path
    raw: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    @classmethod
    def open(cls, directory: Path) -> "_Adapter":
        path = directory / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {CONFIG}; it must be the directory of a LoRA adapter as PEFT "
                "saves it."
            )
        raw = files.read_json(path)
        _check_kind(path, raw)
        weights = next((directory / n for n in WEIGHTS if (directory / n).exists()), None)
        if weights is None:
            raise FileNotFoundError(
                f"{directory} has {CONFIG}, but no {WEIGHTS[0]}; put the adapter's weights beside "
                f"it, or remove {CONFIG} if they are merged into the model already."
            )
        return cls(path, raw, _parts(weights))

    def update(self, module: str, parts: dict[str, Tensor], shape: tuple[int, ...]) -> _Update:
        """Checks what there is for one module, a matrix of this shape."""
        magnitudes = ("lora_magnitude_vector",) if self._flag("use_dora") else ()
        for part in ("lora_A", "lora_B", *magnitudes):
            if part not in parts:
                raise ValueError(f"{self.path.parent}: the adapter has no {part} for {module}.")
        rank = self._at(module, "rank_pattern", "r", 8)
        alpha = self._at(module, "alpha_pattern", "lora_alpha", 8)
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"{self.path}: the rank of {module} is {rank!r}; it must be a whole number from 1."
            )
        if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST:
            raise ValueError(
                f"{self.path}: lora_alpha of {module} is {alpha!r}; it must be a number."
            )
        rows, columns = shape
        wanted = dict(lora_A=(rank, columns), lora_B=(rows, rank), lora_magnitude_vector=(rows,))
        for part, tensor in parts.items():
            if part == "lora_magnitude_vector" and not magnitudes:
                raise ValueError(
                    f"{tensor.label} is one of DoRA's, but {self.path} does not say use_dora."
                )
            if tensor.shape != wanted[part]:
                raise ValueError(
                    f"{tensor.label} has shape {list(tensor.shape)}; with rank {rank} it must be "
                    f"{list(wanted[part])}."
                )
        root = math.sqrt(rank) if self._flag("use_rslora") else rank
        magnitude = parts.get("lora_magnitude_vector")
        return _Update(parts["lora_A"], parts["lora_B"], alpha / root, magnitude)

    def check_targets(self, modules: Collection[str]) -> None:
        """Refuses an adapter that has not all tensors that it says it has, or others."""
        if not self.raw.get("target_modules") or self.raw["target_modules"] == "all-linear":
            return
        meant = self._named("target_modules", modules)
        if self.raw.get("exclude_modules"):
            meant -= self._named("exclude_modules", modules)
        meant = {module for module in meant if self._in_layers(module)}
        others, lacking = self.parts.keys() - meant, meant - self.parts.keys()
        if others:
            raise ValueError(
                f"{self.path}: there are tensors for {min(others)}, which {self._choosing} do not "
                "choose; settings and weights must be of one adapter."
            )
        if lacking:
            raise ValueError(
                f"{self.path}: there are no tensors for {min(lacking)}, which {self._choosing} "
                "choose; the adapter is incomplete."
            )

    @property
    def _choosing(self) -> str:
        """The settings that say which modules have an adapter."""
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        return " and ".join(name for name in names if self.raw.get(name) not in (None, [], ""))

    def _named(self, setting: str, modules: Collection[str]) -> set[str]:
        """The modules that a setting names: by the ends of their names, or by one pattern."""
        given = self.raw[setting]
        if isinstance(given, str):
            pattern = self._compile(given, setting)
        else:
            ends = "|".join(map(re.escape, self._texts(setting)))
            pattern = re.compile(rf"(.*\.)?({ends})")
        return {module for module in modules if pattern.fullmatch(module)}

    def _texts(self, setting: str) -> list[str]:
        given = self.raw[setting]
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"{self.path}: {setting} is {given!r}; it must be names of modules.")
        return given

    def _in_layers(self, module: str) -> bool:
        """Whether a module is in one of the layers that have adapters."""
        given = self.raw.get("layers_to_transform")
        if given in (None, []):
            return True
        wanted = given if isinstance(given, list) else [given]
        if not all(type(layer) is int for layer in wanted):
            raise ValueError(
                f"{self.path}: layers_to_transform is {given!r}; it must be numbers of layers."
            )
        names = self._texts("layers_pattern") if self.raw.get("layers_pattern") else [r"[^.]+"]
        pattern = rf"(?:^|\.)(?:{'|'.join(names)})\.(\d+)\."
        found = self._compile(pattern, "layers_pattern").search(module)
        return found is not None and int(found[1]) in wanted

    def _at(self, module: str, pattern_setting: str, setting: str, otherwise: int) -> Any:
        """A setting of one module: by the first pattern that fits it, or that of all."""
        patterns = self.raw.get(pattern_setting) or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"{self.path}: {pattern_setting} is {patterns!r}; it must map modules to numbers."
            )
        for pattern, value in patterns.items():
            if self._compile(rf"(.*\.)?({pattern})$", pattern_setting).match(module):
                return value
        return self.raw.get(setting, otherwise)

    def _compile(self, pattern: str, setting: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{self.path}: {setting} has {pattern!r}, which is no regular expression: {error}."
            ) from error

    def _flag(self, setting: str) -> bool:
        return bool(self.raw.get(setting))


def _check_kind(path: Path, raw: dict[str, Any]) -> None:
    """Refuses by name what is no LoRA, or would change other numbers than those that are merged."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, which is not implemented; it must be "
            "'LORA'."
        )
    for setting in ("use_rslora", "use_dora"):
        if raw.get(setting) not in (True, False, None) or type(raw.get(setting)) is int:
            raise ValueError(f"{path}: {setting} is {raw[setting]!r}; it must be true or false.")
    for setting, value in raw.items():
        values = _NOT_IMPLEMENTED.get(setting, (None, False, [], {}, ""))
        if setting not in _OF_NO_EFFECT and value not in values:
            raise ValueError(
                f"{path}: {setting} is {value!r}, which is not implemented; merge the adapter with "
                "PEFT, and give the merged model."
            )
    start = raw.get("init_lora_weights")
    if start not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, so the adapter belongs to a base model that "
            "was changed at the start of its training; merge the two with PEFT, or save the "
            "adapter with path_initial_model_for_weight_conversion."
        )


def _parts(weights: Path) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.unwrap(files.open_file(weights)).items():
        match = _PART.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{tensor.label} is not implemented; an adapter must hold lora_A and lora_B of "
                "linear maps, and nothing else."
            )
        parts = found.setdefault(match["module"], {})
        part = match["half"] or match["magnitude"]
        if part in parts:
            raise ValueError(f"{tensor.label} is there twice, under another name.")
        parts[part] = tensor
    if not found:
        raise ValueError(f"{weights} holds no tensors; it must hold those of a LoRA adapter.")
    return found
