"""Candidates and confidences against definitions written out in numpy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dlm_jax.decoding import sampler
from dlm_jax.decoding.strategies.entropy_bound import entropy

VOCAB = 7
LOGITS = np.log(
    [[0.05, 0.4, 0.1, 0.3, 0.05, 0.08, 0.02], [0.01, 0.02, 0.02, 0.05, 0.11, 0.09, 0.7]]
)


class Sampled(NamedTuple):
    """Of one row."""

    token: jax.Array
    score: jax.Array
    confidence: jax.Array
    said: sampler.Distributions


def sampled(alg, logits=LOGITS, *, banned=None, seed=0, **numbers):
    """What `sampler.sample` and a measure make of one row; numbers that are not given are None."""
    logits = jnp.asarray(logits, jnp.float32)[None]
    dtypes = dict(top_k=jnp.int32)
    token, said = sampler.sample(
        logits,
        jax.random.split(jax.random.key(seed), logits.shape[:2]),
        banned=banned,
        **{
            name: jnp.asarray(value, dtypes.get(name, jnp.float32))
            for name, value in numbers.items()
            if value is not None
        },
    )
    measure = sampler.ALGORITHMS[alg]
    score, confidence = measure.score(said, token), measure.confidence(said, token)
    np.testing.assert_array_equal(measure.report(score), confidence)
    return jax.tree.map(lambda leaf: leaf[0], Sampled(token, score, confidence, said))


def sample(*arguments, **keywords):
    """Candidates and confidences of one row."""
    out = sampled(*arguments, **keywords)
    return np.asarray(out.token), np.asarray(out.confidence)


def test_confidences_of_the_unfiltered_softmax():
    p = np.exp(LOGITS)
    for alg, expected in (
        ("low_confidence", [0.4, 0.7]),
        ("maskgit_plus", [0.4, 0.7]),
        ("topk_margin", [0.1, 0.59]),
        ("entropy", (p * np.log(p + 1e-10)).sum(-1)),
    ):
        token, confidence = sample(alg)
        assert token.tolist() == [1, 6]
        np.testing.assert_allclose(confidence, expected, rtol=1e-5)


def test_filters_change_dreams_confidences_but_not_lladas():
    for filters in (dict(top_k=2), dict(top_p=0.5), dict(min_p=0.7)):
        np.testing.assert_allclose(sample("maskgit_plus", **filters)[1][0], 0.4 / 0.7, rtol=1e-5)
        np.testing.assert_allclose(sample("low_confidence", **filters)[1][0], 0.4, rtol=1e-5)
        np.testing.assert_allclose(sample("topk_margin", **filters)[1][0], 0.1 / 0.7, rtol=1e-4)
    # One token survives: Dream's confidence is exactly 1.
    assert sample("maskgit_plus", top_p=0.3)[1].tolist() == [1.0, 1.0]


def test_a_banned_token_is_no_candidate_but_keeps_its_share():
    p = np.exp(LOGITS)
    token, confidence = sample("low_confidence", banned=6)
    assert token.tolist() == [1, 4]
    np.testing.assert_allclose(confidence, [0.4, 0.11], rtol=1e-5)
    # Where the filters leave only the banned token, the best other one is a last resort.
    token, confidence = sample("maskgit_plus", banned=6, top_k=1)
    assert token.tolist() == [1, 4]
    np.testing.assert_allclose(confidence, [1.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(sample("topk_margin", banned=6)[1], [0.1, 0.02], atol=1e-6)
    np.testing.assert_allclose(sample("entropy", banned=6)[1], (p * np.log(p)).sum(-1), rtol=1e-5)


def test_sure_tokens_are_ranked_where_float32_probabilities_are_all_one():
    logits = np.zeros((3, 1000), np.float32)
    logits[:, 5] = [25.0, 27.0, 26.0]
    _, score, confidence, _ = sampled("low_confidence", logits)
    assert (confidence == 1).all()
    assert np.argsort(score).tolist() == [0, 2, 1]
    exact = -np.log1p(999 * np.exp(-logits[:, 5].astype(np.float64)))
    np.testing.assert_allclose(score, exact, rtol=1e-5)


def test_a_traced_temperature_of_zero_takes_the_best_token():
    token, confidence = sample("maskgit_plus", temperature=0.0)
    assert token.tolist() == [1, 6]
    np.testing.assert_allclose(confidence, [0.4, 0.7], rtol=1e-5)


def test_the_lowest_id_wins_a_tie():
    assert sample("low_confidence", np.zeros((1, VOCAB)))[0].tolist() == [0]


def test_sampling_stays_within_the_filters_and_depends_on_the_key():
    many = np.repeat(LOGITS[:1], 300, axis=0)
    token, confidence = sample("low_confidence", many, temperature=3.0, top_k=3)
    assert set(token) == {1, 2, 3}
    np.testing.assert_allclose(confidence, np.exp(LOGITS[0])[token], rtol=1e-5)
    token, confidence = sample("maskgit_plus", many, temperature=0.5, top_k=3)
    squared = np.exp(LOGITS[0]) ** 2
    np.testing.assert_allclose(confidence, squared[token] / squared[[1, 2, 3]].sum(), rtol=1e-4)
    assert (sample("low_confidence", many, temperature=3.0, seed=1)[0] != token).any()


def test_min_p_compares_with_the_best_token_after_the_temperature():
    many = np.repeat(LOGITS[:1], 300, axis=0)
    assert set(sample("maskgit_plus", many, temperature=1.0, min_p=0.5)[0]) == {1, 3}
    assert set(sample("maskgit_plus", many, temperature=2.0, min_p=0.5)[0]) == {1, 2, 3}
    assert set(sample("maskgit_plus", many, temperature=2.0, min_p=0.5, top_k=2)[0]) == {1, 3}
    assert len(set(sample("maskgit_plus", many, temperature=3.0, min_p=0.0)[0])) == VOCAB


def test_a_tiny_temperature_takes_the_best_token_without_overflow():
    token, confidence = sample("maskgit_plus", 50.0 * LOGITS, temperature=1e-4)
    assert token.tolist() == [1, 6] and np.isfinite(confidence).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-40, 40), min_size=VOCAB, max_size=VOCAB, unique=True),
    top_p=st.one_of(st.none(), st.floats(0.05, 1.0)),
    top_k=st.one_of(st.none(), st.integers(1, VOCAB)),
    min_p=st.one_of(st.none(), st.floats(0.0, 0.99)),
)
def test_filters_keep_what_their_definition_keeps(values, top_p, top_k, min_p):
    logits = np.asarray(values, np.float64) / 7
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    if top_p is not None and np.abs(before - top_p).min() < 1e-5:
        return  # too close to the edge for float32
    if min_p is not None and np.abs(p / p.max() - min_p).min() < 1e-5:
        return
    kept = set(order.tolist())
    if top_p is not None:
        kept &= set(order[before <= top_p].tolist())
    if top_k is not None:
        kept &= set(order[:top_k].tolist())
    if min_p is not None:
        kept &= set(np.flatnonzero(p >= min_p * p.max()).tolist())
    ours = sampler.keep(
        jnp.asarray(logits, jnp.float32)[None, None],
        None if top_p is None else jnp.float32(top_p),
        None if top_k is None else jnp.int32(top_k),
        None if min_p is None else jnp.float32(min_p),
    )
    assert set(np.flatnonzero(ours[0, 0]).tolist()) == kept


@pytest.mark.parametrize("alg", sorted(sampler.ALGORITHMS))
def test_a_surer_distribution_has_a_higher_confidence(alg):
    _, (flat, sharp) = sample(alg, np.stack([0.5 * LOGITS[0], 3 * LOGITS[0]]))
    assert sharp > flat


@pytest.mark.parametrize("alg", sorted(sampler.ALGORITHMS))
def test_report_and_level_translate_between_scores_and_confidences(alg):
    measure = sampler.ALGORITHMS[alg]
    out = sampled(alg, temperature=0.7, top_k=4)
    np.testing.assert_allclose(measure.report(out.score), out.confidence, rtol=1e-6)
    np.testing.assert_allclose(measure.level(out.confidence), out.score, rtol=1e-5)


def test_every_confidence_reaches_a_level_of_zero_and_none_reaches_more_than_one():
    measure = sampler.ALGORITHMS["low_confidence"]
    scores = sampled("low_confidence", 1000.0 * LOGITS - [[0], [5000]]).score
    for confidence, reached in ((-1.0, True), (0.0, True), (1.0001, False)):
        assert (scores >= measure.level(jnp.float32(confidence))).all() == reached


@pytest.mark.parametrize("alg", sorted(sampler.ALGORITHMS))
def test_what_a_measure_says_of_itself_is_so(alg):
    """Of any tokens, candidates or not: which measures go by the token, and which are negative."""
    measure = sampler.ALGORITHMS[alg]
    said = sampled(alg, temperature=0.7).said
    told = np.asarray([measure.confidence(said, jnp.full(2, v)) for v in range(VOCAB)])
    if measure.is_probability:
        logits = LOGITS if alg == "low_confidence" else LOGITS / 0.7
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(told, p.T, rtol=1e-4)
    else:
        assert (told == told[0]).all()
    assert (told <= 0).all() == measure.negative


def test_the_tempered_distribution_is_told():
    for out, expected in (
        (sampled("low_confidence"), np.exp(LOGITS)),
        (sampled("low_confidence", temperature=0.5), np.exp(2 * LOGITS)),
        (sampled("low_confidence", top_k=2), np.exp(LOGITS) * (np.exp(LOGITS) >= [[0.3], [0.11]])),
        (sampled("low_confidence", banned=6), np.exp(LOGITS)),
    ):
        expected = expected / expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(out.said.tempered), expected, rtol=1e-4)


def test_debias_makes_common_tokens_less_sure():
    frequency = np.full(VOCAB, 0.01)
    frequency[6] = 0.5
    for alg in ("low_confidence", "maskgit_plus"):
        for clip, expected in ((10.0, [1.84207, 0.48520]), (1.5, [1.5, 0.48520])):
            debias = sampler.Debias(jnp.asarray(frequency, jnp.float32), jnp.float32(clip))
            out = sampled(alg)
            assert out.token.tolist() == [1, 6]
            (told,) = debias.calibrate(out.confidence[None], out.token[None])
            np.testing.assert_allclose(told, expected, rtol=1e-4)


def test_debias_of_tokens_that_never_occur_is_finite():
    debias = sampler.Debias(jnp.zeros(3, jnp.float32), jnp.float32(100.0))
    told = debias.calibrate(jnp.asarray([[1.0, 0.5]]), jnp.asarray([[0, 2]]))
    np.testing.assert_allclose(told, [[23.02585, 11.51293]], rtol=1e-5)  # -log(1e-10)


def test_entropy_of_distributions():
    rows = np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(rows), jnp.float32)
    expected = [np.log(2), np.log(4), 0.0, -0.7 * np.log(0.7) - 0.3 * np.log(0.1)]
    np.testing.assert_allclose(entropy(log_p), expected, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_best_is_the_first_of_the_largest(data):
    """Few distinct values, so that there are ties; 256 values make two groups, 129 are one each."""
    size = data.draw(st.sampled_from([5, 129, 256]))
    x = data.draw(
        hnp.arrays(np.float32, (2, size), elements=st.sampled_from([-np.inf, 0.0, 1.0, 2.0]))
    )
    banned = data.draw(st.none() | st.integers(0, size - 1))
    among = x.copy()
    if banned is not None:
        among[:, banned] = -np.inf
    assume(np.isfinite(among).any(axis=-1).all())
    assert sampler.best(jnp.asarray(x), banned).tolist() == among.argmax(axis=-1).tolist()
