"""Decoding strategies by name. A new strategy is one module and one line in `STRATEGIES`."""

import dataclasses
from typing import TYPE_CHECKING, Any

from dlm_jax.decoding.table import Table

if TYPE_CHECKING:
    from dlm_jax.decoding.strategies.base import Rule, Strategy
    from dlm_jax.decoding.strategies.entropy_bound import EntropyBound
    from dlm_jax.decoding.strategies.factor import Factor
    from dlm_jax.decoding.strategies.klass import Klass
    from dlm_jax.decoding.strategies.origin import Origin
    from dlm_jax.decoding.strategies.random_order import Random
    from dlm_jax.decoding.strategies.surest import Surest
    from dlm_jax.decoding.strategies.threshold import Threshold
    from dlm_jax.decoding.strategies.wino import Wino

__all__ = [
    "STRATEGIES",
    "EntropyBound",
    "Factor",
    "Klass",
    "Origin",
    "Random",
    "Rule",
    "Strategy",
    "Surest",
    "Threshold",
    "Wino",
    "arguments",
    "make",
    "shorthands",
]

STRATEGIES: "Table[type[Strategy]]" = Table(
    __name__,
    {
        "surest": "surest.Surest",
        "threshold": "threshold.Threshold",
        "factor": "factor.Factor",
        "entropy-bound": "entropy_bound.EntropyBound",
        "klass": "klass.Klass",
        "wino": "wino.Wino",
        "random": "random_order.Random",
        "origin": "origin.Origin",
    },
)
"""Name -> class."""


def __getattr__(name: str) -> Any:
    return STRATEGIES.export(name, {"Strategy": "base.Strategy", "Rule": "base.Rule"})


def shorthands() -> "dict[str, type[Strategy]]":
    """Parameters of `DecodeConfig` that choose a strategy and give its only parameter."""
    return {s.shorthand: s for s in STRATEGIES.values() if s.shorthand is not None}


def arguments(name: str) -> tuple[str, ...]:
    """What `make` takes for a strategy: its fields; for one that narrows a rule, also the rule's.

    Raises:
      ValueError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy is {name!r}; it must be one of {', '.join(STRATEGIES)}.")
    fields = [field.name for field in dataclasses.fields(STRATEGIES[name])]
    if "rule" not in fields:
        return tuple(fields)
    return (*shorthands(), *(field for field in fields if field != "rule"))


def make(name: str, **given: Any) -> "Strategy":
    """A strategy by name.

    A strategy with a field `rule` takes the shorthand of one instead: `make("klass",
    threshold=0.9)`.

    Raises:
      ValueError: the name or an argument is unknown; what there is is listed.
    """
    known = arguments(name)
    for argument in given:
        if argument not in known and not (argument == "rule" and "rule" in _fields(name)):
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ValueError(f"The strategy {name!r} has no argument {argument!r}; {takes}.")
    own = {argument: given[argument] for argument in given if argument in _fields(name)}
    rules = {argument: given[argument] for argument in given if argument not in own}
    if rules:
        own["rule"] = by_shorthand(rules)
    missing = [argument for argument in _required(name) if argument not in own]
    if missing:
        raise ValueError(
            f"The strategy {name!r} needs {' and '.join(missing)}; give it as {missing[0]}=..."
        )
    return STRATEGIES[name](**own)


def by_shorthand(given: dict[str, Any]) -> "Strategy":
    """The strategy that a shorthand stands for.

    Raises:
      ValueError: there are several.
    """
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both given; one of them decides how many tokens a step "
            "commits."
        )
    ((argument, value),) = given.items()
    return shorthands()[argument](**{argument: value})


def _fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(STRATEGIES[name])}


def _required(name: str) -> list[str]:
    fields = _fields(name).values()
    return [field.name for field in fields if field.default is dataclasses.MISSING]
