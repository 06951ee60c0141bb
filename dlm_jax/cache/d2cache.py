"""d2Cache (arXiv 2509.23094): chooses the positions to compute by certainty, then by attention.

Stage one takes the masks that are likely to be decoded soon: sure predictions in places where much
is known. Stage two adds the positions that the network attended to most, by attention rollout over
the layers. Only the first step computes everything.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax import ranking
from dlm_jax.cache.base import CacheMethod, StepShape, buckets, empty_kv, round_up, write_kv
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import Observation, Row
from dlm_jax.decoding.settings import check_number, check_whole
from dlm_jax.geometry import Geometry
from dlm_jax.models.attention import KV, HeadsFirst
from dlm_jax.models.base import Block, Config, LayerFn, Transformer, sources
from dlm_jax.queries import Queries
from dlm_jax.ranking import certainty_density
from dlm_jax.typing import Array, Bool, DTypeLike, Float, Int


class Selection(NamedTuple):
    """Memory of one row."""

    selected_L: Bool[Array, " L"]
    """What the next step computes."""
    confidence_L: Float[Array, " L"]
    """Confidence of every generated position when its logits were last read."""


class Rollout(NamedTuple):
    """Attention rollout of one step, as an accumulator over the layers.

    Positions that are not computed attend to themselves only, so their rows of the rollout matrix
    stay those of the identity, and only the rows of the queries are kept.
    """

    rows_BQL: Float[Array, "*B Q L"]
    index_BQ: Int[Array, "*B Q"]
    """Slots of the rows; L marks an empty one, whose row is zero."""


@dataclasses.dataclass(frozen=True)
class D2Cache(CacheMethod):
    """Dual adaptive caching.

    Rows choose by themselves: no row is topped up to the size of its neighbours' sets.

    Attributes:
      rollout_p: share of the attention mass, in [0, 1], that stage two covers with the positions
        that stage one left.
      current_k: masks that stage one takes.
      sigma: width of the Gaussian of the certainty density, in positions.
      inflate_w: what lies between two selected positions at most this far apart is selected as
        well; 0 adds nothing.
    """

    rollout_p: float | int = 0.1
    current_k: int = 32
    sigma: float | int = 10.0
    inflate_w: int = 4

    name: ClassVar[str] = "d2cache"
    reads_ahead: ClassVar[bool] = True

    @property
    def partial(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rollout_p", self.rollout_p, "lie in [0, 1]", least=0, most=1)
        check_whole("current_k", self.current_k, 1)
        check_number("sigma", self.sigma, "be above 0", above=0)
        check_whole("inflate_w", self.inflate_w, 0)

    def check_settings(self, config: Config, decode: DecodeConfig) -> None:
        if not decode.gen_length:
            raise ValueError(
                f"gen_length is 0; the cache {self.name!r} chooses among generated positions, so "
                "take another one."
            )

    def step_shapes(self, geo: Geometry) -> tuple[StepShape, ...]:
        # The positions of a nucleus weigh more than the average, so they are no more than its
        # share of all; gaps that are filled add about as much again.
        most = self.current_k + geo.most_per_step + int(self.rollout_p * geo.length) + 1
        if self.inflate_w:
            most *= 2
        sizes = (int(most * share) for share in (0.3, 0.45, 0.6, 0.8, 1.0))
        return buckets((round_up(size) for size in sizes), geo)

    def init(self, geo: Geometry) -> Selection:
        return Selection(jnp.ones(geo.length, bool), jnp.zeros(geo.length, jnp.float32))

    def select(self, memory: Selection, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        # Masks inside the prompt are not for the two stages to choose. And whatever they chose,
        # there must be something to fill.
        needed_L = sources(row.next_L, row.valid_L, geo.shift)
        prompt_L = jnp.arange(geo.length) < geo.prompt
        infill_L = sources(row.next_L & prompt_L, row.valid_L, geo.shift)
        stuck = ~jnp.any(memory.selected_L & needed_L)
        return memory.selected_L | infill_L | (needed_L & stuck)

    def readable(self, memory: Selection, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        del memory, geo
        return row.masked_L

    def observe(self, memory: Selection, row: Row, obs: Observation, geo: Geometry) -> Selection:
        prompt = geo.prompt
        slot_G = jnp.arange(geo.gen)
        masked_G = (row.masked_L & (obs.tokens_L == row.tokens_L))[prompt:]
        confidence_L = jnp.where(obs.read_L, obs.confidence_L, memory.confidence_L)

        # Stage one: masks from the block on, up to the end of the block that completes current_k.
        in_block_G = slot_G // geo.block == row.block
        enough_G = jnp.cumsum(masked_G) >= self.current_k
        last = jnp.where(jnp.any(enough_G), jnp.argmax(enough_G), geo.gen - 1) // geo.block
        window_G = (slot_G >= row.block * geo.block) & (slot_G < (last + 1) * geo.block)
        score_G = confidence_L[prompt:] * certainty_density(~masked_G, self.sigma)
        score_G = jnp.where(in_block_G, score_G + jnp.max(score_G), score_G)
        soon_G = ranking.top(score_G, window_G & masked_G, jnp.int32(self.current_k))
        soon_L = jnp.pad(soon_G, (prompt, 0))
        needed_L = sources(soon_L, row.valid_L, geo.shift)
        generated_L = jnp.arange(geo.length) >= prompt
        selected_L = (needed_L & generated_L) | obs.chosen_L

        # Stage two: a nucleus of the attention that the other positions received.
        received_L = jnp.sum(obs.acc.rows_BQL, axis=0) + jnp.where(obs.computed_L, 0.0, 1.0)
        left_L = jnp.where(selected_L | ~row.valid_L, 0.0, received_L)
        selected_L = selected_L | _nucleus(left_L, self.rollout_p)
        if geo.shift:  # the end of the prompt is there for the first generated position only
            end_L = jnp.arange(geo.length) == prompt - geo.shift
            selected_L = jnp.where(end_L, needed_L, selected_L)
        if self.inflate_w:
            selected_L = _fill_gaps(selected_L, self.inflate_w)
        return Selection(selected_L, confidence_L)

    def init_cache(self, model: Transformer, geo: Geometry, dtype: DTypeLike) -> tuple[KV, ...]:
        # Only attention in this layout tells what was attended to.
        return empty_kv(model.config, geo.length, dtype, HeadsFirst)

    def init_acc(self, row: Row, index_Q: Int[Array, " Q"], geo: Geometry) -> Rollout:
        del row
        return Rollout(jax.nn.one_hot(index_Q, geo.length), index_Q)

    def layers(
        self, shape: StepShape, config: Config, geo: Geometry
    ) -> tuple[tuple[int, int, LayerFn], ...]:
        del shape, geo
        return ((0, config.num_layers, _rollout_layer),)


def _rollout_layer(
    block: Block, carry: tuple[Array, Rollout], layer_cache: HeadsFirst, queries: Queries
) -> tuple[tuple[Array, Rollout], HeadsFirst]:
    """`kv_layer` that also rolls the attention of the queries out over the layer."""
    hidden, rollout = carry
    normed, kv = write_kv(block, hidden, layer_cache, queries)
    q_BQNH = block.query(normed, queries.rotary_BQH)
    out, told_BQL = block.attend_and_tell(q_BQNH, kv, queries.attended_BL[:, None, :])
    hidden = queries.outputs(hidden + out)
    return (hidden + block.ffn(hidden), _roll(rollout, told_BQL, queries.valid_BL)), kv


def _roll(
    rollout: Rollout, told_BQL: Float[Array, "B Q L"], valid_BL: Bool[Array, "B L"]
) -> Rollout:
    """The rollout after one more layer, given what its queries attended to.

    Half of every row stays (the residual connection) and half is passed on by attention, averaged
    over the heads: to the rows of the queries as rolled out so far, and to all others, whose rows
    are those of the identity.
    """
    index_BQ = rollout.index_BQ
    real_BQ = index_BQ < valid_BL.shape[1]
    attention_BQL = jnp.where(real_BQ[:, :, None], told_BQL, 0.0)
    among_BQQ = jnp.take_along_axis(attention_BQL, index_BQ[:, None, :], axis=-1, mode="clip")
    computed_BL = queries_lib.scatter(jnp.zeros_like(valid_BL), real_BQ, index_BQ)
    passed_BQL = jnp.matmul(
        jnp.where(real_BQ[:, None, :], among_BQQ, 0.0),
        rollout.rows_BQL,
        precision=jax.lax.Precision.HIGHEST,
    ) + jnp.where(computed_BL[:, None, :], 0.0, attention_BQL)
    return rollout._replace(rows_BQL=(passed_BQL + rollout.rows_BQL) / 2)


def _nucleus(weight_L: Float[Array, " L"], share: float | int) -> Bool[Array, " L"]:
    """The heaviest positions that together weigh no more than `share` of all; at least one."""
    order_L = jnp.argsort(-weight_L, stable=True)
    sorted_L = weight_L[order_L]
    total_L = jnp.cumsum(sorted_L / (jnp.sum(weight_L) + 1e-9))
    within_L = (total_L <= share) | (share >= 1)  # whatever the rounding of the sum
    chosen_L = (within_L | (jnp.arange(weight_L.shape[0]) == 0)) & (sorted_L > 0)
    return jnp.zeros_like(chosen_L).at[order_L].set(chosen_L, unique_indices=True)


def _fill_gaps(selected_L: Bool[Array, " L"], width: int) -> Bool[Array, " L"]:
    """Also what lies between two selected positions that are at most `width` apart."""
    length = selected_L.shape[0]
    slot_L = jnp.arange(length)
    before_L = jax.lax.cummax(jnp.where(selected_L, slot_L, -length))
    after_L = jax.lax.cummin(jnp.where(selected_L, slot_L, 2 * length), reverse=True)
    return after_L - before_L <= width
