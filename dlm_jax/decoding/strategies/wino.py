"""WINO (arXiv 2507.18578), wide in and narrow out: commits boldly, revokes what turns out wrong.

Behind the canvas stands a shadow of the row's block (`dlm_jax/decoding/shadow.py`), whose output
says what the model would put there, given the rest. A committed token that this makes too
improbable becomes a mask again.
"""

from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp

from dlm_jax import ranking
from dlm_jax.decoding.rows import Proposal, Row
from dlm_jax.decoding.sampler import Distributions, Measure
from dlm_jax.decoding.settings import Number, check_confidence, number, settings
from dlm_jax.decoding.strategies.base import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig


@settings
class Wino(Strategy):
    """Commits what is sure of a block, and revokes what the rest makes unsure.

    It revokes fewer than it chooses, by at least what the schedule says.

    Attributes:
      wide_in_thres: how sure a token must be to be committed.
      narrow_out_thres: what it must stay above in order not to be revoked.
    """

    wide_in_thres: Number = number(0.6)
    narrow_out_thres: Number = number(0.9)

    name: ClassVar[str] = "wino"
    schedules: ClassVar[tuple[str, ...]] = ("fixed",)
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    shadows: ClassVar[bool] = True
    revokes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("wide_in_thres", "narrow_out_thres"):
            check_confidence(name, getattr(self, name))

    def check(self, decode: "DecodeConfig") -> None:
        super().check(decode)
        if not decode.measure.is_probability:
            raise ValueError(
                f"alg is {decode.alg!r}; the strategy 'wino' compares probabilities, so it must "
                "be 'low_confidence' or 'maskgit_plus'."
            )

    def readable(self, row: Row, wanted_L: Bool[Array, " L"], geo: Geometry) -> Bool[Array, " L"]:
        return geo.in_block(row.block)

    def read(
        self, measure: Measure, said: Distributions, there_W: Int[Array, " W"]
    ) -> Float[Array, " W"]:
        return measure.confidence(said, there_W)

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        count = jnp.sum(proposal.reaching(self.wide_in_thres), dtype=jnp.int32)
        masks = jnp.sum(proposal.read_L, dtype=jnp.int32)
        return memory, proposal.surest(jnp.clip(count, row.least, most(masks, row.least)))

    def revoke(
        self, row: Row, proposal: Proposal, chosen_L: Bool[Array, " L"], geo: Geometry
    ) -> Bool[Array, " L"]:
        # What was not read is in no doubt.
        probability_L = proposal.place(proposal.kept, jnp.inf)
        return revoked(
            probability_L,
            row.committed_L,
            self.narrow_out_thres,
            jnp.sum(chosen_L, dtype=jnp.int32),
            row.least,
        )


def most(masks: Int[Array, "*B"], least: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """The most tokens that a step commits into a block with so many masks."""
    return jnp.maximum(jnp.clip(masks * 7 // 10, 5, 20), least)


def revoked(
    probability_L: Float[Array, " L"],
    committed_L: Bool[Array, " L"],
    narrow_out_thres: Float[Array, ""],
    committed_now: Int[Array, ""],
    least: Int[Array, ""],
) -> Bool[Array, " L"]:
    """Which tokens of one row become masks again: as many less than are committed as `least` says.

    Args:
      probability_L: of the tokens, according to their shadows; infinite where there is none.
      committed_L: tokens that were committed in earlier steps.
      narrow_out_thres: what a probability must not be below.
      committed_now: tokens that this step commits.
      least: what the canvas must gain in the step.
    """
    doubtful_L = committed_L & (probability_L < narrow_out_thres)
    return ranking.top(-probability_L, doubtful_L, jnp.maximum(committed_now - least, 0))
