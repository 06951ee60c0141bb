"""Programs that misbehave: each is stopped, and none that skipped its tests passes."""

import ast
import os
import sys
import time
from pathlib import Path

import pytest

from dlm_jax.eval import sandbox
from dlm_jax.eval.sandbox import Outcome, pass_at_k, run, run_all

PASSED = Outcome(passed=True, reason="passed")


def reason(program: str, **limits) -> str:
    outcome = run(program, **limits)
    assert not outcome.passed
    return outcome.reason


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "",
        "π = 'größer 数'\nassert len(π) == 8\nprint(π, '\\ud800'.encode(errors='ignore'))",
        "a = 1\r\nassert a == 1\r\n",
        "if __name__ == '__main__':\n    1 / 0",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(3).x == 3",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import atexit\natexit.register(lambda: 1 / 0)",
        "import math, re, collections, heapq, itertools, bisect, typing, datetime, random",
    ],
)
def test_a_program_that_reaches_its_end_passes(program):
    assert run(program) == PASSED


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError: invalid syntax (program.py, line 1)"),
        ("x = '\0'", "failed: SyntaxError: "),
        ("\ud800", "failed: SyntaxError: invalid syntax (program.py, line 1)"),
        ("def f(): return f()\nf()", "failed: RecursionError: "),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "failed: E"),
        ("raise ValueError('x' * 10**6)", "failed: ValueError: " + "x" * 288),
        ("import numpy", "failed: ModuleNotFoundError: No module named 'numpy'"),
        ("input()", "failed: EOFError: EOF when reading a line"),
    ],
)
def test_a_program_that_raises_fails_with_the_exception(program, expected):
    assert reason(program).startswith(expected)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import sys\nsys.exit()",
        "exit(0)",
        "quit()",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos.closerange(3, 64)",
        "import os\nfor i in range(3, 64):\n  try: os.write(i, b'passed')\n  except OSError: pass",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_ending_early_is_not_passing(program):
    assert reason(f"{program}\nassert False").startswith("failed: ")


def test_time_is_limited():
    start = time.monotonic()
    assert reason("while True: pass", seconds=0.3) == "timed out"
    assert reason("import time; time.sleep(60)", seconds=0.3) == "timed out"
    assert reason("while True:\n  try: 1 / 0\n  except BaseException: pass", seconds=0.3)
    assert time.monotonic() - start < 30


def test_memory_is_limited():
    limits = dict(memory_mib=128, seconds=20.0)
    assert reason("x = [0] * 10**9", **limits) == "too much memory"
    assert reason("x = []\nwhile True: x.append(bytearray(10**6))", **limits) == "too much memory"
    assert reason("x = ()\nwhile True: x = (x,)", **limits) == "too much memory"


def test_output_goes_nowhere_and_fills_nothing(capfd):
    flood = (
        "import sys\nfor _ in range(100):\n  print('x' * 10**5)\n  sys.stderr.write('y' * 10**5)"
    )
    assert run(flood) == PASSED
    assert capfd.readouterr() == ("", "")


def test_files_are_small_and_stay_in_the_directory(tmp_path):
    assert reason("open('a', 'w').write('x' * 2**25)").startswith("failed: OSError: [Errno 27]")
    assert reason("x = [open(str(i), 'w') for i in range(99)]").startswith(
        "failed: OSError: [Errno 24]"
    )
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for attempt in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.chdir({str(tmp_path)!r}); os.rename('kept', 'lost')",
        f"from pathlib import Path; Path({str(tmp_path)!r}, 'new').mkdir()",
    ):
        refused = f"failed: PermissionError: a program may not change {tmp_path}"
        assert reason(attempt).startswith(refused)
    assert kept.read_text() == "kept" and [*tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize(
    "attempt",
    [
        "os.truncate({kept!r}, 0)",
        "os.chmod({kept!r}, 0)",
        "os.utime({kept!r})",
        "os.symlink('x', {folder!r} + '/new')",
        "open('x', 'w').close(); os.link('x', {folder!r} + '/new')",
        "open('x', 'w').close(); os.rename('x', {folder!r} + '/new')",
        "os.rmdir({folder!r})",
        "os.symlink({kept!r}, 'link'); open('link', 'a')",
        "os.open({kept!r}, os.O_RDWR)",
        "os.remove('kept', dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "os.mkdir('new', dir_fd=os.open({folder!r}, os.O_RDONLY))",
    ],
)
def test_there_is_no_other_way_to_files_outside(attempt, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    before = kept.stat()
    attempt = attempt.format(kept=str(kept), folder=str(tmp_path))
    refused = f"failed: PermissionError: a program may not change {tmp_path}"
    assert reason(f"import os; {attempt}").startswith(refused)
    assert kept.read_text() == "kept" and [*tmp_path.iterdir()] == [kept]
    assert (kept.stat().st_mode, kept.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_what_a_program_writes_to_nowhere_is_no_change():
    assert run("import os\nwith open(os.devnull, 'w') as file: file.write('x')") == PASSED


def test_a_directory_of_its_own_is_deleted_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, tempfile\nassert os.listdir() == []\nassert os.getcwd().startswith(%r)\n"
        "os.mkdir('d')\nopen('d/f', 'w').write('x')\n"
        "with tempfile.TemporaryDirectory() as d: open(d + '/g', 'w').close()"
    )
    assert run(program % str(tmp_path)) == PASSED
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    read, write = os.pipe()
    os.set_inheritable(write, True)
    program = (
        "import os, sys\nassert not os.environ\nassert sys.argv == ['program.py']\n"
        f"try: os.write({write}, b'x')\nexcept OSError: pass\nelse: assert False\nimport dlm_jax"
    )
    assert reason(program) == "failed: ModuleNotFoundError: No module named 'dlm_jax'"
    os.close(read)
    os.close(write)


def test_the_interpreter_is_isolated_and_knows_no_other_folder():
    program = f"""
import sys
flags = sys.flags
assert flags.isolated and flags.no_site and flags.dont_write_bytecode and flags.utf8_mode
assert flags.safe_path and flags.no_user_site and flags.ignore_environment
assert {str(sandbox.CHILD.parent)!r} not in sys.path and "site" not in sys.modules
assert not [path for path in sys.path if path.endswith("-packages")]
"""
    assert run(program) == PASSED


def test_the_child_imports_nothing_but_the_standard_library():
    found = set()
    for node in ast.walk(ast.parse(sandbox.CHILD.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found and {name.partition(".")[0] for name in found} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.kill(os.getppid(), 0)",
    ],
)
def test_processes_and_connections_are_refused(program):
    assert reason(program).startswith("failed: PermissionError: a program may not use ")


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)", "while True: pass"])
def test_a_process_that_was_started_nevertheless_does_not_outlive_the_run(end):
    mark = f"left-behind-{os.getpid()}-{len(end)}"
    program = (
        "import ctypes, time\n"
        "if ctypes.CDLL(None).fork() == 0:\n"
        f"  ctypes.CDLL(None).prctl(15, {mark[-15:]!r}.encode(), 0, 0, 0)\n"
        "  time.sleep(60)\n"
        "time.sleep(0.1)\n" + end
    )
    assert run(program, seconds=0.5 if end else 5.0).passed == (not end)
    patience = time.monotonic() + 5
    while mark[-15:] in _running() and time.monotonic() < patience:
        time.sleep(0.01)
    assert mark[-15:] not in _running()


def _running() -> set[str]:
    """Names of the processes; one that is only not waited for yet does not run."""
    names = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes():
                names.add((folder / "comm").read_text().strip())
        except OSError:
            continue
    return names


def test_many_programs_keep_their_order():
    programs = [f"import time; time.sleep({0.2 - i / 50}); assert {i} % 2" for i in range(6)]
    outcomes = run_all(programs, workers=3)
    assert [outcome.passed for outcome in outcomes] == [False, True] * 3
    assert run_all([]) == []


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="limits must be positive, not seconds=0.0 and memory"):
        run("", seconds=0.0)
    with pytest.raises(ValueError, match="limits must be positive"):
        run_all([""], memory_mib=0)
    with pytest.raises(ValueError, match="workers must be positive, not 0"):
        run_all([""], workers=0)


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    assert pass_at_k(1, 1, 1) == 1.0 and pass_at_k(1, 0, 1) == 0.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # 3 of the 10 pairs both fail
    assert pass_at_k(5, 4, 2) == 1.0
    for n, c, k in ((1, 2, 1), (5, 1, 6), (5, 1, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(n, c, k)
