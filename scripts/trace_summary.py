"""Says where the time of a traced step goes, by part of the network.

    python scripts/bench.py --caches dual --profile trace
    python scripts/trace_summary.py trace

A trace names the operations of the compiled program, which mean little to a reader. The program
itself, `step.hlo.txt` beside the trace, says what each was made from, and this adds up the times by
that: layers together, the slowest parts first. A part that the compiler has merged into another is
counted there. What a trace in itself shows is described in docs/performance.md.
"""

import argparse
import collections
import gzip
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"', re.M)

_AROUND = re.compile(r"^\s*(?:ROOT )?%?(\S+) = .*? (?:while|conditional|call)\(", re.M)
"""Loops and branches, which last as long as what is in them."""


class Part(NamedTuple):
    """All operations that were made from one line of the network."""

    name: str
    ms: float
    operations: int


def parts(events: Iterable[dict[str, Any]], program: str) -> list[Part]:
    """The parts of a step, the slowest first.

    Args:
      events: `traceEvents` of a trace.
      program: the compiled program as text.
    """
    origin = dict(_INSTRUCTION.findall(program))
    around = set(_AROUND.findall(program))
    micros, counts = collections.Counter[str](), collections.Counter[str]()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") != "X" or operation is None or operation in around:
            continue
        # Operations that the compiler has added for its own purposes have no origin.
        name = origin.get(operation) or re.sub(r"[.\d]+$", "", operation)
        name = re.sub(r"^jit\(\w+\)/", "", re.sub(r"blocks_\d+", "blocks", name))
        micros[name] += event["dur"]
        counts[name] += 1
    return [Part(name, time / 1e3, counts[name]) for name, time in micros.most_common()]


def read(directory: Path) -> list[Part]:
    """The parts of the latest trace in a directory.

    Raises:
      ValueError: it holds none.
    """
    traces = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    program = directory / "step.hlo.txt"
    if not traces or not program.is_file():
        raise ValueError(f"{directory} holds no trace; scripts/bench.py --profile writes one.")
    with gzip.open(traces[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return parts(events, program.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("directory", type=Path, help="what --profile was given")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="parts to show [20]")
    args = parser.parse_args(argv)
    try:
        found = read(args.directory)
    except (ValueError, OSError) as error:
        print(f"trace_summary.py: {error}", file=sys.stderr)
        return 2
    total = sum(part.ms for part in found)
    print(f"{'ms':>9}  {'share':>6}  operations  part")
    for part in [*found[: args.top], Part("all", total, sum(part.operations for part in found))]:
        share = part.ms / total if total else 0.0
        print(f"{part.ms:9.3f}  {share:6.1%}  {part.operations:10}  {part.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
