"""From hidden states to candidates: what the model would put where, and how sure it is.

Float32 logits over the vocabulary are the largest arrays of a step. They are made for a group of
positions at a time, and only what the decoding asks of them is kept.
"""

import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.decoding import guidance
from dlm_jax.decoding.forward import Seen
from dlm_jax.decoding.sampler import Sampled, entropy, sample
from dlm_jax.decoding.state import DecodeState, Setup, position_keys
from dlm_jax.models.base import unembed
from dlm_jax.typing import Array, Float, Int

LOGITS = 2**26
"""About the most logits of a group, 256 MiB; but one position of every row at the least."""


class Proposals(NamedTuple):
    """A candidate for each position that was read."""

    token: Int[Array, "B W"]
    score: Float[Array, "B W"]
    """To rank positions by; `Measure.level` turns a confidence into one."""
    confidence: Float[Array, "B W"]
    """To report."""
    entropy: Float[Array, "B W"] | None
    """Of the tempered distribution, in nats; for rules that bound it."""
    standing: Float[Array, "B W"] | None
    """Confidence in the token that is there now; for strategies that revoke tokens."""
    tempered: Float[Array, "B W V"] | None
    """Log-probabilities after temperature and filters; for strategies that follow them."""


def propose(setup: Setup, state: DecodeState, seen: Seen) -> Proposals:
    """Reads the logits and draws a candidate at every position that was read."""

    def group(hidden: Float[Array, "B2 w D"], slot_Bw: Int[Array, "B w"]) -> Proposals:
        logits = _logits(setup, state, hidden, slot_Bw)
        sampled = sample(
            logits,
            position_keys(setup, state.step_B, slot_Bw),
            alg=setup.decode.alg,
            banned=setup.model.config.mask_id if setup.decode.ban_mask else None,
            debias=setup.debias,
            **setup.numbers.sampling(),
        )
        return _reduce(setup, state, sampled, slot_Bw)

    (rows, width), config = seen.hidden_BWD.shape[:2], setup.model.config
    groups = math.ceil(rows * width * config.vocab_size / LOGITS)
    # Whole distributions are kept, and a hook is told everything in one call.
    together = state.stability is not None or setup.logits_processor is not None
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
        return values.swapaxes(0, 1).reshape(values.shape[1], -1)[:, :width]

    parts = (split(seen.hidden_BWD, 0), split(seen.slot_BW, setup.geo.length))
    return jax.tree.map(join, jax.lax.map(lambda part: group(*part), parts))


def _reduce(
    setup: Setup, state: DecodeState, sampled: Sampled, slot_BW: Int[Array, "B W"]
) -> Proposals:
    """Keeps of the distributions only what the decoding wants."""
    there_BW = queries.gather(state.tokens_BL, slot_BW)
    revokes = setup.numbers.narrow_out_thres is not None
    return Proposals(
        sampled.token,
        sampled.score,
        sampled.confidence,
        entropy=entropy(sampled.tempered) if setup.numbers.gamma is not None else None,
        standing=sampled.confidence_in(there_BW, setup.decode.alg) if revokes else None,
        tempered=None if state.stability is None else sampled.tempered,
    )


def _logits(
    setup: Setup, state: DecodeState, hidden_BWD: Float[Array, "B2 W D"], slot_BW: Int[Array, "B W"]
) -> Float[Array, "B W V"]:
    """The logits after everything that the user wants to be done to them."""
    logits, hook = unembed(setup.model, setup.params, hidden_BWD), setup.logits_processor
    if setup.numbers.cfg_scale is not None:
        conditional, unconditional = jnp.split(logits, 2)
        logits = guidance.combine(conditional, unconditional, setup.numbers.cfg_scale)
    if setup.decode.suppress:
        logits = logits.at[..., jnp.asarray(setup.decode.suppress)].set(-jnp.inf)
    if hook is None:
        return logits
    located = "positions" in inspect.signature(hook).parameters
    where = dict(positions=slot_BW) if located else {}
    processed = hook(state.tokens_BL, logits, state.nfe, **where)
    if jnp.shape(processed) != logits.shape:
        raise ValueError(
            f"logits_processor returned shape {jnp.shape(processed)}; it must be that of the "
            f"logits, {logits.shape}."
        )
    return processed.astype(jnp.float32)
