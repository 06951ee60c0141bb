"""The trainer of the embedded models, at a size where it takes seconds."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_recipe
import train_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import Recipe

from dlm_jax import load
from dlm_jax.checkpoint import embedded

RECIPE = Recipe(
    width=32,
    mlp_width=64,
    layers=1,
    heads=2,
    kv_heads=2,
    problems=200,
    tokenizer_problems=200,
    vocab_size=400,
    length=160,
    long_length=160,
    batch=8,
    drill_rows=3,
    drill_from=10,
    drill_until=20,
    result_rows=3,
    steps=30,
    warmup=5,
    learning_rate=5e-3,
)


@pytest.fixture(autouse=True, scope="module")
def _usual_promotion():
    """Optax mixes integers, floats and ranks, which the tests of the library forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_recipe.train_tokenizer(tiny_recipe.draw(0, "train", 3000), vocab_size=1024)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted training run: its final state, its work and its model directory."""
    root = tmp_path_factory.mktemp("run")
    state = train_tiny.train(
        RECIPE, root / "work", root / "model", log_every=5, test_every=15, tests=2
    )
    return state, root / "work", root / "model"


def entries(work: Path, name: str) -> list[float]:
    lines = map(json.loads, (work / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text().filter(lambda text: "<|" not in text))  # special tokens are no text
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_words_and_digits_are_single_tokens(tokenizer):
    pieces = tokenizer.encode("Tom has 35 boxes. 3 * 12 = 36 apples").tokens
    wanted = ["Tom", " has", " ", "3", "5", " boxes", ". ", "3", " * ", "1", "2", " = ", "3", "6"]
    assert [piece.replace("Ġ", " ") for piece in pieces] == [*wanted, " apples"]


def test_problems_fit_the_recipes(tokenizer):
    drawn = tiny_recipe.draw(7, "train", 3000)
    for recipe in tiny_recipe.RECIPES.values():
        tokens, starts = tiny_recipe.encode_problems(tokenizer, drawn, recipe.length)
        assert (starts + recipe.min_canvas <= recipe.length).all()
        eos = tokenizer.token_to_id(tiny_recipe.EOS)
        assert (tokens[:, -1] == eos).all()  # there is room for the end of the answer
    with pytest.raises(ValueError, match="length is 20"):
        tiny_recipe.encode_problems(tokenizer, drawn, 20)


def first_batch(tokenizer, step: int, **changes) -> list[np.ndarray]:
    drawn = tiny_recipe.draw(0, "train", 100)
    tokens, starts = tiny_recipe.encode_problems(tokenizer, drawn, Recipe.long_length)
    facts = tiny_recipe.encode_facts(tokenizer, drawn)
    return next(tiny_recipe.batches(tokens, starts, facts, tokenizer, Recipe(**changes), step))


def test_first_phase_may_mask_everything(tokenizer):
    tokens_BL, start_B, target_BL, hidden_BL = first_batch(tokenizer, 0)
    assert tokens_BL.shape == (Recipe.batch, Recipe.length)
    assert (start_B > 0).all() and target_BL.all() and not hidden_BL.any()
    assert first_batch(tokenizer, Recipe.long_every - 1)[0].shape[1] == Recipe.long_length


def test_drill_asks_for_results_only(tokenizer):
    tokens_BL, start_B, target_BL, hidden_BL = first_batch(tokenizer, Recipe.drill_from)
    assert (start_B == 0).sum() == Recipe.drill_rows and not hidden_BL.any()
    for tokens_L, target_L in zip(tokens_BL[start_B == 0], target_BL[start_B == 0], strict=True):
        facts = "".join(
            "?" if asked else tokenizer.decode([token])
            for token, asked in zip(tokens_L.tolist(), target_L, strict=True)
        )
        assert re.fullmatch(r"(\d+ [-+*/] \d+ = \?\?? ?\. )*.{0,14}", facts), facts


def test_hidden_results_are_not_given_away(tokenizer):
    tokens_BL, _, target_BL, hidden_BL = first_batch(tokenizer, Recipe.drill_until, cut_rows=0.0)
    asked_B = ~target_BL.all(axis=1)
    assert asked_B.sum() == Recipe.result_rows
    for tokens_L, target_L, hidden_L in zip(
        tokens_BL[asked_B], target_BL[asked_B], hidden_BL[asked_B], strict=True
    ):
        text = "".join(
            "?" if hidden else tokenizer.decode([token])
            for token, hidden in zip(tokens_L.tolist(), target_L | hidden_L, strict=True)
        )
        result = tokenizer.decode(tokens_L[target_L].tolist())
        before, after = text.split(" = ?", 1)
        assert re.search(r"\d+ [-+*/] \d+$", before)  # the operands are visible
        assert result not in re.findall(r"\d+", after)
        assert "#### ?" in after


def test_cut_rows_show_nothing_behind_the_result(tokenizer):
    _, _, target_BL, hidden_BL = first_batch(tokenizer, Recipe.drill_until, cut_rows=1.0)
    asked_B = ~target_BL.all(axis=1)
    assert asked_B.sum() == Recipe.result_rows
    for target_L, hidden_L in zip(target_BL[asked_B], hidden_BL[asked_B], strict=True):
        first = target_L.argmax()
        assert target_L.sum() in (2, 3)  # one or two digits and what comes behind them
        assert (target_L | hidden_L)[first:].all() and not hidden_L[:first].any()


@pytest.mark.slow
def test_loss_falls(run):
    losses = entries(run[1], "loss")
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "work")
    (tmp_path / "work" / "state.msgpack").unlink()
    options = dict(log_every=5, test_every=15, tests=2)
    for stop_at in (18, None):  # the first part saves its state at step 15
        state = train_tiny.train(
            RECIPE, tmp_path / "work", tmp_path / "model", stop_at=stop_at, **options
        )
    jax.tree.map(np.testing.assert_array_equal, state, run[0])
    names = sorted(path.name for path in run[2].iterdir())
    assert names == sorted(path.name for path in (tmp_path / "model").iterdir())
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (run[2] / name).read_bytes()


def test_another_recipe_is_refused(run, tmp_path):
    other = dataclasses.replace(RECIPE, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"learning_rate 0\.005, not 0\.001"):
        train_tiny.train(other, run[1], tmp_path)


def test_the_written_model_opens(run):
    checkpoint = load(run[2])
    assert checkpoint.config.family == "llada"
    chat = [{"role": "user", "content": "3 + 4?"}]
    render = checkpoint.tokenizer.apply_chat_template
    assert render(chat, tokenize=False, add_generation_prompt=True) == "<|user|>3 + 4?<|assistant|>"
    chat += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    assert render(chat, tokenize=False, add_generation_prompt=True) == (
        "<|user|>3 + 4?<|assistant|>7<|endoftext|><|user|>Sure?<|assistant|>"
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, run[0].ema)


def test_evaluation_ends_with_json(run, capsys):
    train_tiny.evaluate(run[2], count=3, seed=5, gen_length=40)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {"accuracy": result["accuracy"], "problems": 3, "seed": 5, "gen_length": 40}
    assert 0.0 <= result["accuracy"] <= 1.0


def test_dream_reads_one_position_to_the_left(tokenizer):
    config = train_tiny.make_config(dataclasses.replace(RECIPE, family="dream"), tokenizer)
    assert (config.shift, config.qkv_bias) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give one with --work"),
        (["--evaluate", "0"], "--evaluate is 0"),
        (["--evaluate", "5", "--out", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *arguments])
    assert train_tiny.main() == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.slow
@pytest.mark.parametrize("name", embedded())
def test_embedded_models_solve_held_out_problems(name, capsys):
    train_tiny.evaluate(train_tiny.ASSETS / name, count=50, seed=11, gen_length=40)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracy"] >= 0.9
