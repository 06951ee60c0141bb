"""Says where the time of a traced step goes, by part of the network.

    python scripts/bench.py --caches dual --profile trace
    python scripts/trace_summary.py trace
    python scripts/trace_summary.py trace/cached --by kernel

A trace names the operations of the compiled program, which mean little to a reader. The program
itself, `step.hlo.txt` beside the trace, says what each was made from, and this adds up the times by
that: layers together, the slowest parts first. A part that the compiler has merged into another is
counted there. With `--by kernel` they are added up by what ran instead, numbers left out. What a
trace in itself shows is described in docs/performance.md.
"""

import argparse
import collections
import gzip
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"', re.M)

_AROUND = re.compile(r"^\s*(?:ROOT )?%?(\S+) = .*? (?:while|conditional|call)\(", re.M)
"""Loops and branches, which last as long as what is in them."""

PROGRAM = "step.hlo.txt"
"""The file beside a trace that holds the program."""

_NUMBER = re.compile(r"(?:[._]\d+)+$")


class Operation(NamedTuple):
    """What ran once, on a stream of a GPU or on a thread of a CPU."""

    kernel: str
    """Its name, without the number that tells it from others of its kind."""
    part: str
    """The line of the network that it was made from."""
    start: float
    """In microseconds, like the next."""
    micros: float


class Part(NamedTuple):
    """All operations of one name."""

    name: str
    ms: float
    operations: int


class Summary(NamedTuple):
    """Where the time of a traced step goes."""

    operations: list[Operation]

    @property
    def span_ms(self) -> float:
        """From the beginning of the first operation to the end of the last."""
        begin = min((one.start for one in self.operations), default=0.0)
        return (max((one.start + one.micros for one in self.operations), default=0.0) - begin) / 1e3

    @property
    def busy_ms(self) -> float:
        """In which at least one operation ran."""
        busy, until = 0.0, -math.inf
        for one in sorted(self.operations, key=lambda one: one.start):
            end = one.start + one.micros
            busy += max(0.0, end - max(one.start, until))
            until = max(until, end)
        return busy / 1e3

    @property
    def parts(self) -> list[Part]:
        """By what they were made from, the slowest first."""
        return _add_up(self.operations, lambda one: one.part)

    @property
    def kernels(self) -> list[Part]:
        """By what ran, the slowest first."""
        return _add_up(self.operations, lambda one: one.kernel)


def summarize(events: Sequence[dict[str, Any]], program: str) -> Summary:
    """The operations of a step.

    Args:
      events: `traceEvents` of a trace.
      program: the compiled program as text.
    """
    origin = dict(_INSTRUCTION.findall(program))
    # What a GPU runs as part of a graph has only the name of its kernel, made from the operation's.
    by_kernel = {re.sub(r"\W", "_", operation): name for operation, name in origin.items()}
    around = set(_AROUND.findall(program))
    found = []
    for event in _ran(events):
        instruction = event.get("args", {}).get("hlo_op", "")
        if instruction in around:
            continue
        kernel = _NUMBER.sub("", event["name"])
        # Operations that the compiler has added for its own purposes have no origin.
        known = origin.get(instruction) or by_kernel.get(event["name"])
        part = known or _NUMBER.sub("", instruction) or kernel
        part = re.sub(r"^jit\(\w+\)/", "", re.sub(r"blocks_\d+", "blocks", part))
        found.append(Operation(kernel, part, event.get("ts", 0.0), event["dur"]))
    return Summary(found)


def _ran(events: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The events that are operations: all on the streams of a GPU, or those of the program."""
    named = [event for event in events if event.get("ph") == "M"]
    devices = {
        event["pid"]
        for event in named
        if event["name"] == "process_name" and event["args"]["name"].startswith("/device:")
    }
    # Other lines of a device show the same operations again, grouped in some way.
    streams = {
        (event["pid"], event["tid"])
        for event in named
        if event["name"] == "thread_name"
        and event["pid"] in devices
        and event["args"]["name"].startswith("Stream")
    }
    for event in events:
        if event.get("ph") == "X" and (
            (event["pid"], event["tid"]) in streams
            if streams
            else "hlo_op" in event.get("args", {})
        ):
            yield event


def _add_up(operations: Iterable[Operation], name: Callable[[Operation], str]) -> list[Part]:
    micros, counts = collections.Counter[str](), collections.Counter[str]()
    for one in operations:
        micros[name(one)] += one.micros
        counts[name(one)] += 1
    return [Part(name, time / 1e3, counts[name]) for name, time in micros.most_common()]


def find_trace(folder: Path) -> Path:
    """The latest trace in a folder.

    Raises:
      ValueError: it holds none.
    """
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces or not (folder / PROGRAM).is_file():
        raise ValueError(f"{folder} holds no trace; scripts/bench.py --profile writes one.")
    return traces[-1]


def read(folder: Path) -> Summary:
    """What the latest trace in a folder shows.

    Raises:
      ValueError: it holds none.
    """
    with gzip.open(find_trace(folder), "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return summarize(events, (folder / PROGRAM).read_text(encoding="utf-8"))


def table(parts: Sequence[Part], top: int) -> str:
    """The slowest parts, and all together."""
    total = sum(part.ms for part in parts)
    lines = [f"{'ms':>9}  {'share':>6}  operations  part"]
    for part in [*parts[:top], Part("all", total, sum(part.operations for part in parts))]:
        share = part.ms / total if total else 0.0
        lines.append(f"{part.ms:9.3f}  {share:6.1%}  {part.operations:10}  {part.name}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("directory", type=Path, help="what --profile was given, or a folder in it")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="parts to show [20]")
    parser.add_argument("--by", choices=("part", "kernel"), default="part", help="[part]")
    args = parser.parse_args(argv)
    try:
        programs = sorted(args.directory.rglob(PROGRAM)) or [args.directory / PROGRAM]
        found = {program.parent: read(program.parent) for program in programs}
    except (ValueError, OSError) as error:
        print(f"trace_summary.py: {error}", file=sys.stderr)
        return 2
    for folder, summary in found.items():
        print(f"{folder}: operations ran for {summary.busy_ms:.3f} of {summary.span_ms:.3f} ms")
        print(table(summary.parts if args.by == "part" else summary.kernels, args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
