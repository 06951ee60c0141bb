"""Models by name.

A new family is one module with `NAME`, `ARCHITECTURE`, `MASK_TOKEN`, `PRESETS`, `DECODE`,
`LIKELIHOOD`, `WEIGHTS`, `from_hf` and `to_hf`, and one line in `FAMILIES`.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.models import dream, hf, kinds, llada
from dlm_jax.models.base import Block, Config, LayerFn, Transformer
from dlm_jax.typing import Params

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Block",
    "Config",
    "LayerFn",
    "Transformer",
    "config_from_hf",
    "config_to_hf",
    "flatten",
    "param_shapes",
    "params_to_hf",
    "unflatten",
    "weight_names",
]

FAMILIES: dict[str, ModuleType] = {module.NAME: module for module in (llada, dream)}
"""Family name -> its module."""

PRESETS: dict[str, Config] = {
    name: config for family in FAMILIES.values() for name, config in family.PRESETS.items()
}
"""Preset name -> configuration, for random weights of a known shape."""


def config_from_hf(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> Config:
    """Reads a Hugging Face configuration of any supported family.

    Args:
      raw: the parsed config.json.
      generation: the parsed generation_config.json, if there is one: it may name more ends.

    Raises:
      ValueError: the model is of another family, or a setting is missing or not implemented.
    """
    generation = generation or {}
    hf.check_finite(raw, hf.CONFIG)
    hf.check_finite(generation, hf.GENERATION)
    architectures = {name: module.ARCHITECTURE for name, module in FAMILIES.items()}
    family = kinds.family(raw, generation, architectures)
    return FAMILIES[family].from_hf(raw | {"eos_token_id": hf.ends(raw, generation)})


def config_to_hf(config: Config) -> dict[str, Any]:
    """The inverse of `config_from_hf`."""
    return FAMILIES[config.family].to_hf(config)


@functools.cache
def param_shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Parameter path (`blocks_0/q/kernel`) -> shape, without making any array."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    return MappingProxyType({path: leaf.shape for path, leaf in flatten(shapes).items()})


def weight_names(config: Config) -> dict[str, str]:
    """Parameter path -> tensor name in the family's Hugging Face checkpoint."""
    table = FAMILIES[config.family].WEIGHTS
    names = {}
    for path in param_shapes(config):
        block, _, rest = path.partition("/")
        prefix, _, layer = block.rpartition("_")
        if prefix == "blocks":
            names[path] = table[f"blocks_{{i}}/{rest}"].format(i=layer)
        else:
            names[path] = table[path]
    return names


def params_to_hf(config: Config, params: Params) -> dict[str, np.ndarray]:
    """All parameters as tensors of a Hugging Face checkpoint, in their own dtype."""
    flat = flatten(params)
    return {name: hf.from_param(path, flat[path]) for path, name in weight_names(config).items()}


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dict -> `{"blocks_0/q/kernel": leaf}`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
