"""Models and prompts small enough for a test."""

import functools

import jax
import numpy as np
from places import CHECKPOINTS

import dlm_jax
from dlm_jax.models import Config, Transformer


@functools.cache
def tiny(name: str) -> tuple[Transformer, dict]:
    """One of the recorded tiny checkpoints, in float32."""
    checkpoint = dlm_jax.load(CHECKPOINTS / name)
    return checkpoint.model, checkpoint.params


def small_config(family: str = "llada", **changes) -> Config:
    """Two layers, a few dozen tokens: for tests that need a network but not a recorded one."""
    dream = family == "dream"
    settings = dict(
        family=family,
        vocab_size=40,
        width=16,
        mlp_width=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2 if dream else 4,
        head_dim=4,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=dream,
        tied_head=False,
        max_length=64,
        shift=int(dream),
        mask_id=39,
        eos_id=38,
        pad_id=38,
    )
    return Config(**settings | changes)


@functools.cache
def small(family: str = "llada") -> tuple[Transformer, dict]:
    """A random model of `small_config`, with logits peaky enough that orders are clear."""
    model = Transformer(small_config(family))
    params = model.init(jax.random.key(1), np.zeros((1, 4), np.int32))["params"]
    params["head"]["kernel"] = 8.0 * params["head"]["kernel"]
    return model, params


def prompts(rows: int, length: int, *, seed: int = 0, top: int = 38) -> np.ndarray:
    """Random token ids below `top`, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, top, (rows, length)).astype(np.int32)
