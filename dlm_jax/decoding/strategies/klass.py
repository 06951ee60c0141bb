"""KLASS (arXiv 2511.05664): only predictions that have become stable are committed in parallel.

A prediction is stable when its distribution, compared by Kullback-Leibler divergence with that of
the step before, hardly moved for `kl_history_length` steps. A rule then picks among the stable
ones; where it finds none, the surest are committed, stable or not.
"""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp

from dlm_jax import queries
from dlm_jax.decoding.rows import Proposal, Row
from dlm_jax.decoding.sampler import Distributions, Measure
from dlm_jax.decoding.settings import Number, check_number, check_whole, nested, number, settings
from dlm_jax.decoding.strategies.base import Rule, Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config
from dlm_jax.typing import Array, Bool, Float, Int

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig


class Moves(NamedTuple):
    """What is known about how the predictions of a row move, for all positions S of the canvas."""

    probability_SV: Float[Array, "S V"]
    """Of the last step; 0 before the first."""
    divergence_Sh: Float[Array, "S h"]
    """Of the last steps from the one before, in nats, the newest last."""


@settings
class Klass(Strategy):
    """Narrows what a rule finds sure to what is stable.

    Memory: `Moves`, of the last positions of the canvas, as far as any of them can be filled.

    Attributes:
      rule: the rule, such as `Threshold` or `Factor`.
      kl_threshold: a distribution is stable when its divergence from the one before was below this,
        in nats, ...
      kl_history_length: ... for so many steps.
    """

    rule: Rule = nested(Rule())
    kl_threshold: Number = number(0.01)
    kl_history_length: int = 2

    name: ClassVar[str] = "klass"
    schedules: ClassVar[tuple[str, ...]] = ("fixed",)
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.rule, Rule) and self.rule.by_confidence):
            raise ValueError(
                "strategy is 'klass', which narrows what a threshold or a factor finds sure; give "
                "one of these two."
            )
        check_number("kl_threshold", self.kl_threshold, "be above 0", above=0, most=float("inf"))
        check_whole("kl_history_length", self.kl_history_length, 1)

    def check(self, decode: "DecodeConfig") -> None:
        self.rule.check(decode)

    def init(self, config: Config, geo: Geometry) -> Moves:
        # As in the original, steps that never were count as stable.
        return Moves(
            jnp.zeros((geo.fillable, config.vocab_size), jnp.float32),
            jnp.zeros((geo.fillable, self.kl_history_length), jnp.float32),
        )

    def readable(self, row: Row, wanted_L: Bool[Array, " L"], geo: Geometry) -> Bool[Array, " L"]:
        # Every prediction is followed, also those of later blocks.
        return wanted_L | row.masked_L

    def read(
        self, measure: Measure, said: Distributions, there_W: Int[Array, " W"]
    ) -> Float[Array, "W V"]:
        del measure, there_W
        return said.tempered

    def choose(
        self, memory: Moves, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[Moves, Bool[Array, " L"]]:
        memory = followed(memory, proposal.kept, proposal.slot_W, geo.length)
        stable_L = proposal.candidate_L & stable(memory, self.kl_threshold, geo.length)
        count = self.rule.count(proposal, stable_L)
        found = count > 0
        among_L = jnp.where(found, stable_L, proposal.candidate_L)
        return memory, proposal.surest(jnp.where(found, count, row.least), among_L)


def followed(
    moves: Moves, log_p_WV: Float[Array, "W V"], slot_W: Int[Array, " W"], length: int
) -> Moves:
    """What is known after a step.

    Args:
      moves: what was known before.
      log_p_WV: the predictions that were read, as log-probabilities.
      slot_W: their slots; L marks an unused entry.
      length: L.

    A position that was not read has, as in the original, a uniform distribution. So it comes to
    rest while a cache leaves it out, and moves when it is computed again.
    """
    size, vocabulary = moves.probability_SV.shape
    place_W = jnp.where(slot_W < length, slot_W - (length - size), size)
    uniform_SV = jnp.full((size, vocabulary), 1.0 / vocabulary)
    p_SV = queries.scatter_row(uniform_SV, jnp.exp(log_p_WV), place_W)
    change_SV = jnp.log(p_SV + 1e-12) - jnp.log(moves.probability_SV + 1e-12)
    divergence_S1 = jnp.sum(p_SV * change_SV, axis=-1, keepdims=True)
    return Moves(p_SV, jnp.concatenate([moves.divergence_Sh[..., 1:], divergence_S1], axis=-1))


def stable(moves: Moves, kl_threshold: Float[Array, ""], length: int) -> Bool[Array, " L"]:
    """Positions whose prediction moved by less than `kl_threshold` in each of the last steps."""
    stable_S = jnp.all(moves.divergence_Sh < kl_threshold, axis=-1)
    return jnp.pad(stable_S, (length - len(stable_S), 0))
