"""Translates recorded likelihoods from the vocabularies of the originals into that of this library.

The counterpart of `golden_args.py` for cases that hold a log-likelihood instead of a generation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from golden_args import Unsupported

from dlm_jax.estimators import LikelihoodDraws
from dlm_jax.likelihood import LikelihoodConfig
from dlm_jax.models import Config


@dataclasses.dataclass(frozen=True)
class LikelihoodRun:
    """A case in this library's vocabulary."""

    config: LikelihoodConfig
    draws: LikelihoodDraws | None


def translate_likelihood(case: dict[str, Any], config: Config) -> LikelihoodRun:
    """A case's arguments as a configuration, and its recorded masks.

    Raises:
      Unsupported: naming the entry point, or the first argument, that has no counterpart.
      ValueError: the case lacks an argument, or one has an impossible value.
    """
    entry = case["source"]["entry"].split(" (", 1)[0]
    if entry not in _ENTRIES:
        raise Unsupported(f"entry point {entry}")
    read, known = _ENTRIES[entry]
    args = case["args"]
    unknown = sorted(set(args) - known)
    if unknown:
        raise Unsupported(f"{unknown[0]}={args[unknown[0]]}")
    for name in ("mask_id", "mask_token_id"):
        _only(args, name, (config.mask_id,))
    if case["prompt_mask"] is not None and not np.all(case["prompt_mask"]):
        # The originals take one row at a time and never pad.
        raise Unsupported("prompt_mask with padding")
    try:
        wanted = read(args)
        return LikelihoodRun(wanted, _draws(case, wanted))
    except KeyError as error:
        raise ValueError(f"argument {error} of {entry} is missing") from error


def _llada(args: dict[str, Any]) -> LikelihoodConfig:
    """`get_log_likelihood` of LLaDA."""
    batches = args["mc_num"] // args["batch_size"]
    return LikelihoodConfig(
        estimator="mc_count",
        mc_num=batches * args["batch_size"],  # the rest of the samples is never drawn
        batch_size=args["batch_size"],
        cfg_scale=args["cfg_scale"],
    )


def _dream_mc(args: dict[str, Any]) -> LikelihoodConfig:
    """`_eval_target_nll_mc` of Dream's evaluation."""
    _only(args, "nll_type", ("mc",))
    _unguided(args)
    batches = max(args["mc_num"] // args["batch_size"], 1)
    return LikelihoodConfig(
        estimator="mc_rate",
        log_type=args["log_type"],
        mc_num=batches * args["batch_size"],
        batch_size=args["batch_size"],
        eps=args["sampling_eps"],
    )


def _dream_ar(args: dict[str, Any]) -> LikelihoodConfig:
    """`_eval_target_nll_ar` of Dream's evaluation."""
    _only(args, "nll_type", ("ar_ftb", "ar_btf"))
    _unguided(args)
    return LikelihoodConfig(
        estimator=args["nll_type"], log_type=args["log_type"], batch_size=args["batch_size"]
    )


_DREAM = {"batch_size", "classifier_free_guidance", "log_type", "mask_token_id", "mc_num"}
_DREAM |= {"nll_type", "sampling_eps"}
_ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], LikelihoodConfig], set[str]]] = {
    "get_log_likelihood.get_log_likelihood": (
        _llada,
        {"batch_size", "cfg_scale", "mask_id", "mc_num"},
    ),
    "eval/eval.py Dream._eval_target_nll_mc": (_dream_mc, _DREAM),
    "eval/eval.py Dream._eval_target_nll_ar": (_dream_ar, _DREAM),
}
"""What a case's `source.entry` names -> how it is read, and the arguments that are known."""


def _draws(case: dict[str, Any], config: LikelihoodConfig) -> LikelihoodDraws | None:
    """The recorded masks, a list of positions per batch and copy; None where nothing is drawn."""
    if config.estimator.startswith("ar_"):
        return None
    rows, prompt = np.shape(case["prompt"])
    answer = len(case["answer"][0])
    if rows != 1:
        raise Unsupported(f"draws of {rows} rows")
    recorded = case["draws"]
    masked = np.zeros((1, len(recorded["masked"]), config.batch_size, prompt + answer), bool)
    for batch, copies in enumerate(recorded["masked"]):
        for copy, positions in enumerate(copies):
            masked[0, batch, copy, positions] = True
    if "p_mask" in recorded:
        return LikelihoodDraws(masked, np.asarray([recorded["p_mask"]], np.float32))
    counts = np.asarray([recorded["num_masked"]], np.float32)
    return LikelihoodDraws(masked, counts / np.float32(answer))


def _unguided(args: dict[str, Any]) -> None:
    """The original guides above 1 only, and then reads a setting that does not exist."""
    if args["classifier_free_guidance"] > 1:
        raise Unsupported(f"classifier_free_guidance={args['classifier_free_guidance']}")


def _only(args: dict[str, Any], name: str, values: tuple[Any, ...]) -> None:
    if args.get(name, values[0]) not in values:
        raise Unsupported(f"{name}={args[name]}")
