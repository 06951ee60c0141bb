"""Standard streams that are closed, full, or of an encoding that lacks letters."""

import io
import os
import subprocess
import sys

import pytest
from places import ROOT

from dlm_jax.cli import chat, streams
from dlm_jax.tokenizer import TemplateError

COMMAND = """
import os, sys
from dlm_jax.cli import options, streams

def work():
    print("note", file=sys.stderr)
    if "-" in sys.argv:
        print(sys.stdin.read())
    if "file" in sys.argv:  # what is opened gets no place of a stream
        with open("opened", "w") as file:
            os.write(2, b"of a library")
            assert file.fileno() > 2
    print("answer \\N{SNOWMAN}", flush=True)

def prepare():
    if "asks" in sys.argv:
        streams.check_input()
    return work

sys.exit(options.command("name", prepare, memory="none"))
"""
SNOWMAN = "\N{SNOWMAN}"
FULL = "cannot be written: No space left on device."
BAD = "Standard output cannot be written: Bad file descriptor."
NO_INPUT = "name: Standard input is closed; open it, as it is to be read.\n"
NO_OUTPUT = "name: Standard output is closed; open it, as that is where the text goes.\n"
NONSENSE = "dlm-jax-generate: unrecognized arguments: --nonsense; see --help\n"


def run(redirections: str, *argv: str, cwd=None, **env: str) -> tuple[int, str, str]:
    """Status, output and error of a command that is started by a shell."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$@" {redirections}', sys.executable, COMMAND, *argv],
        env={
            name: value
            for name, value in {**os.environ, "PYTHONPATH": str(ROOT), **env}.items()
            if name not in ("PYTHONUNBUFFERED", "PYTHONUTF8") or name in env
        },
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        cwd=cwd,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize(
    ("redirections", "argv", "wanted"),
    [
        ("", [], (0, f"answer {SNOWMAN}\n", "note\n")),
        ("<&-", [], (0, f"answer {SNOWMAN}\n", "note\n")),
        ("2>&-", [], (0, f"answer {SNOWMAN}\n", "")),
        ("<&-", ["-"], (1, "", f"note\n{NO_INPUT}")),
        ("<&-", ["asks"], (1, "", NO_INPUT)),
        (">&-", [], (1, "", NO_OUTPUT)),
        (">/dev/full", [], (1, "", f"note\nname: Standard output {FULL}\n")),
        ("2>/dev/full", [], (1, f"name: Standard error {FULL}\n", "")),
        (">/dev/full 2>/dev/full", [], (1, "", "")),
        (">&- 2>&-", [], (1, "", "")),
        ("<&- >&- 2>&-", ["-"], (1, "", "")),
        ("1</dev/null", [], (1, "", f"note\nname: {BAD}\n")),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_sentence(redirections, argv, wanted, env):
    assert run(redirections, *argv, PYTHONIOENCODING="utf-8", **env) == wanted


def test_files_get_no_place_of_a_closed_stream(tmp_path):
    status, out, _ = run("2>&-", "file", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert (status, out) == (0, f"answer {SNOWMAN}\n")
    assert (tmp_path / "opened").read_text() == ""


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("ascii", "\\u2603"), ("latin-1", "\\u2603"), ("ascii:replace", "?"), ("utf-8", SNOWMAN)],
)
def test_letters_that_a_stream_lacks_are_escapes(encoding, wanted):
    assert run("", PYTHONIOENCODING=encoding) == (0, f"answer {wanted}\n", "note\n")


@pytest.mark.parametrize(
    ("redirections", "argv", "status", "told"),
    [
        (">/dev/full", ["--help"], 1, f"dlm-jax-generate: Standard output {FULL}\n"),
        ("2>&-", ["--nonsense"], 2, NONSENSE),
    ],
)
def test_the_parser_s_words_are_not_lost_either(redirections, argv, status, told):
    program = "import sys; from dlm_jax import generate; sys.exit(generate.main())"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$@" {redirections}', sys.executable, program, *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout + done.stderr) == (status, told)


def test_streams_may_be_anything(monkeypatch, capsys):
    class Bare:
        def write(self, text): ...

        def flush(self): ...

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, Bare())
    with streams.ready():
        streams.check_output()
        streams.take_any_bytes()
        streams.tell("nobody hears it")
    assert isinstance(sys.stdout, Bare)


# --- a conversation -------------------------------------------------------------------------------

TALK = """
import sys
from dlm_jax.cli import chat, streams
with streams.ready():
    def reply(messages, turn):
        return messages[-1]["content"] + "!"
    chat.converse(reply, sys.stderr.write, remembers=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape", "ascii"])
def test_bytes_that_are_no_text_do_not_end_a_conversation(encoding):
    done = subprocess.run(
        [sys.executable, "-c", TALK],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        input=b"one\nH\xff\n\xe9\xfe/reset\n\xc3\xa9\n",
        capture_output=True,
    )
    assert done.stderr.decode().count("no valid Unicode text") == 2
    assert done.returncode == 0
    assert done.stdout.splitlines() in ([b"one!", b"\xc3\xa9!"], [b"one!", b"\\xe9!"])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_that_are_no_text_can_be_told_from_text(encoding, monkeypatch):
    raw = io.BytesIO("\N{SNOWMAN}\n".encode() + b"H\xff\nthree\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding))
    streams.take_any_bytes()
    assert list(sys.stdin) == ["\N{SNOWMAN}\n", "H\udcff\n", "three\n"]


def test_what_is_no_message_is_told_and_the_conversation_goes_on(monkeypatch, capsys):
    typed = iter(["one", "H\udcff", "/\udcff", "two", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    notes, seen = [], []

    def reply(messages, turn):
        if messages[-1]["content"] == "two":
            raise TemplateError("No twos.")
        seen.append([message["content"] for message in messages])
        return f"reply {turn}"

    chat.converse(reply, notes.append, remembers=True)
    assert capsys.readouterr().out == "reply 0\nreply 1\n"
    assert seen == [["one"], ["one", "reply 0", "three"]]
    assert [note.partition(" ")[0] for note in notes[1:]] == ["That", "That", "No"]
