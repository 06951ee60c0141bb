"""Which decoding settings are refused, and in which words.

Every refusal is a `ValueError` of one sentence that names the argument, its value and what would be
right. Numbers that are traced are taken as they are.
"""

import math
import operator
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from jax.core import Tracer

from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.decoding.schedule import SCHEDULES
from dlm_jax.models import Config

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig

RULES = ("threshold", "factor", "gamma")
"""Fields that let confidence decide how many tokens a step commits."""
STRATEGIES = ("klass", "wino")
"""Ways to decode that look beyond one step's confidences; each is a module of that name."""


def check(decode: "DecodeConfig") -> None:
    """Refuses settings that have no meaning, by themselves or together."""
    _one_of("alg", decode.alg, ALGORITHMS)
    if decode.schedule is not None:
        _one_of("schedule", decode.schedule, SCHEDULES)
    if decode.strategy is not None:
        _one_of("strategy", decode.strategy, STRATEGIES)
    _check_numbers(decode)
    _check_rule(decode)
    if not decode.measure.ranks:
        _check_unranked(decode)
    if decode.alg == "entropy":
        _check_negative(decode)
    if decode.strategy == "klass":
        _check_klass(decode)
    if decode.strategy == "wino":
        _check_wino(decode)
    _check_length(decode)


def check_model(decode: "DecodeConfig", config: Config) -> None:
    """Refuses a model that the decoding has no meaning for."""
    if decode.strategy == "wino" and config.shift:
        raise ValueError(
            "strategy is 'wino', which checks a token by predicting it at its own position; "
            f"{config.family} predicts it at the one before, so take another strategy."
        )
    for name, ids in (("eos_id", (decode.eos_id,)), ("suppress", decode.suppress)):
        for token in ids:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} has token id {token}; it must lie in 0 to {config.vocab_size - 1}."
                )
            if token == config.mask_id:
                raise ValueError(f"{name} has the mask token; it must be another one.")
    if len(set(decode.suppress)) >= config.vocab_size - 1:
        raise ValueError("suppress has every token; leave some that can be predicted.")


def concrete(value: Any) -> bool:
    """Whether something is given and known."""
    return value is not None and not isinstance(value, Tracer)


def positive(value: Any) -> bool:
    """Whether a number that 0 switches off is on; a traced one is."""
    return value is not None and (isinstance(value, Tracer) or bool(value > 0))


def _check_numbers(decode: "DecodeConfig") -> None:
    for name in ("gen_length", "block_length", "steps", "num_transfer_tokens", "kl_history_length"):
        value = getattr(decode, name)
        optional = name in ("block_length", "steps")
        if not (isinstance(value, Integral) or (optional and value is None)) or value is True:
            raise ValueError(f"{name} is {value}; it must be a whole number.")
    for name in ("num_transfer_tokens", "kl_history_length", "max_forwards", "top_k"):
        value = getattr(decode, name)
        if concrete(value) and _index(value) < 1:
            raise ValueError(f"{name} is {value}; it must be a whole number from 1 on.")
    if not isinstance(decode.suppress, tuple) or not all(
        isinstance(token, Integral) for token in decode.suppress
    ):
        raise ValueError(f"suppress is {decode.suppress!r}; it must be a tuple of token ids.")
    if not 0.0 < decode.eps < 1.0:
        raise ValueError(f"eps is {decode.eps}; it must lie between 0 and 1.")
    if concrete(decode.top_p) and not 0 < decode.top_p <= 1:
        raise ValueError(f"top_p is {decode.top_p}; it must lie in (0, 1].")
    for name in ("temperature", "alg_temp", "gamma", "cfg_scale"):
        value = getattr(decode, name)
        if concrete(value) and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be 0 or above.")
    for name in ("factor", "sigma", "clip_alpha", "kl_threshold"):
        value = getattr(decode, name)
        if concrete(value) and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0.")
    for name in ("threshold", "wide_in_thres", "narrow_out_thres"):
        value = getattr(decode, name)
        if concrete(value) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a confidence.")
    for name in ("clip_alpha", "kl_threshold", "wide_in_thres", "narrow_out_thres"):
        if getattr(decode, name) is None:
            raise ValueError(f"{name} is None; it must be a number.")


def _check_rule(decode: "DecodeConfig") -> None:
    given = _rules(decode)
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both given; one of them decides how many tokens a step "
            "commits."
        )
    if decode.schedule == "capped" and not decode.parallel:
        raise ValueError(
            f"schedule is 'capped', which limits a rule; give one of {', '.join(RULES)}."
        )
    if decode.schedule is not None and decode.schedule not in decode.schedules:
        raise ValueError(
            f"schedule is {decode.schedule!r}; with {_decider(decode)} it must be "
            f"{' or '.join(map(repr, decode.schedules))}, or left out."
        )
    if decode.draws_positions and decode.parallel:
        raise ValueError(
            f"alg_temp is {decode.alg_temp}, which draws the positions of a step; with "
            f"{_decider(decode)} leave it out."
        )


def _check_unranked(decode: "DecodeConfig") -> None:
    ranked = [*_rules(decode), *(["sigma"] if decode.sigma is not None else [])]
    ranked += ["alg_temp"] if decode.draws_positions else []
    ranked += [decode.strategy] if decode.strategy is not None else []
    if ranked:
        raise ValueError(
            f"alg is {decode.alg!r}, which ignores confidence; with {ranked[0]} it must be "
            f"one of {', '.join(name for name, m in ALGORITHMS.items() if m.ranks)}."
        )


def _check_negative(decode: "DecodeConfig") -> None:
    if concrete(decode.threshold) and decode.threshold > 0:
        raise ValueError(
            f"threshold is {decode.threshold}, but confidences of alg 'entropy' are never above 0; "
            "take alg 'maskgit_plus' or 'topk_margin'."
        )
    if decode.sigma is not None:
        raise ValueError(
            "alg is 'entropy', whose confidences are never above 0; sigma, which multiplies them, "
            "would favour what is least known, so take 'maskgit_plus' or 'topk_margin'."
        )


def _check_klass(decode: "DecodeConfig") -> None:
    if _rules(decode) not in (["threshold"], ["factor"]):
        raise ValueError(
            "strategy is 'klass', which narrows what a threshold or a factor finds sure; give "
            "one of these two."
        )


def _check_wino(decode: "DecodeConfig") -> None:
    other = [*_rules(decode), *(["cfg_scale"] if decode.guided else [])]
    other += ["infill"] if decode.infill else []
    if other:
        raise ValueError(
            f"strategy is 'wino', which has no meaning with {other[0]}; leave that out."
        )
    if not decode.measure.is_probability:
        raise ValueError(
            f"alg is {decode.alg!r}; the strategy 'wino' compares probabilities, so it must "
            "be 'low_confidence' or 'maskgit_plus'."
        )


def _check_length(decode: "DecodeConfig") -> None:
    """What the numbers of tokens, steps and forwards say together."""
    if decode.pace == "fixed" and decode.steps is not None:
        if decode.schedule is None:
            capped = ", or set schedule='capped' to make them the fewest"
            raise ValueError(
                f"steps is {decode.steps}, but {_decider(decode)} decides how many tokens a step "
                f"commits; leave steps out{capped if decode.strategy is None else ''}."
            )
        raise ValueError(
            f"steps is {decode.steps}, but the schedule 'fixed' counts tokens; leave steps out "
            "and set num_transfer_tokens."
        )
    if decode.pace != "fixed" and decode.num_transfer_tokens != 1:
        raise ValueError(
            f"num_transfer_tokens is {decode.num_transfer_tokens}, but the schedule "
            f"{decode.pace!r} counts steps; take the schedule 'fixed', or set steps."
        )
    if decode.infill and decode.steps is None and decode.pace != "fixed":
        raise ValueError(
            f"steps is None, but the schedule {decode.pace!r} does not know how many masks the "
            "prompt holds; set steps, or take the schedule 'fixed'."
        )
    if decode.stop_until_eos and not decode.leave_early:
        raise ValueError(
            "stop_until_eos ends a row early, but leave_early is False; set it to True."
        )
    if decode.gen_length == 0 and not decode.infill:
        raise ValueError(
            "gen_length is 0; it must be at least 1 unless infill=True has the masks of the "
            "prompt filled."
        )


def _rules(decode: "DecodeConfig") -> list[str]:
    return [name for name in RULES if getattr(decode, name) is not None]


def _decider(decode: "DecodeConfig") -> str:
    """What decides how many tokens a step commits, as an argument is written."""
    if decode.strategy is not None:
        return f"strategy={decode.strategy!r}"
    return next(iter(_rules(decode)), f"alg={decode.alg!r}")


def _index(value: Any) -> int:
    """A whole number; 0 for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return 0


def _one_of(name: str, value: str, table: Iterable[str]) -> None:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(table)}.")
