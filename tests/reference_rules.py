"""Slow definitions of rules over the scores of a row, and rows to try them on."""

import jax
import jax.numpy as jnp
from hypothesis import settings
from hypothesis import strategies as st

from dlm_jax.decoding.rows import Chance, Proposal

SIZE = 8
# Numbers that float32 holds exactly, few enough that equal ones are common.
parts = st.integers(0, 16).map(lambda n: n / 16)
rows = st.lists(parts, min_size=SIZE, max_size=SIZE)
flags = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)
often = settings(max_examples=150, deadline=None, derandomize=True)


def row(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def number(value) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def proposal(score_L: jax.Array, eligible_L: jax.Array) -> Proposal:
    """What a strategy sees where confidences are what ranks."""
    slot_L = jnp.arange(len(score_L), dtype=jnp.int32)
    return Proposal(
        read_L=eligible_L,
        candidate_L=eligible_L,
        confidence_L=score_L,
        score_L=score_L,
        kept=(),
        slot_W=slot_L,
        place_L=slot_L,
        chance=Chance(jax.random.key(0), jnp.int32(0), slot_L),
        level=lambda confidence: confidence,
    )


def by_score(score, eligible) -> list[int]:
    """Eligible positions, the surest first, the leftmost among equals."""
    positions = [p for p in range(len(score)) if eligible[p]]
    return sorted(positions, key=lambda p: (-score[p], p))


def slow_factored(confidence, eligible, factor) -> int:
    order = by_score(confidence, eligible)
    for n, position in enumerate(order, start=1):
        if not (n + 1) * (1 - confidence[position]) < factor:
            return n - 1
    return len(order)


def slow_bounded(score, entropy, eligible, gamma) -> int:
    count = 0
    order = by_score(score, eligible)
    for n in range(1, len(order) + 1):
        taken = [entropy[position] for position in order[:n]]
        if sum(taken) - max(taken) <= gamma:
            count = n
    return count
