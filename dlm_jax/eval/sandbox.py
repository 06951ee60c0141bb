"""Runs a generated program in a process of its own, with limits, and says whether it got through.

The limits keep accidents small: a program that never ends, eats the memory, fills the disk, deletes
files, starts processes or opens connections. They are no security boundary: a program that is
written to get out gets out (through `ctypes`, for one). Run programs of unknown origin in a
container or a virtual machine.

A program sees the standard library and no other package, an empty environment, an empty directory
that is deleted afterwards, and nothing on its standard input; what it prints is thrown away.
"""

import contextlib
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dlm_jax.eval import sandbox_child
from dlm_jax.eval.sandbox_child import FILE, TOO_MUCH_MEMORY

TIMED_OUT = "timed out"
CHILD = Path(sandbox_child.__file__).absolute()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its last line.
        reason: "passed", "timed out", "too much memory" or "failed: ..." with the exception.
    """

    passed: bool
    reason: str


def run(program: str, *, seconds: float = 5.0, memory_mib: int = 1024) -> Outcome:
    """Runs one program to its end or to a limit.

    A program passes if its last statement is reached. One that ends the process before (`exit(0)`,
    `os._exit(0)`) does not pass: at its end the process returns a random token, which waits in a
    pipe until then.

    Args:
        program: Python source with its tests, which raise if they fail.
        seconds: time limit, the start of an interpreter (a few hundredths) included.
        memory_mib: limit of the address space.

    Raises:
        ValueError: if a limit is not positive.
    """
    if seconds <= 0 or memory_mib <= 0:
        raise ValueError(f"limits must be positive, not {seconds=} and {memory_mib=}")
    token = secrets.token_hex(16).encode()
    deadline = time.monotonic() + seconds
    ours, theirs = socket.socketpair()
    with ours, theirs, _directory() as home:
        Path(home, FILE).write_bytes(program.encode("utf-8", "replace"))
        ours.sendall(token)
        process = _start(home, theirs.fileno(), math.ceil(seconds) + 1, memory_mib * 2**20)
        try:
            theirs.close()
            verdict = _receive(ours, deadline)
            ended = verdict == b"" and _ends(process, deadline)
        finally:
            _kill(process)
    return _outcome(verdict, token, process.returncode if ended else None)


def run_all(
    programs: Sequence[str],
    *,
    workers: int | None = None,
    seconds: float = 5.0,
    memory_mib: int = 1024,
) -> list[Outcome]:
    """Runs programs in parallel; the outcomes are in the order of the programs.

    Args:
        programs: as in `run`.
        workers: programs at a time; by default as many as there are CPU cores for this process.
        seconds: as in `run`.
        memory_mib: as in `run`.

    Raises:
        ValueError: if a limit or the number of workers is not positive.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers <= 0:
        raise ValueError(f"workers must be positive, not {workers}")
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda p: run(p, seconds=seconds, memory_mib=memory_mib), programs))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of `k` samples passes, from `c` of `n` that did (Chen et al. 2021).

    The unbiased estimator, one minus the share of draws of `k` samples that all failed.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not {n=}, {c=}, {k=}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dlm-jax-", ignore_cleanup_errors=True)


def _start(home: str, channel: int, cpu_seconds: int, memory: int) -> subprocess.Popen:
    # Isolated, without site-packages, writing no bytecode.
    interpreter = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]
    return subprocess.Popen(
        [*interpreter, str(channel), str(cpu_seconds), str(memory)],
        cwd=home,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[channel],
        start_new_session=True,
    )


def _receive(channel: socket.socket, deadline: float) -> bytes | None:
    """What the process sent: nothing if it ended without a word, None if time was over."""
    channel.settimeout(max(deadline - time.monotonic(), 1e-3))
    try:
        return channel.recv(4096)
    except TimeoutError:
        return None
    except ConnectionError:  # it ended with the token unread
        return b""


def _ends(process: subprocess.Popen, deadline: float) -> bool:
    """Whether a process ends in time; it is not waited for, so that its number stays its own."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and all of its group, also what it left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(verdict: bytes | None, token: bytes, code: int | None) -> Outcome:
    if verdict == token:
        return Outcome(passed=True, reason="passed")
    if verdict and verdict != TOO_MUCH_MEMORY.encode():
        text = verdict.decode(errors="replace")
        known = text.startswith("failed: ")
        return Outcome(passed=False, reason=text if known else "failed: it sent no verdict")
    if verdict:
        return Outcome(passed=False, reason=TOO_MUCH_MEMORY)
    if code is None or code == -signal.SIGXCPU:
        return Outcome(passed=False, reason=TIMED_OUT)
    if code < 0:
        return Outcome(passed=False, reason=f"failed: ended by signal {-code}")
    return Outcome(passed=False, reason=f"failed: ended before its last line with exit code {code}")
