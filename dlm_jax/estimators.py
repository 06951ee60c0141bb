"""Which masked copies of a sequence a likelihood looks at, and what their tokens count.

An estimator plans for one row of a batch; `likelihood.py` forwards the copies and sums up. Monte
Carlo estimators (`mc_*`) draw what is masked: in expectation the sum is a lower bound of the
log-likelihood of the tokens that they score. Autoregressive ones (`ar_*`) score the tokens one by
one, each given those before it in their order: the sum is the log-likelihood in that order.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Key


class LikelihoodDraws(NamedTuple):
    """What a Monte Carlo estimator draws: S copies of one row for one forward.

    Whoever gives them to `log_likelihood` gives them for all rows and forwards, `[B, T, ...]`.
    """

    masked: ArrayOrNumpy
    """bool [S, L], what each copy masks; what is not scored is never masked."""
    p_mask: ArrayOrNumpy
    """float [S], the share of tokens to mask: divides the copy's log-probabilities."""


def count(key: Array, valid_L: Array, region_L: Array, copies: int, eps: float) -> LikelihoodDraws:
    """A number of masks drawn from 1 to all, in random places; LLaDA (arXiv 2502.09992), Eq. 6.

    The copies draw one number together and spread evenly from there.
    """
    del eps
    target_L = valid_L & region_L
    size = jnp.maximum(jnp.sum(target_L, dtype=jnp.int32), 1)
    start = jax.random.randint(_shared(key), (), 1, size + 1).astype(jnp.float32)
    size = size.astype(jnp.float32)
    count_S = (jnp.round(start + jnp.arange(copies, dtype=jnp.float32) * size / copies) - 1) % size
    count_S = count_S + 1
    noise_SL = jnp.where(target_L[None], _noise(key, valid_L, copies), 2.0)
    rank_SL = jnp.argsort(jnp.argsort(noise_SL, axis=-1), axis=-1).astype(jnp.float32)
    return LikelihoodDraws(rank_SL < count_S[:, None], count_S / size)


def rate(key: Array, valid_L: Array, region_L: Array, copies: int, eps: float) -> LikelihoodDraws:
    """Masks every token with a probability drawn from [eps, 1); Dream (arXiv 2508.15487).

    As in Dream's evaluation code the row's first and last token are never masked. The copies draw
    one number together and spread evenly from there (arXiv 2107.00630, appendix I.1).
    """
    del region_L
    spread_S = jnp.arange(copies, dtype=jnp.float32) / copies
    time_S = (jax.random.uniform(_shared(key), (), jnp.float32) + spread_S) % 1.0
    p_S = (1 - eps) * time_S + eps
    position_L = queries.positions(valid_L[None])[0]
    inner_L = (position_L > 0) & (position_L < jnp.sum(valid_L, dtype=jnp.int32) - 1)
    masked_SL = _noise(key, valid_L, copies) < p_S[:, None]
    return LikelihoodDraws(masked_SL & inner_L[None], p_S)


def _shared(key: Array) -> Key[Array, ""]:
    """The key of what a row's copies share; no position has this number."""
    return jax.random.fold_in(key, jnp.int32(-1))


def _noise(key: Array, valid_L: Array, copies: int) -> Float[Array, "S L"]:
    """Uniform numbers that depend on the position within the row, not on its padding."""

    def draw(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (copies,), jnp.float32)

    return jax.vmap(draw, out_axes=1)(queries.positions(valid_L[None])[0])


class Copies(NamedTuple):
    """What a forward computes of one row."""

    masked_SL: Bool[Array, "S L"]
    slot_SW: Int[Array, "S W"]
    """The slots whose tokens are scored."""
    weight_SW: Float[Array, "S W"]
    """What their log-probabilities count in the result; 0 where a slot is not scored after all."""


class Estimator(NamedTuple):
    """One way to estimate: either `draw` (Monte Carlo) or `hides` (autoregressive) is given."""

    log_types: tuple[str, ...]
    draw: Callable[..., LikelihoodDraws] | None = None
    hides: Callable[[Any, Any], Any] | None = None
    """`hides(slot, scored)`: whether a slot is masked in the copy that scores slot `scored`."""
    guided: bool = False
    """Whether it is defined with classifier-free guidance."""


ESTIMATORS: dict[str, Estimator] = {
    "mc_count": Estimator(("ftb",), draw=count, guided=True),
    "mc_rate": Estimator(("ftb", "btf", "union"), draw=rate),
    "ar_ftb": Estimator(("ftb", "btf"), hides=operator.ge),
    "ar_btf": Estimator(("ftb", "btf"), hides=operator.le),
}
"""Name -> estimator."""


def plan(
    name: str,
    key: Key[Array, ""] | None,
    valid_L: Bool[Array, " L"],
    draws: LikelihoodDraws | None,
    index: Int[Array, ""],
    *,
    scored: range,
    forwards: int,
    copies: int,
    eps: float,
) -> Copies:
    """The copies of one row that enter one forward.

    Args:
      name: a key of `ESTIMATORS`.
      key: the row's PRNG key; None where nothing is to be drawn.
      valid_L: slots that hold a token; the others are padding.
      draws: what a Monte Carlo estimator would draw, if it is given.
      index: which of the `forwards` this is.
      scored: the slots whose tokens count.
      forwards: T, over which Monte Carlo estimates are averaged.
      copies: S, copies per forward.
      eps: lowest masking probability of `mc_rate`.
    """
    estimator, length = ESTIMATORS[name], valid_L.shape[0]
    slot_L = jnp.arange(length, dtype=jnp.int32)
    region_L = (slot_L >= scored.start) & (slot_L < scored.stop)
    if estimator.hides is not None:
        # Each copy scores one slot; in the last forward some may be left over.
        target_S = scored.start + index * copies + jnp.arange(copies, dtype=jnp.int32)
        hidden_SL = region_L[None] & estimator.hides(slot_L[None], target_S[:, None])
        real_S = (target_S < scored.stop) & valid_L.at[target_S].get(mode="clip")
        slot_S = jnp.minimum(target_S, scored.stop - 1)
        return Copies(hidden_SL, slot_S[:, None], real_S[:, None].astype(jnp.float32))
    if draws is None:
        assert estimator.draw is not None and key is not None
        draws = estimator.draw(jax.random.fold_in(key, index), valid_L, region_L, copies, eps)
    masked_SL = jnp.asarray(draws.masked) & (region_L & valid_L)[None]
    masked_SW = masked_SL[:, scored.start : scored.stop]
    share_S = 1.0 / (forwards * copies * jnp.asarray(draws.p_mask))
    slot_W = slot_L[scored.start : scored.stop]
    return Copies(
        masked_SL,
        jnp.broadcast_to(slot_W[None], masked_SW.shape),
        jnp.where(masked_SW, share_S[:, None], 0.0),
    )
