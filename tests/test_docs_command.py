"""docs/command.md: its commands run, and its tables are those of the command."""

import dataclasses
import functools
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from documents import argv_of, names, options_of, page

from dlm_jax import arithmetic, cache, generate
from dlm_jax.cli import live, options
from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.decoding.schedule import SCHEDULES
from dlm_jax.decoding.strategies import STRATEGIES

PAGE = page("docs/command.md")
DAY = PAGE.commands(within=PAGE.section("A day"))  # which tests/test_docs_day.py runs
README = page("README.md").commands()  # which tests/test_readme.py runs
COMMANDS = [command for command in PAGE.commands() if command not in DAY + README]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the commands run, one after the other as on the page."""
    return tmp_path_factory.mktemp("command")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:70])
def test_command(command, directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(live, "SLOWEST", 0.0)
    piped = ""
    if command.startswith("echo "):
        _, text, arrow, file, *rest = shlex.split(command)
        assert arrow in (">", ">>", "|")
        if arrow != "|":
            with (directory / file).open("a" if arrow == ">>" else "w") as target:
                target.write(text + "\n")
            return
        piped, command = text + "\n", shlex.join([file, *rest])
    argv = argv_of(command)
    if "--live" in argv:
        monkeypatch.setenv("FORCE_COLOR", "1")  # makes standard error a terminal for rich
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    assert generate.main(argv) == 0
    out, err = capsys.readouterr()
    if "--interactive" in argv:
        assert "/quit" in err
    elif "--output" in argv:
        assert out == ""
        text = Path(argv[argv.index("--output") + 1]).read_text()
        assert [json.loads(line)["id"] for line in text.splitlines()] == [1, 2]
    elif "--batch-size" in argv:
        answers = [json.loads(line) for line in out.splitlines()]
        assert [answer["stats"]["batch_tokens"] for answer in answers] == [
            answer["stats"]["tokens"] for answer in answers
        ]
    elif "--json" in argv:
        answers = [json.loads(line) for line in out.splitlines()]
        history = json.loads((directory / "history.json").read_text())
        assert len(answers) == len(history["committed_at"]) == 1
        assert len(history["frames"]) == answers[0]["stats"]["forwards"]
        _check_keys(answers[0], history)
    else:
        assert "####" in out and "[MASK" not in out and "tokens/s" in err
    if argv == ["--live"]:  # the default question
        assert arithmetic.extract_answer(out) == 7 * 4 - 5


def _check_keys(answer: dict, history: dict) -> None:
    """What is written is what the page says."""
    told = re.findall(r"`(\w+)`", PAGE.section("JSON and history"))
    stats = names(cells[0] for cells in PAGE.table("JSON and history", "in `stats`"))
    assert sorted(answer["stats"]) == sorted(stats)
    assert {*answer, *history} <= set(told)


def test_nothing_is_left_out():
    assert all(block.mark is None and block.language == "bash" for block in PAGE.blocks)
    assert len(COMMANDS) >= 12


def test_options_are_those_of_the_command():
    known = options_of(generate.parse) - {"--help"}
    table = [cells[0] for cells in PAGE.table("Options", "option")]
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(table))) == known
    assert PAGE.options - {"--help"} <= known


def test_names_of_schedules_and_algorithms():
    rows = {names(cells[0])[0]: cells[1] for cells in PAGE.table("Options", "option")}
    assert set(SCHEDULES) <= set(names(rows["--schedule NAME"])) | {"capped"}
    assert set(ALGORITHMS) <= set(names(rows["--alg NAME"]))
    assert "`--schedule capped`" in rows["--threshold X"]


def test_caches_are_those_of_the_library():
    told = PAGE.table("Caches", "`--cache`")
    assert [names(cells[0]) for cells in told] == [[name] for name in cache.METHODS]
    for cells, method in zip(told, cache.METHODS.values(), strict=True):
        given = dict((*pair.split("="), None)[:2] for pair in names(cells[1]))
        defaults = {field.name: field.default for field in dataclasses.fields(method)}
        assert given.keys() == defaults.keys()
        for name, value in given.items():
            assert value is None if defaults[name] is None else value == _written(defaults[name])


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_strategies_are_those_of_the_library():
    told = {names(cells[0])[0]: cells for cells in PAGE.table("Decoding", "`--strategy`")}
    assert list(told) == list(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        given = dict(pair.partition("=")[::2] for pair in names(told[name][1]))
        fields = {field.name: field.default for field in dataclasses.fields(strategy)}
        fields.pop("rule", None)  # which has an option of its own
        assert list(given) == list(fields)
        for argument, value in given.items():
            needed = fields[argument] is dataclasses.MISSING
            assert value == ("X" if needed else _written(fields[argument]))
    for short in names(cells[2] for cells in told.values()):
        generate.check(generate.parse(short.replace("X", "0.5").split()))


class NoFile(OSError):
    def __init__(self) -> None:
        super().__init__(2, "No such file", "answer.json")


@pytest.mark.parametrize(
    ("status", "early", "late"),
    [
        (0, None, None),
        (1, None, NoFile()),
        (1, None, RuntimeError("RESOURCE_EXHAUSTED: out of memory")),
        (2, ValueError("It is wrong."), None),
        (2, NoFile(), None),
        (130, None, KeyboardInterrupt()),
        (130, KeyboardInterrupt(), None),
    ],
)
def test_exit_status(status, early, late, capsys):
    def act(error, result):
        if error is not None:
            raise error
        return result

    prepare = functools.partial(act, early, functools.partial(act, late, None))
    assert options.command("program", prepare, memory="take less") == status
    assert bool(capsys.readouterr().err) == (status in (1, 2))
    told = [int(cells[0]) for cells in PAGE.table("Exit status", "status")]
    assert status in told and 141 in told  # tests/test_generate.py closes a pipe


def test_a_wrong_option_has_the_status_that_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        generate.parse(["--frobnicate"])
    assert caught.value.code == 2 and "--frobnicate" in capsys.readouterr().err
