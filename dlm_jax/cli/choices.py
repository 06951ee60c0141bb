"""From parsed options (`dlm_jax.cli.options`) to what a `DecodeConfig` is made of."""

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlm_jax import tokenizer
from dlm_jax.decoding import strategies
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.models import Config

APART = ("gen_length", "infill", "suppress")
"""Options named like arguments of `DecodeConfig` that need more than to be handed on."""


def overrides(args: argparse.Namespace, tok: Any) -> dict[str, Any]:
    """The arguments of `DecodeConfig` that options decide, `APART` apart; others are left out.

    Raises:
      ValueError: an argument that the strategy does not have, or a token that is none.
    """
    suppress = _tokens("--suppress", args.suppress, tok)
    ends = _tokens("--eos", args.eos, tok)
    chosen = {name: getattr(args, name) for name in passed(args)}
    chosen |= dict(stop_until_eos=args.stop_at_eos or None)
    chosen |= dict(suppress=suppress or None, eos_id=ends or None)
    given = {name: value for name, value in chosen.items() if value is not None}
    return given if args.strategy is None else _with_strategy(given, args.strategy_args)


def _tokens(option: str, texts: Sequence[str], tok: Any) -> tuple[int, ...]:
    """The tokens that an option names, each once."""
    try:
        return tuple(dict.fromkeys(tokenizer.token_id(tok, text) for text in texts))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def passed(args: argparse.Namespace) -> list[str]:
    """The options that are arguments of `DecodeConfig` by the same name, `APART` apart."""
    arguments = inspect.signature(DecodeConfig).parameters
    return [name for name in arguments if name in args and name not in APART]


def _with_strategy(given: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with a strategy in place of its name, and of the rule that it narrows."""
    rules = {name: given[name] for name in strategies.shorthands() if name in given}
    for name in rules.keys() & arguments.keys():
        raise ValueError(f"{name} is given twice; leave it out of --strategy-args, or --{name}.")
    # JSON does not tell 2.0 from 2.
    whole = {name: int(x) for name, x in arguments.items() if type(x) is float and x.is_integer()}
    strategy = strategies.make(given["strategy"], **rules, **arguments | whole)
    rest = {name: value for name, value in given.items() if name not in rules}
    return rest | dict(strategy=strategy)


def token_freq(args: argparse.Namespace, config: Config, decode: DecodeConfig) -> np.ndarray | None:
    """The frequencies of --debias.

    Raises:
      ValueError, OSError: the decoding has no probabilities, or the file cannot be read.
    """
    if args.debias is None:
        return None
    if not decode.debiasable:
        right = [name for name, measure in ALGORITHMS.items() if measure.is_probability]
        raise ValueError(
            f"--debias calibrates probabilities, and alg {decode.alg!r} does not compare any; add "
            f"--alg {' or '.join(right)}."
        )
    return tokenizer.frequencies(args.debias, config.vocab_size)
