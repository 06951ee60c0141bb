"""Candidates and confidences against definitions written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax import sampler

VOCAB = 7
LOGITS = np.log(
    [[0.05, 0.4, 0.1, 0.3, 0.05, 0.08, 0.02], [0.01, 0.02, 0.02, 0.05, 0.11, 0.09, 0.7]]
)


def sample(alg, logits=LOGITS, *, banned=None, temperature=None, top_p=None, top_k=None, seed=0):
    logits = jnp.asarray(logits, jnp.float32)[None]
    token, _, confidence = sampler.sample(
        logits,
        jax.random.split(jax.random.key(seed), logits.shape[:2]),
        alg=alg,
        banned=banned,
        temperature=None if temperature is None else jnp.float32(temperature),
        top_p=None if top_p is None else jnp.float32(top_p),
        top_k=None if top_k is None else jnp.int32(top_k),
    )
    return np.asarray(token[0]), np.asarray(confidence[0])


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
    for filters in (dict(top_k=2), dict(top_p=0.5)):
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
    _, score, confidence = sampler.sample(
        jnp.asarray(logits)[None],
        jax.random.split(jax.random.key(0), (1, 3)),
        alg="low_confidence",
        banned=None,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    assert (confidence == 1).all()
    assert np.argsort(score[0]).tolist() == [0, 2, 1]
    exact = -np.log1p(999 * np.exp(-logits[:, 5].astype(np.float64)))
    np.testing.assert_allclose(score[0], exact, rtol=1e-5)


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


def test_a_tiny_temperature_takes_the_best_token_without_overflow():
    token, confidence = sample("maskgit_plus", 50.0 * LOGITS, temperature=1e-4)
    assert token.tolist() == [1, 6] and np.isfinite(confidence).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-40, 40), min_size=VOCAB, max_size=VOCAB, unique=True),
    top_p=st.one_of(st.none(), st.floats(0.05, 1.0)),
    top_k=st.one_of(st.none(), st.integers(1, VOCAB)),
)
def test_filters_keep_what_their_definition_keeps(values, top_p, top_k):
    logits = np.asarray(values, np.float64) / 7
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    if top_p is not None and np.abs(before - top_p).min() < 1e-5:
        return  # too close to the edge for float32
    kept = set(order.tolist())
    if top_p is not None:
        kept &= set(order[before <= top_p].tolist())
    if top_k is not None:
        kept &= set(order[:top_k].tolist())
    ours = sampler.keep(
        jnp.asarray(logits, jnp.float32)[None, None],
        None if top_p is None else jnp.float32(top_p),
        None if top_k is None else jnp.int32(top_k),
    )
    assert set(np.flatnonzero(ours[0, 0]).tolist()) == kept


@pytest.mark.parametrize("alg", sorted(sampler.ALGORITHMS))
def test_a_surer_distribution_has_a_higher_confidence(alg):
    _, (flat, sharp) = sample(alg, np.stack([0.5 * LOGITS[0], 3 * LOGITS[0]]))
    assert sharp > flat
