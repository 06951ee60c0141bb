"""Everything in README.md that can be run here is run here."""

import contextlib
import io
import json
import re
import shlex

import pytest
from places import ROOT

from dlm_jax import arithmetic, generate
from dlm_jax.cli import live

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.S
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]
COMMANDS = [
    line
    for block in BLOCKS
    if block["language"] == "bash" and not block["why"]
    for line in block["text"].splitlines()
]
SNIPPETS = [block["text"] for block in BLOCKS if block["language"] == "python"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the commands run, one after the other as in the README."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:50])
def test_command(command, directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(live, "SLOWEST", 0.0)
    program, *argv = shlex.split(command)
    if program == "echo":
        text, arrow, file = argv
        assert arrow == ">"
        (directory / file).write_text(text + "\n")
        return
    assert [program, *argv[:2]] == ["python", "-m", "dlm_jax.generate"]
    argv = argv[2:]
    if "--live" in argv:
        monkeypatch.setenv("FORCE_COLOR", "1")  # makes standard error a terminal for rich
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert generate.main(argv) == 0
    out, err = capsys.readouterr()
    if "--interactive" in argv:
        assert "/quit" in err
    elif "--json" in argv:
        answers = [json.loads(line) for line in out.splitlines()]
        history = json.loads((directory / "history.json").read_text())
        assert len(answers) == len(history["committed_at"]) == 1
        assert len(history["frames"]) == answers[0]["stats"]["forwards"]
    else:
        assert "####" in out and "[MASK" not in out and "tokens/s" in err
    if argv == ["--live"]:  # the default question, as in the quick start
        assert arithmetic.extract_answer(out) == 7 * 4 - 5


def test_snippets_work_one_after_the_other():
    namespace: dict = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for snippet in SNIPPETS:
            exec(snippet, namespace)
    results = [arithmetic.extract_answer(line) for line in out.getvalue().splitlines()]
    assert results == [9 * 6 + 9, (22 - 8) // 2]
    assert namespace["masks_left"] == 0 and 0 < namespace["share"] < 0.3


def test_only_what_cannot_run_is_left_out():
    reasons = {block["why"] for block in BLOCKS if block["why"]}
    assert reasons == {"installs", "needs the weights", "takes long"}
    assert len(SNIPPETS) == 3 and len(COMMANDS) >= 5
    assert "python -m dlm_jax.generate --live" in COMMANDS
    assert README.count("```") == 2 * len(BLOCKS) + 2  # and the map of files


def test_the_two_commands_of_the_quick_start():
    first, second = (block["text"] for block in BLOCKS[:2])
    assert first.endswith(".venv/bin/pip install . && .venv/bin/python -m dlm_jax.generate\n")
    assert second.endswith(".venv/bin/pip install -e '.[test]' && .venv/bin/pytest\n")
    assert "'.[test]'" in (ROOT / ".ci" / "environment.sh").read_text()
    for script in ("run", "full"):
        assert '/environment.sh"\n' in (ROOT / ".ci" / script).read_text()


def test_options_are_those_of_the_command(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    table = [line for line in README.splitlines() if line.startswith("| `")]
    told = set(re.findall(r"--[a-z][a-z-]+", "\n".join(table)))
    assert told == known
