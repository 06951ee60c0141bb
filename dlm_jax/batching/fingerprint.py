"""What tells a model from others, for the keys of its responses."""

import hashlib
from pathlib import Path
from typing import Any

from dlm_jax import tokenizer
from dlm_jax.batching.responses import digest
from dlm_jax.weights import converted, lora
from dlm_jax.weights.layout import CONFIG, GENERATION


def fingerprint(directory: Path, adapter: str | Path | None = None) -> str:
    """What tells the model in a directory from others, without reading its weights.

    Its configuration and tokenizer, and of a converted checkpoint the checksums of all parameters,
    otherwise sizes and times of change of the weight files. Likewise of an adapter that is merged
    into it.
    """
    known: list[Any] = []
    for name in (CONFIG, GENERATION, lora.CONFIG, converted.METADATA, *tokenizer.FILES):
        if (directory / name).exists():
            known.append((name, _contents(directory / name)))
    if adapter is not None:
        folder = lora.find(adapter)
        known.append((_contents(folder / lora.CONFIG), _stats(folder)))
    if not converted.is_converted(directory):
        known.append(_stats(directory))
    return digest(*known)


def _contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stats(folder: Path) -> list[tuple[str, int, int]]:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
