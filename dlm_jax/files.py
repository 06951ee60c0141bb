"""Files that are either the old ones or complete."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes) -> None:
    """Writes a file in one step: whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
