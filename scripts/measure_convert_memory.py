"""Measures the converter's peak memory against the number of layers.

    python scripts/measure_convert_memory.py                      # LLaDA-8B cut to 2 and 6 layers
    python scripts/measure_convert_memory.py --layers 32 --dtype bfloat16 --dir /scratch

For each size: writes a synthetic checkpoint with the preset's true names and shapes, converts it
in a process of its own, and deletes both. Peak memory is the kernel's high-water mark of resident
memory (VmHWM) of that process at its end, file pages included. Disk: twice the size of the
largest. The last line on stdout is one JSON document.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from make_synthetic_checkpoint import write_checkpoint

from dlm_jax import models

_ROOT = Path(__file__).resolve().parent.parent
_CONVERTER = _ROOT / "convert" / "hf_to_orbax.py"
# Runs a script as if by itself and writes its own peak to a file.
_WRAPPER = """
import re, runpy, sys
peak, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status") as status, open(peak, "w") as file:
        file.write(re.search(r"VmHWM:\\s*(\\d+) kB", status.read()).group(1))
"""


def convert_and_measure(src: Path, dst: Path, *options: str) -> tuple[int, float]:
    """Converts in a process of its own; returns its peak resident memory in bytes, and seconds."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.NamedTemporaryFile("r", suffix=".kB") as peak:
        start = time.monotonic()
        subprocess.run(
            [
                sys.executable,
                "-c",
                _WRAPPER,
                peak.name,
                _CONVERTER,
                "--src",
                src,
                "--dst",
                dst,
                *options,
            ],
            env=os.environ | {"PYTHONPATH": path},
            check=True,
        )
        return int(peak.read()) * 1024, time.monotonic() - start


def measure(directory: Path, preset: str, layers: int, options: Sequence[str]) -> dict[str, float]:
    """One row of the table."""
    config = dataclasses.replace(models.PRESETS[preset], num_layers=layers)
    src, dst = directory / "src", directory / "dst"
    try:
        size = write_checkpoint(src, config)
        peak, seconds = convert_and_measure(src, dst, *options)
    finally:
        for made in (src, dst):
            shutil.rmtree(made, ignore_errors=True)
    return {
        "layers": layers,
        "source_GB": round(size / 1e9, 2),
        "peak_rss_GiB": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        "MB_per_s": round(size / 1e6 / seconds),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llada-8b-instruct", choices=sorted(models.PRESETS))
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--dtype", help="passed on to the converter")
    parser.add_argument("--verify", action="store_true", help="passed on to the converter")
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary directory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    options = ["--dtype", args.dtype] if args.dtype else []
    options += ["--verify"] if args.verify else []
    try:
        if args.dir is not None and not args.dir.is_dir():
            raise ValueError(f"{args.dir} is no folder; --dir must name one.")
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            rows = [measure(Path(folder), args.preset, layers, options) for layers in args.layers]
    except subprocess.CalledProcessError as error:  # which has told why
        return error.returncode
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}."
        print(f"measure_convert_memory.py: {sentence}", file=sys.stderr)
        return 2
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>14}" for value in row.values()))
    print(json.dumps({"preset": args.preset, "options": options, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
