"""Measures generation speed with each cache method, beside what the device could do at best.

    python scripts/bench.py --batch 1 4 --json bench.json --plot bench.png
    python scripts/bench.py --caches dual,dllm:kp=100+rou=0.1 --gen-length 64 128
    python scripts/bench.py --preset llada-8b --prompt-length 512 --gen-length 512 --dry-run

Every cache generates after the same random prompts, with random weights unless --preset names a
checkpoint. Programs are compiled ahead of time and run for a few forwards first; then each round
runs every cache once, so that whatever slows the machine for a while slows all of them. `none`
always runs, as the baseline. Times are medians over the rounds. A round of a program is a whole
generation, a run of its first forward only and a run of none; `bench_report.describe` says how the
time of a full forward and of a cached step follow from these three. What the host does once per run
is therefore in the seconds and tokens/s, but not in the time of a forward.

The predicted speed-up is a ratio of matrix-product FLOPs, counted in the jaxpr of each step shape
and summed over the forwards that really ran; the limit is the least time these forwards can take
(`roofline.py`). Random weights attend to everything alike, so what methods that choose by attention
gain here is not what they gain on a trained model.

--dry-run compiles the same programs for shapes alone and says what they need; no weights are made.
"""

import argparse
import functools
import itertools
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_report
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
from bench_report import COUNTED, MEASURED, Case, Row, compare_all
from bench_run import Inputs, dry_run, measure, note, profile
from roofline import Ceilings, step_products

from dlm_jax import cache as cache_lib
from dlm_jax import checkpoint, compilation, files, models
from dlm_jax.cache import CacheMethod
from dlm_jax.cli.options import Named, Parser, check_picture, named_list
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.start import start
from dlm_jax.models import Config, Transformer
from dlm_jax.typing import Params

ALIASES = {"llada-8b": "llada-8b-instruct", "dream-7b": "dream-v0-instruct-7b"}
"""Short names of presets."""
LARGE = 10**9
"""Models of so many parameters are measured in bfloat16 unless the user says otherwise."""
H200 = Ceilings(flops=790e12, bytes=4.3e12)
"""Measured on such a card in bfloat16: what a dry run assumes."""


# --- what is measured -----------------------------------------------------------------------------


def make_caches(asked: Sequence[Named]) -> dict[str, CacheMethod]:
    """Methods by label; `all` is every method with its defaults, and `none` comes first.

    Raises:
      ValueError: there is no such method, or not with these arguments.
    """
    methods: dict[str, CacheMethod] = {"none": cache_lib.make("none")}
    for label, name, arguments in asked:
        if label == "all":
            methods |= {name: cache_lib.make(name) for name in cache_lib.METHODS}
        else:
            methods[label] = cache_lib.make(name, **arguments)
    return methods


def open_config(preset: str) -> tuple[Config, Path | None]:
    """The configuration of a preset, or of a checkpoint with its directory; reads no weights."""
    name = ALIASES.get(preset, preset)
    if name in models.PRESETS:
        return models.PRESETS[name], None
    known = [*ALIASES, *models.PRESETS, *checkpoint.embedded()]
    if preset not in known and not Path(preset).is_dir():
        raise ValueError(
            f"--preset is {preset!r}; it must be a checkpoint directory or one of "
            f"{', '.join(known)}."
        )
    directory = checkpoint.find(preset)
    return checkpoint.inspect(directory).config, directory


def make_decode(gen: int, block: int, per_step: int, shapes: int) -> DecodeConfig:
    """The even schedule for every family, so that all steps commit alike."""
    if block % per_step:
        raise ValueError(
            f"--tokens-per-step is {per_step}; it must divide --block-length, {block}."
        )
    return DecodeConfig(
        gen_length=gen, block_length=block, steps=gen // per_step, step_shapes=shapes
    )


def random_prompts(config: Config, batch: int, length: int, seed: int) -> np.ndarray:
    """Token ids [B, P], none of them the mask."""
    ids_BP = np.random.default_rng(seed).integers(0, config.vocab_size - 1, (batch, length))
    return (ids_BP + (ids_BP >= config.mask_id)).astype(np.int32)


def plan(args: argparse.Namespace, config: Config, shapes: Params) -> list[tuple[int, list[Case]]]:
    """Prompt length and cases, products still to be counted, for each pair of lengths.

    Raises:
      ValueError: settings that do not fit each other.
    """
    methods, plans = make_caches(args.caches), []
    most = args.step_shapes or DecodeConfig.for_model(config).step_shapes
    for prompt, gen in itertools.product(args.prompt_length, args.gen_length):
        decode, cases = make_decode(gen, args.block_length, args.tokens_per_step, most), []
        prompt_1P = random_prompts(config, 1, prompt, args.seed)
        for label, method in methods.items():
            # Drawing an order costs next to nothing, so one baseline serves both.
            own = decode.for_cache(method)
            check = functools.partial(
                start,
                model=Transformer(config),
                prompt_BP=prompt_1P,
                key=jax.random.key(0),
                decode=own,
                cache=method,
            )
            jax.eval_shape(check, shapes)
            cases.append(Case(label, method, own, []))
        plans.append((prompt, cases))
    return plans


def needed_bytes(
    config: Config, shapes: Params, plans: Sequence[tuple[int, list[Case]]], batch: int
) -> int:
    """Of the parameters and the largest cache: less than any run takes."""
    dtype = jax.tree.leaves(shapes)[0].dtype
    caches = [
        jax.eval_shape(functools.partial(case.method.init_cache, Transformer(config), geo, dtype))
        for prompt, cases in plans
        for case in cases
        for geo in [case.decode.geometry(prompt=prompt, shift=config.shift)]
    ]
    # XLA's CPU backend multiplies halves as float32, and keeps such a copy of every kernel.
    copies = 3 if jax.default_backend() == "cpu" and dtype.itemsize == 2 else 1
    return copies * _bytes(shapes) + batch * max(map(_bytes, caches))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- the command ----------------------------------------------------------------------------------


def bench(args: argparse.Namespace, command: str) -> None:
    """Checks everything, then measures and writes.

    Raises:
      ValueError, OSError: what is wrong, in one sentence; before any long work.
    """
    compilation.check_devices()
    compilation.use_cache(args.compile_cache)
    config, directory = open_config(args.preset)
    dtype = choose_dtype(args.dtype, config)
    shapes = random_weights.shapes(config, dtype)
    plans = plan(args, config, shapes)
    check_outputs(args)
    if not args.dry_run:
        check_memory(needed_bytes(config, shapes, plans, max(args.batch)), args.preset, dtype)
    model, key = Transformer(config), jax.random.key(args.seed)
    if args.dry_run:
        params = shapes
    elif directory is not None:
        params = checkpoint.load(directory, dtype=dtype).params
    else:
        params = jax.block_until_ready(random_weights.make(config, dtype, key))

    rows: list[Row] = []
    document: dict[str, Any] = {
        "command": command,
        "device": None if args.dry_run else jax.devices()[0].device_kind,
        "host_cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "preset": args.preset,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        "dtype": dtype.name,
        "ceilings_measured": not (args.ceilings or args.dry_run),
        "rows": rows,
    }
    same = {name: getattr(args, name) for name in ("block_length", "tokens_per_step")}
    for prompt, planned in plans:
        prompts = random_prompts(config, max(args.batch), prompt, args.seed)
        cases = [
            case._replace(steps=step_products(model, shapes, prompts, case.decode, case.method))
            for case in planned
        ]
        for batch in args.batch:
            inputs = Inputs(model, params, prompts[:batch], key)
            if args.dry_run:
                done = dry_run(cases, inputs, args.ceilings or H200)
            else:
                done = compare_all(measure(cases, inputs, args.repeat, args.ceilings))
            for row in done:
                rows.append(row | {"prompt_length": prompt, "dtype": dtype.name} | same)
                if args.json is not None:  # after every row: the whole may take long
                    files.write_json(args.json, document)
    print(bench_report.table(rows, COUNTED if args.dry_run else MEASURED))
    if args.plot is not None:
        title = f"{args.preset}, {dtype.name}, on {document['device']}"
        bench_report.draw(rows, title, args.plot)
    if args.profile is not None:
        for _ in profile(cases[-1], inputs, args.profile):
            pass  # it says itself what it has traced


def choose_dtype(name: str | None, config: Config) -> np.dtype:
    """What the user says; else float32 on a CPU, bfloat16 for large models and on other devices."""
    size = sum(map(math.prod, models.param_shapes(config).values()))
    small = size < LARGE and jax.default_backend() == "cpu"
    return jnp.dtype(name or ("float32" if small else "bfloat16"))


def check_memory(needed: int, preset: str, dtype: np.dtype) -> None:
    """Refuses what is larger than the memory of the device."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > limit:
        raise ValueError(
            f"Parameters and cache of {preset} in {dtype.name} take {needed / 2**30:.1f} GiB, and "
            f"the device has {limit / 2**30:.1f} GiB; take less, or --dry-run."
        )


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses targets that cannot be written, or not by this run."""
    if args.dry_run and (args.plot or args.profile):
        raise ValueError("--dry-run measures nothing; leave --plot and --profile out.")
    if args.json is not None:
        files.check_target(args.json, "--json")
    if args.plot is not None:
        check_picture(args.plot, "--plot")
    if args.profile is not None:
        files.check_folder(args.profile, "--profile")


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^32 - 1")
    return int(text)


positive = functools.partial(_whole, least=1)


def _ceilings(text: str) -> Ceilings:
    try:
        tera = [float(part) for part in text.split(",")]
    except ValueError:
        tera = []
    if len(tera) != 2 or not all(0 < rate < math.inf for rate in tera):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers, as in 790,4.3")
    return Ceilings(flops=1e12 * tera[0], bytes=1e12 * tera[1])


def add_work(add: Callable[..., Any], *, prompt: int, gen: int, caches: str) -> None:
    """Adds what `plan` reads: lengths, batches and cache methods, with these defaults."""
    some = dict(type=positive, nargs="+")
    add("--batch", **some, default=[1], metavar="B", help="batch sizes [1]")
    add("--prompt-length", **some, default=[prompt], metavar="P", help=f"lengths [{prompt}]")
    add("--gen-length", **some, default=[gen], metavar="G", help=f"tokens to generate [{gen}]")
    add("--block-length", type=positive, default=32, metavar="N", help="tokens per block [32]")
    add("--tokens-per-step", type=positive, default=1, metavar="N", help="tokens per step [1]")
    add(
        "--caches",
        type=named_list,
        default=caches,
        metavar="NAME[:K=V+K=V],...",
        help=f"cache methods with arguments of their own, or all [{caches}]",
    )
    add("--step-shapes", type=positive, metavar="N", help="compiled at most [as the commands do]")
    add("--seed", type=_whole, default=0, metavar="N", help="of weights and prompts [0]")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="bench.py", description=__doc__, formatter_class=layout, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", default="bench-60m", help="preset, embedded model or checkpoint directory")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters [float32 for small models on a CPU, else bfloat16]",
    )
    add_work(add, prompt=128, gen=256, caches="all")
    add("--repeat", type=positive, default=3, metavar="N", help="rounds [3]")
    add("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw speed-ups and shares of the limit")
    add("--profile", type=Path, metavar="DIR", help="write traces of two steps of the last cache")
    compilation.add_option(parser.add_argument)
    add("--dry-run", action="store_true", help="compile for shapes and count; make no weights")
    add(
        "--ceilings",
        type=_ceilings,
        metavar="TFLOPS,TBPS",
        help="of the device [measured; an H200's, 790,4.3, in a dry run]",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        bench(args, shlex.join(["python", "scripts/bench.py", *given]))
    except (ValueError, OSError) as error:
        note(f"bench.py: {' '.join(str(error).split())}")
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        note("bench.py: Not enough memory; take smaller batches or shorter sequences.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
