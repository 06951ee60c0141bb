"""The accuracy table: one cache on a few problems, and what it refuses."""

import json

import accuracy
import pytest

MODEL = "dream-tiny-math"
SMALL = ["--models", MODEL, "--problems", "4", "--gen-length", "32", "--batch", "3"]


@pytest.mark.slow
def test_a_cache_stands_beside_none(tmp_path, capsys):
    file = tmp_path / "accuracy.json"
    assert accuracy.main([*SMALL, "--caches", "dual", "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 4 and "dual block_start=shifted" in captured.out
    assert captured.err.count(" of 4 in ") == 2

    result = json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]
    rows = result.pop("rows")
    assert result == dict(problems=4, seed=2026, gen_length=32, block_length=16, batch=3)
    for row in rows:
        assert (row["model"], row["total"]) == (MODEL, 4)
        assert (row["alg"], row["strategy"]) == ("low_confidence", "surest")
        assert row["accuracy"] == row["correct"] / 4
        assert row["agreement"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert row["forwards"] == 32
        assert 0.0 <= row["waste"] < 1.0
    none, dual = rows
    assert (none["cache"], none["parameters"], none["agreement"]) == ("none", {}, 1.0)
    assert none["correct"] >= 3
    assert (dual["cache"], dual["parameters"]) == ("dual", dict(block_start="shifted"))
    assert dual["positions_per_token"] < none["positions_per_token"]


def labels(*arguments: str) -> list[str]:
    args = accuracy.parse([*SMALL, *arguments])
    return [trial.label for trial in accuracy.plan(args, MODEL, accuracy.checkpoint.load(MODEL))]


def test_a_method_that_needs_the_order_has_a_baseline_of_its_own():
    assert labels("--caches", "none,dkv-greedy,prefix") == [
        "none",
        "none (random order)",
        "dkv-greedy cache_steps=2 window_size=4",
        "prefix block_start=shifted",
    ]


def test_other_parameters_stand_beside_the_defaults():
    others = f"{MODEL}/dllm:kp=25+kr=2,dllm:rou=0.5,elsewhere/dllm:kp=9,dkv-pd:shift_type=un_right"
    assert labels("--caches", "dllm,dkv-pd", "--cache-args", others) == [
        "none",
        "dllm kp=50 kr=7 rou=0.25",
        "dllm kp=25 kr=2 rou=0.25",
        "dllm kp=50 kr=7 rou=0.5",
        "dkv-pd cache_steps=4",
        "dkv-pd cache_steps=4 shift_type=un_right",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--problems", "0"], "--problems is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--models", "nowhere"], "'nowhere' is neither"),
        (["--caches", "fast"], "cache is 'fast'"),
        (["--caches", "dual,dual"], "not a list of different names"),
        (["--cache-args", "dllm"], "not of the form NAME:K=V+K=V"),
        (["--cache-args", "dllm:kp=0"], "kp is 0"),
        (["--cache-args", "dllm:kq=5"], "no argument 'kq'"),
        (["--cache-args", "nowhere/dllm:kp=5"], "not among --models"),
        (["--caches", "dual", "--cache-args", "dllm:kp=5"], "not among --caches"),
        (["--block-length", "7"], "7"),
        (["--gen-length", "250", "--block-length", "0"], "context ends at 256"),
        (["--json", "/dev/null"], "no regular file; --json must name one"),
        (["--json", "no/such/folder.json"], "--json must name a file in a writable directory"),
        (["--batch", "x"], "--batch"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, capsys):
    try:
        status = accuracy.main([*SMALL, *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert not captured.out
