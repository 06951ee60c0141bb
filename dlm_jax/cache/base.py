"""The protocol of a cache method, and the K/V cache that most of them use.

Slots are absolute positions. A step recomputes a set of positions, writes their K/V into buffers of
full length, and attends over all of them. A method is therefore a policy over sets of positions: a
frozen dataclass of pure functions over its own pytree, the memory. Functions over a `Row` see one
row and are vmapped by the loop, so that rows cannot leak into one another.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Block, Config, LayerFn
from dlm_jax.queries import Queries
from dlm_jax.typing import Array, Bool, Float, Int, PyTree


class Row(NamedTuple):
    """What a method may know about one row before a step."""

    tokens_L: Int[Array, " L"]
    valid_L: Bool[Array, " L"]
    """Slots that hold a token or a mask, not padding."""
    masked_L: Bool[Array, " L"]
    """Masks that are to be filled, in any block."""
    eligible_L: Bool[Array, " L"]
    """Masks that this step may fill: those up to the end of the row's block."""
    block: Int[Array, ""]
    """Index of the row's block; the number of blocks when the row is done."""
    block_step: Int[Array, ""]
    """Denoising step within the block."""
    step: Int[Array, ""]
    """Denoising step of this row over the whole generation."""


class Observation(NamedTuple):
    """What a step did to one row."""

    computed_L: Bool[Array, " L"]
    """Positions that entered the network."""
    committed_L: Bool[Array, " L"]
    confidence_L: Float[Array, " L"]
    """-inf where no logits were read."""
    tokens_L: Int[Array, " L"]
    """The canvas after the step."""
    acc: PyTree
    """What the layer functions accumulated, for this row."""


class Variant(NamedTuple):
    """A compiled step shape: the number of query slots, and a mode for methods with several."""

    capacity: int
    mode: int = 0


class KV(NamedTuple):
    """Keys (after rotary positions) and values of one layer, one slot per position."""

    k_BLKH: Float[Array, "B L K H"]
    v_BLKH: Float[Array, "B L K H"]


def kv_layer(
    block: Block, carry: tuple[Array, PyTree], layer_cache: KV, queries: Queries
) -> tuple[tuple[Array, PyTree], KV]:
    """A block whose queries write their K/V into the cache and attend to all valid slots of it."""
    hidden, acc = carry
    normed = block.norm(hidden)
    k_BLKH = queries_lib.scatter(
        layer_cache.k_BLKH, block.key(normed, queries.position_BQ), queries.index_BQ
    )
    v_BLKH = queries_lib.scatter(layer_cache.v_BLKH, block.value(normed), queries.index_BQ)
    q_BQNH = block.query(normed, queries.position_BQ)
    out, _ = block.attend(q_BQNH, k_BLKH, v_BLKH, queries.valid_BL[:, None, :])
    hidden = hidden + out
    return (hidden + block.ffn(hidden), acc), KV(k_BLKH, v_BLKH)


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """Base of all cache methods; fields of a subclass are its parameters.

    Subclasses implement `select` and override what they need of the rest.
    """

    name: ClassVar[str]
    """What `--cache` and the error messages call it."""
    lockstep: ClassVar[bool] = False
    """Whether the rows of a batch leave a block together unless the user says otherwise."""

    def variants(self, geo: Geometry) -> tuple[Variant, ...]:
        """The few step shapes that the method can ask for, by ascending capacity."""
        return (Variant(geo.length),)

    def init(self, geo: Geometry) -> PyTree:
        """Memory of one row before the first step."""
        del geo
        return ()

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        """Positions of one row that enter the network now; the loop leaves out padding."""
        raise NotImplementedError

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        """Memory of one row after a step; `row` is the state before it."""
        del row, obs, geo
        return memory

    def variant_id(
        self, nfe: Int[Array, ""], counts_B: Int[Array, " B"], geo: Geometry
    ) -> Int[Array, ""]:
        """Which variant the next step takes: the smallest that holds every row's set.

        A set larger than the largest variant is an error of the method.
        """
        del nfe
        capacities = jnp.asarray([variant.capacity for variant in self.variants(geo)], jnp.int32)
        return jnp.sum(jnp.max(counts_B) > capacities[:-1], dtype=jnp.int32)

    def init_cache(
        self, config: Config, geo: Geometry, batch: int, dtype: Any
    ) -> tuple[PyTree, ...]:
        """One pytree per layer, for the whole batch."""
        shape = (batch, geo.length, config.num_kv_heads, config.head_dim)
        return tuple(
            KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
        )

    def init_acc(self, geo: Geometry, batch: int) -> PyTree:
        """What the layer functions accumulate from, `[B, ...]`."""
        del geo, batch
        return ()

    def layers(self, variant: Variant, config: Config) -> tuple[tuple[int, int, LayerFn], ...]:
        """`(low, high, layer function)` ranges that cover all layers."""
        del variant
        return ((0, config.num_layers, kv_layer),)
