"""Responses that outlive the process: what a killed evaluation had answered is not asked again.

A folder holds one file per process, `responses-0.jsonl` and so on, with a response per line, which
is written when it is known. A response belongs to a key, a digest of all that it depends on: it is
found again whatever the batches, devices and processes of the next run, and never by a run that
asks for something else.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_START = b'{"key": "'


class Responses:
    """Key -> response, in memory and, with a folder, on disk.

    A response is whatever JSON can hold.
    """

    def __init__(self, folder: Path | None = None, *, process: int = 0) -> None:
        """Reads what there is.

        Args:
          folder: where the files are; made if it is missing. None keeps everything in memory.
          process: number of this process, which writes a file of its own.

        Raises:
          ValueError: another run is writing there, or a file holds something else.
          OSError: the folder cannot be read or written.
        """
        self._known: dict[str, Any] = {}
        self._file = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"responses-{process}.jsonl"
        self._file = path.open("a+b")
        weakref.finalize(self, self._file.close)  # whoever forgets `close` lets go all the same
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for found in self.files(folder):
                self._known |= _read(found)
        except (BlockingIOError, ValueError) as error:
            self._file.close()
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"Another run, or another model of this process, is writing to {folder}; wait for "
                "it, or take another folder."
            ) from error
        # The process may have been killed within a line; that line is lost, the next is not.
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            self._file.write(b"\n")

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """The files with responses in a folder."""
        return sorted(folder.glob("responses-*.jsonl"))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, response: Any) -> None:
        """Keeps a response; it is on disk when this returns."""
        self._known[key] = response
        if self._file is not None:
            line = json.dumps({"key": key, "response": response}, ensure_ascii=False)
            with self._naming_the_file():
                self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets another run write to the folder."""
        if self._file is not None:
            with self._naming_the_file():
                self._file.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Has an error of the operating system tell where, as it does not of an open file."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = getattr(self._file, "name", None)
            raise


def _read(path: Path) -> dict[str, Any]:
    known = {}
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["response"]
        except (ValueError, KeyError, TypeError) as error:
            # Where a run was killed within a line, the next one ended it.
            if not (line.startswith(_START) or _START.startswith(line)):
                raise ValueError(
                    f"{path}, line {number}, is no response; take another folder, or delete the "
                    "line."
                ) from error
    return known


def digest(*parts: Any) -> str:
    """A key: the same for the same parts, which JSON must be able to hold."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
