"""The package as it is installed: names, versions, what importing costs, and the files in it."""

import importlib.metadata
import subprocess
import sys
import tomllib

import pytest
from places import ROOT

import dlm_jax
from dlm_jax import checkpoint


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dlm_jax.__version__ == project["version"] == importlib.metadata.version("dlm-jax")
    assert f"## [{dlm_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_name_is_there():
    for name in dlm_jax.__all__:
        assert getattr(dlm_jax, name) is not None
        assert name in dir(dlm_jax)
    with pytest.raises(AttributeError, match="no attribute 'generation'"):
        _ = dlm_jax.generation


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in (ROOT / "dlm_jax").iterdir()}
    assert {name for name in dlm_jax.__all__ if name in modules} == {"cache", "models", "tokenizer"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dlm_jax", ("jax", "numpy", "flax", "rich")),
        ("import dlm_jax.generate", ("jax", "numpy", "flax", "rich")),
        ("import dlm_jax.cli.run", ("transformers", "tokenizers", "orbax", "optax", "torch")),
    ],
)
def test_imports_are_late(statement, absent, tmp_path):
    code = f"{statement}\nimport sys\nprint(*(n for n in {absent!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dlm-jax-generate")
    assert script.value == "dlm_jax.generate:main"


def test_an_embedded_model_is_in_the_package():
    assert "llada-tiny-math" in checkpoint.embedded()
