"""Scores and speed of a model with one cache method or several, by lm-evaluation-harness.

    python -m dlm_jax.evaluate --limit 64 --compare none,dual,d2cache
    python -m dlm_jax.evaluate --model DIR --tasks gsm8k --cache dual --threshold 0.9 --output DIR

Without --tasks and --model, the embedded model solves the word problems that come with the package.
The table goes to standard output and everything else to standard error. A value that cannot work
ends the command with one sentence and exit status 2, before the weights are read.

This module knows the options and imports nothing that takes time; `dlm_jax.eval.evaluation` does
the work.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm_jax import compilation, files
from dlm_jax.cli import options

PROGRAM = "dlm-jax-evaluate"
TASK = "tiny_math"
"""The task that is run without --tasks."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    return options.command(PROGRAM, functools.partial(_prepare, args), memory="lower --batch-size")


def _prepare(args: argparse.Namespace) -> Callable[[], None]:
    check(args)

    from dlm_jax import distributed

    if args.distributed or args.coordinator is not None:
        distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    compilation.check_devices()
    compilation.use_cache(args.compile_cache)

    from dlm_jax.eval.evaluation import Evaluation

    evaluation = distributed.together(lambda: Evaluation.prepare(args))
    return functools.partial(distributed.or_leave, evaluation.run)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = options.Parser(
        prog=PROGRAM,
        description="Scores and speed of a masked diffusion language model with one cache method "
        "or several, by lm-evaluation-harness. The table goes to standard output, everything else "
        "to standard error. Without arguments the embedded model solves word problems.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    options.add_model(add)
    add(
        "--variant",
        metavar="NAME",
        help="base, inst or 1.5, on which the papers' settings depend [by the model's name]",
    )

    add = parser.add_argument_group("tasks").add_argument
    add(
        "--tasks",
        type=options.names,
        default=[TASK],
        metavar="NAME,...",
        help=f"tasks of this package or of lm-evaluation-harness [{TASK}]",
    )
    add("--limit", type=_limit, metavar="N", help="samples per task; below 1, a share of them")
    add("--num-fewshot", type=options.whole, metavar="N", help="examples [as the task does]")
    add(
        "--task-seed",
        type=options.seed,
        default=42,
        metavar="N",
        help="seed of what is random in tasks, such as the choice of examples [42]",
    )
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts as a conversation [if the variant is inst and there is a chat template]",
    )
    add(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="examples as earlier turns of the conversation [yes]",
    )
    add("--system", metavar="TEXT", help="system message of the conversation")
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin prompts with the beginning-of-text token, if there is one [yes]",
    )
    add("--include-path", type=Path, metavar="DIR", help="a folder with more tasks, as YAML")
    add(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that the model writes, on this machine, to score them",
    )

    add = parser.add_argument_group("cache").add_argument
    options.add_cache(add)
    add(
        "--compare",
        type=options.named_list,
        metavar="NAME,...",
        help="several caches on the same samples, as none,dual,d2cache:rollout_p=0.2+sigma=0",
    )

    task = "as the task does, see docs/evaluation.md"
    options.add_decoding(
        parser.add_argument_group("decoding").add_argument, gen_length=task, otherwise=task
    )
    add = parser.add_argument_group("how many tokens a step commits").add_argument
    options.add_pace(add, otherwise="one token")
    add = parser.add_argument_group("which tokens a step commits").add_argument
    options.add_order(add, otherwise=task)

    add = parser.add_argument_group("likelihoods").add_argument
    add("--estimator", metavar="NAME", help="mc_count, mc_rate, ar_ftb or ar_btf [by the family]")
    add("--log-type", metavar="NAME", help="ftb, btf or union: what is scored given what [ftb]")
    add("--mc-num", type=options.whole, metavar="N", help="Monte Carlo samples [128]")
    add("--mc-batch-size", type=options.whole, metavar="N", help="of them at a time [16]")
    add(
        "--check-greedy",
        action="store_true",
        help="also generate, to tell if a continuation is what the model would say",
    )

    add = parser.add_argument_group("devices").add_argument
    add(
        "--batch-size",
        type=options.whole,
        default=1,
        metavar="N",
        help="samples that every part of the mesh's data axis decodes at a time [1]",
    )
    add(
        "--mesh",
        metavar="data=N,model=M",
        help="divide the batch into N parts and the parameters into M [data: all devices]",
    )
    add(
        "--distributed",
        action="store_true",
        help="be one of several processes that SLURM or Open MPI has started",
    )
    add("--coordinator", metavar="HOST:PORT", help="be one of several processes, led by this one")
    add("--num-processes", type=options.whole, metavar="N", help="how many there are")
    add("--process-id", type=options.whole, metavar="I", help="which one this is, from 0")

    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write results.json, samples, pareto.png, and responses as they come, from which a "
        "run that was killed goes on",
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other.

    Raises:
      ValueError: one sentence.
    """
    options.check(args)
    if args.compare is not None and (args.cache != "none" or args.cache_args):
        raise ValueError(
            "--compare names the caches, with their arguments as in dual:block_length=32; leave "
            "--cache and --cache-args out."
        )
    cluster = (args.coordinator, args.num_processes, args.process_id)
    if any(given is not None for given in cluster) and None in cluster:
        raise ValueError("--coordinator, --num-processes and --process-id go together; give all.")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num-fewshot is {args.num_fewshot}; it must be 0 or more.")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1.")
    if args.output is not None:
        files.check_folder(args.output, "--output")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"{args.include_path} is no folder; --include-path must name one.")
    for module in ("lm_eval", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{module} is not installed; evaluation needs the extra eval: pip install "
                "'dlm-jax[eval]'."
            )


def _limit(text: str) -> int | float:
    value = options.number(text)
    if value <= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor a share")
    return int(value) if value >= 1 else value


if __name__ == "__main__":
    sys.exit(main())
