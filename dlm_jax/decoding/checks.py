"""Which decoding settings are refused, and in which words.

Every refusal is a `ValueError` of one sentence that names the argument, its value and what would be
right. Numbers that are traced are taken as they are. What a strategy refuses, it says itself
(`strategies/`), and so does a cache method (`dlm_jax/cache/`).
"""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING

from dlm_jax.decoding import strategies
from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.decoding.schedule import SCHEDULES
from dlm_jax.decoding.settings import check_number, check_whole, positive
from dlm_jax.models import Config

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig


def check(decode: "DecodeConfig") -> None:
    """Refuses settings that have no meaning, by themselves or together."""
    _one_of("alg", decode.alg, ALGORITHMS)
    if decode.schedule is not None:
        _one_of("schedule", decode.schedule, SCHEDULES)
    _check_numbers(decode)
    _check_strategy(decode)
    _check_length(decode)


def check_model(decode: "DecodeConfig", config: Config) -> None:
    """Refuses a model that the decoding has no meaning for."""
    decode.strategy.check_model(config)
    ends = decode.ends_of_text(config)
    for name, ids in (("eos_id", ends), ("suppress", decode.suppress)):
        for token in ids:
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} has token id {token}; it must lie in 0 to {config.vocab_size - 1}."
                )
            if token == config.mask_id:
                raise ValueError(f"{name} has the mask token; it must be another one.")
    for first, behind in decode.unused:
        if not 0 <= first < behind <= config.vocab_size:
            raise ValueError(
                f"unused has the range {first} to {behind}; it must lie within the vocabulary, 0 "
                f"to {config.vocab_size}."
            )
    never = {*decode.suppress, *(id for part in decode.unused for id in range(*part))}
    if len(never - {config.mask_id}) >= config.vocab_size - 1:
        raise ValueError("suppress and unused have every token; leave some that can be predicted.")


def _check_numbers(decode: "DecodeConfig") -> None:
    for name in ("gen_length", "block_length", "steps", "num_transfer_tokens"):
        value = getattr(decode, name)
        optional = name in ("block_length", "steps")
        if not (isinstance(value, Integral) or (optional and value is None)) or value is True:
            raise ValueError(f"{name} is {value}; it must be a whole number.")
    check_whole("num_transfer_tokens", decode.num_transfer_tokens, 1)
    check_whole("step_shapes", decode.step_shapes, 1)
    for name in ("max_forwards", "top_k"):
        check_whole(name, getattr(decode, name), 1, optional=True)
    if not isinstance(decode.suppress, tuple) or not all(
        isinstance(token, Integral) for token in decode.suppress
    ):
        raise ValueError(f"suppress is {decode.suppress!r}; it must be a tuple of token ids.")
    if not isinstance(decode.unused, tuple) or not all(
        isinstance(part, tuple) and len(part) == 2 and all(isinstance(id, Integral) for id in part)
        for part in decode.unused
    ):
        raise ValueError(f"unused is {decode.unused!r}; it must be a tuple of pairs of token ids.")
    ends = decode.eos_id if isinstance(decode.eos_id, tuple) else (decode.eos_id,)
    if not ends or not (
        decode.eos_id is None
        or all(isinstance(token, Integral) and not isinstance(token, bool) for token in ends)
    ):
        raise ValueError(
            f"eos_id is {decode.eos_id!r}; it must be a token id, or a tuple of several."
        )
    if not 0.0 < decode.eps < 1.0:
        raise ValueError(f"eps is {decode.eps}; it must lie between 0 and 1.")
    check_number("top_p", decode.top_p, "lie in (0, 1]", above=0, most=1, optional=True)
    below_one = math.nextafter(1.0, 0.0)
    check_number("min_p", decode.min_p, "lie in [0, 1)", least=0, most=below_one, optional=True)
    for name in ("temperature", "alg_temp", "cfg_scale"):
        check_number(name, getattr(decode, name), "be 0 or above", least=0, optional=True)
    check_number("sigma", decode.sigma, "be above 0", above=0, most=math.inf, optional=True)
    check_number("clip_alpha", decode.clip_alpha, "be above 0", above=0, most=math.inf)


def _check_strategy(decode: "DecodeConfig") -> None:
    """What the strategy has no meaning with."""
    strategy = decode.strategy
    if decode.schedule == "capped" and not strategy.adaptive:
        rules = ", ".join(strategies.shorthands())
        raise ValueError(f"schedule is 'capped', which limits a rule; give one of {rules}.")
    if decode.schedule is not None and decode.schedule not in decode.schedules:
        raise ValueError(
            f"schedule is {decode.schedule!r}; with {strategy.spelling} it must be "
            f"{' or '.join(map(repr, decode.schedules))}, or left out."
        )
    drawn = positive(decode.alg_temp)
    if drawn and strategy.adaptive:
        raise ValueError(
            f"alg_temp is {decode.alg_temp}, which draws the positions of a step; with "
            f"{strategy.spelling} leave it out."
        )
    for name, given in (("sigma", decode.sigma is not None), ("alg_temp", drawn)):
        if given and not strategy.ranks:
            raise ValueError(
                f"{name} is {getattr(decode, name)}, but {strategy.spelling} ignores confidence; "
                "leave one of them out."
            )
    if decode.sigma is not None and decode.measure.negative:
        raise ValueError(
            f"alg is {decode.alg!r}, whose confidences are never above 0; sigma, which multiplies "
            "them, would favour what is least known, so take 'maskgit_plus' or 'topk_margin'."
        )
    strategy.check(decode)


def _check_length(decode: "DecodeConfig") -> None:
    """What the numbers of tokens, steps and forwards say together."""
    strategy = decode.strategy
    if decode.pace == "fixed" and decode.steps is not None:
        if decode.schedule is None:
            fewest = ", or set schedule='capped' to make them the fewest"
            raise ValueError(
                f"steps is {decode.steps}, but {strategy.spelling} decides how many tokens a step "
                f"commits; leave steps out{fewest if 'capped' in strategy.schedules else ''}."
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


def _one_of(name: str, value: str, table: Iterable[str]) -> None:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(table)}.")
