"""From hidden states to what the model proposes: candidates, and how sure it is of each.

    hidden -> logits -> candidate, confidence -> times the certainty prior, with noise -> Proposal

Float32 logits over the vocabulary are the largest arrays of a step. They are made for a group of
positions at a time, and only what the decoding asks of them is kept.
"""

import functools
import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import queries
from dlm_jax.decoding import guidance
from dlm_jax.decoding.forward import Seen
from dlm_jax.decoding.rows import CHOICE, TOKEN, Chance, Proposal, Row, Rows, per_row
from dlm_jax.decoding.sampler import sample
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.models.base import unembed
from dlm_jax.ranking import certainty_density
from dlm_jax.typing import Array, Bool, Float, Int, PyTree

LOGITS = 2**26
"""About the most logits of a group, 256 MiB; but one position of every row at the least."""


class Predictions(NamedTuple):
    """What is kept of a distribution, for each position that was read."""

    token: Int[Array, "*B W"]
    """The candidate."""
    score: Float[Array, "*B W"]
    """How sure the model is, to rank by; `Measure.level` turns a confidence into one."""
    confidence: Float[Array, "*B W"]
    """The same, as it is reported."""
    finite: Bool[Array, "*B W"]
    """Whether the distribution is one: no logit NaN, and the best one not infinite."""
    kept: PyTree
    """What `Strategy.read` keeps."""


def predict(setup: Setup, state: DecodeState, seen: Seen) -> tuple[Predictions, PyTree]:
    """Reads the logits and draws a candidate at every position that was read.

    Returns the predictions, and the strategy's memory after it adjusted the logits.
    """

    def group(
        hidden: Float[Array, "B2 w D"], slot_Bw: Int[Array, "B w"]
    ) -> tuple[Predictions, PyTree]:
        logits = _logits(setup, state, hidden, slot_Bw)
        memory = state.strategy_memory
        if setup.strategy.whole:
            adjust = functools.partial(_adjust, setup)
            memory, logits = per_row(adjust)(state.rows, memory, logits, slot_Bw)
        return _sample(setup, state.rows, logits, slot_Bw), memory

    (rows, width), config = seen.hidden_BWD.shape[:2], setup.model.config
    groups = math.ceil(rows * width * config.vocab_size / LOGITS)
    # A hook of the user's is told everything in one call as well.
    together = setup.strategy.whole or setup.logits_processor is not None
    if groups <= 1 or together:
        return group(seen.hidden_BWD, seen.slot_BW)
    size = math.ceil(width / min(groups, width))

    def split(values: Array, fill: int) -> Array:
        """`[rows, W, ...]` as `[groups, rows, w, ...]`, w slots to a group."""
        short = -width % size
        values = jnp.pad(
            values, ((0, 0), (0, short), *[(0, 0)] * (values.ndim - 2)), constant_values=fill
        )
        return values.reshape(len(values), -1, size, *values.shape[2:]).swapaxes(0, 1)

    def join(values: Array) -> Array:
        return values.swapaxes(0, 1).reshape(values.shape[1], -1, *values.shape[3:])[:, :width]

    parts = (split(seen.hidden_BWD, 0), split(seen.slot_BW, setup.geo.length))
    predictions = jax.lax.map(lambda part: group(*part)[0], parts)
    return jax.tree.map(join, predictions), state.strategy_memory


def propose(
    setup: Setup,
    row: Row,
    read_L: Bool[Array, " L"],
    packed: tuple[Int[Array, " W"], Int[Array, " L"]],
    predictions: Predictions,
    chance: Chance,
) -> Proposal:
    """What strategies see of one row: predictions at their slots, weighed as the user wants it.

    `packed` says where predictions were read, as `queries.Packed` does for all rows.
    """
    decode, geo, (slot_W, place_L) = setup.decode, setup.geo, packed
    score_L = queries.look_up(predictions.score, place_L, -jnp.inf)
    confidence_L = queries.look_up(predictions.confidence, place_L, -jnp.inf)
    level = decode.measure.level if setup.debias is None else _same
    if decode.sigma is not None and geo.gen:
        # The density is defined for the generated part; the prompt is certain.
        density_G = certainty_density(~row.masked_L[geo.prompt :], decode.sigma)
        density_L = jnp.pad(density_G, (geo.prompt, 0), constant_values=1.0)
        confidence_L = jnp.where(read_L, confidence_L * density_L, -jnp.inf)
        score_L, level = confidence_L, _same
    if decode.alg_temp is not None:
        # The largest sums with Gumbel noise are a sample without replacement from the softmax.
        gumbel_L = -jnp.log(-jnp.log(jnp.maximum(chance.uniform_L(CHOICE), 1e-37)))
        score_L = confidence_L / decode.alg_temp + gumbel_L
    return Proposal(
        read_L=read_L,
        candidate_L=read_L & row.eligible_L,
        confidence_L=confidence_L,
        score_L=score_L,
        kept=predictions.kept,
        slot_W=slot_W,
        place_L=place_L,
        chance=chance,
        level=level,
    )


def _sample(
    setup: Setup, rows: Rows, logits_BWV: Float[Array, "B W V"], slot_BW: Int[Array, "B W"]
) -> Predictions:
    """Draws candidates and keeps of the distributions only what the decoding wants."""
    decode, measure = setup.decode, setup.decode.measure
    chances = Chance(setup.key_B, rows.step_B, queries.gather(setup.position_BL, slot_BW))
    token_BW, said = sample(
        logits_BWV,
        jax.vmap(lambda chance: chance.keys_L(TOKEN))(chances),
        banned=setup.model.config.mask_id if decode.ban_mask else None,
        temperature=decode.temperature,
        top_p=decode.top_p,
        top_k=decode.top_k,
        min_p=decode.min_p,
    )
    score_BW = measure.score(said, token_BW)
    finite_BW = finite(logits_BWV, token_BW, score_BW)
    confidence_BW = measure.report(score_BW)
    if setup.debias is not None:
        score_BW = confidence_BW = setup.debias.calibrate(confidence_BW, token_BW)
    read = jax.vmap(functools.partial(setup.strategy.read, measure))
    kept = read(said, queries.gather(rows.tokens_BL, slot_BW))
    return Predictions(token_BW, score_BW, confidence_BW, finite_BW, kept)


def finite(
    logits: Float[Array, "*B W V"], token: Int[Array, "*B W"], score: Float[Array, "*B W"]
) -> Bool[Array, "*B W"]:
    """Whether logits were numbers, seen from the candidate and its score.

    A NaN is the largest of all and thus the candidate, or else, where it may not be one, in the
    normalisation of every measure.
    """
    best = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return jnp.isfinite(best) & ~jnp.isnan(score)


def _adjust(
    setup: Setup, row: Row, memory: PyTree, logits_WV: Array, slot_W: Array
) -> tuple[PyTree, Array]:
    return setup.strategy.adjust(memory, logits_WV, slot_W, row, setup.geo)


def _logits(
    setup: Setup, state: DecodeState, hidden_BWD: Float[Array, "B2 W D"], slot_BW: Int[Array, "B W"]
) -> Float[Array, "B W V"]:
    """The logits after everything that the user wants to be done to them."""
    logits, hook = unembed(setup.model, setup.params, hidden_BWD), setup.logits_processor
    if setup.decode.cfg_scale is not None:
        conditional, unconditional = jnp.split(logits, 2)
        logits = guidance.combine(conditional, unconditional, setup.decode.cfg_scale)
    if setup.decode.suppress:
        logits = logits.at[..., jnp.asarray(setup.decode.suppress)].set(-jnp.inf)
    if setup.decode.unused:
        unused_V = np.zeros(logits.shape[-1], bool)
        for first, behind in setup.decode.unused:
            unused_V[first:behind] = True
        logits = jnp.where(unused_V[None, None], -jnp.inf, logits)
    if hook is None:
        return logits
    located = "positions" in inspect.signature(hook).parameters
    where = dict(positions=slot_BW) if located else {}
    processed = hook(state.rows.tokens_BL, logits, state.nfe, **where)
    if jnp.shape(processed) != logits.shape:
        raise ValueError(
            f"logits_processor returned shape {jnp.shape(processed)}; it must be that of the "
            f"logits, {logits.shape}."
        )
    return processed.astype(jnp.float32)


def _same(confidence: Array) -> Array:
    return confidence
