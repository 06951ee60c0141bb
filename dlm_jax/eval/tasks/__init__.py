"""Tasks for lm-evaluation-harness: `TaskManager(include_path=PATH, include_defaults=False)`."""

from pathlib import Path

PATH = Path(__file__).parent
