"""dLLM-Cache (arXiv 2506.06295): features of prompt and response refreshed at their own intervals.

Every layer keeps, besides K and V, what its attention and its feed-forward network last added to
the residual stream. Prompt features are computed again every `kp` steps and response features every
`kr`; in between, only for the fraction `rou` of the response whose values changed most. The
residual stream always has full length, so that a new token is felt at once. The first layer is
computed in full in every step, and so keeps nothing.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax import ranking
from dlm_jax.cache.base import CacheMethod, StepShape
from dlm_jax.cache.runs import Plan, Repeat, Run
from dlm_jax.decoding.rows import Row
from dlm_jax.decoding.settings import check_number, check_whole
from dlm_jax.geometry import Geometry
from dlm_jax.models.attention import KV
from dlm_jax.models.base import Block, Config, LayerFn, Transformer, plain_layer
from dlm_jax.queries import Queries
from dlm_jax.typing import Array, Bool, DTypeLike, Float, Int, PyTree

PROMPT, RESPONSE = 1, 2
"""Bits of `StepShape.mode`: what is refreshed."""


class Features(NamedTuple):
    """What one layer keeps, one slot per position."""

    kv: KV
    attention_BLD: Float[Array, "B L D"]
    ffn_BLD: Float[Array, "B L D"]


class Refresh(NamedTuple):
    """Accumulator of the layers: what the rows refresh now, and what each layer selected."""

    prompt_B: Bool[Array, "*B"]
    response_B: Bool[Array, "*B"]
    selected: tuple[Bool[Array, "*B L"], ...]


@dataclasses.dataclass(frozen=True)
class DLLMCache(CacheMethod):
    """Adaptive feature caching.

    Attributes:
      kp: denoising steps from one refresh of the prompt to the next.
      kr: denoising steps from one refresh of the response to the next.
      rou: share of the response, in [0, 1], that is computed in the steps between.
    """

    kp: int = 50
    kr: int = 7
    rou: float | int = 0.25

    name: ClassVar[str] = "dllm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("kp", self.kp, 1)
        check_whole("kr", self.kr, 1)
        check_number("rou", self.rou, "lie in [0, 1]", least=0, most=1)

    def changed(self, geo: Geometry) -> int:
        """Response positions that are computed between refreshes."""
        return int(geo.gen * self.rou)

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        modes = (0, PROMPT, RESPONSE, PROMPT | RESPONSE)
        return tuple(StepShape(geo.length, mode) for mode in modes)

    def plan(self, geo: Geometry, forwards: int) -> Plan:
        if self.kp % self.kr:
            return ()  # the two periods do not nest
        periods, rest = divmod(forwards * geo.num_blocks, self.kp)

        def prompt_period(steps: int) -> Plan:
            later, over = divmod(max(0, steps - self.kr), self.kr)
            between = self.kr - 1
            return (
                Run(PROMPT | RESPONSE, min(1, steps)),
                Run(0, max(0, min(between, steps - 1))),
                Repeat((Run(RESPONSE, 1), Run(0, between)), later),
                Run(RESPONSE, min(1, over)),
                Run(0, max(0, over - 1)),
            )

        return (Repeat(prompt_period(self.kp), periods), *prompt_period(rest))

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        del memory, geo
        return row.valid_L

    def serves(
        self, row: Row, selected_L: Bool[Array, " L"], geo: Geometry
    ) -> Bool[Array, " shapes"]:
        del selected_L
        modes = jnp.asarray([shape.mode for shape in self.step_shapes(geo)], jnp.int32)
        prompt, response = self._due(row)
        due = PROMPT * prompt.astype(jnp.int32) + RESPONSE * response.astype(jnp.int32)
        return (modes & due) == due

    def init_cache(self, model: Transformer, geo: Geometry, dtype: DTypeLike) -> tuple[PyTree, ...]:
        added = jnp.zeros((geo.length, model.config.width), dtype)
        _, *later = super().init_cache(model, geo, dtype)
        return ((), *(Features(kv, added, added) for kv in later))

    def init_acc(self, row: Row, index_Q: Int[Array, " Q"], geo: Geometry) -> Refresh:
        del index_Q, geo
        return Refresh(*self._due(row), selected=())

    def layers(
        self, shape: StepShape, config: Config, geo: Geometry
    ) -> tuple[tuple[int, int, LayerFn], ...]:
        layer = functools.partial(_layer, method=self, mode=shape.mode, geo=geo)
        return ((0, 1, plain_layer), (1, config.num_layers, layer))

    def layer_sets(
        self, selected_L: Bool[Array, " L"], acc: Refresh, config: Config
    ) -> tuple[Bool[Array, " L"], ...]:
        del config
        return (selected_L, *acc.selected)

    def width(self, shape: StepShape, config: Config, geo: Geometry) -> float:
        later = self.capacity(shape.mode, geo)
        return (geo.length + (config.num_layers - 1) * later) / config.num_layers

    def capacity(self, mode: int, geo: Geometry) -> int:
        """Query slots of a layer, the first one apart."""
        response = geo.gen if mode & RESPONSE else self.changed(geo)
        return response + (geo.prompt if mode & PROMPT else 0)

    def _due(self, row: Row) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether a row refreshes its prompt now, and whether its response."""
        active = jnp.any(row.eligible_L)
        return active & (row.step % self.kp == 0), active & (row.step % self.kr == 0)


def _layer(
    block: Block,
    carry: tuple[Array, Refresh],
    layer_cache: Features,
    queries: Queries,
    *,
    method: DLLMCache,
    mode: int,
    geo: Geometry,
) -> tuple[tuple[Array, Refresh], Features]:
    """A block of which only the selected positions go through attention and feed-forward network.

    The queries have one slot per position (`queries.pack` at full capacity).
    """
    hidden, acc = carry
    kv, attention_BLD, ffn_BLD = layer_cache
    length, prompt = geo.length, geo.prompt
    place_BL = queries.index_BQ
    real_BL = place_BL < length
    response_BL = real_BL & (jnp.arange(length) >= prompt)[None]

    # Values of the whole response tell what changed; elsewhere they are needed at refreshes only.
    normed = block.norm(hidden)
    first = 0 if mode & PROMPT else prompt
    fresh_BLKH = block.value(normed[:, first:])
    selected_BL = (real_BL & ~response_BL & acc.prompt_B[:, None]) | (
        response_BL & acc.response_B[:, None]
    )
    written_BL = selected_BL
    if method.rou and method.kr > 1:
        between_BL = response_BL & ~acc.response_B[:, None]
        similarity_BL = jnp.pad(
            _cosine(fresh_BLKH[:, prompt - first :], kv.v_BLKH[:, prompt:]),
            ((0, 0), (prompt, 0)),
        )
        changed_BL = jax.vmap(ranking.top, (0, 0, None))(
            -similarity_BL, between_BL, jnp.int32(method.changed(geo))
        )
        selected_BL = selected_BL | changed_BL
        written_BL = selected_BL | between_BL
    kv = kv.write(jnp.where(written_BL, place_BL, length)[:, first:], v_BQKH=fresh_BLKH)
    acc = acc._replace(selected=(*acc.selected, selected_BL))

    capacity = method.capacity(mode, geo)
    if capacity:
        chosen = queries_lib.pack(selected_BL, queries.slots, queries.attended_BL, capacity)
        normed_BQD = queries_lib.gather(normed, chosen.index_BQ)
        kv = kv.write(chosen.index_BQ, k_BQKH=block.key(normed_BQD, chosen.rotary_BQH))
        q_BQNH = block.query(normed_BQD, chosen.rotary_BQH)
        out_BQD = block.attend(q_BQNH, kv, queries.attended_BL[:, None, :])
        attention_BLD = queries_lib.scatter(attention_BLD, out_BQD, chosen.index_BQ)
    hidden = hidden + attention_BLD
    if capacity:
        out_BQD = block.ffn(queries_lib.gather(hidden, chosen.index_BQ))
        ffn_BLD = queries_lib.scatter(ffn_BLD, out_BQD, chosen.index_BQ)
    return (queries.outputs(hidden + ffn_BLD), acc), Features(kv, attention_BLD, ffn_BLD)


def _cosine(
    a_BLKH: Float[Array, "B L K H"], b_BLKH: Float[Array, "B L K H"]
) -> Float[Array, "B L"]:
    """Cosine similarity over all heads, in float32."""
    a, b = a_BLKH.astype(jnp.float32), b_BLKH.astype(jnp.float32)

    def dot(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=(-2, -1))

    return dot(a, b) / jnp.maximum(jnp.sqrt(dot(a, a) * dot(b, b)), 1e-8)
