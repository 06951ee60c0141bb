"""Candidates that are read in groups are those that are read at once."""

import chex
import jax
import numpy as np
import pytest
from tiny_models import prompts, small

from dlm_jax.decoding import predict
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate

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
        dict(strategy="wino", wide_in_thres=0.2, narrow_out_thres=0.3),
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
