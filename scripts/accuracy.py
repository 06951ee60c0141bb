"""Measures what the cache methods cost in accuracy: held-out word problems solved with each.

    python scripts/accuracy.py --json accuracy.json
    python scripts/accuracy.py --models dream-tiny-math --caches dllm,d2cache --problems 100
    python scripts/accuracy.py --caches dllm --cache-args dream-tiny-math/dllm:kp=25+kr=2

The problems are those that `train_tiny.py --evaluate` draws. Each cache method is measured with its
default parameters, and with those that `--cache-args` adds, beside `none` with the same decoding:
one token per step, the surest one. A method that must know the order of the tokens in advance fills
them in a random one, and is compared with `none` in that order.

Standard output is a table in Markdown:

    correct    answers whose number after #### is right
    agreement  answers that are those of `none`, to the letter
    positions  query slots computed per generated token, mean over the layers
    waste      share of these slots that hold nothing the method asked for: padding of the prompts,
               and of a step to its compiled shape
    forwards   model forwards per batch
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from train_tiny import accuracy

from dlm_jax import DecodeConfig, cache, checkpoint, compilation, diffusion_generate, tokenizer
from dlm_jax.arithmetic import Problem, problems
from dlm_jax.cache import METHODS, CacheMethod, NoCache
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.cli import options
from dlm_jax.engine import check_rows
from dlm_jax.files import check_target, write_json

SUREST = "low_confidence"
BLOCK_LENGTH = 16


class Other(NamedTuple):
    """Parameters of a cache method to be measured beside its defaults."""

    model: str | None
    """None: all models."""
    name: str
    parameters: dict[str, Any]

    def concerns(self, model: str, name: str) -> bool:
        return self.name == name and self.model in (None, model)


class Trial(NamedTuple):
    """A model on one decoding and one cache method."""

    model: str
    decode: DecodeConfig
    cache: CacheMethod

    @property
    def label(self) -> str:
        """The method, and its parameters as far as they are set."""
        order = (
            " (random order)" if self.decode.strategy.ordered and self.cache == NoCache() else ""
        )
        parameters = dataclasses.asdict(self.cache).items()
        shown = [f"{name}={value}" for name, value in parameters if value is not None]
        return " ".join([self.cache.name + order, *shown])


class Outcome(NamedTuple):
    """What became of the problems."""

    texts: list[str]
    positions: float
    waste: float
    forwards: float
    tokens_per_forward: float
    answer: float
    """Tokens up to the end of the answer."""


def solve(
    opened: Checkpoint, rows: list[list[int]], trial: Trial, *, seed: int, batch: int
) -> Outcome:
    """Answers all prompts, in batches of one shape.

    A row's random order depends on the seed and its own number only.
    """
    config, gen_length = opened.config, trial.decode.gen_length
    # All are padded to the longest, so that every batch runs the same program.
    ids_NP, mask_NP = tokenizer.pad(rows, config.pad_id, bucket=1)
    count, batch = len(rows), min(batch, len(rows))
    texts, computed, asked, forwards, rates, lengths = [], [], [], [], [], []
    for low in range(0, count, batch):
        kept = min(batch, count - low)
        row_B = np.arange(low, low + batch) % count  # the last batch is filled up
        out = diffusion_generate(
            opened.params,
            opened.model,
            ids_NP[row_B],
            mask_NP[row_B],
            key=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(row_B)),
            decode=trial.decode,
            cache=trial.cache,
        )
        for ids in np.asarray(out.tokens)[:kept, -gen_length:]:
            texts.append(tokenizer.decode(opened.tokenizer, ids, config.eos_id))
            lengths.append(len(tokenizer.until_eos(ids, config.eos_id)))
        computed.append(np.asarray(out.positions_computed).sum(axis=0)[:kept])
        asked.append(np.asarray(out.positions_asked).sum(axis=0)[:kept])
        forwards.append(int(out.nfe))
        rates.append(np.asarray(out.tokens_per_forward)[:kept])
    slots = float(np.mean(np.concatenate(computed)))
    waste = 1.0 - float(np.mean(np.concatenate(asked))) / slots
    means = (float(np.mean(values)) for values in (forwards, np.concatenate(rates), lengths))
    return Outcome(texts, slots / gen_length, waste, *means)


def plan(args: argparse.Namespace, model: str, opened: Checkpoint) -> list[Trial]:
    """All trials of a model, each behind the one without a cache that it is compared with.

    Raises:
      ValueError: a parameter, or a method for this model and decoding, makes no sense.
    """
    surest = DecodeConfig(
        gen_length=args.gen_length, block_length=args.block_length or None, alg=SUREST
    )
    trials = [Trial(model, surest, NoCache())]
    for name in args.caches:
        others = (o.parameters for o in args.cache_args if o.concerns(model, name))
        for method in (cache.make(name, **parameters) for parameters in ({}, *others)):
            decode = surest.for_cache(method)
            method.check(opened.config, decode)
            for trial in (Trial(model, decode, NoCache()), Trial(model, decode, method)):
                if trial not in trials:
                    trials.append(trial)
    return trials


def measure(
    args: argparse.Namespace, drawn: list[Problem], opened: Checkpoint, trials: list[Trial]
) -> list[dict[str, Any]]:
    """Runs the trials of a model; returns a row of the table for each."""
    rows = encode(opened, drawn)
    without: dict[DecodeConfig, list[str]] = {}
    table = []
    for trial in trials:
        start = time.perf_counter()
        outcome = solve(opened, rows, trial, seed=args.seed, batch=args.batch)
        baseline = without.setdefault(trial.decode.strategy.name, outcome.texts)
        same = [text == other for text, other in zip(outcome.texts, baseline, strict=True)]
        correct = round(accuracy(drawn, outcome.texts) * len(drawn))
        table.append(
            dict(
                model=trial.model,
                cache=trial.cache.name,
                parameters=dataclasses.asdict(trial.cache),
                label=trial.label,
                alg=trial.decode.alg,
                strategy=trial.decode.strategy.name,
                correct=correct,
                total=len(drawn),
                accuracy=round(correct / len(drawn), 4),
                agreement=round(float(np.mean(same)), 4),
                positions_per_token=round(outcome.positions, 2),
                waste=round(outcome.waste, 4),
                forwards=round(outcome.forwards, 2),
            )
        )
        print(
            f"{trial.model}, {trial.label}: {correct} of {len(drawn)} "
            f"in {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return table


def encode(opened: Checkpoint, drawn: list[Problem]) -> list[list[int]]:
    """Token ids of the questions, each as a user's message."""
    return tokenizer.encode(opened.tokenizer, [p.question for p in drawn], chat=True)


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| model | cache | correct | | agreement | positions | waste | forwards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        lines.append(
            f"| {row['model']} | {row['label']} | {row['correct']}/{row['total']} "
            f"| {row['accuracy']:.1%} | {row['agreement']:.1%} | {row['positions_per_token']:.1f} "
            f"| {row['waste']:.1%} | {row['forwards']:g} |"
        )
    return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = make_parser(__doc__, caches=["all"], problems=500)
    parser.add_argument(
        "--cache-args",
        type=_others,
        action="extend",
        default=[],
        metavar="[MODEL/]NAME:K=V+K=V,...",
        help="parameters to try beside the defaults, for one model or all; may be repeated",
    )
    return parser.parse_args(argv)


def make_parser(description: str | None, *, caches: list[str], problems: int) -> options.Parser:
    """What every measurement on word problems asks for, with its own defaults."""
    parser = options.Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compilation.add_option(parser.add_argument)
    add = parser.add_argument
    add(
        "--models",
        type=options.names,
        default=checkpoint.embedded(),
        metavar="NAME,...",
        help="embedded models, or directories [all embedded]",
    )
    add(
        "--caches",
        type=options.names,
        default=caches,
        metavar="NAME,...",
        help=f"cache methods: all, or some of {', '.join(METHODS)} [{','.join(caches)}]",
    )
    add(
        "--problems",
        type=int,
        default=problems,
        metavar="N",
        help=f"held-out problems [{problems}]",
    )
    add("--seed", type=int, default=2026, metavar="N", help="of problems and orders [2026]")
    add("--gen-length", type=int, default=64, metavar="G", help="tokens to generate [64]")
    add(
        "--block-length",
        type=int,
        default=BLOCK_LENGTH,
        metavar="N",
        help=f"tokens per block; 0 makes one block of everything [{BLOCK_LENGTH}]",
    )
    add("--batch", type=int, default=50, metavar="B", help="problems per batch [50]")
    add("--json", type=Path, metavar="FILE", help="write the settings and the table as JSON")
    return parser


def check(args: argparse.Namespace) -> None:
    """Fills in the names of all methods, and refuses what cannot work.

    Raises:
      ValueError: one sentence.
    """
    for option, value in (("--problems", args.problems), ("--batch", args.batch)):
        if value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to {2**32 - 1}.")
    if args.caches == ["all"]:
        args.caches = list(METHODS)
    for other in args.cache_args:
        if other.name not in args.caches:
            raise ValueError(
                f"--cache-args has parameters of {other.name!r}, which is not among --caches."
            )
        if other.model not in (None, *args.models):
            raise ValueError(
                f"--cache-args has parameters for {other.model!r}, which is not among --models."
            )
    if args.json is not None:
        check_target(args.json, "--json")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    compilation.use_cache(args.compile_cache)
    try:
        compilation.check_devices()
        check(args)
        drawn = list(itertools.islice(problems(args.seed, "heldout"), args.problems))
        opened = {name: checkpoint.load(name) for name in args.models}
        trials = {name: plan(args, name, opened[name]) for name in args.models}
        for name in args.models:
            if not tokenizer.has_chat_template(opened[name].tokenizer):
                raise ValueError(f"{name} has no chat template; it must be a model that chats.")
            check_rows(encode(opened[name], drawn), opened[name].config, trials[name][0].decode)
        table = [
            row for name in args.models for row in measure(args, drawn, opened[name], trials[name])
        ]
        print(markdown(table))
        if args.json is not None:
            settings = ("problems", "seed", "gen_length", "block_length", "batch")
            write_json(
                args.json, {name: getattr(args, name) for name in settings} | {"rows": table}
            )
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}."
        print(f"accuracy: {sentence}", file=sys.stderr)
        return 2
    return 0


def _others(text: str) -> list[Other]:
    others = []
    for label, which, parameters in options.named_list(text):
        model, _, name = which.rpartition("/")
        if not name or not parameters:
            raise argparse.ArgumentTypeError(f"{label!r} is not of the form NAME:K=V+K=V")
        others.append(Other(model or None, name, parameters))
    return others


if __name__ == "__main__":
    sys.exit(main())
