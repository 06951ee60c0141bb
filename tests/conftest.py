"""Strict JAX settings, and fixtures that several test modules share."""

import os
import subprocess
import sys

import jax
import pytest
from hypothesis import settings
from places import ROOT
from tiny_models import small
from xla import FLAG

from dlm_jax.models import Transformer

# The tests compile hundreds of tiny programs and run each once or twice.
jax.config.update("jax_disable_most_optimizations", True)
# What the environment gives is kept: `XLA_FLAGS= pytest` takes the way that users have, as do the
# tests that start a process with flags of its own. XLA ends a process with a flag that it does not
# know, so another one tries it first.
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

# The same examples in every run, so that a change is judged by what it changed. `.ci/full` draws
# new ones, as does `--hypothesis-profile default`.
settings.register_profile("the same", derandomize=True)
settings.load_profile("the same")

sys.path.insert(0, str(ROOT / "scripts"))
# So that a failing comparison in them is told in as many words as one in a test.
pytest.register_assert_rewrite("generation_replay")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees what a module compiled: a process can only hold so many programs."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["llada", "dream"])
def small_model(request) -> tuple[Transformer, dict]:
    return small(request.param)
