"""From logits to a candidate token and how sure the model is of it.

The candidate comes from the tempered and filtered distribution. What a confidence is differs:
LLaDA's `low_confidence` (arXiv 2502.09992) takes the candidate's probability under the model's own
softmax; Dream's measures look at the tempered and filtered one, so that filters change them even at
temperature 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int, Key


class Distributions(NamedTuple):
    """What the model says about some positions."""

    logits: Float[Array, "*W V"]
    """As it said it."""
    tempered: Float[Array, "*W V"]
    """Log-probabilities after temperature and filters; -inf where filtered out."""
    allowed: Bool[Array, "*W V"]
    """Tokens that may be committed."""


class Measure(NamedTuple):
    """A way to be sure: `score` ranks positions, and `report(score)` is told as the confidence.

    Attributes:
      score: how sure the model is of the given tokens.
      report: the confidence that a score means.
      level: its inverse: the score that a confidence means.
      is_probability: whether the confidence is the token's probability.
      negative: whether the confidence is never above 0.
    """

    score: Callable[[Distributions, Array], Array]
    report: Callable[[Array], Array] = lambda score: score
    level: Callable[[Array], Array] = lambda confidence: confidence
    is_probability: bool = False
    negative: bool = False

    def confidence(self, said: Distributions, token: Int[Array, "*W"]) -> Float[Array, "*W"]:
        """The confidence in any tokens, whether they are candidates or not."""
        return self.report(self.score(said, token))


class Debias(NamedTuple):
    """What calibrates confidences by how common a token is (PC-Sampler, arXiv 2508.13021)."""

    frequency_V: Float[Array, " V"]
    """Share of each token in a corpus."""
    clip_alpha: Float[Array, ""]
    """The most that a confidence can become."""

    def calibrate(self, c: Float[Array, "B W"], token: Int[Array, "B W"]) -> Float[Array, "B W"]:
        """A probability times the token's information content, in nats, clipped."""
        content = -jnp.log(self.frequency_V[token] + 1e-10)
        return jnp.minimum(c * content, jnp.broadcast_to(self.clip_alpha, c.shape))


def log_probability(said: Distributions, token: Int[Array, "*W"]) -> Float[Array, "*W"]:
    """Logarithm of the token's probability, untempered and unfiltered (LLaDA, algorithm 5).

    LLaDA ranks probabilities in float64. Those of sure tokens differ by less than float32 resolves
    around 1, so what is computed here is how much the other tokens have.
    """
    other = ~jax.nn.one_hot(token, said.logits.shape[-1], dtype=bool)
    gap = said.logits - jnp.take_along_axis(said.logits, token[..., None], axis=-1)
    return -jnp.log1p(jnp.sum(jnp.exp(gap), axis=-1, where=other))


def probability(said: Distributions, token: Int[Array, "*W"]) -> Float[Array, "*W"]:
    """Probability of the token after temperature and filters (Dream)."""
    return jnp.exp(jnp.take_along_axis(said.tempered, token[..., None], axis=-1)[..., 0])


def margin(said: Distributions, token: Int[Array, "*W"]) -> Float[Array, "*W"]:
    """Probability of the best token minus that of the second (Dream)."""
    del token
    best, _ = jax.lax.top_k(jnp.where(said.allowed, jnp.exp(said.tempered), 0.0), 2)
    return best[..., 0] - best[..., 1]


def negative_entropy(said: Distributions, token: Int[Array, "*W"]) -> Float[Array, "*W"]:
    """Negative entropy of the distribution (Dream)."""
    del token
    p = jnp.exp(said.tempered)
    return jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


def _log(confidence: Array) -> Array:
    return jnp.log(jnp.maximum(confidence, 0.0))


ALGORITHMS: dict[str, Measure] = {
    "low_confidence": Measure(log_probability, report=jnp.exp, level=_log, is_probability=True),
    "maskgit_plus": Measure(probability, is_probability=True),
    "topk_margin": Measure(margin),
    "entropy": Measure(negative_entropy, negative=True),
}
"""Name -> measure; higher is surer."""


def sample(
    logits: Float[Array, "B W V"],
    key_BW: Key[Array, "B W"],
    *,
    banned: int | None,
    temperature: Float[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
    top_k: Int[Array, ""] | None = None,
    min_p: Float[Array, ""] | None = None,
) -> tuple[Int[Array, "B W"], Distributions]:
    """Draws one candidate per position, out of distributions that are returned as well.

    Args:
      logits: float32.
      key_BW: one key per position; unused at temperature 0.
      banned: a token that is never a candidate, though it keeps its share of the probability. Where
        the filters leave nothing else, the candidate comes from all other tokens.
      temperature: None takes the most probable token (the lowest id among equals), as 0 does.
      top_p: nucleus filter; None switches it off.
      top_k: keeps the k largest logits; None switches it off.
      min_p: keeps what has at least this share of the best token's probability; None: off.
    """
    scaled = logits
    if temperature is not None:
        scaled = logits / jnp.broadcast_to(jnp.where(temperature > 0, temperature, 1), logits.shape)
    kept = keep(scaled, top_p, top_k, min_p)
    allowed = jnp.ones(logits.shape, bool)
    if banned is not None:
        allowed = jnp.broadcast_to(jnp.arange(logits.shape[-1]) != banned, logits.shape)
    ranked = scaled
    if not (top_p is None and top_k is None and min_p is None):
        some = jnp.any(kept & allowed, axis=-1, keepdims=True)
        ranked = jnp.where(kept | ~some, scaled, -jnp.inf)
    if temperature is not None:
        # Gumbel noise: the maximum is then a sample from the softmax.
        ranked = ranked + jnp.where(temperature > 0, _gumbel(key_BW, logits.shape[-1]), 0.0)
    tempered = jax.nn.log_softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    return best(ranked, banned), Distributions(logits, tempered, allowed)


def best(x: Float[Array, "*W V"], banned: int | None = None) -> Int[Array, "*W"]:
    """The index of the largest value over the last axis, the lowest among equals.

    In two stages, since a maximum alone is found several times as fast as one with its index. The
    banned index is left out where that needs no copy of everything: in its own group.
    """
    size = math.gcd(x.shape[-1], 32)  # small, so that a sharded vocabulary has whole groups
    grouped = x.reshape(*x.shape[:-1], -1, size)
    most = jnp.max(grouped, axis=-1)
    if banned is not None:
        number, place = divmod(banned, size)
        others = grouped[..., number, :].at[..., place].set(-jnp.inf)
        most = most.at[..., number].set(jnp.max(others, axis=-1))
    group = jnp.argmax(most, axis=-1)[..., None]
    inside = jnp.take_along_axis(grouped, group[..., None], axis=-2)[..., 0, :]
    if banned is not None:
        inside = jnp.where(group == number, inside.at[..., place].set(-jnp.inf), inside)
    return (size * group[..., 0] + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def keep(
    logits: Float[Array, "B W V"],
    top_p: Float[Array, ""] | None,
    top_k: Int[Array, ""] | None,
    min_p: Float[Array, ""] | None = None,
) -> Bool[Array, "B W V"]:
    """Which tokens survive all filters, of which each looks at the whole distribution.

    Equal logits survive together, and the most probable token always does. The nucleus keeps the
    token that crosses `top_p`. What is not a number survives, so that it is found.
    """
    kept = jnp.ones(logits.shape, bool)
    if min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True)
        least = least + jnp.log(jnp.broadcast_to(min_p, least.shape))
        kept = ~(logits < least)
    if top_p is None and top_k is None:
        return kept
    order = jnp.sort(logits, axis=-1, descending=True)
    count_BW = jnp.full(logits.shape[:-1], logits.shape[-1], jnp.int32)
    if top_p is not None:
        total = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
        before = jnp.pad(total[..., :-1], ((0, 0), (0, 0), (1, 0)))
        count_BW = jnp.sum(
            before <= jnp.broadcast_to(top_p, before.shape), axis=-1, dtype=jnp.int32
        )
    if top_k is not None:
        count_BW = jnp.minimum(count_BW, jnp.broadcast_to(top_k, count_BW.shape))
    threshold = jnp.take_along_axis(order, jnp.maximum(count_BW - 1, 0)[..., None], axis=-1)
    return kept & ~(logits < threshold)


def _gumbel(key_BW: Key[Array, "B W"], size: int) -> Float[Array, "B W V"]:
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32)))(key_BW)
