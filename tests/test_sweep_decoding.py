"""scripts/sweep_decoding.py: a small sweep, what it leaves out, its picture, bad input."""

import itertools
import json
import sys

import jax
import pytest
import sweep_decoding

MODEL = "dream-tiny-math"
SMALL = ["--models", MODEL, "--problems", "3", "--gen-length", "16", "--batch", "2"]
FEW = {
    "threshold": {"1": dict(threshold=1.0), "0.5": dict(threshold=0.5)},
    "wino": {"0.6": dict(strategy="wino")},
}


def test_a_small_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_decoding, "LINES", FEW)
    file = tmp_path / "sweep.json"
    assert sweep_decoding.main([*SMALL, "--caches", "none", "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2 + 2  # Dream refuses WINO
    assert captured.err.count(" of 3, ") == 2

    result = json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]
    rows = result.pop("rows")
    sizes = dict(problems=3, seed=2026, gen_length=16, block_length=16, batch=2)
    assert result == sizes | dict(alg="low_confidence")
    assert [(row["line"], row["label"]) for row in rows] == [
        ("threshold", "1"),
        ("threshold", "0.5"),
    ]
    for row in rows:
        assert (row["model"], row["cache"], row["total"]) == (MODEL, "none", 3)
        assert row["settings"] == FEW[row["line"]][row["label"]]
        assert row["accuracy"] == round(row["correct"] / 3, 4)
        assert row["forwards"] >= 16 / row["tokens_per_forward"] - 0.01  # of the slowest row
    careful, bold = rows
    assert (careful["tokens_per_forward"], careful["forwards"]) == (1.0, 16.0)
    assert 1.0 < bold["tokens_per_forward"] <= 16.0 and careful["answer_tokens"] <= 16.0


def planned(model: str, *arguments: str) -> list[sweep_decoding.Trial]:
    args = sweep_decoding.parse(["--models", model, *arguments])
    return sweep_decoding.plan(args, sweep_decoding.checkpoint.load(model))


@pytest.mark.parametrize("model", ["llada-tiny-math", MODEL])
def test_what_is_refused_is_left_out(model):
    trials = planned(model)
    assert {trial.cache.name for trial in trials} == {"none", "dual"}
    assert (trials[0].line, trials[0].label) == sweep_decoding.BASELINE
    everywhere = set(sweep_decoding.LINES) - {"wino"}
    for name in ("none", "dual"):
        lines = {trial.line for trial in trials if trial.cache.name == name}
        wino = model.startswith("llada") and name == "none"
        assert lines == everywhere | ({"wino"} if wino else set())


def test_the_numbers_of_a_line_share_a_program():
    programs = {
        line: {jax.tree.structure(trial.decode) for trial in trials}
        for line, trials in itertools.groupby(
            planned("llada-tiny-math", "--caches", "none"), lambda trial: trial.line
        )
    }
    assert programs.keys() == sweep_decoding.LINES.keys()
    assert len(programs.pop("fixed number")) == 3
    assert all(len(structures) == 1 for structures in programs.values())


def crowded(model: str, name: str) -> list[sweep_decoding.Row]:
    """A table with all settings, most of them close together."""
    return [
        dict(
            model=model,
            cache=name,
            line=line,
            label=label,
            tokens_per_forward=1.0 if i == 0 else 10.0 + len(line) / 9 + i / 4,
            accuracy=0.95 - i * i / 99,
        )
        for line, settings in sweep_decoding.LINES.items()
        for i, label in enumerate(settings)
    ]


def test_picture_shows_every_line_and_no_label_covers_another(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    table = [
        row for model in ("a", "b") for name in ("none", "dual") for row in crowded(model, name)
    ]
    figure = sweep_decoding.picture(table)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{model}, cache {name}" for name in ("none", "dual") for model in ("a", "b")
    ]
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [*sweep_decoding.LINES, "one token per step"]
    for axes in figure.axes:
        frame = axes.get_window_extent().extents
        boxes = [text.get_window_extent().extents for text in axes.texts]
        assert len(boxes) == 2 * len(sweep_decoding.LINES) - 1  # the baseline has its star
        assert all((frame[:2] < box[:2]).all() and (box[2:] < frame[2:]).all() for box in boxes)
        for one, other in itertools.combinations(boxes, 2):
            assert not sweep_decoding._overlap(one, other)
    sweep_decoding.draw(table, tmp_path / "new" / "sweep.png")
    (file,) = (tmp_path / "new").iterdir()  # nothing unfinished is left
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sweep_decoding.main([*SMALL, "--plot", str(tmp_path / "sweep.png")]) == 2
    said = "sweep_decoding: Drawing needs matplotlib: pip install '.[plot]'.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--problems", "0"], "--problems is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--models", "nowhere"], "'nowhere' is neither"),
        (["--caches", "fast"], "cache is 'fast'"),
        (["--caches", "dual,dual"], "not a list of different names"),
        (["--caches", "dkv-greedy"], "take the strategy random"),
        (["--block-length", "7"], "7"),
        (["--gen-length", "250", "--block-length", "0"], "context ends at 256"),
        (["--json", "/dev/null"], "no regular file"),
        (["--plot", "/dev/null.png/x"], "must name a PNG file"),
        (["--plot", "sweep.jpg"], "must name a PNG file"),
        (["--batch", "x"], "--batch"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    try:
        status = sweep_decoding.main([*SMALL, *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert not captured.out
