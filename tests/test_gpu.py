"""Correctness on a GPU, by the checks that `scripts/gpu_suite.py` makes there: `pytest -m gpu`."""

import gpu_checks
import jax
import pytest

CHECKS = gpu_checks.all_checks()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_device(name):
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU here")
    outcome, detail = CHECKS[name]()
    if outcome == "skipped":
        pytest.skip(detail)
    assert outcome == "passed", detail
