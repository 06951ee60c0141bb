"""The protocol of a cache method, and the K/V cache that most of them use.

Slots are absolute positions. A step recomputes a set of positions, writes their K/V into buffers of
full length, and attends over all of them. A method is therefore a policy over sets of positions: a
frozen dataclass of pure functions over its own pytree, the memory.

All of them see one row and are mapped over the batch, so that rows cannot leak into one another.
The only exception are the layer functions that `layers` returns: a matrix product is one for all
rows. A contract test compares every row of a batch with itself alone.
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.cache.runs import Plan
from dlm_jax.decoding.blocks import Blocks
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import Observation, Row
from dlm_jax.decoding.strategies import STRATEGIES
from dlm_jax.geometry import Geometry
from dlm_jax.models import attention
from dlm_jax.models.attention import KV, SameKV
from dlm_jax.models.base import Block, Config, LayerFn, Transformer
from dlm_jax.queries import Queries
from dlm_jax.typing import Array, Bool, DTypeLike, Float, Int, PyTree

GRAIN = 8
"""Capacities for sets of any size are multiples of it."""


class StepShape(NamedTuple):
    """A compiled step shape: the number of query slots, and a mode for methods with several."""

    capacity: int
    mode: int = 0

    @property
    def scope(self) -> str:
        """What the operations of such a step are called in compiled programs and in traces."""
        return f"step_{self.capacity}" + (f"_{self.mode}" if self.mode else "")


def kv_layer(
    block: Block, carry: tuple[Array, PyTree], layer_cache: SameKV, queries: Queries
) -> tuple[tuple[Array, PyTree], SameKV]:
    """A block whose queries write their K/V into the cache and attend to what they may of it."""
    hidden, acc = carry
    normed, kv = write_kv(block, hidden, layer_cache, queries)
    hidden, normed, rotary_BQH = queries.outputs((hidden, normed, queries.rotary_BQH))
    q_BQNH = block.query(normed, rotary_BQH)
    hidden = hidden + block.attend(q_BQNH, kv, queries.attended_BL[:, None, :])
    return (hidden + block.ffn(hidden), acc), kv


def write_kv(
    block: Block, hidden: Float[Array, "B Q D"], layer_cache: SameKV, queries: Queries
) -> tuple[Float[Array, "B Q D"], SameKV]:
    """The normed hidden states, and the cache with what all queries write into it."""
    normed = block.norm(hidden)
    k_BQKH, v_BQKH = block.key(normed, queries.rotary_BQH), block.value(normed)
    return normed, layer_cache.write(queries.index_BQ, k_BQKH=k_BQKH, v_BQKH=v_BQKH)


def empty_kv(config: Config, length: int, dtype: DTypeLike, layout: type[KV]) -> tuple[KV, ...]:
    """Keys and values of one row, for each layer."""
    kv = layout.empty(length, config.num_kv_heads, config.head_dim, dtype)
    return (kv,) * config.num_layers


def round_up(size: int) -> int:
    """The next multiple of `GRAIN`."""
    return -(-size // GRAIN) * GRAIN


def buckets(sizes: Iterable[int], geo: Geometry) -> tuple[StepShape, ...]:
    """Step shapes for sets of the given sizes, and one for the whole length.

    At most `geo.step_shapes`: neighbouring sizes share the capacity of the largest of them.
    """
    distinct = sorted({min(size, geo.length) for size in sizes if size > 0} - {geo.length})
    count = min(geo.step_shapes - 1, len(distinct))
    groups = np.array_split(np.asarray(distinct), count) if count else []
    capacities = [int(group[-1]) for group in groups if len(group)]
    return tuple(map(StepShape, [*capacities, geo.length]))


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """Base of all cache methods; fields of a subclass are its parameters.

    Subclasses implement `select` and override what they need of the rest.
    """

    name: ClassVar[str]
    """What `--cache` and the error messages call it."""
    lockstep: ClassVar[bool] = False
    """Whether the rows of a batch leave a block together unless the user says otherwise."""
    keeps: ClassVar[bool] = True
    """Whether a step reads what earlier ones computed."""
    reads_ahead: ClassVar[bool] = False
    """Whether `readable` goes beyond what the step may fill."""
    needs_order: ClassVar[bool] = False
    """Whether the order of the tokens must be drawn in advance; see `DecodeConfig.for_cache`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        said = {"select", "serves", "step_shapes", "restrict", "blocks"} & set(vars(cls))
        if said and "plan" not in vars(cls):
            cls.plan = CacheMethod.plan

    def __post_init__(self) -> None:
        """Refuses arrays: parameters decide the program, which is looked up by their values."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray | jax.Array):
                raise ValueError(f"{field.name} is {value!r}; it must not be an array.")

    @property
    def partial(self) -> bool:
        """Whether a step may fill fewer positions than the schedule wants."""
        return False

    def check(self, config: Config, decode: DecodeConfig) -> None:
        """Refuses a model and decoding that have no meaning together, or none with the method.

        Raises:
          ValueError: one sentence that says what would be right.
        """
        decode.check(config)
        decode.strategy.check_cache(self.name, self.keeps)
        if self.needs_order and not decode.strategy.ordered:
            ordered = [name for name, strategy in STRATEGIES.items() if strategy.ordered]
            raise ValueError(
                f"{decode.strategy.spelling} is an order that depends on confidence; the cache "
                f"{self.name!r} must know the next tokens before the step, so take the strategy "
                f"{' or '.join(ordered)}."
            )
        self.check_settings(config, decode)

    def check_settings(self, config: Config, decode: DecodeConfig) -> None:
        """The method's own part of `check`."""
        del config, decode

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        """The few step shapes that the method can ask for, by ascending capacity."""
        return (StepShape(geo.length),)

    def plan(self, geo: Geometry, forwards: int) -> Plan:
        """Which of several step shapes come one after the other, where the schedule alone decides.

        A subclass that selects otherwise than its base does not inherit the plan.

        Args:
          geo: of the generation; no row has masks but those of its blocks.
          forwards: that every block takes, in every row, all with something to fill.

        Returns:
          A plan whose shapes hold what `select` asks for, or the empty one.
        """
        del geo, forwards
        return ()

    def init(self, geo: Geometry) -> PyTree:
        """Memory of one row before the first step."""
        del geo
        return ()

    def blocks(self, blocks: Blocks) -> Blocks:
        """How the canvas is divided, where the method does not take what the user wants."""
        return blocks

    def restrict(self, memory: PyTree, row: Row, geo: Geometry) -> Row:
        """Narrows what a step may fill, how much of it, and what its queries may attend to; the
        loop takes nothing else of it."""
        del memory, geo
        return row

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        """Positions of one row that enter the network now; the loop leaves out padding."""
        raise NotImplementedError

    def readable(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        """Masks of one row whose logits are wanted; the loop leaves out what is not computed."""
        del memory, geo
        return row.next_L

    def observe(self, memory: PyTree, row: Row, obs: Observation, geo: Geometry) -> PyTree:
        """Memory of one row after a step; `row` is the state before it.

        The loop keeps the old memory of rows that had nothing to fill.
        """
        del row, obs, geo
        return memory

    def serves(
        self, row: Row, selected_L: Bool[Array, " L"], geo: Geometry
    ) -> Bool[Array, " shapes"]:
        """Which of `step_shapes` do for a row; the loop takes the first that does for all.

        The last one must do for any row.
        """
        del row
        capacities = jnp.asarray([shape.capacity for shape in self.step_shapes(geo)], jnp.int32)
        return jnp.sum(selected_L, dtype=jnp.int32) <= capacities

    def init_cache(self, model: Transformer, geo: Geometry, dtype: DTypeLike) -> tuple[PyTree, ...]:
        """What is kept of one row, a pytree per layer; `dtype` is that of the parameters."""
        layout = attention.layout(model.attention, model.config.heads, dtype)
        return empty_kv(model.config, geo.length, dtype, layout)

    def init_acc(self, row: Row, index_Q: Int[Array, " Q"], geo: Geometry) -> PyTree:
        """What the layer functions accumulate from; `index_Q` are the slots of the queries.

        In a row's first step it must follow from its tokens and its queries: rows that are equal in
        these are then computed once.
        """
        del row, index_Q, geo
        return ()

    def layers(
        self, shape: StepShape, config: Config, geo: Geometry
    ) -> tuple[tuple[int, int, LayerFn], ...]:
        """`(low, high, layer function)` ranges that cover all layers.

        A layer function sees all rows at once, or some of them in any order (`turns.py`); what it
        does to a row must not depend on the others.
        """
        del shape, geo
        return ((0, config.num_layers, kv_layer),)

    def layer_sets(
        self, selected_L: Bool[Array, " L"], acc: PyTree, config: Config
    ) -> tuple[Bool[Array, " L"], ...]:
        """The positions whose queries each layer asked for in a step."""
        del acc
        return (selected_L,) * config.num_layers

    def width(self, shape: StepShape, config: Config, geo: Geometry) -> float:
        """Query slots that a step of this shape computes per row, mean over the layers."""
        del config, geo
        return float(shape.capacity)
