"""Where the checkout keeps what tests read."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"


def read_case(name: str) -> dict:
    return json.loads((GOLDEN / "cases" / f"{name}.json").read_text())
