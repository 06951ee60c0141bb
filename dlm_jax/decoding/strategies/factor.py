"""Factor decoding (Fast-dLLM, arXiv 2505.22618, theorem 1 turned into a rule)."""

import math
from typing import ClassVar

import jax.numpy as jnp

from dlm_jax import ranking
from dlm_jax.decoding.rows import Proposal
from dlm_jax.decoding.settings import Number, check_flag, check_number, number, settings
from dlm_jax.decoding.strategies.base import Rule
from dlm_jax.typing import Array, Bool, Float, Int


@settings
class Factor(Rule):
    """Commits the n surest candidates, n the largest with (n + 1)(1 - confidence) below `factor`.

    Attributes:
      factor: above 0; the confidence is that of the n-th.
      spare_last: leave out the least sure position where the rule would take all, as the d2Cache
        framework does by mistake.
    """

    factor: Number = number()
    spare_last: bool = False

    name: ClassVar[str] = "factor"
    shorthand: ClassVar[str | None] = "factor"
    by_confidence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("factor", self.factor, "be above 0", above=0, most=math.inf)
        check_flag("spare_last", self.spare_last)

    def count(self, proposal: Proposal, among_L: Bool[Array, " L"]) -> Int[Array, ""]:
        everything = jnp.sum(among_L, dtype=jnp.int32) - int(self.spare_last)
        return jnp.minimum(factored(proposal.confidence_L, among_L, self.factor), everything)


def factored(
    confidence_L: Float[Array, " L"], eligible_L: Bool[Array, " L"], factor: Float[Array, ""]
) -> Int[Array, ""]:
    """The number n up to which (n + 1)(1 - confidence of the n-th surest) stays below `factor`."""
    sorted_L = jnp.sort(jnp.where(eligible_L, confidence_L, -jnp.inf), descending=True)
    places_L = jnp.arange(2, sorted_L.shape[0] + 2, dtype=sorted_L.dtype)
    return ranking.leading(places_L * (1 - sorted_L) < factor)
