"""Measures generation speed with each cache method, beside what its FLOPs promise.

    python scripts/bench.py --batch 1 4 --json bench.json
    python scripts/bench.py --caches dual,dllm:kp=100+rou=0.1 --gen-length 64

Every cache generates after the same random prompts, with random weights unless --preset names a
checkpoint. Programs are compiled ahead of time and run for a few forwards first; then each round
runs every cache once, so that whatever slows the machine for a while slows all of them. `none`
always runs, as the baseline. Times are medians over the rounds.

The predicted speed-up is a ratio of matrix-product FLOPs, counted in the jaxpr of each step shape
and summed over the forwards that really ran. Random weights attend to everything alike, so what
methods that choose by attention gain here is not what they gain on a trained model.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import cache as cache_lib
from dlm_jax import checkpoint, models
from dlm_jax.arguments import Call, prepare
from dlm_jax.cache import CacheMethod
from dlm_jax.cache.base import Variant
from dlm_jax.config import DecodeConfig
from dlm_jax.decode import GenerateOutput, _setup, diffusion_generate
from dlm_jax.models import Config, Transformer
from dlm_jax.state import DecodeState
from dlm_jax.step import begin, step
from dlm_jax.typing import Array, Params

FIRST_FORWARDS = 8
"""Of the run that warms a program up, and of the one that is traced."""
COLUMNS = (
    ("cache", "cache", "{}"),
    ("batch", "batch", "{}"),
    ("compile s", "compile_s", "{:.1f}"),
    ("seconds", "seconds", "{:.2f}"),
    ("ms/step", "ms_per_step", "{:.2f}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("positions/token", "positions_per_token", "{:.1f}"),
    ("waste", "waste", "{:.1%}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("predicted", "predicted_speedup", "{:.2f}"),
    ("ratio", "measured_to_predicted", "{:.2f}"),
)
"""Heading, key of the row, format."""

Run = Callable[..., tuple[GenerateOutput, float]]
"""A compiled generation, of at most so many forwards if told: its result and its seconds."""
Row = dict[str, Any]
"""What was measured of one cache at one batch size; an element of `rows` in the JSON file."""


class Case(NamedTuple):
    """A cache method to measure."""

    label: str
    method: CacheMethod
    decode: DecodeConfig
    flops: list[int]
    """What `step_flops` says."""


class Inputs(NamedTuple):
    """What all cases of a batch size share."""

    model: Transformer
    params: Params
    prompt_BP: np.ndarray
    key: Array


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products in a jaxpr: 2 M N K each, bodies of loops once per turn."""
    total = 0
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        values = jax.tree.leaves(list(eqn.params.values()))
        inner = [count_flops(value) for value in values if hasattr(value, "eqns")]
        if kind == "while" and any(inner):
            raise ValueError("A loop of unknown length holds matrix products; they have no number.")
        total += max(inner) if kind == "cond" else sum(inner) * eqn.params.get("length", 1)
    return total


def step_flops(inputs: Inputs, decode: DecodeConfig, method: CacheMethod) -> list[int]:
    """FLOPs per row of one step of each shape, in the order of the variants; computes nothing.

    Rows do not interact, so the first one tells the cost of all; `inputs.params` may be shapes.

    Raises:
      ValueError: the arguments do not fit each other.
    """
    model, params, prompt_BP, key = inputs
    call = prepare(params, model, prompt_BP[:1], None, key, decode, method)
    geo = decode.geometry(prompt=prompt_BP.shape[1], shift=model.config.shift)

    def first_step(call: Call, *, variant: Variant) -> DecodeState:
        setup, tokens_BL = _setup(call)
        return step(setup, begin(setup, tokens_BL), variant)  # no products before the step

    steps = [functools.partial(first_step, variant=variant) for variant in method.variants(geo)]
    return [count_flops(jax.make_jaxpr(one)(call).jaxpr) for one in steps]


def parse_caches(text: str) -> dict[str, CacheMethod]:
    """`name[:k=v+k=v],...` -> label -> method; `all` is every method, and `none` comes first."""
    labels = ["none"]
    for label in text.split(","):
        labels += cache_lib.METHODS if label == "all" else [label]
    return {label: _parse_cache(label) for label in labels}


def _parse_cache(label: str) -> CacheMethod:
    name, _, pairs = label.partition(":")
    fields = dataclasses.fields(cache_lib.METHODS[name]) if name in cache_lib.METHODS else ()
    kinds = {field.name: type(field.default) for field in fields if field.default is not None}
    arguments: dict[str, Any] = {}
    for pair in filter(None, pairs.split("+")):
        parameter, _, value = pair.partition("=")
        kind = kinds.get(parameter, str)
        try:
            arguments[parameter] = kind(value)
        except ValueError as error:
            raise ValueError(
                f"--caches holds {label!r}, where {parameter} is {value!r}; it must be of type "
                f"{kind.__name__}."
            ) from error
    return cache_lib.make(name, **arguments)


def open_config(preset: str) -> tuple[Config, Path | None]:
    """The configuration of a preset, or of a checkpoint with its directory; reads no weights."""
    if preset in models.PRESETS:
        return models.PRESETS[preset], None
    known = [*models.PRESETS, *checkpoint.embedded()]
    if preset not in known and not Path(preset).is_dir():
        raise ValueError(
            f"--preset is {preset!r}; it must be a checkpoint directory or one of "
            f"{', '.join(known)}."
        )
    directory = checkpoint.find(preset)
    return checkpoint.inspect(directory).config, directory


def make_decode(args: argparse.Namespace) -> DecodeConfig:
    """The even schedule for every family, so that all steps commit alike."""
    gen, block, per_step = args.gen_length, args.block_length, args.tokens_per_step
    if block % per_step:
        raise ValueError(
            f"--tokens-per-step is {per_step}; it must divide --block-length, {block}."
        )
    return DecodeConfig(gen_length=gen, block_length=block, steps=gen // per_step)


def suited(method: CacheMethod, config: Config, decode: DecodeConfig) -> DecodeConfig:
    """The decoding, with a random order if the method refuses one that depends on confidence.

    Drawing the order costs next to nothing, so one baseline serves both.
    """
    try:
        method.check(config, decode)
    except ValueError:
        decode = dataclasses.replace(decode, alg="random")
        method.check(config, decode)
    return decode


def random_prompts(config: Config, batch: int, length: int, seed: int) -> np.ndarray:
    """Token ids [B, P], none of them the mask."""
    ids_BP = np.random.default_rng(seed).integers(0, config.vocab_size - 1, (batch, length))
    return (ids_BP + (ids_BP >= config.mask_id)).astype(np.int32)


def initialiser(config: Config, dtype: np.dtype) -> Callable[[Array], Params]:
    """Key -> random parameters, made on the device in their final dtype."""
    model = Transformer(config, param_dtype=dtype)
    return jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def compile_ahead(inputs: Inputs, decode: DecodeConfig, method: CacheMethod) -> tuple[Run, float]:
    """A generation of at most so many forwards, and the seconds that compiling it took."""
    model, params, prompt_BP, key = inputs

    def generate(params: Params, prompt_BP: Array, key: Array, limit: Array) -> GenerateOutput:
        limited = dataclasses.replace(decode, max_forwards=limit)
        return diffusion_generate(params, model, prompt_BP, key=key, decode=limited, cache=method)

    start = time.perf_counter()
    program = jax.jit(generate).lower(params, prompt_BP, key, np.int32(1)).compile()
    seconds = time.perf_counter() - start

    def run(limit: int = np.iinfo(np.int32).max) -> tuple[GenerateOutput, float]:
        start = time.perf_counter()
        out = jax.block_until_ready(program(params, prompt_BP, key, np.int32(limit)))
        return out, time.perf_counter() - start

    return run, seconds


def measure(cases: Sequence[Case], inputs: Inputs, repeat: int) -> list[Row]:
    """Compiles all cases for one batch, warms them up and times them in turns; one row each."""
    programs = []
    for i, case in enumerate(cases, 1):
        run, seconds = compile_ahead(inputs, case.decode, case.method)
        _, first = run(FIRST_FORWARDS)
        programs.append((case, run, seconds))
        _note(
            f"batch {len(inputs.prompt_BP)}, {i}/{len(cases)} {case.label}: compiled in "
            f"{seconds:.1f} s, {FIRST_FORWARDS} forwards in {first:.2f} s"
        )
    rounds = []
    for i in range(repeat):
        rounds.append([run() for _, run, _ in programs])
        _note(f"batch {len(inputs.prompt_BP)}, round {i + 1}/{repeat} done")
    rows = [
        describe(case, jax.device_get(done[0][0]), compile_s, [seconds for _, seconds in done])
        for (case, _, compile_s), done in zip(programs, zip(*rounds, strict=True), strict=True)
    ]
    return [compare(row, rows[0]) for row in rows]


def describe(case: Case, out: GenerateOutput, compile_s: float, seconds: Sequence[float]) -> Row:
    """What one case did: its times, the positions it computed and its FLOPs."""
    batch, gen, nfe = len(out.tokens), case.decode.gen_length, int(out.nfe)
    slots_T = np.asarray(out.positions_computed[:nfe, 0])
    computed, asked = float(slots_T.sum()), float(out.positions_asked[:nfe].mean(axis=1).sum())
    median = statistics.median(seconds)
    sizes, counts = np.unique(slots_T, return_counts=True)
    return {
        "cache": case.label,
        "batch": batch,
        "alg": case.decode.alg,
        "compile_s": compile_s,
        "seconds": median,
        "seconds_all": list(seconds),
        "forwards": nfe,
        "forwards_by_positions": dict(zip(map("{:g}".format, sizes), counts.tolist(), strict=True)),
        "ms_per_step": 1e3 * median / nfe,
        "tokens_per_s": batch * gen / median,
        "positions_per_token": computed / gen,
        "waste": (computed - asked) / computed,
        "gflop_per_token": sum(case.flops[variant] for variant in out.variant[:nfe]) / gen / 1e9,
    }


def compare(row: Row, baseline: Row) -> Row:
    """The row with its speed-up over the baseline, measured and predicted from FLOPs."""
    speedup = baseline["seconds"] / row["seconds"]
    predicted = baseline["gflop_per_token"] / row["gflop_per_token"]
    return row | dict(
        speedup=speedup, predicted_speedup=predicted, measured_to_predicted=speedup / predicted
    )


def profile(case: Case, inputs: Inputs, directory: Path) -> None:
    """Writes a profiler trace of the first few steps of a case."""
    run, _ = compile_ahead(inputs, case.decode, case.method)
    run(FIRST_FORWARDS)
    with jax.profiler.trace(directory):
        run(FIRST_FORWARDS)
    _note(f"traced {FIRST_FORWARDS} forwards of {case.label}, batch {len(inputs.prompt_BP)}")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text under their headings."""
    cells = [[heading for heading, _, _ in COLUMNS]]
    cells += [[form.format(row[key]) for _, key, form in COLUMNS] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(first), *map(str.rjust, numbers, others)]) for name, *numbers in cells
    )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes under another name and moves the file into place when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage that --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^32 - 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="bench.py", description=__doc__, formatter_class=layout, allow_abbrev=False
    )
    add, positive = parser.add_argument, functools.partial(_whole, least=1)
    add("--preset", default="bench-60m", help="preset, embedded model or checkpoint directory")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
    add("--batch", type=positive, nargs="+", default=[1], metavar="B", help="batch sizes")
    add("--prompt-length", type=positive, default=128, metavar="P")
    add("--gen-length", type=positive, default=256, metavar="G")
    add("--block-length", type=positive, default=32, metavar="N")
    add("--tokens-per-step", type=positive, default=1, metavar="N")
    add("--caches", default="all", metavar="LIST", help="name[:k=v+k=v],... or all")
    add("--repeat", type=positive, default=3, metavar="N", help="timed runs of each cache")
    add("--seed", type=_whole, default=0, metavar="N", help="of weights and prompts")
    add("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    add("--profile", type=Path, metavar="DIR", help="write a trace of the last cache's first steps")
    return parser.parse_args(argv)


def check_json(path: Path) -> None:
    """Refuses a target that cannot be written."""
    usable = path.is_file() or not (path.exists() or path.is_symlink())
    if not (usable and path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise ValueError(f"--json is {path}; it must be a file in a writable directory.")


def bench(args: argparse.Namespace, command: str) -> None:
    """Checks everything, then measures and writes.

    Raises:
      ValueError, OSError: what is wrong, in one sentence; before any long work.
    """
    config, directory = open_config(args.preset)
    model, dtype, decode = Transformer(config), jnp.dtype(args.dtype), make_decode(args)
    methods = parse_caches(args.caches)
    decodes = [suited(method, config, decode) for method in methods.values()]
    if args.json is not None:
        check_json(args.json)
    if args.profile is not None:
        args.profile.mkdir(parents=True, exist_ok=True)
    init, key = initialiser(config, dtype), jax.random.key(args.seed)
    shapes = jax.eval_shape(init, key)
    prompts = [random_prompts(config, batch, args.prompt_length, args.seed) for batch in args.batch]
    first = Inputs(model, shapes, prompts[0], key)
    cases = [
        Case(label, method, own, step_flops(first, own, method))
        for (label, method), own in zip(methods.items(), decodes, strict=True)
    ]

    params = checkpoint.load(directory, dtype=dtype).params if directory else init(key)
    names = ("preset", "prompt_length", "gen_length", "block_length", "tokens_per_step")
    document: dict[str, Any] = {
        "command": command,
        "device": jax.devices()[0].device_kind,
        "host_cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "dtype": args.dtype,
        "shapes": {name: getattr(args, name) for name in names}
        | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes))},
        "rows": [],
    }
    batches = [Inputs(model, params, prompt_BP, key) for prompt_BP in prompts]
    for inputs in batches:
        document["rows"] += measure(cases, inputs, args.repeat)
        if args.json is not None:
            write_json(args.json, document)
    print(table(document["rows"]))
    if args.profile is not None:
        profile(cases[-1], batches[-1], args.profile)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        bench(args, shlex.join(["python", "scripts/bench.py", *given]))
    except (ValueError, OSError) as error:
        _note(f"bench.py: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
