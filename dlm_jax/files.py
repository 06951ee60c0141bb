"""Files that are either the old ones or complete, and whether they can be written at all."""

import json
import os
from pathlib import Path
from typing import Any


def check_target(path: Path, option: str) -> None:
    """Refuses a file that `write` could not write in the end, or should not.

    It is replaced when it is complete, which must not befall a link or a device: /dev/stdout.

    Args:
      path: a file, which need not exist.
      option: what asks for it.

    Raises:
      ValueError: one sentence.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is no regular file; {option} must name one, or a new file.")
    if not path.parent.is_dir() or not _writable(path.parent):
        raise ValueError(
            f"{path} cannot be written; {option} must name a file in a writable directory."
        )


def check_folder(path: Path, option: str) -> None:
    """Refuses a folder in which nothing could be written; one that is missing must be possible.

    Args:
      path: a folder, which need not exist.
      option: what asks for it.

    Raises:
      ValueError: one sentence.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise ValueError(f"{path} is no folder; {option} must name one, or a new one.")
    ways = (path, *path.absolute().parents)
    there = next(folder for folder in ways if folder.exists() or folder.is_symlink())
    if not there.is_dir() or not _writable(there):
        raise ValueError(f"{path} cannot be written; {option} must name a writable folder.")


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def write(path: Path, data: bytes) -> None:
    """Writes a file in one step: whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if (
            error.errno is not None and error.filename is None
        ):  # a full disk does not say of which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
