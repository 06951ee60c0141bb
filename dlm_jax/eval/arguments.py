"""What lm-evaluation-harness hands over as strings, sorted into what dlm_jax knows."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from dlm_jax import cache as cache_lib
from dlm_jax.decoding import strategies
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.estimators import ESTIMATORS
from dlm_jax.likelihood import LikelihoodConfig
from dlm_jax.models import Config

_DECODE = inspect.signature(DecodeConfig).parameters.keys()
_LIKELIHOOD = {
    "estimator": "estimator",
    "log_type": "log_type",
    "mc_num": "mc_num",
    "mc_batch_size": "batch_size",
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of tokens."""
_NAMED = ("alg", "schedule", "strategy")
"""Arguments of `DecodeConfig` that are texts."""
_UNSUITED = {"infill": "prompts hold no masks", "max_forwards": "every answer must be complete"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is given of how to decode, to cache and to score; the rest is as in `defaults`.

    Attributes:
      cache: name of the cache method.
      cache_args: parameters of the method.
      decode: arguments of `DecodeConfig`; None takes back what the tables of `defaults` say.
      likelihood: arguments of `LikelihoodConfig`.

    Raises:
      ValueError: there is no such method, or not with these parameters; one sentence.
    """

    cache: str = "none"
    cache_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    likelihood: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        cache_lib.make(self.cache, **self.cache_args)

    def over(self, decode: Mapping[str, Any], likelihood: Mapping[str, Any]) -> "Settings":
        """These settings, and others as far as these have none of the same name."""
        return dataclasses.replace(
            self, decode={**decode, **self.decode}, likelihood={**likelihood, **self.likelihood}
        )


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """A whole number, which may be given as text.

    Raises:
      ValueError: it is none, or too small.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, float | bool) or number < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on.")
    return number


def yes_or_no(name: str, value: Any) -> bool:
    """A truth value, which may be given as text.

    Raises:
      ValueError: it is none.
    """
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
    return found


def sort_out(cache: str, named: Mapping[str, Any]) -> Settings:
    """What all settings together, by name, are about: decoding, cache method or likelihood.

    Beside arguments of `DecodeConfig`, decoding knows those of the strategy that is named. A name
    that decoding and cache method share means the decoding's; with `cache_` before it, any name
    means the method's.

    Raises:
      ValueError: no such method or setting, or a setting that evaluation has no use for.
    """
    if cache not in cache_lib.METHODS:
        raise ValueError(f"cache is {cache!r}; it must be one of {', '.join(cache_lib.METHODS)}.")
    own = {field.name for field in dataclasses.fields(cache_lib.METHODS[cache])}
    chosen = named.get("strategy")
    of_strategy = strategies.arguments(chosen) if isinstance(chosen, str) else ()
    decode, method, likelihood, strategy = {}, {}, {}, {}
    for name, value in named.items():
        if name in _UNSUITED:
            raise ValueError(f"{name} is not for evaluation: {_UNSUITED[name]}.")
        if name == "gen_length" and value is None:
            continue
        if name in _LIKELIHOOD:
            likelihood[_LIKELIHOOD[name]] = value
        elif name in _DECODE:
            if isinstance(value, str) and name not in _NAMED:
                raise ValueError(f"{name} is {value!r}; it must not be a text.")
            decode[name] = value
        elif name in of_strategy:
            strategy[name] = value
        elif name in own:
            method[name] = value
        elif name.removeprefix("cache_") in own:
            method[name.removeprefix("cache_")] = value
        else:
            raise ValueError(
                f"There is no setting {name!r}; settings are fields of DecodeConfig, such as "
                f"gen_length, and for the cache {cache}: {', '.join(sorted(own)) or 'none'}."
            )
    if strategy:
        # The rule that it narrows is one of its arguments.
        rules = [name for name in strategies.shorthands() if decode.get(name) is not None]
        strategy |= {name: decode.pop(name) for name in rules}
        decode["strategy"] = strategies.make(decode["strategy"], **strategy)
    return Settings(cache=cache, cache_args=method, decode=decode, likelihood=likelihood)


def estimate(config: Config, settings: Settings) -> LikelihoodConfig:
    """How likelihoods are estimated; guidance holds for them too, if the estimator has it.

    Raises:
      ValueError: settings that cannot work, in one sentence.
    """
    likelihood = settings.likelihood
    if "mc_num" in likelihood and "batch_size" not in likelihood:
        divisors = (n for n in range(LikelihoodConfig.batch_size, 0, -1))
        fitting = next(n for n in divisors if whole("mc_num", likelihood["mc_num"]) % n == 0)
        likelihood = {**likelihood, "batch_size": fitting}
    try:
        chosen = LikelihoodConfig.for_model(config, **likelihood)
    except ValueError as error:
        raise ValueError(str(error).replace("batch_size", "mc_batch_size")) from error
    guidance = settings.decode.get("cfg_scale")
    if guidance and ESTIMATORS[chosen.estimator].guided:
        chosen = dataclasses.replace(chosen, cfg_scale=guidance)
    return chosen


def wishes(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecodeConfig` that a task's generation arguments amount to."""
    fields: dict[str, Any] = {}
    lengths = [gen_kwargs[name] for name in _LENGTHS if gen_kwargs.get(name)]
    if lengths:
        fields["gen_length"] = int(lengths[0])
    if gen_kwargs.get("do_sample") is not False and float(gen_kwargs.get("temperature") or 0):
        fields["temperature"] = float(gen_kwargs["temperature"])
        if gen_kwargs.get("top_p"):
            fields["top_p"] = float(gen_kwargs["top_p"])
        if gen_kwargs.get("top_k"):
            fields["top_k"] = int(gen_kwargs["top_k"])
    return fields


def unknown(gen_kwargs: Mapping[str, Any]) -> set[str]:
    """Names of generation arguments that are neither wishes nor stop strings."""
    return gen_kwargs.keys() - {*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k"}


def stops(gen_kwargs: Mapping[str, Any]) -> list[str]:
    """The stop strings in a task's generation arguments."""
    until = gen_kwargs.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]
