"""Random weights of a known shape, made on the device in their final dtype."""

import functools
import math

import jax
import jax.numpy as jnp

from dlm_jax import models
from dlm_jax.models import Config
from dlm_jax.typing import Array, DTypeLike, Params

_PIECE = 2**22
"""Entries of a tensor that are drawn together."""


def shapes(config: Config, dtype: DTypeLike) -> Params:
    """The parameters as shapes and dtypes, without any array."""
    return models.unflatten(
        {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, shape in models.param_shapes(config).items()
        }
    )


def make(config: Config, dtype: DTypeLike, key: Array) -> Params:
    """Parameters with the scales that training would start from.

    Tensor by tensor, large ones in pieces: drawing normal numbers takes several times the memory of
    its result, which is too much for a model that fills the device.
    """
    table = models.param_shapes(config)
    keys = jax.random.split(key, len(table))
    params = {}
    for key, (path, shape) in zip(keys, table.items(), strict=True):
        layer, kind = path.split("/")[-2:]
        if kind == "scale":
            params[path] = jnp.ones(shape, dtype)
        elif kind == "bias":
            params[path] = jnp.zeros(shape, dtype)
        else:
            inputs = {"o": math.prod(shape[:-1]), "embed": shape[-1]}.get(layer, shape[0])
            params[path] = normal(key, shape, dtype, 1 / math.sqrt(inputs))
    return models.unflatten(params)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike, scale: float) -> Array:
    """Normal numbers of a standard deviation, drawn in pieces along the first axis."""
    pieces = math.gcd(shape[0], 2 ** (math.prod(shape) // _PIECE).bit_length())

    def draw(key: Array) -> Array:
        return scale * jax.random.normal(key, (shape[0] // pieces, *shape[1:]), dtype)

    return jax.lax.map(draw, jax.random.split(key, pieces)).reshape(shape)
