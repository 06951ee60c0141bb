"""A process in which stages run, and which another one can end at any time.

A compiler that hangs answers no signal and holds no deadline, so that whoever watches must be
another process. This one keeps what its stages share: JAX, the device, the weights.
"""

import contextlib
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Entry = tuple[str, dict[str, Any]]
"""The table that a result belongs to, and the result."""


LAST_S = 10.0
"""Seconds that a process may take to end; one that waits for a device can be stuck for good."""


class Refused(Exception):
    """The process cannot run any stage; says why in one sentence."""


class Failed(Exception):
    """The stage raised an exception: what it said, and the traceback."""


class Ended(Exception):
    """The process is no more, be it that it took too long or that it died by itself."""


class Worker:
    """A process that is running, or was."""

    def __init__(
        self, module: str, options: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        """Starts it.

        Args:
          module: has a class `Session`, whose methods run stages as iterators of entries.
          options: of the session.
          environment: variables to set, before anything is imported.
          log: what it prints is appended here.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        self._log = log
        self._process = context.Process(
            target=_serve, args=(its_end, module, options, environment, log), daemon=True
        )
        self._process.start()
        its_end.close()

    def run(self, task: str, arguments: Mapping[str, Any], seconds: float) -> Iterator[Entry]:
        """Runs a stage and gives its results as they come.

        Raises:
          Refused, Failed, Ended: see there; the process is of no further use.
        """
        until = time.monotonic() + seconds
        try:
            self._pipe.send((task, arguments))
            while True:
                if not self._pipe.poll(max(0.0, until - time.monotonic())):
                    raise Ended(f"ended after {seconds:.0f} s, its limit")
                kind, *message = self._pipe.recv()
                if kind == "entry":
                    yield message[0], message[1]
                elif kind == "done":
                    return
                else:
                    raise {"refused": Refused, "failed": Failed}[kind](*message)
        except (EOFError, OSError):
            self._process.join(LAST_S)
            raise Ended(f"died with status {self._process.exitcode}: {self._said()}") from None

    def close(self) -> None:
        """Ends the process; what it had on the device is free when this returns."""
        self._process.kill()
        self._process.join(LAST_S)
        self._pipe.close()

    def _said(self) -> str:
        """Its last words."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def _serve(
    pipe: Connection,
    module: str,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
) -> None:
    """What the process does: a stage after the other, until nobody asks for more."""
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        session = importlib.import_module(module).Session(**options)
    except Exception as error:
        traceback.print_exc()
        pipe.send(("refused", in_one_line(error)))
        return
    with contextlib.suppress(EOFError):
        while True:
            task, arguments = pipe.recv()
            pipe.send(_outcome(pipe, session, task, arguments))


def _outcome(pipe: Connection, session: Any, task: str, arguments: Mapping[str, Any]) -> tuple:
    """Runs a stage; returns the message that ends it."""
    try:
        for table, result in getattr(session, task)(**arguments):
            pipe.send(("entry", table, result))
    except Exception as error:
        # As text: a traceback would keep what is on the device.
        return ("failed", in_one_line(error), traceback.format_exc())
    return ("done",)


def in_one_line(error: Exception) -> str:
    """What an exception says, without line breaks and not at length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
