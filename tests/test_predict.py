"""Candidates that are read in groups are those that are read at once; what is kept of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import prompts, small

from dlm_jax.decoding import predict
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.forward import forward
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.decoding.rows import Chance, Row
from dlm_jax.decoding.sampler import Debias
from dlm_jax.decoding.start import start
from dlm_jax.decoding.strategies import Wino

PROMPT = prompts(2, 6, seed=2)
VOCABULARY = 40


def generate(**changes):
    """Ten tokens after two prompts; the canvas is read five positions at a time."""
    model, params = small("llada")
    decode = DecodeConfig(**dict(gen_length=10, block_length=5) | changes)
    key = jax.random.key(3)
    return jax.device_get(diffusion_generate(params, model, PROMPT, key=key, decode=decode))


@pytest.mark.parametrize(
    "changes",
    [
        dict(temperature=0.7, cfg_scale=0.5, gamma=0.3),
        dict(strategy=Wino(0.2, 0.3)),
    ],
    ids=["sampled, guided, gamma", "wino"],
)
def test_groups_change_nothing(changes, monkeypatch):
    """Of two and one positions: five are no multiple of two."""
    whole = generate(**changes)
    rows = 4 if "cfg_scale" in changes else 2
    monkeypatch.setattr(predict, "LOGITS", rows * VOCABULARY * 2)
    jax.clear_caches()
    grouped = generate(**changes)
    jax.clear_caches()
    assert len(np.unique(whole.committed_at)) > 2
    chex.assert_trees_all_close(grouped, whole, rtol=1e-5)


def test_no_more_logits_than_asked_for(monkeypatch):
    """The traced program holds no logits but those of a group."""

    def logits(limit):
        monkeypatch.setattr(predict, "LOGITS", limit)
        model, params = small("llada")
        decode = DecodeConfig(gen_length=10, block_length=10)

        def run(prompt):
            key = jax.random.key(0)
            return diffusion_generate(params, model, prompt, key=key, decode=decode).tokens

        jax.clear_caches()
        text = str(jax.make_jaxpr(run)(PROMPT))
        jax.clear_caches()
        return {size for size in (10, 5, 3) if f"f32[2,{size},{VOCABULARY}]" in text}

    assert logits(2 * VOCABULARY * 10) == {10}
    assert logits(2 * VOCABULARY * 9) == {5}
    assert logits(2 * VOCABULARY * 3) == {3}


@pytest.mark.parametrize("alg", ["low_confidence", "maskgit_plus"])
def test_a_debiased_confidence_is_reported_and_ranks(alg):
    """It is the calibrated one; what a confidence means as a score is then itself."""
    model, params = small("llada")
    share_V = np.random.default_rng(4).dirichlet(np.ones(VOCABULARY)).astype(np.float32)
    decode = DecodeConfig(gen_length=10, block_length=5, alg=alg, clip_alpha=3.0)

    @jax.jit
    def predicted(setup, state):
        seen = forward(setup, state, setup.method.step_shapes(setup.geo)[0])
        out, _ = predict.predict(setup, state, seen)
        chances = setup.key_B[0], jnp.int32(0), setup.position_BL[0]
        row = jax.tree.map(lambda leaf: leaf[0], tuple(state.rows))
        one = jax.tree.map(lambda leaf: leaf[0], out)
        proposal = predict.propose(
            setup,
            Row(*row),
            seen.read_BL[0],
            (seen.slot_BW[0], seen.place_BL[0]),
            one,
            Chance(*chances),
        )
        return out, proposal.level(jnp.float32(0.25))

    def run(**others):
        key = jax.random.key(3)
        return predicted(*start(params, model, PROMPT, key=key, decode=decode, **others))

    (plain, _), (told, level) = run(), run(token_freq=share_V)
    expected = Debias(jnp.asarray(share_V), jnp.float32(3.0)).calibrate(
        plain.confidence, plain.token
    )
    np.testing.assert_array_equal(told.token, plain.token)
    np.testing.assert_allclose(told.confidence, expected, rtol=1e-6)
    np.testing.assert_array_equal(told.score, told.confidence)
    assert (told.confidence != plain.confidence).any() and level == 0.25
