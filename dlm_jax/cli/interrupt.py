"""Ctrl-C during a computation, which Python would tell only when the computation is over."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

STATUS = 130
"""Exit status of a command that was interrupted."""


def interruptible(work: Callable[..., T], *args: Any, **named: Any) -> T:
    """The result of `work`, which another thread computes while this one listens for Ctrl-C.

    No thread can be stopped within a compiled program. After an interrupt the process therefore
    ends without waiting for it: when Python exits, whatever else is registered for then is left
    out, and the exit status is `STATUS`.

    Raises:
      KeyboardInterrupt: Ctrl-C, at once.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(*args, **named))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        thread.join()
    except KeyboardInterrupt:
        atexit.register(_leave)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # closed, or nobody reads on
            continue
    os._exit(STATUS)
