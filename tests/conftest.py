"""Strict JAX settings, tiny models, and helpers that several test modules share."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax.models import Config, Transformer

# The tests compile hundreds of tiny programs and run each once or twice.
jax.config.update("jax_disable_most_optimizations", True)
# XLA's older way to emit code compiles in about half the time. What the environment gives is kept:
# `XLA_FLAGS= pytest` takes the way that users have, as do the tests that start a process with flags
# of its own. XLA ends a process with a flag that it does not know, so another one tries it first.
FLAG = "--xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.jit(abs)(1.0)"],
        env=os.environ | dict(XLA_FLAGS=FLAG, JAX_PLATFORMS="cpu"),
        capture_output=True,
    )
    if known.returncode == 0:
        os.environ["XLA_FLAGS"] = FLAG
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# What the user's programs are kept in is not for tests, here or in the processes that they start.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees what a module compiled: a process can only hold so many programs."""
    yield
    jax.clear_caches()


@functools.cache
def tiny(name: str) -> tuple[Transformer, dict]:
    """One of the recorded tiny checkpoints, in float32."""
    checkpoint = dlm_jax.load(CHECKPOINTS / name)
    return checkpoint.model, checkpoint.params


def compile_as_users_do(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """For tests that look at what XLA makes of a program: its text, its count of memory.

    LLVM, which comes after both, is in a hurry all the same.
    """
    options: dict[str, bool | int] = dict(xla_backend_optimization_level=0)
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        options["xla_cpu_use_fusion_emitters"] = True
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return lowered.compile(options)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def read_case(name: str) -> dict:
    return json.loads((GOLDEN / "cases" / f"{name}.json").read_text())


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


@pytest.fixture(params=["llada", "dream"])
def small_model(request) -> tuple[Transformer, dict]:
    return small(request.param)


def prompts(rows: int, length: int, *, seed: int = 0, top: int = 38) -> np.ndarray:
    """Random token ids below `top`, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, top, (rows, length)).astype(np.int32)
