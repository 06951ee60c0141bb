"""What becomes of a step's candidates: which are committed, and which tokens are revoked.

confidence -> score (certainty prior, noise) -> how many (schedule, rule) -> the surest of them
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries, ranking
from dlm_jax.cache.base import Row
from dlm_jax.decoding.forward import Seen
from dlm_jax.decoding.predict import Proposals
from dlm_jax.decoding.state import DecodeState, Setup, position_keys
from dlm_jax.decoding.strategies import klass, wino
from dlm_jax.ranking import certainty_density
from dlm_jax.typing import Array, Bool, Float, Int

CHOICE = 1
"""Purpose of the noise that chooses positions; see `position_keys`."""


class Scores(NamedTuple):
    """How sure a step is of its candidates; -inf where there is none."""

    score_BL: Float[Array, "B L"]
    """To rank positions by."""
    confidence_BL: Float[Array, "B L"]
    """The same as confidences."""
    level: Callable[[Array], Array]
    """The score that a confidence means."""


def commit(
    setup: Setup,
    state: DecodeState,
    stability: klass.Stability | None,
    rows: Row,
    most_B: Int[Array, " B"],
    seen: Seen,
    proposed: Proposals,
) -> Bool[Array, "B L"]:
    """Which positions become final: the surest, as many as the schedule and the rule say.

    Args:
      setup: constants.
      state: the state before the step.
      stability: how settled the predictions of this step are, for the strategy `klass`.
      rows: what each row may fill, and at least how much.
      most_B: at most how much, where a rule decides.
      seen: what was read.
      proposed: candidates at the slots that were read.
    """
    candidate_BL = seen.read_BL & rows.eligible_L
    given_BL = setup.transfer_BL(state.nfe)
    if given_BL is not None:
        return candidate_BL & given_BL
    top = jax.vmap(ranking.top)
    if rows.order_L is not None:
        return top(-rows.order_L, candidate_BL, rows.quota)
    if setup.decode.measure.thinned:
        noise_BL = -_uniform(setup, state)
        assert setup.schedule.share is not None  # `DecodeConfig` demands the schedule `timestep`
        share_B = setup.schedule.share(state.block_step_B)
        count_B = jax.vmap(ranking.sure)(noise_BL, candidate_BL, -share_B)
        return top(noise_BL, candidate_BL, jnp.maximum(count_B, rows.quota))
    scores = _scores(setup, state, rows, seen, proposed)
    if not setup.decode.parallel:
        return top(scores.score_BL, candidate_BL, rows.quota)
    kl_threshold = setup.numbers.kl_threshold
    if stability is None or kl_threshold is None:
        count_B = _count(setup, scores, candidate_BL, seen, proposed)
        if setup.decode.strategy == "wino":
            most_B = wino.most(jnp.sum(seen.read_BL, axis=-1, dtype=jnp.int32), rows.quota)
        return top(scores.score_BL, candidate_BL, jnp.clip(count_B, rows.quota, most_B))
    settled_BL = candidate_BL & klass.settled(stability, kl_threshold, setup.geo.length)
    count_B = _count(setup, scores, settled_BL, seen, proposed)
    found_B = count_B > 0
    return top(
        scores.score_BL,
        jnp.where(found_B[:, None], settled_BL, candidate_BL),
        jnp.where(found_B, count_B, rows.quota),
    )


def revoke(
    setup: Setup,
    state: DecodeState,
    rows: Row,
    commit_BL: Bool[Array, "B L"],
    seen: Seen,
    standing_BW: Float[Array, "B W"],
) -> Bool[Array, "B L"]:
    """Which tokens of each row's block become masks again (WINO).

    Args:
      setup: constants.
      state: the state before the step.
      rows: at least how much each row is to gain.
      commit_BL: what the step commits.
      seen: what was read.
      standing_BW: how sure the model is of the tokens that are there.
    """
    narrow_out_thres = setup.numbers.narrow_out_thres
    assert narrow_out_thres is not None  # only strategies that have one revoke
    certain_BL = jnp.ones(commit_BL.shape, jnp.float32)
    probability_BL = queries.scatter(certain_BL, standing_BW, seen.slot_BW)
    inside_BL = queries.scatter(
        jnp.zeros_like(commit_BL), jnp.ones(seen.slot_BW.shape, bool), seen.slot_BW
    )
    committed_BL = inside_BL & (state.committed_at_BL >= 0)
    return jax.vmap(wino.revoked, (0, 0, None, 0, 0))(
        probability_BL,
        committed_BL,
        narrow_out_thres,
        jnp.sum(commit_BL, axis=-1, dtype=jnp.int32),
        rows.quota,
    )


def _scores(setup: Setup, state: DecodeState, rows: Row, seen: Seen, proposed: Proposals) -> Scores:
    numbers, geo = setup.numbers, setup.geo
    lowest_BL = jnp.full(seen.read_BL.shape, -jnp.inf, jnp.float32)
    score_BL = queries.scatter(lowest_BL, proposed.score, seen.slot_BW)
    confidence_BL = queries.scatter(lowest_BL, proposed.confidence, seen.slot_BW)
    level = setup.decode.measure.level
    if setup.debias is not None:
        level = _same
    if numbers.sigma is not None and geo.gen:
        # The density is defined for the generated part; the prompt is certain.
        density_BG = jax.vmap(certainty_density, (0, None))(
            ~rows.masked_L[:, geo.prompt :], numbers.sigma
        )
        density_BL = jnp.pad(density_BG, ((0, 0), (geo.prompt, 0)), constant_values=1.0)
        confidence_BL = jnp.where(seen.read_BL, confidence_BL * density_BL, lowest_BL)
        score_BL, level = confidence_BL, _same
    if numbers.alg_temp is not None:
        # The largest sums with Gumbel noise are a sample without replacement from the softmax.
        gumbel_BL = -jnp.log(-jnp.log(jnp.maximum(_uniform(setup, state), 1e-37)))
        score_BL = confidence_BL / numbers.alg_temp + gumbel_BL
    return Scores(score_BL, confidence_BL, level)


def _count(
    setup: Setup,
    scores: Scores,
    among_BL: Bool[Array, "B L"],
    seen: Seen,
    proposed: Proposals,
) -> Int[Array, " B"]:
    """How many of the surest positions the rule takes, out of those given."""
    numbers = setup.numbers
    threshold = numbers.wide_in_thres if numbers.threshold is None else numbers.threshold
    if threshold is not None:
        sure = jax.vmap(ranking.sure, (0, 0, None))
        return sure(scores.score_BL, among_BL, scores.level(threshold))
    if numbers.factor is not None:
        factored = jax.vmap(ranking.factored, (0, 0, None))
        count_B = factored(scores.confidence_BL, among_BL, numbers.factor)
        spared = int(setup.decode.spare_last)
        return jnp.minimum(count_B, jnp.sum(among_BL, axis=-1, dtype=jnp.int32) - spared)
    assert numbers.gamma is not None and proposed.entropy is not None  # a rule is one of these
    entropy_BL = queries.scatter(
        jnp.zeros(among_BL.shape, jnp.float32), proposed.entropy, seen.slot_BW
    )
    bounded = jax.vmap(ranking.bounded_entropy, (0, 0, 0, None))
    return bounded(scores.score_BL, entropy_BL, among_BL, numbers.gamma)


def _uniform(setup: Setup, state: DecodeState) -> Float[Array, "B L"]:
    """A number in [0, 1) for every position, new in every step."""
    shape = state.tokens_BL.shape
    slot_BL = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    key_BL = position_keys(setup, state.step_B, slot_BL, CHOICE)
    return jax.vmap(jax.vmap(jax.random.uniform))(key_BL)


def _same(confidence: Array) -> Array:
    return confidence
