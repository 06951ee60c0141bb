"""What a step commits and revokes, against slow definitions and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax import ranking
from dlm_jax.decoding import guidance
from dlm_jax.decoding.strategies import klass, wino
from dlm_jax.geometry import Geometry
from dlm_jax.models import Transformer
from dlm_jax.models.base import lay_out, unembed

SIZE = 8
# Numbers that float32 holds exactly, few enough that equal ones are common.
parts = st.integers(0, 16).map(lambda n: n / 16)
rows = st.lists(parts, min_size=SIZE, max_size=SIZE)
flags = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)
often = settings(max_examples=150, deadline=None, derandomize=True)

top = jax.jit(ranking.top)
sure = jax.jit(ranking.sure)
factored = jax.jit(ranking.factored)
bounded_entropy = jax.jit(ranking.bounded_entropy)


def row(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def number(value) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


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


class TestBoundedEntropy:
    def test_by_hand(self):
        score = row([0.9, 0.8, 0.7, 0.95])
        entropy = row([0.5, 0.25, 1.0, 9.0])
        eligible = jnp.asarray([True, True, True, False])
        # Without the largest of the first 1, 2, 3: 0, 0.25, 0.75.
        for gamma, expected in ((0.0, 1), (0.1875, 1), (0.25, 2), (0.6875, 2), (0.75, 3), (9.0, 3)):
            assert bounded_entropy(score, entropy, eligible, number(gamma)) == expected

    def test_the_largest_entropy_is_left_out_wherever_it_stands(self):
        score, everywhere = row([3.0, 2.0, 1.0]), jnp.ones(3, bool)
        for entropy in ([4.0, 0.25, 0.5], [0.25, 4.0, 0.5], [0.5, 0.25, 4.0]):
            assert bounded_entropy(score, row(entropy), everywhere, number(0.75)) == 3

    @often
    @given(score=rows, entropy=rows, eligible=flags, gamma=parts, larger=parts)
    def test_definition(self, score, entropy, eligible, gamma, larger):
        def count(gamma):
            return int(
                bounded_entropy(row(score), row(entropy), jnp.asarray(eligible), number(gamma))
            )

        assert count(gamma) == slow_bounded(score, entropy, eligible, gamma)
        assert count(gamma + larger) >= count(gamma)
        assert count(1e6) == sum(eligible)


class TestKlass:
    LENGTH, SLOTS, VOCAB, HISTORY = 6, 4, 5, 2

    def predictions(self, seed: int) -> np.ndarray:
        p = np.random.default_rng(seed).dirichlet(np.ones(self.VOCAB), (2, 3))
        p[0, 0] = [1, 0, 0, 0, 0]  # filtered out tokens have no probability
        return p

    def test_divergences_are_those_of_the_definition(self):
        steps = [
            ([[2, 4, 5], [3, 6, 6]], [True, True]),
            ([[2, 3, 6], [3, 4, 6]], [True, True]),
            ([[2, 4, 5], [2, 3, 4]], [True, False]),
            ([[5, 4, 6], [2, 3, 4]], [True, True]),
        ]
        known = klass.begin(2, self.SLOTS, self.VOCAB, self.HISTORY)
        before = np.zeros((2, self.SLOTS, self.VOCAB))
        history = [[[0.0] * self.HISTORY for _ in range(self.SLOTS)] for _ in range(2)]
        for seed, (slots, active) in enumerate(steps):
            p = self.predictions(seed)
            with np.errstate(divide="ignore"):
                log_p = jnp.asarray(np.log(p), jnp.float32)
            known = klass.update(
                known,
                log_p,
                jnp.asarray(slots, jnp.int32),
                jnp.asarray(active),
                self.LENGTH,
            )
            for b in range(2):
                if not active[b]:
                    continue
                now = np.full((self.SLOTS, self.VOCAB), 1 / self.VOCAB)
                for w, slot in enumerate(slots[b]):
                    if slot < self.LENGTH:
                        now[slot - 2] = p[b, w]
                for s in range(self.SLOTS):
                    moved = np.log(now[s] + 1e-12) - np.log(before[b, s] + 1e-12)
                    history[b][s] = [*history[b][s][1:], float((now[s] * moved).sum())]
                before[b] = now
            np.testing.assert_allclose(known.divergence_BSh, history, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(known.probability_BSV, before, rtol=1e-5)

    def test_the_first_step_moves_every_prediction(self):
        known = klass.update(
            klass.begin(2, self.SLOTS, self.VOCAB, 1),
            jnp.log(jnp.full((2, 3, self.VOCAB), 1 / self.VOCAB)),
            jnp.asarray([[2, 3, 4]] * 2, jnp.int32),
            jnp.ones(2, bool),
            self.LENGTH,
        )
        assert (known.divergence_BSh > 20).all()  # log(1/5) - log(1e-12), also where not read
        assert not klass.settled(known, number(20.0), self.LENGTH).any()

    def test_settled_needs_every_remembered_step_and_nothing_in_the_prompt(self):
        divergence = [[[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.25, 0.125]]]
        known = klass.Stability(jnp.zeros((1, 4, 5)), jnp.asarray(divergence))
        for level, expected in ((0.25, [2]), (0.3125, [2, 5]), (1.0, [2, 3, 4, 5]), (0.0, [])):
            settled = klass.settled(known, number(level), self.LENGTH)
            assert np.flatnonzero(settled[0]).tolist() == expected

    def test_steps_that_never_were_count_as_settled(self):
        assert klass.settled(klass.begin(1, 4, 5, 3), number(0.01), 4).all()


class TestWino:
    def test_the_most_is_seven_tenths_between_five_and_twenty(self):
        for least in (1, 7, 30):
            expected = [max(min(max(int(0.7 * masks), 5), 20), least) for masks in range(80)]
            most_B = wino.most(jnp.arange(80), jnp.full(80, least))
            assert most_B.tolist() == expected

    def revoked(self, probability, committed, threshold, now, least) -> list[int]:
        taken = wino.revoked(
            row(probability),
            jnp.asarray(committed),
            number(threshold),
            jnp.int32(now),
            jnp.int32(least),
        )
        return np.flatnonzero(taken).tolist()

    def test_revoked_by_hand(self):
        probability, all_of_them = [0.5, 0.25, 0.75, 0.125], [True] * 4
        assert self.revoked(probability, all_of_them, 0.75, 9, 1) == [0, 1, 3]
        # Only as many as the canvas gains beyond the least.
        assert self.revoked(probability, all_of_them, 0.75, 3, 1) == [1, 3]
        assert self.revoked(probability, all_of_them, 0.75, 3, 2) == [3]
        assert self.revoked(probability, all_of_them, 0.75, 1, 1) == []
        assert self.revoked(probability, all_of_them, 0.75, 0, 1) == []
        # What is as probable as demanded stays; so does what was not committed.
        assert self.revoked(probability, all_of_them, 0.5, 9, 1) == [1, 3]
        assert self.revoked(probability, [True, True, True, False], 0.75, 9, 1) == [0, 1]

    @often
    @given(
        probability=rows,
        committed=flags,
        threshold=parts,
        now=st.integers(0, SIZE),
        least=st.integers(1, 3),
    )
    def test_revoked_definition(self, probability, committed, threshold, now, least):
        doubtful = [p for p in range(SIZE) if committed[p] and probability[p] < threshold]
        doubtful.sort(key=lambda p: probability[p])
        expected = sorted(doubtful[: max(now - least, 0)])
        assert self.revoked(probability, committed, threshold, now, least) == expected

    def test_a_row_that_is_not_active_has_no_span(self):
        geo = Geometry(prompt=3, gen=6, block=2, steps=None, shift=0)
        slots = wino.span(jnp.asarray([1, 2]), jnp.asarray([True, False]), geo)
        assert slots.tolist() == [[5, 6], [9, 9]]


MASK, BLOCK = 39, [3, 4, 5, 6]


@pytest.fixture(scope="module")
def predict():
    """Canvas -> logits over `BLOCK` with shadows, and everywhere without them.

    Of two equal rows, the second without its first two tokens. One layer, so that a shadow hears of
    its own token from nobody.
    """
    model = Transformer(small_config(num_layers=1))
    params = jax.jit(model.init)(jax.random.key(2), np.zeros((1, 4), np.int32))["params"]
    valid_BL = jnp.asarray([[True] * 9, [False] * 2 + [True] * 7])

    @jax.jit
    def both(tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = jnp.asarray([BLOCK] * 2, jnp.int32)
        layout = lay_out(model.config, valid_BL)
        hidden = wino.predict(model, params, tokens_BL, valid_BL, layout, slots)
        return unembed(model, params, hidden), model.apply({"params": params}, tokens_BL)

    return lambda canvas: jax.device_get(both(jnp.asarray([canvas] * 2, jnp.int32)))


def canvas(*block: int) -> list[int]:
    return [7, 8, 9, *block, MASK, MASK]


class TestShadows:
    def test_at_masks_they_change_nothing(self, predict):
        logits, plain = predict(canvas(MASK, 11, MASK, 12))
        np.testing.assert_allclose(logits[0][[0, 2]], plain[0][[3, 5]], rtol=1e-4, atol=1e-5)
        assert (np.abs(logits[0] - plain[0][BLOCK]).max(axis=-1)[[1, 3]] > 1e-3).all()

    def test_a_token_is_judged_by_all_others_but_not_by_itself(self, predict):
        before, _ = predict(canvas(10, 11, MASK, 12))
        after, _ = predict(canvas(10, 20, MASK, 12))
        np.testing.assert_array_equal(before[:, 1], after[:, 1])
        assert (np.abs(before - after).max(axis=-1)[:, [0, 2, 3]] > 1e-3).all()

    def test_padding_is_not_seen(self, predict):
        one, _ = predict([7, 8, 9, 10, 11, MASK, 12, 13, 14])
        two, _ = predict([1, 2, 9, 10, 11, MASK, 12, 13, 14])
        np.testing.assert_array_equal(one[1], two[1])
        assert (one[0] != two[0]).any()


class TestGuidance:
    def test_scales_the_difference_that_the_prompt_makes(self):
        conditional = np.array([[[1.0, 2.0, -1.0]], [[0.0, 4.0, 8.0]]], np.float32)
        unconditional = np.array([[[0.5, 3.0, -1.0]], [[2.0, 4.0, 0.0]]], np.float32)
        for scale, expected in (
            (0.0, conditional),
            (1.0, [[[1.5, 1.0, -1.0]], [[-2.0, 4.0, 16.0]]]),
            (0.5, [[[1.25, 1.5, -1.0]], [[-1.0, 4.0, 12.0]]]),
        ):
            guided = guidance.combine(
                jnp.asarray(conditional), jnp.asarray(unconditional), number(scale)
            )
            np.testing.assert_allclose(guided, expected)

    def test_the_copy_keeps_only_what_was_generated(self):
        tokens = jnp.asarray([[5, 6, 39, 7], [1, 2, 3, 39]], jnp.int32)
        committed_at = jnp.asarray([[-1, -1, -1, 0], [-1, 4, 2, -1]], jnp.int32)
        both = guidance.canvases(tokens, committed_at, 39)
        assert both[:2].tolist() == tokens.tolist()
        assert both[2:].tolist() == [[39, 39, 39, 7], [39, 2, 3, 39]]

    def test_copies_come_after_all_rows(self):
        tree = (jnp.arange(6).reshape(2, 3), jnp.asarray([True, False]))
        twice = guidance.with_copy(tree)
        assert twice[0].tolist() == [[0, 1, 2], [3, 4, 5]] * 2
        for kept, whole in zip(guidance.without_copy(twice), tree, strict=True):
            np.testing.assert_array_equal(kept, whole)
