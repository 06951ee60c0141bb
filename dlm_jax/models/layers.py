"""The parts of a transformer block: normalisation, rotary positions, projections, attention."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, DTypeLike, Float, Int


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


def attention(
    q_BQNH: Float[Array, "B Q N H"],
    k_BKLH: Float[Array, "B K L H"],
    v_BKLH: Float[Array, "B K L H"],
    mask_BQL: Bool[Array, "B #Q L"],
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B K R Q L"]]:
    """Grouped-query attention with a float32 softmax.

    Keys and values have the heads before the slots, so that both products are batches of plain
    matrix products and no cache is transposed for them.

    Returns the attended values and the weights; a caller that ignores the weights pays nothing for
    them under jit. A query row whose mask is empty gets finite, meaningless values.
    """
    batch, size, heads, width = q_BQNH.shape
    kv_heads = k_BKLH.shape[1]
    groups = heads // kv_heads
    exact = precision(q_BQNH.dtype)
    # The queries that share a KV head side by side, X = R Q: XLA's CPU backend then computes all of
    # this tile by tile and never holds the scores.
    q_BKRQH = q_BQNH.reshape(batch, size, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    scores_BKXL = jnp.einsum(
        "BKXH,BKLH->BKXL",
        q_BKRQH.reshape(batch, kv_heads, groups * size, width),
        k_BKLH,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    bias_BQL = jnp.where(mask_BQL, 0.0, jnp.finfo(jnp.float32).min)
    if mask_BQL.shape[1] > 1:
        bias_BQL = jnp.tile(bias_BQL, (1, groups, 1))
    scores_BKXL = scores_BKXL + bias_BQL[:, None]
    shifted_BKXL = scores_BKXL - jax.lax.stop_gradient(jnp.max(scores_BKXL, axis=-1, keepdims=True))
    mass_BKXL = jnp.exp(shifted_BKXL * (1.0 / math.sqrt(width)))
    total_BKX1 = jnp.sum(mass_BKXL, axis=-1, keepdims=True)
    # Normalised after the product, which is the smaller array.
    out_BKXH = (
        jnp.einsum(
            "BKXL,BKLH->BKXH",
            mass_BKXL.astype(v_BKLH.dtype),
            v_BKLH,
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        / total_BKX1
    )
    out_BQKRH = out_BKXH.reshape(q_BKRQH.shape).transpose(0, 3, 1, 2, 4).astype(v_BKLH.dtype)
    weights_BKXL = mass_BKXL / total_BKX1
    return (
        out_BQKRH.reshape(batch, size, heads, width),
        weights_BKXL.reshape(*q_BKRQH.shape[:4], k_BKLH.shape[2]),
    )
