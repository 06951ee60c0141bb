"""The standard streams of a command, which may be closed, full, or unable to hold a letter.

What a command has worked for is not lost to an encoding: letters that a stream lacks are written as
escapes. A stream that cannot be used is told in one sentence, on the one that is left.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

Stream = Any
"""A text file, or what stands for one: whoever runs the command may have put anything there."""


class StreamError(OSError):
    """A standard stream that is needed cannot be used; one sentence."""


@contextlib.contextmanager
def ready() -> Iterator[None]:
    """Has a command find three streams: of the closed ones, what does nothing, or says so.

    Notes to a closed standard error are dropped, as whoever closed it wants. Reading standard input
    that is closed raises `StreamError`.
    """
    _hold_places()
    with contextlib.ExitStack() as stack:
        if sys.stdin is None:
            stack.enter_context(_replaced("stdin", _ClosedInput()))
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(_replaced(name, nowhere))
            _reconfigure(getattr(sys, name), errors="backslashreplace")
        yield


def check_output() -> None:
    """Refuses to work for a standard output that is closed.

    Raises:
      StreamError: one sentence.
    """
    if _is_nowhere(sys.stdout):
        raise StreamError("Standard output is closed; open it, as that is where the text goes.")


def check_input() -> None:
    """Refuses to ask standard input for anything if it is closed.

    Raises:
      StreamError: one sentence.
    """
    if isinstance(sys.stdin, _ClosedInput):
        sys.stdin.read()


def take_any_bytes() -> None:
    """Has standard input turn what is no text into lone surrogates, so that it can be told."""
    _reconfigure(sys.stdin, errors="surrogateescape")


def tell(sentence: str, otherwise: str | None = None) -> None:
    """Writes a line to standard error, or if that cannot be, to standard output.

    Args:
      sentence: the line.
      otherwise: the line for standard output; None means the same.
    """
    for stream, line in ((sys.stderr, sentence), (sys.stdout, otherwise or sentence)):
        if stream is not None and not _is_nowhere(stream):
            with contextlib.suppress(OSError):
                print(line, file=stream, flush=True)
                return
            give_up(stream)


def is_of_stream(error: OSError) -> bool:
    """Whether an error must come from writing to a standard stream: it knows of no file."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)
    return error.filename is None and error.errno in full


def tell_failure(program: str, error: OSError) -> None:
    """Tells that a standard stream cannot be written: whichever can tell it, it is the other."""
    sentence = f"{program}: Standard {{}} cannot be written: {error.strerror}."
    tell(sentence.format("output"), sentence.format("error"))
    give_up(sys.stdout)


def flushed(program: str) -> bool:
    """Whether all that was printed has left; it is told if not."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)
    except OSError as error:
        tell_failure(program, error)
        return False
    return True


def give_up(stream: Stream) -> None:
    """Has what a stream still holds go nowhere, or Python would complain when it closes it."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        stream.flush()


class _ClosedInput(io.TextIOBase):
    """Standard input that was closed before the command began."""

    def read(self, size: int | None = -1, /) -> NoReturn:
        raise StreamError("Standard input is closed; open it, as it is to be read.")

    def readline(self, size: int = -1, /) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.read()

    def __next__(self) -> NoReturn:
        self.read()

    @property
    def buffer(self) -> NoReturn:
        self.read()


def _hold_places() -> None:
    """Opens what is closed of the three file descriptors, or the next file would get its place.

    What libraries print would then be written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


@contextlib.contextmanager
def _replaced(name: str, stream: Any) -> Iterator[None]:
    before = getattr(sys, name)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, before)


def _reconfigure(stream: Any, *, errors: str) -> None:
    """Changes what becomes of letters or bytes that a stream's encoding lacks, but no wish."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        ascii_only = codecs.lookup(stream.encoding).name == "ascii"
        # All that ASCII can say means the same in UTF-8.
        wider = ascii_only and stream.readable()
        stream.reconfigure(encoding="utf-8" if wider else None, errors=errors)


def _is_nowhere(stream: Stream) -> bool:
    """Whether a stream stands for a closed one."""
    return getattr(stream, "name", None) == os.devnull
