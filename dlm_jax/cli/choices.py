"""From parsed options (`dlm_jax.cli.options`) to what a `DecodeConfig` is made of."""

import argparse
import inspect
from typing import Any

import numpy as np

from dlm_jax import tokenizer
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.models import Config

APART = ("gen_length", "infill", "suppress")
"""Options named like arguments of `DecodeConfig` that need more than to be handed on."""
STRATEGY_ARGS = {
    "klass": ("kl_threshold", "kl_history_length"),
    "wino": ("wide_in_thres", "narrow_out_thres"),
}
"""What --strategy-args may name for each strategy; fields of `DecodeConfig`."""


def overrides(args: argparse.Namespace, tok: Any) -> dict[str, Any]:
    """The arguments of `DecodeConfig` that options decide, `APART` apart; others are left out.

    Raises:
      ValueError: an argument that the strategy does not have, or a token that is none.
    """
    try:
        suppress = tuple(tokenizer.token_id(tok, text) for text in args.suppress)
    except ValueError as error:
        raise ValueError(f"--suppress: {error}") from error
    chosen = {name: getattr(args, name) for name in passed(args)}
    chosen |= dict(stop_until_eos=args.stop_at_eos or None, suppress=suppress or None)
    given = {name: value for name, value in chosen.items() if value is not None}
    return given | _strategy_args(args)


def passed(args: argparse.Namespace) -> list[str]:
    """The options that are arguments of `DecodeConfig` by the same name, `APART` apart."""
    arguments = inspect.signature(DecodeConfig).parameters
    return [name for name in arguments if name in args and name not in APART]


def _strategy_args(args: argparse.Namespace) -> dict[str, int | float]:
    """The arguments of --strategy-args, if they are the strategy's."""
    known = STRATEGY_ARGS.get(args.strategy)
    if known is None:
        return {}  # `DecodeConfig` refuses the strategy
    for name, value in args.strategy_args.items():
        if name not in known:
            raise ValueError(
                f"The strategy {args.strategy!r} has no argument {name!r}; it takes "
                f"{', '.join(known)}."
            )
        if type(value) not in (int, float) or not abs(value) < 2**31:
            raise ValueError(f"{name} is {value!r}; it must be a number.")
    # JSON does not tell 2.0 from 2.
    return {k: int(x) if x == int(x) else x for k, x in args.strategy_args.items()}


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
