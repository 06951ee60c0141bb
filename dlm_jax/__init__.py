"""Masked diffusion language models in JAX and Flax. Names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax import cache, models, tokenizer
    from dlm_jax.checkpoint import Checkpoint, load
    from dlm_jax.decoding.config import DecodeConfig
    from dlm_jax.decoding.loop import (
        Frame,
        GenerateOutput,
        diffusion_generate,
        diffusion_stream,
    )
    from dlm_jax.decoding.state import Draws
    from dlm_jax.estimators import LikelihoodDraws
    from dlm_jax.likelihood import LikelihoodConfig, log_likelihood
    from dlm_jax.models import Config, Transformer

__all__ = [
    "Checkpoint",
    "Config",
    "DecodeConfig",
    "Draws",
    "Frame",
    "GenerateOutput",
    "LikelihoodConfig",
    "LikelihoodDraws",
    "Transformer",
    "cache",
    "diffusion_generate",
    "diffusion_stream",
    "load",
    "log_likelihood",
    "models",
    "tokenizer",
]

__version__ = "0.1.0"

_MODULES = {
    "Checkpoint": "checkpoint",
    "Config": "models",
    "DecodeConfig": "decoding.config",
    "Draws": "decoding.state",
    "Frame": "decoding.loop",
    "GenerateOutput": "decoding.loop",
    "LikelihoodConfig": "likelihood",
    "LikelihoodDraws": "estimators",
    "Transformer": "models",
    "diffusion_generate": "decoding.loop",
    "diffusion_stream": "decoding.loop",
    "load": "checkpoint",
    "log_likelihood": "likelihood",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    value = getattr(module, name) if name in _MODULES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
