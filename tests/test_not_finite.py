"""A model whose numbers are NaN or infinite is told of, and says nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import CHECKPOINTS
from tiny_models import prompts, small

from dlm_jax import cache, checkpoint, generate
from dlm_jax.answers import NotFinite
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding import predict, sampler
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.engine import Engine

MASK = 39


def with_changed(params: dict, path: tuple[str, ...], index, value) -> dict:
    """Parameters of which some numbers are others."""
    name, *rest = path
    inner = with_changed(params[name], tuple(rest), index, value) if rest else None
    changed = params[name].at[index].set(value) if inner is None else inner
    return params | {name: changed}


WHERE = {
    "head": (("head", "kernel"), (3, slice(None))),
    "one token of the head": (("head", "kernel"), (slice(None), 7)),
    "norm": (("blocks_1", "attn_norm", "scale"), 2),
    "embedding of the mask": (("embed", "embedding"), MASK),
}
"""Where in a model a number is NaN or infinite."""


def logits_of(kind: str, V: int = 12) -> np.ndarray:
    logits_WV = np.random.default_rng(0).normal(size=(1, 2, V)).astype(np.float32)
    where = {"one": 5, "mask": V - 1, "all": slice(None)}[kind.split()[1]]
    logits_WV[:, 1, where] = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}[kind.split()[0]]
    return logits_WV


@pytest.mark.parametrize("alg", sampler.ALGORITHMS)
@pytest.mark.parametrize(
    "filters", [{}, dict(top_k=3), dict(top_p=0.5), dict(min_p=0.5), dict(temperature=1.0, top_k=2)]
)
def test_every_measure_and_filter_lets_it_be_seen(alg, filters):
    """What `predict` looks at: the candidate's logit, and its score."""
    dtypes = dict(top_k=jnp.int32)
    numbers = {
        name: jnp.asarray(value, dtypes.get(name, jnp.float32)) for name, value in filters.items()
    }
    for kind in ("nan one", "nan mask", "nan all", "inf one", "inf all", "-inf all"):
        logits = jnp.asarray(logits_of(kind))
        keys = jax.random.split(jax.random.key(0), (1, 2))
        token, said = sampler.sample(logits, keys, banned=11, **numbers)
        score = sampler.ALGORITHMS[alg].score(said, token)
        assert predict.finite(logits, token, score).tolist() == [[True, False]], kind


@pytest.mark.parametrize("where", WHERE)
def test_a_generation_says_in_which_forward(where):
    model, params = small()
    decode = DecodeConfig(gen_length=4, steps=2)
    broken = with_changed(params, *WHERE[where], jnp.nan)
    out = diffusion_generate(broken, model, prompts(2, 3), key=jax.random.key(0), decode=decode)
    assert out.not_finite_at.tolist() == [0, 0]


def test_only_rows_that_meet_it_are_not_finite_and_others_stay_as_they_were():
    """Token 5 is NaN: row 1 has it in its prompt, and row 2 commits it itself."""
    model, params = small()
    prompt = np.array([[1, 2, 3], [1, 5, 3], [1, 2, 3]], np.int32)
    decode = DecodeConfig(gen_length=4, steps=4, suppress=(6,))

    def put(tokens_BL, logits_BWV, step):
        third_B = jnp.arange(3) == 2
        wanted_B = jnp.where((step == 1) & third_B, jnp.inf, 0.0)
        nowhere_B = jnp.where(
            third_B, 0.0, jnp.where(jnp.isnan(logits_BWV[:, 0, 0]), 0.0, -jnp.inf)
        )
        logits_BWV = logits_BWV.at[:, :, 5].add(jnp.where(wanted_B > 0, 1e4, nowhere_B)[:, None])
        return logits_BWV

    def run(params):
        return diffusion_generate(
            params, model, prompt, key=jax.random.key(0), decode=decode, logits_processor=put
        )

    whole = run(params)
    out = run(with_changed(params, ("embed", "embedding"), 5, jnp.nan))
    assert whole.not_finite_at.tolist() == [-1, -1, -1]
    assert out.not_finite_at.tolist() == [-1, 0, 2]
    np.testing.assert_array_equal(out.tokens[0], whole.tokens[0])
    np.testing.assert_array_equal(out.confidence[0], whole.confidence[0])


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, params = small()
    broken = with_changed(params, ("embed", "embedding"), 5, jnp.nan)
    decode = DecodeConfig(gen_length=4, steps=2)
    return Engine(Checkpoint(model.config, broken, None), decode, cache.make("none"))


def test_an_engine_raises(engine):
    key = jax.random.key(0)
    with pytest.raises(NotFinite, match=r"^The model's numbers are not finite in forward 1: "):
        engine.run([[1, 5]], key)
    shown = []
    with pytest.raises(NotFinite, match="not finite in forward 1 of row 2: its weights"):
        engine.run([[1, 2], [1, 5]], key, shown.append)
    assert shown == []


def test_what_overflows_in_float16_is_not_finite():
    model, params = small()
    large = with_changed(params, ("blocks_0", "down", "kernel"), slice(None), 3e4)
    decode = DecodeConfig(gen_length=4, steps=2)

    def at(dtype) -> list[int]:
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), large)
        out = diffusion_generate(cast, model, prompts(1, 3), key=jax.random.key(0), decode=decode)
        return out.not_finite_at.tolist()

    assert (at(jnp.float16), at(jnp.bfloat16)) == ([0], [-1])


def test_the_command_ends_with_one_sentence_and_status_1(monkeypatch, capsys, tmp_path):
    load = checkpoint.load

    def broken(directory, **how):
        opened = load(directory, **how)
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, opened.params)
        return opened._replace(params=params)

    monkeypatch.setattr(checkpoint, "load", broken)
    (tmp_path / "ids.json").write_text("[[1, 2], [3]]")
    given = ["--model", str(CHECKPOINTS / "llada-tiny"), "--gen-length=4"]
    assert generate.main([*given, f"--prompt-ids={tmp_path}/ids.json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *_, told = err.splitlines()
    assert told.startswith("dlm-jax-generate: The model's numbers are not finite in forward 1 of ")


def test_logits_that_somebody_made_infinite_are_fine():
    """What is suppressed, filtered out or banned is -inf, and so is what a hook forbids."""
    model, params = small()
    decode = DecodeConfig(
        gen_length=4, steps=2, suppress=(3,), unused=((30, 38),), top_k=4, min_p=0.1, infill=True
    )

    def even_ones_only(tokens_BL, logits_BWV, step):
        return jnp.where(jnp.arange(40) % 2 == 0, logits_BWV, -jnp.inf)

    out = diffusion_generate(
        params,
        model,
        prompts(2, 3),
        key=jax.random.key(0),
        decode=decode,
        logits_processor=even_ones_only,
    )
    assert out.not_finite_at.tolist() == [-1, -1]
