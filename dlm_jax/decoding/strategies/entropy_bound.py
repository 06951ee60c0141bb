"""The EB-Sampler (arXiv 2505.24857): commits what depends little on one another."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dlm_jax import ranking
from dlm_jax.decoding.rows import Proposal
from dlm_jax.decoding.sampler import Distributions, Measure
from dlm_jax.decoding.settings import Number, check_number, number, settings
from dlm_jax.decoding.strategies.base import Rule
from dlm_jax.typing import Array, Bool, Float, Int


@settings
class EntropyBound(Rule):
    """Commits the surest candidates as long as their entropies, the largest left out, are few.

    Attributes:
      gamma: what these sum up to at most, in nats; bounds the error of sampling independently.
    """

    gamma: Number = number()

    name: ClassVar[str] = "entropy-bound"
    shorthand: ClassVar[str | None] = "gamma"

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, "be 0 or above", least=0)

    def read(
        self, measure: Measure, said: Distributions, there_W: Int[Array, " W"]
    ) -> Float[Array, " W"]:
        del measure, there_W
        return entropy(said.tempered)

    def count(self, proposal: Proposal, among_L: Bool[Array, " L"]) -> Int[Array, ""]:
        entropy_L = proposal.place(proposal.kept, 0.0)
        return bounded(proposal.score_L, entropy_L, among_L, self.gamma)


def entropy(log_p: Float[Array, "*W V"]) -> Float[Array, "*W"]:
    """Entropy of distributions given by their logarithms, in nats."""
    p, eps = jnp.exp(log_p), jnp.finfo(jnp.float32).eps
    return -jnp.sum(p * jnp.log(jnp.clip(p, eps, 1 - eps)), axis=-1)


def bounded(
    score_L: Float[Array, " L"],
    entropy_L: Float[Array, " L"],
    eligible_L: Bool[Array, " L"],
    gamma: Float[Array, ""],
) -> Int[Array, ""]:
    """How many of the surest positions have entropies that, the largest left out, sum up to at most
    `gamma`."""
    place_L = ranking.rank(score_L, eligible_L)
    sorted_L = jnp.zeros_like(entropy_L).at[place_L].set(entropy_L, unique_indices=True)
    bound_L = jnp.cumsum(sorted_L) - jax.lax.cummax(sorted_L)
    within_L = jnp.arange(sorted_L.shape[0]) < jnp.sum(eligible_L)
    return ranking.leading(within_L & (bound_L <= gamma))
