"""README.md: everything in it that can be run here is run here, and its figures are measured."""

import re
import runpy

import pytest
from documents import argv_of, names, page, run_snippets
from places import ROOT

from dlm_jax import arithmetic, cache, generate
from dlm_jax.cli import live

pytest_plugins = ["hub_fixtures"]

PAGE = page("README.md")
COMMANDS = PAGE.commands()
MOST_LINES = 170
STAND_INS = {
    "GSAI-ML/LLaDA-8B-Instruct": "llada-tiny-math",
    "Dream-org/Dream-v0-Instruct-7B": "dream-tiny-math",
}
"""Small models that take the place of those whose weights are not here."""


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal for rich, which draws without holding its frames."""
    monkeypatch.setattr(live, "SLOWEST", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_it_is_short():
    assert len(PAGE.text.splitlines()) <= MOST_LINES


def test_only_what_cannot_run_is_left_out():
    assert {block.why for block in PAGE.blocks if block.mark} == {"installs", "needs the weights"}
    assert len(PAGE.snippets) == 2 and len(COMMANDS) == 3
    assert "python -m dlm_jax.generate --live" in COMMANDS


def test_the_two_commands_of_the_quick_start():
    first, second = (block.text for block in PAGE.blocks[:2])
    assert first.endswith(".venv/bin/pip install . && .venv/bin/python -m dlm_jax.generate\n")
    assert second.endswith(".venv/bin/pip install -e '.[test]' && .venv/bin/pytest\n")
    assert "'.[test]'" in (ROOT / ".ci" / "environment.sh").read_text()
    for script in ("run", "full"):
        assert '/environment.sh"\n' in (ROOT / ".ci" / script).read_text()


def test_the_answer_of_the_quick_start(capsys):
    assert generate.main([]) == 0
    answer = capsys.readouterr().out
    assert f"\n> {answer}" in PAGE.section("Quick start")
    assert arithmetic.extract_answer(answer) == 7 * 4 - 5


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[27:70])
def test_command(command, terminal, capsys):
    assert generate.main(argv_of(command)) == 0
    out, err = capsys.readouterr()
    expected = 6 * 7 - 13 if "Sam" in command else 7 * 4 - 5
    assert arithmetic.extract_answer(out) == expected and "tokens/s" in err


def test_large_models_with_small_ones(hub, capsys):
    """The commands for large models work, but for the weights and the length of the answer."""
    for name, small in STAND_INS.items():
        hub.add(name, ROOT / "dlm_jax" / "assets" / small)
    (block,) = [block for block in PAGE.blocks if block.why == "needs the weights"]
    convert = runpy.run_path(str(ROOT / "convert" / "hf_to_orbax.py"))["main"]
    started = []
    for command in block.commands():
        program = "convert/hf_to_orbax.py" if "convert/" in command else "-m dlm_jax.generate"
        argv = argv_of(command, f"python {program}")
        if "convert/" in command:
            assert convert(argv) == 0
            assert "checksums verified" in capsys.readouterr().out
        else:
            assert generate.main(["32" if word == "256" else word for word in argv]) == 0
            assert "32 model forwards" in capsys.readouterr().err
        started.append(program.split("/")[0])
    assert started == ["convert", "-m dlm_jax.generate"] * len(STAND_INS)


def test_snippets_work_one_after_the_other():
    namespace, lines = run_snippets(PAGE.snippets)
    assert [arithmetic.extract_answer(line) for line in lines] == [9 * 6 + 9, (22 - 8) // 2]
    assert namespace["masks_left"] == 0
    out = namespace["out"]
    assert 0 < out.positions_computed.sum() < 0.3 * int(out.nfe) * out.tokens.size


def test_the_figures_are_those_of_the_other_pages():
    """One table and two sentences repeat what docs/ say, where the commands are that measure it."""
    accuracy = {
        cells[0]: re.findall(r"\((.*)\)", cells[1])[0]
        for cells in page("docs/caches.md").table("Accuracy", "cache")
        if cells[1]
    }
    time = {
        cells[0]: [cells[3], cells[4]]
        for cells in page("docs/performance.md").table("Measurements", "cache | full forward")
    }
    table = PAGE.table("What a cache gains", "`--cache`")
    assert [names(cells[0])[0] for cells in table] == list(cache.METHODS)
    for name, _, solved, *speed in table:
        ordered = f"{name}, random order" if solved.endswith(r"\*") else name
        assert solved.removesuffix(r" \*") == accuracy[ordered]
        assert speed == time[name]
    prose = " ".join(PAGE.prose.split())
    assert f"`none` in a random order: {accuracy['`none`, random order']}" in prose

    strategies = page("docs/decoding.md").table("Measured", "setting")
    column = {cells[0]: cells[3].split(" at ") for cells in strategies}  # LLaDA without a cache
    (solved, tokens), (alone, one) = column["`threshold=0.9`"], column["`num_transfer_tokens=1`"]
    assert float(one) == 1
    assert (
        f"commits {float(tokens):.1f} tokens per forward and solves {solved}% of 200 problems, "
        f"where one token per forward solves {alone}%" in prose
    )


def test_every_page_is_named():
    docs = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert docs <= {link.partition("#")[0] for link in PAGE.links}
