"""Attention, and the keys and values that it reads in the layout that suits it.

Two implementations. XLA's own is for every device and dtype, and the only one that tells what was
attended to. cuDNN's, on GPUs in 16 bits, is one kernel which never holds scores. They want keys and
values laid out differently, so that the layout of what is kept decides which one reads it.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax.models.layers import precision
from dlm_jax.typing import Array, Bool, DTypeLike, Float, Int

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
"""What `Transformer.attention` may be; `auto` is cuDNN's where that agrees with XLA's."""
TOLERANCE = 1e-2
"""By how much the two may differ in 16 bits, of values of about 1."""
SCORES = 2**24
"""About the most scores that XLA's attention computes at a time, 64 MiB of float32."""


class Heads(NamedTuple):
    """What is special about the attention of a network."""

    queries: int
    """N."""
    kv: int
    """K."""
    width: int
    """H."""


class HeadsFirst(NamedTuple):
    """Keys (after rotary positions) and values as XLA's attention wants them: both products are
    then batches of plain matrix products, and nothing is transposed. Without B for one row."""

    k_BKLH: Float[Array, "*B K L H"]
    v_BKLH: Float[Array, "*B K L H"]

    @classmethod
    def empty(cls, length: int, heads: int, width: int, dtype: DTypeLike) -> "HeadsFirst":
        """Of one row, all zeros."""
        zeros = jnp.zeros((heads, length, width), dtype)
        return cls(zeros, zeros)

    @classmethod
    def of(cls, k_BLKH: Float[Array, "B L K H"], v_BLKH: Float[Array, "B L K H"]) -> "HeadsFirst":
        """Keys and values of all slots."""
        return cls(k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2))

    @property
    def v_BLKH(self) -> Float[Array, "B L K H"]:
        """The values by slots."""
        return self.v_BKLH.swapaxes(1, 2)

    def write(
        self,
        index_BQ: Int[Array, "B Q"],
        *,
        k_BQKH: Float[Array, "B Q K H"] | None = None,
        v_BQKH: Float[Array, "B Q K H"] | None = None,
    ) -> "HeadsFirst":
        """With other keys, values or both at these slots; empty ones (L) write nothing."""

        def put(kept_BKLH: Array, new_BQKH: Array | None) -> Array:
            if new_BQKH is None:
                return kept_BKLH
            return queries_lib.scatter_heads(kept_BKLH, new_BQKH, index_BQ)

        return HeadsFirst(put(self.k_BKLH, k_BQKH), put(self.v_BKLH, v_BQKH))

    def attend(
        self, q_BQNH: Float[Array, "B Q N H"], mask_BQL: Bool[Array, "B #Q L"]
    ) -> Float[Array, "B Q N H"]:
        """Grouped-query attention with a float32 softmax, computed by XLA.

        A query row whose mask is empty gets finite, meaningless values.

        Args:
          q_BQNH: queries; K divides N.
          mask_BQL: which slots each query attends to.
        """

        def tile(q_BqNH: Array, mask_BqL: Array) -> tuple[Array]:
            return (_plain(q_BqNH, *self, mask_BqL)[0],)

        return _by_tiles(tile, q_BQNH, mask_BQL)[0]

    def attend_and_tell(
        self, q_BQNH: Float[Array, "B Q N H"], mask_BQL: Bool[Array, "B #Q L"]
    ) -> tuple[Float[Array, "B Q N H"], Float[Array, "B Q L"]]:
        """The same, and what each query attended to, as a mean over the heads."""

        def tile(q_BqNH: Array, mask_BqL: Array) -> tuple[Array, Array]:
            out_BqNH, weights_BNqL = _plain(q_BqNH, *self, mask_BqL)
            return out_BqNH, _over_heads(weights_BNqL)

        out_BQNH, told_BQL = _by_tiles(tile, q_BQNH, mask_BQL)
        return out_BQNH, told_BQL


class SlotsFirst(NamedTuple):
    """The same as cuDNN's attention wants them; methods are those of `HeadsFirst`."""

    k_BLKH: Float[Array, "*B L K H"]
    v_BLKH: Float[Array, "*B L K H"]

    @classmethod
    def empty(cls, length: int, heads: int, width: int, dtype: DTypeLike) -> "SlotsFirst":
        zeros = jnp.zeros((length, heads, width), dtype)
        return cls(zeros, zeros)

    @classmethod
    def of(cls, k_BLKH: Float[Array, "B L K H"], v_BLKH: Float[Array, "B L K H"]) -> "SlotsFirst":
        return cls(k_BLKH, v_BLKH)

    def write(
        self,
        index_BQ: Int[Array, "B Q"],
        *,
        k_BQKH: Float[Array, "B Q K H"] | None = None,
        v_BQKH: Float[Array, "B Q K H"] | None = None,
    ) -> "SlotsFirst":
        def put(kept_BLKH: Array, new_BQKH: Array | None) -> Array:
            if new_BQKH is None:
                return kept_BLKH
            length = kept_BLKH.shape[1]
            if index_BQ.shape[1] < length:
                return queries_lib.scatter(kept_BLKH, new_BQKH, index_BQ)
            # Each at its own place (`queries.Packed`): on a GPU one kernel that rotates and writes.
            here_BL11 = (index_BQ < length)[:, :, None, None]
            return jnp.where(here_BL11, new_BQKH.astype(kept_BLKH.dtype), kept_BLKH)

        return SlotsFirst(put(self.k_BLKH, k_BQKH), put(self.v_BLKH, v_BQKH))

    def attend(
        self, q_BQNH: Float[Array, "B Q N H"], mask_BQL: Bool[Array, "B #Q L"]
    ) -> Float[Array, "B Q N H"]:
        return _fused(q_BQNH, *self, mask_BQL)


KV = HeadsFirst | SlotsFirst
"""Keys and values of one layer, one slot per position. The layout decides who reads them."""
SameKV = TypeVar("SameKV", HeadsFirst, SlotsFirst)
"""For what keeps the layout."""


def check(implementation: str, dtype: DTypeLike) -> None:
    """Refuses what is none of `IMPLEMENTATIONS`, or does not compute in this dtype.

    Raises:
      ValueError: one sentence.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        raise ValueError(
            f"attention is 'cudnn', which computes in bfloat16 or float16, not in "
            f"{jnp.dtype(dtype).name}; take 'auto' or 'xla'."
        )


def layout(implementation: str, heads: Heads, dtype: DTypeLike) -> type[KV]:
    """The layout for one of `IMPLEMENTATIONS`, a network, its dtype, and this machine.

    Raises:
      ValueError: see `check`.
    """
    check(implementation, dtype)
    fused = implementation == "cudnn"
    if implementation == "auto" and jnp.dtype(dtype).itemsize == 2:
        fused = jax.default_backend() == "gpu" and fused_agrees(heads, jnp.dtype(dtype).name)
    return SlotsFirst if fused else HeadsFirst


@functools.cache
def fused_agrees(heads: Heads, dtype: str) -> bool:
    """Whether cuDNN's attention gives what XLA's gives here, tried once; if not, warns.

    It is tried outside of whatever is being traced.
    """
    with jax.ensure_compile_time_eval():
        reason = disagreement(heads, dtype)
    if reason:
        warnings.warn(f"cuDNN's attention is not used: {reason}.", stacklevel=2)
    return not reason


def disagreement(heads: Heads, dtype: str) -> str:
    """What is wrong with cuDNN's attention on the default device; empty if nothing is."""
    try:
        difference = fused_difference(heads, dtype)
    except Exception as error:  # of whatever kind: the other implementation is there
        return f"it does not run here ({' '.join(str(error).split())[:200]})"
    return "" if difference <= TOLERANCE else f"it differs from XLA's by {difference:.2g}"


def fused_difference(heads: Heads, dtype: str) -> float:
    """The largest difference between cuDNN's attention and XLA's, on the default device.

    Of a small input: two rows, one of them padded, as many queries as slots and fewer.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    length, (number, kv_number, width) = 160, heads
    q_BLNH = jax.random.normal(keys[0], (2, length, number, width), dtype)
    k_BLKH, v_BLKH = (
        jax.random.normal(key, (2, length, kv_number, width), dtype) for key in keys[1:]
    )
    mask_B1L = (jnp.arange(length)[None] >= jnp.asarray([[0], [37]]))[:, None]

    @functools.partial(jax.jit, static_argnames=("layout", "queries"))
    def attend(layout: type[KV], queries: int) -> Array:
        kv = layout.of(k_BLKH, v_BLKH)
        return kv.attend(q_BLNH[:, :queries], mask_B1L).astype(jnp.float32)

    def differ(queries: int) -> float:
        ours, theirs = (attend(layout, queries) for layout in (HeadsFirst, SlotsFirst))
        worst = jnp.max(jnp.abs(ours - theirs))
        return float(jnp.where(jnp.isfinite(worst), worst, jnp.inf))

    return max(map(differ, (length, 32)))


# --- implementations ------------------------------------------------------------------------------


def _fused(
    q_BQNH: Float[Array, "B Q N H"],
    k_BLKH: Float[Array, "B L K H"],
    v_BLKH: Float[Array, "B L K H"],
    mask_BQL: Bool[Array, "B #Q L"],
) -> Float[Array, "B Q N H"]:
    """cuDNN's."""
    shape = (mask_BQL.shape[0], 1, q_BQNH.shape[1], mask_BQL.shape[2])
    return jax.nn.dot_product_attention(
        q_BQNH,
        k_BLKH,
        v_BLKH,
        mask=jnp.broadcast_to(mask_BQL[:, None], shape),
        implementation="cudnn",
    )


def _plain(
    q_BQNH: Float[Array, "B Q N H"],
    k_BKLH: Float[Array, "B K L H"],
    v_BKLH: Float[Array, "B K L H"],
    mask_BQL: Bool[Array, "B #Q L"],
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q L"]]:
    """XLA's: the attended values and the weights; who ignores these pays nothing under jit."""
    batch, size, heads, width = q_BQNH.shape
    kv_heads, length = k_BKLH.shape[1:3]
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
    weights_BNQL = (mass_BKXL / total_BKX1).reshape(batch, heads, size, length)
    return out_BQKRH.reshape(batch, size, heads, width), weights_BNQL


def _by_tiles(
    attend: Callable[[Array, Array], tuple[Array, ...]],
    q_BQNH: Float[Array, "B Q N H"],
    mask_BQL: Bool[Array, "B #Q L"],
) -> tuple[Array, ...]:
    """Attention of some queries at a time, where the scores of all would take much memory.

    On a CPU XLA goes on to smaller tiles by itself.

    Args:
      attend: from queries and their mask to arrays `[B, q, ...]`.
      q_BQNH: all queries.
      mask_BQL: their mask.
    """
    batch, size, heads, _ = q_BQNH.shape
    tiles = math.ceil(batch * size * heads * mask_BQL.shape[-1] / SCORES)
    if tiles <= 1:
        return attend(q_BQNH, mask_BQL)
    width = math.ceil(size / min(tiles, size))

    def split(values_BQx: Array) -> Array:
        """`[B, Q, ...]` as `[tiles, B, q, ...]`."""
        short = -size % width
        values_BQx = jnp.pad(values_BQx, ((0, 0), (0, short), *[(0, 0)] * (values_BQx.ndim - 2)))
        return values_BQx.reshape(batch, -1, width, *values_BQx.shape[2:]).swapaxes(0, 1)

    def join(values: Array) -> Array:
        return values.swapaxes(0, 1).reshape(batch, -1, *values.shape[3:])[:, :size]

    if mask_BQL.shape[1] == 1:
        parts = jax.lax.map(lambda q_BqNH: attend(q_BqNH, mask_BQL), split(q_BQNH))
    else:
        parts = jax.lax.map(lambda part: attend(*part), (split(q_BQNH), split(mask_BQL)))
    return tuple(map(join, parts))


def _over_heads(weights_BNQL: Float[Array, "B N Q L"]) -> Float[Array, "B Q L"]:
    """The mean over the heads.

    As a product: the CPU backend sums leading axes slowly, and fuses sums of all layers into one,
    for which it keeps the weights of all of them.
    """
    batch, heads, size, length = weights_BNQL.shape
    mean_BX = jnp.einsum(
        "N,BNX->BX",
        jnp.full(heads, 1 / heads),
        weights_BNQL.reshape(batch, heads, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    return mean_BX.reshape(batch, size, length)
