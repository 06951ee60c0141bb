"""Which step shapes a generation goes through, where that is known before it begins.

A plan is a nest of runs: `(Repeat((Run(1, 1), Run(0, 31)), 16),)` is a step of the second shape and
31 of the first one, 16 times over. The loop makes it loops of known lengths, which need not ask
after every step what comes next.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Run(NamedTuple):
    """Steps of one shape."""

    shape: int
    """Its index among the method's step shapes."""
    count: int


class Repeat(NamedTuple):
    """A part of a plan, several times over."""

    parts: "Plan"
    count: int


Plan = tuple[Run | Repeat, ...]
"""One after the other; the empty plan says that nothing is known."""


def present(parts: Iterable[Run | Repeat]) -> Plan:
    """A plan of these parts, without those that have no step."""
    inside = (
        part if isinstance(part, Run) else part._replace(parts=present(part.parts))
        for part in parts
    )
    return tuple(part for part in inside if length((part,)))


def bodies(parts: Plan) -> int:
    """How many loop bodies there are, of which each is compiled by itself."""
    return sum(1 if isinstance(part, Run) else bodies(part.parts) for part in parts)


def length(parts: Plan) -> int:
    """How many steps a plan has."""
    inside = ((1 if isinstance(part, Run) else length(part.parts)) * part.count for part in parts)
    return sum(inside)


def shapes(parts: Plan) -> list[int]:
    """The shape of every step, one after the other."""
    found: list[int] = []
    for part in parts:
        once = [part.shape] if isinstance(part, Run) else shapes(part.parts)
        found += once * part.count
    return found
