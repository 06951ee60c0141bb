"""Measures and checks what only a GPU can tell, for as many minutes as there is one.

    python scripts/gpu_suite.py --minutes 8 --out gpu
    python scripts/gpu_suite.py --minutes 4 --out gpu --only caches --layers 32
    python scripts/gpu_suite.py --dry --out dry

Stages run one after the other, the most valuable first. One begins only if it can be expected to
end in time; one that takes far too long, or dies, is ended and noted, and the next one begins in a
new process. Everything is written as soon as it is known: --out holds `suite.json` and `suite.md`,
traces of two steps with the programs that they name, and what the stages printed, `worker.log`.

It runs from a checkout, with nothing installed but what the package needs. Weights are random,
made on the device once per model. --dry runs all stages on tiny models on a CPU.

Exit code 0 if all stages that ran succeeded, 1 if one failed, 2 on bad input.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_plan
import gpu_report
from gpu_plan import Clock, Own, Stage
from gpu_worker import Ended, Failed, Refused, Worker

from dlm_jax import files
from dlm_jax.cli.options import Parser

BEGUN = time.monotonic()
RESULTS = "suite.json"
"""All of them; `suite.md` shows what a reader wants."""
Start = Callable[[Own], Worker]
"""Starts a process."""


class Record:
    """All that is known so far, in files that are whole at any time."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.document: dict[str, Any] = {**facts, **{table: [] for table in gpu_report.TABLES}}

    def add(self, stage: Stage, table: str, entry: Mapping[str, Any]) -> None:
        """Takes in a result, and writes everything."""
        self.document[table].append(dict(group=stage.group, stage=stage.name, **entry))
        self.write()

    def end(
        self, stage: Stage, status: str, seconds: float, error: str = "", more: str = ""
    ) -> None:
        """Takes in how a stage ended, and says so."""
        entry = dict(status=status, seconds=seconds, expected=stage.seconds)
        self.add(stage, "stages", entry | dict(error=error, traceback=more))
        took = f" in {seconds:.1f} s" if seconds else ""
        note(f"{stage.name}: {status}{took}{f': {error}' if error else ''}")

    def failed(self, stage: Stage) -> str:
        """The checks of a stage that failed."""
        checks = self.document["checks"]
        return ", ".join(
            check["name"]
            for check in checks
            if check["stage"] == stage.name and check["outcome"] == "failed"
        )

    @property
    def status(self) -> int:
        """The exit code that this makes."""
        return int(any(stage["status"] in ("failed", "ended") for stage in self.document["stages"]))

    def write(self) -> None:
        files.write_json(self.folder / RESULTS, self.document)
        files.write(self.folder / "suite.md", gpu_report.markdown(self.document).encode())


def run(stages: Sequence[Stage], clock: Clock, record: Record, start: Start) -> None:
    """Runs the stages for which there is time, in as few processes as possible.

    Raises:
      ValueError: the first process cannot run anything.
    """
    worker: Worker | None = None
    try:
        for stage in stages:
            alone = stage.own is not None
            expected = stage.seconds + gpu_plan.START_S * (worker is None or alone)
            if not clock.fits(expected):
                record.end(stage, "left out", 0.0, "there was no time left")
                continue
            if worker is not None and alone:
                worker.close()  # never two of them on one device
                worker = None
            worker = worker or start(stage.own or Own())
            if not watch(stage, expected, worker, clock, record) or alone:
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()


def watch(stage: Stage, expected: float, worker: Worker, clock: Clock, record: Record) -> bool:
    """Runs a stage and keeps what it tells; returns whether the process can run another one."""
    begun, limit = time.monotonic(), clock.limit(expected)

    def end(status: str, *why: str) -> None:
        record.end(stage, status, time.monotonic() - begun, *why)

    try:
        for table, entry in worker.run(stage.task, stage.arguments, limit):
            record.add(stage, table, entry)
    except Refused as error:
        if not record.document["stages"]:
            raise ValueError(str(error)) from None
        end("failed", str(error))
    except Failed as error:
        end("failed", *map(str, error.args))
    except Ended as error:
        over = clock.left <= 0
        end("cut off" if over else "ended", "time was over" if over else str(error))
    else:
        failed = record.failed(stage)
        end("failed" if failed else "passed", *([failed] if failed else []))
        clock.learn(expected, time.monotonic() - begun)
        return True
    return False


# --- the command ----------------------------------------------------------------------------------


def suite(args: argparse.Namespace, command: str) -> int:
    """Checks everything, then runs what there is time for; returns the exit code.

    Raises:
      ValueError, OSError: what is wrong, in one sentence; before any long work.
    """
    files.check_folder(args.out, "--out")
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / RESULTS).exists():
        raise ValueError(
            f"{args.out} holds the results of another run; --out must name a new folder."
        )
    wanted = {"device", *(args.only or gpu_plan.GROUPS)}
    stages = [stage for stage in gpu_plan.plan(args.layers) if stage.group in wanted]
    facts = dict(command=command, commit=commit(), minutes=args.minutes, dry=args.dry)
    record = Record(args.out, facts)
    with tempfile.TemporaryDirectory(prefix="dlm_jax-") as programs:

        def start(own: Own) -> Worker:
            ceilings = [device["ceilings"] for device in record.document["device"]]
            options = dict(
                folder=args.out, dry=args.dry, ceilings=ceilings[0] if ceilings else None
            )
            variables = environment(programs, own, args.dry)
            return Worker("gpu_stages", options, variables, args.out / "worker.log")

        run(stages, Clock(BEGUN + 60 * args.minutes), record, start)
    record.document["seconds"] = time.monotonic() - BEGUN
    record.write()
    print(gpu_report.markdown(record.document))
    return record.status


def environment(programs: str, own: Own, dry: bool) -> dict[str, str]:
    """Variables of a process; an environment that sets them itself keeps its own.

    Args:
      programs: a folder for compiled programs, and for what autotuning found, so that a new process
        need not compile them again.
      own: what is special about it; its flags come behind those that are set.
      dry: whether it runs on a CPU.
    """
    given = dict(
        JAX_COMPILATION_CACHE_DIR=programs,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.9",
    )
    given = {name: os.environ.get(name, value) for name, value in given.items()}
    if dry:
        given |= dict(JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    if own.flags:
        given["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {own.flags}".strip()
    if own.anew:
        given["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return given


def commit() -> str | None:
    """The commit of the checkout, where git can tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def note(text: str) -> None:
    """A line of progress."""
    print(f"{time.monotonic() - BEGUN:6.1f} s  {text}", file=sys.stderr, flush=True)


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= 60:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 60")


def _layers(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 32")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    layout = argparse.RawDescriptionHelpFormatter
    groups = "\n".join(f"  {name:8} {what}" for name, what in gpu_plan.GROUPS.items())
    parser = Parser(
        prog="gpu_suite.py",
        description=__doc__,
        epilog=f"groups of stages:\n{groups}",
        formatter_class=layout,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--minutes", type=_minutes, default=8.0, metavar="N", help="from the start on [8]")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--only", nargs="+", choices=gpu_plan.GROUPS, metavar="GROUP", help="groups to run [all]")
    add("--layers", type=_layers, default=8, metavar="N", help="of LLaDA-8B, to compare caches [8]")
    add("--dry", action="store_true", help="tiny models on a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        return suite(args, shlex.join(["python", "scripts/gpu_suite.py", *given]))
    except (ValueError, OSError) as error:
        print(f"gpu_suite.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # So that a process that was started does not outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
