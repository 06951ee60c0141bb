"""Compiles generations for a GPU that is not there, and says what it would be given to do.

    python scripts/gpu_program.py --preset llada-8b --caches dual --batch 1
    python scripts/gpu_program.py --preset dream-7b --caches all --batch 1 8 --json program.json

XLA compiles for a card from a description of it (`scripts/gpu_targets`); no driver and no device
is needed, only the wheels of the extra `cuda12`, in an environment of its own since they are large.
What comes back is the program with every kernel, copy and buffer. Nothing is timed: `counted ms` is
the sum over the kernels of the larger of FLOPs over the FLOP rate and bytes over the rate of the
memory, and 2 us for each launch, beside the limit of `roofline.py`. Choosing kernels by measuring
(autotuning) is off, so that a real card may get faster ones.

A step is one turn of the loop over steps of one shape. Where a forward goes by turns, its inner
loop counts as often as a batch without rows that are done needs.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import bench_report
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
from bench_report import Case, Row
from bench_run import note
from jax.experimental import topologies
from roofline import Ceilings, step_products

from dlm_jax import compilation, files
from dlm_jax.cli.options import Parser
from dlm_jax.decoding import turns
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.models import Config, Transformer, attention
from dlm_jax.typing import Array, Params

TARGETS = Path(__file__).parent / "gpu_targets"
CEILINGS = {"h200": bench.H200, "h100": Ceilings(flops=790e12, bytes=3.0e12)}
"""As large products in bfloat16 and copies of large arrays reached on such cards."""
COLUMNS: bench_report.Columns = (
    ("cache", "cache", "{}"),
    ("batch", "batch", "{}"),
    ("step", "step", "{}"),
    ("trips", "trips", "{}"),
    ("kernels", "kernels", "{}"),
    ("counted ms", "counted_ms", "{:.2f}"),
    ("limit ms", "limit_ms", "{:.2f}"),
    ("copies", "copies", "{}"),
    ("over 1 MB", "large", "{}"),
    ("largest MB", "largest_mb", "{:.1f}"),
    ("temporaries MiB", "temporaries_mib", "{:.0f}"),
    ("compile s", "compile_s", "{:.0f}"),
)


class Compiled(NamedTuple):
    """A program for a card that is not there."""

    text: str
    """Optimised and scheduled."""
    memory: dict[str, float]
    """MiB that it needs, as `compilation.memory_mib` names them."""
    seconds: float
    """For tracing, lowering and compiling."""


def check_plugin() -> None:
    """Refuses an environment that cannot compile for GPUs.

    Raises:
      ValueError: one sentence.
    """
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        raise ValueError(
            "Compiling for a GPU needs jax's CUDA plug-in; install dlm_jax with its extra cuda12, "
            "best in an environment of its own."
        )


@functools.cache
def device(target: str) -> Any:
    """A device that exists for the compiler only; `target` is a key of `CEILINGS`."""
    described = (TARGETS / f"{target}.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=described
    )
    return topology.devices[0]


def compile_for(function: Any, arguments: Any, target: str, options: dict[str, Any]) -> Compiled:
    """A function of arrays, compiled for a card.

    Args:
      function: jittable.
      arguments: pytrees of arrays or of their shapes.
      target: a key of `CEILINGS`.
      options: of the compiler.
    """
    place = jax.sharding.SingleDeviceSharding(device(target))
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments
    )
    start = time.perf_counter()
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
    fixed = {"xla_gpu_autotune_level": 0} | compilation.GPU_OPTIONS
    program = lowered.compile(compiler_options=fixed | options)
    seconds = time.perf_counter() - start
    return Compiled(program.as_text(), compilation.memory_mib(program), seconds)


def compile_case(
    case: Case, config: Config, params: Params, prompt_BP: np.ndarray, args: argparse.Namespace
) -> Compiled:
    """A whole generation."""
    model = Transformer(config, attention=args.attention)

    def generate(params: Params, prompt_BP: Array, key_data: Array, limit: Array) -> Any:
        # A limit keeps every step shape in a loop of its own, as in `bench.py`.
        decode = dataclasses.replace(case.decode, max_forwards=limit)
        key = jax.random.wrap_key_data(key_data)
        return diffusion_generate(
            params, model, prompt_BP, key=key, decode=decode, cache=case.method
        )

    key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    arguments = (params, prompt_BP, key_data, jax.ShapeDtypeStruct((), jnp.int32))
    return compile_for(generate, arguments, args.target, dict(args.option))


def describe(
    case: Case, config: Config, program: Compiled, prompt_BP: np.ndarray, target: str
) -> list[Row]:
    """A row for each step shape of a compiled generation."""
    (batch, prompt), ceilings = prompt_BP.shape, CEILINGS[target]
    geo = case.decode.geometry(prompt=prompt, shift=config.shift)
    loops = hlo.steps(hlo.read(program.text))
    rows = []
    for shape, products in zip(case.method.step_shapes(geo), case.steps, strict=True):
        loop = loops.get(shape.scope)
        if loop is None:
            continue  # the compiler saw that it cannot occur
        rounds = -(-batch // turns.rows_per_turn(batch, shape.capacity))
        large = loop.large
        rows.append(
            {
                "cache": case.label,
                "batch": batch,
                "step": shape.scope.removeprefix("step_"),
                "trips": loop.trips,
                "kernels": loop.count(rounds),
                "counted_ms": 1e3 * loop.seconds(ceilings, rounds),
                "limit_ms": 1e3 * ceilings.seconds(products, batch),
                "copies": len(loop.copies),
                "large": len(large),
                "largest_mb": large[0].written / 1e6 if large else 0.0,
                "largest": [
                    dict(mb=kernel.written / 1e6, shape=kernel.shape, source=kernel.source)
                    for kernel in large[:8]
                ],
                "compile_s": program.seconds,
                "compile_cached": False,
            }
            | program.memory
        )
    return rows


def report(args: argparse.Namespace, command: str) -> None:
    """Checks everything, then compiles and writes.

    Raises:
      ValueError, OSError: what is wrong, in one sentence; before any long work.
    """
    check_plugin()
    attention.check(args.attention, args.dtype)
    jax.config.update("jax_platforms", "cpu")  # the plug-in is only to compile, also beside a GPU
    config, _ = bench.open_config(args.preset)
    if args.layers is not None:
        config = dataclasses.replace(config, num_layers=args.layers)
    shapes = random_weights.shapes(config, jnp.dtype(args.dtype))
    plans, asked = bench.plan(args, config, shapes), {label for label, _, _ in args.caches}
    for path, option in ((args.json, "--json"), (args.text, "--text")):
        if path is not None:
            files.check_target(path, option)
    rows: list[Row] = []
    document = {"command": command, "jax": jax.__version__, "target": args.target, "rows": rows}
    for prompt, planned in plans:
        prompts = bench.random_prompts(config, max(args.batch), prompt, args.seed)
        cases = [case for case in planned if asked & {"all", case.label}]
        for case, batch in itertools.product(cases, args.batch):
            program = compile_case(case, config, shapes, prompts[:batch], args)
            note(f"{case.label}, batch {batch}: compiled in {program.seconds:.1f} s")
            if args.text is not None:
                files.write(args.text, program.text.encode())
            steps = step_products(Transformer(config), shapes, prompts, case.decode, case.method)
            counted = case._replace(steps=steps)
            rows += describe(counted, config, program, prompts[:batch], args.target)
            if args.json is not None:
                files.write_json(args.json, document)
    print(bench_report.table(rows, COLUMNS))


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    return name, value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="gpu_program.py", description=__doc__, formatter_class=layout, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", default="llada-8b", help="preset or checkpoint directory [llada-8b]")
    add("--target", choices=sorted(CEILINGS), default="h200", help="the card [h200]")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="[bfloat16]"
    )
    add("--attention", choices=("cudnn", "xla"), default="cudnn", help="whose [cudnn]")
    add("--layers", type=bench.positive, metavar="N", help="take fewer layers; compiles faster")
    bench.add_work(add, prompt=512, gen=512, caches="dual")
    add("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    add("--text", type=Path, metavar="FILE", help="write the last program")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the compiler, beside those that the commands give; may be repeated",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        report(args, shlex.join(["python", "scripts/gpu_program.py", *given]))
    except (ValueError, OSError) as error:
        note(f"gpu_program.py: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
