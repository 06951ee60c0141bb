"""The one bidirectional transformer behind every model family.

A family (`llada.py`, `dream.py`) only makes a `Config` and names its weights; the network is always
this one: pre-RMSNorm, rotary positions, grouped-query attention with optional q/k/v biases, SwiGLU,
untied or tied head, no attention mask but padding.

The network knows no cache. `Transformer.walk` hands each `Block` to a *layer function*, which
decides which positions flow through which of the block's operations and what is kept
(`dlm_jax/cache/`). Arithmetic runs in the dtype of the parameters, with softmax, norms, rotary
positions and logits in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from dlm_jax import queries as queries_lib
from dlm_jax.models import attention as attention_lib
from dlm_jax.models.attention import KV, Heads, HeadsFirst
from dlm_jax.models.layers import Projection, RMSNorm, precision, rotary, rotate
from dlm_jax.queries import Queries, Slots
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, DTypeLike, Float, Int, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and special tokens of a model. Hashable, hence static under jit.

    Attributes:
      family: name of the model family, a key of `dlm_jax.models.FAMILIES`.
      vocab_size: V, rows of the embedding.
      width: D.
      mlp_width: F.
      num_layers: number of blocks.
      num_heads: N.
      num_kv_heads: K, divides N.
      head_dim: H, even.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      qkv_bias: whether the query, key and value projections have biases.
      tied_head: whether the output head is the embedding transposed.
      max_length: longest sequence (prompt and generated tokens together) the model was made for.
      shift: the prediction for position p is read at p - shift.
      mask_id: token id of the mask.
      eos_id: token id that ends an answer.
      more_eos_ids: others of which any ends one as well.
      pad_id: token id used to left-pad prompts; never attended.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied_head: bool
    max_length: int
    shift: int
    mask_id: int
    eos_id: int
    pad_id: int
    more_eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "more_eos_ids", tuple(self.more_eos_ids))  # JSON has but lists
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
        ids = {name: getattr(self, name) for name in ("mask_id", "eos_id", "pad_id")}
        ids |= {f"more_eos_ids[{i}]": token for i, token in enumerate(self.more_eos_ids)}
        for name, token in ids.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} is {token}; it must be a token id below vocab_size, {self.vocab_size}."
                )

    @property
    def heads(self) -> Heads:
        """What attention is made of."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        layer = self.width * (heads + 3 * self.mlp_width + 2) + biases
        tables = self.vocab_size * self.width * (1 if self.tied_head else 2)
        return tables + self.num_layers * layer + self.width

    def room(self, answer: int) -> int:
        """The most tokens that a prompt can have before `answer` tokens; may be below 1."""
        return self.max_length - answer

    def check_length(self, prompt: int, answer: int) -> None:
        """Refuses a prompt and an answer, in tokens, that are longer than the context.

        Raises:
          ValueError: one sentence.
        """
        if prompt > self.room(answer):
            raise ValueError(
                f"Prompt and answer have {prompt} + {answer} tokens; the model's context ends at "
                f"{self.max_length}."
            )


class Block(nn.Module):
    """One transformer block, as operations that a layer function composes.

    Hidden states `x` are `[B, Q, D]`. `norm` feeds `query`, `key` and `value`; `attend` ends with
    the output projection and `ffn` starts with its own norm, so that both return what is added to
    the residual stream.
    """

    config: Config
    param_dtype: DTypeLike = jnp.float32
    attention: str = "auto"

    def setup(self) -> None:
        c, dtype = self.config, self.param_dtype
        self.attn_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.q = Projection((c.width,), (c.num_heads, c.head_dim), c.qkv_bias, dtype)
        self.k = Projection((c.width,), (c.num_kv_heads, c.head_dim), c.qkv_bias, dtype)
        self.v = Projection((c.width,), (c.num_kv_heads, c.head_dim), c.qkv_bias, dtype)
        self.o = Projection((c.num_heads, c.head_dim), (c.width,), False, dtype)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.gate = Projection((c.width,), (c.mlp_width,), False, dtype)
        self.up = Projection((c.width,), (c.mlp_width,), False, dtype)
        self.down = Projection((c.mlp_width,), (c.width,), False, dtype)

    def norm(self, x: Array) -> Array:
        return self.attn_norm(x)

    def query(self, normed: Array, rotary_BQH: Array) -> Float[Array, "B Q N H"]:
        return rotate(self.q(normed), rotary_BQH)

    def key(self, normed: Array, rotary_BQH: Array) -> Float[Array, "B Q K H"]:
        return rotate(self.k(normed), rotary_BQH)

    def value(self, normed: Array) -> Float[Array, "B Q K H"]:
        return self.v(normed)

    def kv(self, k_BLKH: Float[Array, "B L K H"], v_BLKH: Float[Array, "B L K H"]) -> KV:
        """Keys and values that are kept for this layer only."""
        layout = attention_lib.layout(self.attention, self.config.heads, k_BLKH.dtype)
        return layout.of(k_BLKH, v_BLKH)

    def attend(self, q_BQNH: Array, kv: KV, mask_BQL: Array) -> Float[Array, "B Q D"]:
        """What attention adds to the residual stream; see `HeadsFirst.attend`."""
        return self.o(kv.attend(q_BQNH, mask_BQL))

    def attend_and_tell(
        self, q_BQNH: Array, kv: HeadsFirst, mask_BQL: Array
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q L"]]:
        """The same, and what each query attended to; see `HeadsFirst.attend_and_tell`."""
        out_BQNH, told_BQL = kv.attend_and_tell(q_BQNH, mask_BQL)
        return self.o(out_BQNH), told_BQL

    def ffn(self, x: Array) -> Array:
        normed = self.mlp_norm(x)
        return self.down(nn.silu(self.gate(normed)) * self.up(normed))


LayerFn = Callable[
    [Block, tuple[Array, PyTree], PyTree, Queries], tuple[tuple[Array, PyTree], PyTree]
]
"""`(block, (hidden_BQD, acc), layer_cache, queries) -> ((hidden_BQD, acc), layer_cache)`.

`acc` is whatever a cache method accumulates over layers; `()` for most. The hidden states that it
returns are `queries.outputs` of all, so that the last layer need not compute what nobody reads.
"""


def plain_layer(
    block: Block, carry: tuple[Array, PyTree], layer_cache: PyTree, queries: Queries
) -> tuple[tuple[Array, PyTree], PyTree]:
    """The block without a cache: the queries attend to one another and nothing is kept."""
    hidden, acc = carry
    length = queries.valid_BL.shape[1]
    seen_BQ = queries_lib.gather(queries.attended_BL, queries.index_BQ)
    real_BQ = (queries.index_BQ < length) & seen_BQ
    normed = block.norm(hidden)
    kv = block.kv(block.key(normed, queries.rotary_BQH), block.value(normed))
    hidden, normed, rotary_BQH = queries.outputs((hidden, normed, queries.rotary_BQH))
    hidden = hidden + block.attend(block.query(normed, rotary_BQH), kv, real_BQ[:, None, :])
    return (hidden + block.ffn(hidden), acc), layer_cache


class Transformer(nn.Module):
    """A bidirectional transformer; hashable, so that it is a static argument of jitted functions.

    `param_dtype` only matters for `init`: a forward runs in the dtype of the parameters it is
    given. `attention` is one of `attention.IMPLEMENTATIONS`.
    """

    config: Config
    param_dtype: DTypeLike = jnp.float32
    attention: str = "auto"

    def setup(self) -> None:
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, param_dtype=self.param_dtype)
        self.blocks = [Block(c, self.param_dtype, self.attention) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.width, c.norm_eps, self.param_dtype)
        if not c.tied_head:
            self.head = Projection(
                (c.width,), (c.vocab_size,), False, self.param_dtype, out_dtype=jnp.float32
            )

    def walk(
        self,
        tokens_BQ: Int[Array, "B Q"],
        queries: Queries,
        cache: tuple[PyTree, ...],
        acc: PyTree,
        layers: tuple[tuple[int, int, LayerFn], ...],
        read_BW: Int[Array, "B W"] | None = None,
    ) -> tuple[Float[Array, "B W D"], tuple[PyTree, ...], PyTree]:
        """Runs the queries through all layers.

        Args:
          tokens_BQ: token ids at the query slots (any id at empty ones).
          queries: slots, rotary angles and key validity.
          cache: one pytree per layer.
          acc: initial accumulator of the layer functions.
          layers: `(low, high, layer function)` ranges that cover all layers in order.
          read_BW: places among the queries (`readout`); None is all.

        Returns:
          Final-normed hidden states at these places, the new cache, the accumulator.
        """
        hidden = self.embed.embedding[tokens_BQ]
        new_cache = list(cache)
        fewer = read_BW is not None and read_BW.shape[1] < tokens_BQ.shape[1]
        for low, high, layer in layers:
            run = self._traced_once(layer) if isinstance(hidden, Tracer) else layer
            for i in range(low, high):
                if fewer and i + 1 == self.config.num_layers:
                    queries = queries._replace(read_BW=read_BW)
                (hidden, acc), new_cache[i] = run(self.blocks[i], (hidden, acc), cache[i], queries)
        if read_BW is not None and not fewer:
            hidden = queries_lib.gather(hidden, read_BW)
        return self.final_norm(hidden), tuple(new_cache), acc

    def _traced_once(self, layer: LayerFn) -> LayerFn:
        """The layer function, traced for the first block and used again for all that are alike."""
        # Blocks have no parameters yet; or somebody wants to see inside.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return layer
        block = Block(self.config, self.param_dtype, self.attention, parent=None)

        @jax.jit
        def layer_of(params: Params, *args: PyTree) -> PyTree:
            return block.apply({"params": params}, *args, method=layer)

        return lambda bound, *args: layer_of(bound.variables["params"], *args)

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states, for as few positions as the caller chose."""
        if not self.config.tied_head:
            return self.head(hidden)
        table_VD = self.embed.embedding
        return jnp.einsum(
            "...D,VD->...V",
            hidden,
            table_VD,
            precision=precision(table_VD.dtype),
            preferred_element_type=jnp.float32,
        )

    def encode(self, tokens_BL: Int[Array, "B L"], slots: Slots) -> Float[Array, "B L D"]:
        """Final-normed hidden states of whole sequences, without a cache."""
        depth = self.config.num_layers
        layers = ((0, depth, plain_layer),)
        queries = queries_lib.every(slots)
        hidden_BLD, _, _ = self.walk(tokens_BL, queries, ((),) * depth, (), layers)
        return hidden_BLD

    def __call__(
        self,
        tokens_BL: Int[ArrayOrNumpy, "B L"],
        valid_BL: Bool[ArrayOrNumpy, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Raw float32 logits at every position, before any shift."""
        if valid_BL is None:
            valid_BL = jnp.ones(tokens_BL.shape, bool)
        slots = lay_out(self.config, jnp.asarray(valid_BL))
        return self.unembed(self.encode(jnp.asarray(tokens_BL), slots))


def lay_out(config: Config, valid_BL: Bool[Array, "B L"]) -> Slots:
    """All slots of a batch, with their rotary angles: once for a generation, not for a step."""
    position_BL = queries_lib.positions(valid_BL)
    return Slots(valid_BL, rotary(position_BL, config.head_dim, config.rope_theta))


def source_slot(
    slot_BW: Int[Array, "B W"], valid_BL: Bool[Array, "B L"], shift: int
) -> Int[Array, "B W"]:
    """The slot whose output predicts the token at `slot`: `shift` to the left, within the row.

    A row's first real token has no predecessor and is predicted at its own slot, as in Dream's code
    (the first row of logits is repeated). The sentinel L stays L.
    """
    if not shift:
        return slot_BW
    length = valid_BL.shape[1]
    first_B = jnp.argmax(valid_BL, axis=-1).astype(slot_BW.dtype)
    return jnp.where(slot_BW < length, jnp.maximum(slot_BW - shift, first_B[:, None]), slot_BW)


def sources(mask_L: Bool[Array, " L"], valid_L: Bool[Array, " L"], shift: int) -> Bool[Array, " L"]:
    """The slots of a row whose outputs predict the tokens at the given ones; see `source_slot`."""
    if not shift:
        return mask_L
    slot_L = jnp.arange(mask_L.shape[0])
    moved_L = jnp.roll(mask_L, -shift) & (slot_L < mask_L.shape[0] - shift)
    first = jnp.argmax(valid_L)
    return (moved_L & (slot_L >= first)) | (mask_L[first] & (slot_L == first))


def readout(queries: Queries, slot_BW: Int[Array, "B W"], shift: int) -> Int[Array, "B W"]:
    """Places among the queries whose outputs predict the tokens at the given slots.

    Args:
      queries: what enters the network; the sources of the slots must be among them.
      slot_BW: absolute slots; L marks an unused entry, whose place is any.
      shift: of the model.
    """
    source_BW = source_slot(slot_BW, queries.valid_BL, shift)
    return queries_lib.gather(queries.place_BL, source_BW)


def unembed(
    model: Transformer, params: Params, hidden_BWD: Float[Array, "B W D"]
) -> Float[Array, "B W V"]:
    """Float32 logits of hidden states."""
    logits: Any = model.apply({"params": params}, hidden_BWD, method="unembed")
    return logits
