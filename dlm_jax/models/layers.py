"""The parts of a transformer block but attention: normalisation, rotary positions, projections."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, DTypeLike, Float, Int


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 parameters ask for float32 products, where a GPU would otherwise take TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32, cast back before the scale is applied."""

    size: int
    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale_D = self.param("scale", nn.initializers.ones, (self.size,), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        normed = wide.astype(scale_D.dtype)
        return normed * jnp.broadcast_to(scale_D, normed.shape)


class Projection(nn.Module):
    """A linear map that contracts the trailing `inputs` axes into `outputs` axes.

    The kernel has shape `inputs + outputs`, for instance `[D, N, H]` for queries and `[N, H, D]`
    for the attention output, so that heads are an axis of their own for sharding. `out_dtype` is
    the dtype that the products are accumulated and returned in, that of the kernel unless given.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = False
    param_dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank = len(self.inputs)
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(rank)),
            out_axis=tuple(range(rank, rank + len(self.outputs))),
        )
        kernel = self.param("kernel", init, self.inputs + self.outputs, self.param_dtype)
        # One flat matrix product: with more axes the CPU backend is slower, above all its gradient.
        size = math.prod(self.inputs)
        y = jnp.matmul(
            x.astype(kernel.dtype).reshape(-1, size),
            kernel.reshape(size, -1),
            precision=precision(kernel.dtype),
            preferred_element_type=self.out_dtype,
        ).reshape(*x.shape[: x.ndim - rank], *self.outputs)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs, self.param_dtype)
            y = y + jnp.broadcast_to(bias, y.shape)
        return y


def rotary(position_BL: Int[Array, "B L"], width: int, theta: float) -> Float[Array, "B L H"]:
    """Cosines, then sines, of the angles by which `rotate` turns H = `width` features.

    A table, because every layer wants the same ones and the compiler would otherwise compute them
    again for every head of every layer.
    """
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BL.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rotate(
    x_BQNH: Float[Array, "B Q N H"], rotary_BQH: Float[Array, "B Q H"]
) -> Float[Array, "B Q N H"]:
    """Rotary position embedding, half-split form, in float32 (RoFormer, arXiv 2104.09864).

    Args:
      x_BQNH: queries or keys.
      rotary_BQH: `rotary` of their positions.
    """
    cos, sin = jnp.split(rotary_BQH[:, :, None], 2, axis=-1)
    first, second = jnp.split(x_BQNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BQNH.dtype)
