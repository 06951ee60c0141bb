"""From logits to a candidate token and how sure the model is of it.

The candidate comes from the tempered and filtered distribution. What a confidence is differs:
LLaDA's `low_confidence` (arXiv 2502.09992) takes the candidate's probability under the model's own
softmax; Dream's measures look at the tempered and filtered one, so that filters change them even at
temperature 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int, Key


class Candidates(NamedTuple):
    """What a confidence may look at, per position."""

    token: Int[Array, "*W"]
    raw: Float[Array, "*W V"]
    """The model's log-probabilities."""
    tempered: Float[Array, "*W V"]
    """Log-probabilities after temperature and filters; -inf where filtered out."""
    allowed: Bool[Array, "*W V"]
    """Tokens that may be committed."""


def low_confidence(c: Candidates) -> Float[Array, "*W"]:
    """Probability of the candidate, untempered and unfiltered (LLaDA, algorithm 5)."""
    return jnp.exp(_take(c.raw, c.token))


def maskgit_plus(c: Candidates) -> Float[Array, "*W"]:
    """Probability of the candidate after temperature and filters (Dream)."""
    return jnp.exp(_take(c.tempered, c.token))


def topk_margin(c: Candidates) -> Float[Array, "*W"]:
    """Probability of the best token minus that of the second (Dream)."""
    best, _ = jax.lax.top_k(jnp.where(c.allowed, jnp.exp(c.tempered), 0.0), 2)
    return best[..., 0] - best[..., 1]


def entropy(c: Candidates) -> Float[Array, "*W"]:
    """Negative entropy of the distribution (Dream)."""
    p = jnp.exp(c.tempered)
    return jnp.sum(p * jnp.log(p + 1e-10), axis=-1)


ALGORITHMS: dict[str, Callable[[Candidates], Array]] = {
    "low_confidence": low_confidence,
    "maskgit_plus": maskgit_plus,
    "topk_margin": topk_margin,
    "entropy": entropy,
}
"""Name -> confidence; higher is surer."""


def sample(
    logits: Float[Array, "B W V"],
    key_BW: Key[Array, "B W"],
    *,
    alg: str,
    banned: int | None,
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    top_k: Int[Array, ""] | None,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """Draws one candidate per position and measures the confidence in it.

    Args:
      logits: float32.
      key_BW: one key per position; unused at temperature 0.
      alg: a key of `ALGORITHMS`.
      banned: a token that is never a candidate, though it keeps its share of the probability.
      temperature: None takes the most probable token (the lowest id among equals).
      top_p: nucleus filter; None switches it off.
      top_k: keeps the k largest logits; None switches it off.
    """
    vocab = jnp.arange(logits.shape[-1])[None, None, :]
    allowed = jnp.broadcast_to(
        jnp.ones_like(vocab, bool) if banned is None else vocab != banned, logits.shape
    )
    scaled = logits if temperature is None else logits / jnp.broadcast_to(temperature, logits.shape)
    kept = allowed & keep(jnp.where(allowed, scaled, -jnp.inf), top_p, top_k)
    choice = jnp.where(kept, scaled, -jnp.inf)
    if temperature is not None:
        choice = choice + _gumbel(key_BW, logits.shape[-1])
    token_BW = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    candidates = Candidates(
        token=token_BW,
        raw=jax.nn.log_softmax(logits, axis=-1),
        tempered=jax.nn.log_softmax(jnp.where(kept | ~allowed, scaled, -jnp.inf), axis=-1),
        allowed=allowed,
    )
    return token_BW, ALGORITHMS[alg](candidates)


def keep(
    logits: Float[Array, "B W V"], top_p: Float[Array, ""] | None, top_k: Int[Array, ""] | None
) -> Bool[Array, "B W V"]:
    """Which tokens survive the nucleus and the top-k filter; equal logits survive together.

    The nucleus keeps the token that crosses `top_p`, and always the most probable one.
    """
    if top_p is None and top_k is None:
        return jnp.ones(logits.shape, bool)
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
    return logits >= threshold


def _take(values: Float[Array, "*W V"], token: Int[Array, "*W"]) -> Float[Array, "*W"]:
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _gumbel(key_BW: Key[Array, "B W"], size: int) -> Float[Array, "B W V"]:
    """Gumbel noise: adding it to logits and taking the maximum samples from their softmax."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32)))(key_BW)
