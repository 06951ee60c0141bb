"""How far a run is, on standard error: a spinner or a bar in a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status

from dlm_jax.cli.output import Totals

LINE_SECONDS = 10.0
"""Where no bar can be drawn, a line is written this often at most."""


class Spinner:
    """Shows a phase after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows what goes on while the context lasts."""
        if self._console.is_terminal:
            self._status = self._console.status(f"{name} ...")
            self._status.start()
        else:
            self._console.print(f"{name} ...", soft_wrap=True)
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Draws nothing more, whatever another thread is doing."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()


class Bar:
    """Prompts answered, tokens per second and time left; a context manager around the run."""

    def __init__(self, console: Console, total: int) -> None:
        """Shows nothing yet; `total` is how many prompts there are."""
        self._console, self._total = console, total
        self._done = 0
        self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Bar":
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(
                TextColumn("{task.description}"),
                *columns,
                TimeRemainingColumn(),
                console=self._console,
                # Answers that go elsewhere must not be drawn here.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task("", total=self._total, rate="")
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As of a `Spinner`."""
        if self._bar is not None:
            self._bar.stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As of a `Spinner`."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        elif name != "denoising":  # which goes on all the time
            self._console.print(f"{name} ...", soft_wrap=True)
        yield

    def advance(self, rows: int, totals: Totals | None = None) -> None:
        """Counts prompts that are answered; the totals say what this took so far."""
        self._done += rows
        rate = "" if totals is None else f"{totals.tokens_per_second:.1f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=rows, rate=rate)
            return
        now = time.monotonic()
        if totals is not None and now - self._said > LINE_SECONDS:
            self._said = now
            left = totals.seconds_left(self._total - self._done)
            told = f"{self._done} of {self._total} prompts, {rate}, about {left:.0f} s left"
            self._console.print(told, soft_wrap=True)
