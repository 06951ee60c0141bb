"""How many positions a rule takes, against slow definitions and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from reference_rules import (
    SIZE,
    by_score,
    flags,
    number,
    often,
    parts,
    proposal,
    row,
    rows,
    slow_bounded,
    slow_factored,
)

from dlm_jax import ranking
from dlm_jax.decoding.strategies import Threshold, entropy_bound
from dlm_jax.decoding.strategies import factor as factor_rule

top = jax.jit(ranking.top)
factored = jax.jit(factor_rule.factored)
bounded = jax.jit(entropy_bound.bounded)


@jax.jit
def sure(score_L: jax.Array, eligible_L: jax.Array, level: jax.Array) -> jax.Array:
    return Threshold(level).count(proposal(score_L, eligible_L), eligible_L)


class TestTop:
    def test_by_hand(self):
        score, eligible = row([0.5, 0.9, 0.5, 0.1]), jnp.asarray([True, False, True, True])
        for quota, expected in enumerate([[], [0], [0, 2], [0, 2, 3], [0, 2, 3]]):
            taken = top(score, eligible, jnp.int32(quota))
            assert np.flatnonzero(taken).tolist() == expected

    def test_an_infinitely_low_score_is_still_eligible(self):
        score = row([-np.inf, 0.3, -np.inf])
        taken = top(score, jnp.asarray([True, False, True]), jnp.int32(2))
        assert taken.tolist() == [True, False, True]

    @often
    @given(score=rows, eligible=flags, quota=st.integers(0, SIZE + 1))
    def test_definition(self, score, eligible, quota):
        taken = top(row(score), jnp.asarray(eligible), jnp.int32(quota))
        assert np.flatnonzero(taken).tolist() == sorted(by_score(score, eligible)[:quota])
        place = ranking.rank(row(score), jnp.asarray(eligible))
        assert sorted(place.tolist()) == list(range(SIZE))


class TestSure:
    def test_a_score_at_the_level_counts(self):
        score = row([0.25, 0.5, 0.75, 1.0])
        eligible = jnp.asarray([True, True, True, False])
        levels = (-np.inf, 0.25, 0.5, 0.5625, 0.75, 1.0)
        counts = [int(sure(score, eligible, number(level))) for level in levels]
        assert counts == [3, 3, 2, 1, 1, 0]

    def test_what_has_no_score_never_counts(self):
        nothing = jnp.zeros(3, bool)
        assert sure(row([-np.inf] * 3), nothing, number(-np.inf)) == 0

    @often
    @given(score=rows, eligible=flags, level=parts, lower=parts)
    def test_definition(self, score, eligible, level, lower):
        def count(level):
            return int(sure(row(score), jnp.asarray(eligible), number(level)))

        assert count(level) == sum(e and s >= level for s, e in zip(score, eligible, strict=True))
        assert count(min(level, lower)) >= count(level)


class TestFactored:
    def test_by_hand(self):
        confidence = row([0.875, 0.5, 0.9375, 0.75])
        # Sorted: 2/16, 3/8, 4/4, 5/2.
        for factor, expected in (
            (0.125, 0),
            (0.1875, 1),
            (0.375, 1),
            (0.5, 2),
            (1.0, 2),
            (1.0625, 3),
            (2.5, 3),
            (2.5625, 4),
        ):
            assert factored(confidence, jnp.ones(4, bool), number(factor)) == expected

    def test_stops_at_the_first_failure(self):
        # 2/8 fails, though 3/8 would then pass.
        assert factored(row([0.875, 0.875]), jnp.ones(2, bool), number(0.25)) == 0
        # 4 certain positions pass at any factor.
        assert factored(jnp.ones(4), jnp.ones(4, bool), number(0.0625)) == 4

    @often
    @given(
        confidence=rows,
        eligible=flags,
        factor=st.integers(1, 150).map(lambda n: n / 16),
        larger=parts,
    )
    def test_definition(self, confidence, eligible, factor, larger):
        def count(factor):
            return int(factored(row(confidence), jnp.asarray(eligible), number(factor)))

        assert count(factor) == slow_factored(confidence, eligible, factor)
        assert count(factor + larger) >= count(factor)
        assert count(1e6) == sum(eligible)


class TestBounded:
    def test_by_hand(self):
        score = row([0.9, 0.8, 0.7, 0.95])
        entropy = row([0.5, 0.25, 1.0, 9.0])
        eligible = jnp.asarray([True, True, True, False])
        # Without the largest of the first 1, 2, 3: 0, 0.25, 0.75.
        for gamma, expected in ((0.0, 1), (0.1875, 1), (0.25, 2), (0.6875, 2), (0.75, 3), (9.0, 3)):
            assert bounded(score, entropy, eligible, number(gamma)) == expected

    def test_the_largest_entropy_is_left_out_wherever_it_stands(self):
        score, everywhere = row([3.0, 2.0, 1.0]), jnp.ones(3, bool)
        for entropy in ([4.0, 0.25, 0.5], [0.25, 4.0, 0.5], [0.5, 0.25, 4.0]):
            assert bounded(score, row(entropy), everywhere, number(0.75)) == 3

    @often
    @given(score=rows, entropy=rows, eligible=flags, gamma=parts, larger=parts)
    def test_definition(self, score, entropy, eligible, gamma, larger):
        def count(gamma):
            return int(bounded(row(score), row(entropy), jnp.asarray(eligible), number(gamma)))

        assert count(gamma) == slow_bounded(score, entropy, eligible, gamma)
        assert count(gamma + larger) >= count(gamma)
        assert count(1e6) == sum(eligible)
