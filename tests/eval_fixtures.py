"""Fixtures about models for evaluation: a plugin of pytest, named by the modules that need it."""

import shutil

import pytest
from eval_models import CONTEXT, Scripted, change

from dlm_jax import checkpoint
from dlm_jax.engine import Engine
from dlm_jax.eval import runners
from dlm_jax.eval.model import DiffusionLM


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """family -> an embedded model with a short context, as directory and checkpoint."""
    found = {}
    for family, name in (("llada", "max_sequence_length"), ("dream", "max_position_embeddings")):
        directory = tmp_path_factory.mktemp("models") / f"{family}-short"
        shutil.copytree(checkpoint.find(f"{family}-tiny-math"), directory)
        change(directory / "config.json", **{name: CONTEXT})
        found[family] = (directory, checkpoint.load(directory))
    return found


@pytest.fixture(scope="module")
def engines():
    """Engines by their settings, so that no program is compiled twice."""
    return {}


@pytest.fixture
def make(opened, engines, monkeypatch):
    """Makes a `DiffusionLM` of a family; few tokens and few samples unless others are given."""

    def engine(loaded, decode, method, *, token_freq, mesh) -> Engine:
        assert token_freq is None and mesh is None
        key = (loaded.config, decode, method)
        if key not in engines:
            engines[key] = Engine(loaded, decode, method)
        return engines[key]

    monkeypatch.setattr(runners, "Engine", engine)

    def make_model(family="llada", **settings) -> DiffusionLM:
        directory, loaded = opened[family]
        few = dict(gen_length=8) | (
            {"mc_num": 4, "mc_batch_size": 2} if settings.get("estimator") != "ar_ftb" else {}
        )
        return DiffusionLM(str(directory), checkpoint=loaded, **few | settings)

    return make_model


@pytest.fixture
def say(monkeypatch, opened):
    """Makes engines say a text, or the same tokens to everyone."""
    tok = opened["llada"][1].tokenizer

    def script(text) -> Scripted:
        ids = tok(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        return Scripted(monkeypatch, ids)

    return script
