"""The protocol of a decoding strategy: which positions a step commits.

A strategy is a frozen dataclass whose fields are its parameters (`settings.settings`: numbers that
shape nothing are leaves, so that another value compiles nothing). Its functions are pure, written
for one row and mapped over the batch, with a memory of their own, a pytree. All but `choose` have a
default that does nothing; docs/architecture.md says when a step asks which.

The order in a step: `restrict` and `next` before the forward; `readable` says where predictions are
wanted; `adjust` may change the logits; `read` keeps something of the distributions; `choose` says
which candidates are committed; `revoke` says which tokens become masks again.
"""

from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp

from dlm_jax.decoding.rows import Proposal, Row
from dlm_jax.decoding.sampler import Distributions, Measure
from dlm_jax.decoding.schedule import Schedule
from dlm_jax.decoding.settings import settings
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config
from dlm_jax.typing import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig


@settings
class Strategy:
    """Base of all strategies. A subclass overrides what it needs, at least `choose`."""

    name: ClassVar[str]
    """What `--strategy` and the error messages call it."""
    shorthand: ClassVar[str | None] = None
    """A parameter of `DecodeConfig`, and an option, that stands for strategy and parameter."""
    as_alg: ClassVar[bool] = False
    """Whether `alg` may name it in place of a measure, as the originals do."""
    schedules: ClassVar[tuple[str, ...]] = ("even", "timestep", "fixed")
    """The schedules that fit, the usual one first."""
    adaptive: ClassVar[bool] = False
    """Whether data decide how many positions a step commits, at least one. A block then lasts until
    it is full; otherwise it ends after its denoising steps, if these are counted."""
    exact: ClassVar[bool] = True
    """Whether every step commits exactly as many positions as the schedule says."""
    ranks: ClassVar[bool] = True
    """Whether confidence decides which positions are committed; only then do settings that change
    confidences have a meaning."""
    ordered: ClassVar[bool] = False
    """Whether positions are filled in an order that is known before the forward (`Row.order_L`)."""
    drawn: ClassVar[bool] = False
    """Whether chance decides which positions are committed (`Draws.transfer` stands in for it)."""
    reads_ahead: ClassVar[bool] = False
    """Whether `readable` goes beyond what the step may fill."""
    whole: ClassVar[bool] = False
    """Whether the logits of all positions that are read are made at once, B W V numbers, and not a
    few positions at a time; `adjust` is asked only then."""
    shadows: ClassVar[bool] = False
    """Whether predictions are wanted all over the block, where a token stands without seeing it
    (`shadow.py`)."""
    revokes: ClassVar[bool] = False
    """Whether `revoke` is to be asked."""

    @property
    def redraws(self) -> bool:
        """Whether an order is a new one in every forward."""
        return False

    @property
    def spelling(self) -> str:
        """What decides how many tokens a step commits, as an argument is written."""
        return f"strategy={self.name!r}" if self.shorthand is None else self.shorthand

    # --- what it refuses; each raises a ValueError of one sentence --------------------------------

    def check(self, decode: "DecodeConfig") -> None:
        """Refuses other settings with which it has no meaning."""
        if self.shadows:
            for name, given in (("cfg_scale", decode.guided), ("infill", decode.infill)):
                if given:
                    raise ValueError(
                        f"strategy is {self.name!r}, which has no meaning with {name}; leave that "
                        "out."
                    )

    def check_model(self, config: Config) -> None:
        """Refuses a model with which it has no meaning."""
        if self.shadows and config.shift:
            raise ValueError(
                f"strategy is {self.name!r}, which checks a token by predicting it at its own "
                f"position; {config.family} predicts it at the one before, so take another "
                "strategy."
            )

    def check_cache(self, name: str, keeps: bool) -> None:
        """Refuses a cache method of this name, which perhaps keeps keys and values."""
        if self.shadows and keeps:
            raise ValueError(
                f"cache is {name!r}, which keeps keys and values; the strategy {self.name!r} has "
                "no meaning with that, so take the cache 'none'."
            )

    # --- one row ----------------------------------------------------------------------------------

    def init(self, config: Config, geo: Geometry) -> PyTree:
        """Memory before the first step. The loop keeps that of rows that have nothing to fill."""
        del config, geo
        return ()

    def restrict(self, memory: PyTree, row: Row, geo: Geometry) -> Row:
        """Narrows what a step may fill, and how much of it; the loop takes nothing else of it."""
        del memory, geo
        return row

    def next(self, row: Row) -> Bool[Array, " L"]:
        """What the step will fill, if that is known before the forward; else all that it may."""
        return row.eligible_L

    def readable(self, row: Row, wanted_L: Bool[Array, " L"], geo: Geometry) -> Bool[Array, " L"]:
        """Where predictions are wanted, given where the cache method wants them."""
        del row, geo
        return wanted_L

    def adjust(
        self,
        memory: PyTree,
        logits_WV: Float[Array, "W V"],
        slot_W: Int[Array, " W"],
        row: Row,
        geo: Geometry,
    ) -> tuple[PyTree, Float[Array, "W V"]]:
        """Changes logits before a candidate is drawn; L in `slot_W` marks an unused entry."""
        del slot_W, row, geo
        return memory, logits_WV

    def read(self, measure: Measure, said: Distributions, there_W: Int[Array, " W"]) -> PyTree:
        """What `choose` and `revoke` want of the distributions, `[W, ...]`: `Proposal.kept`.

        Args:
          measure: what a confidence is.
          said: `[W, V]`.
          there_W: the tokens that are there now.
        """
        del measure, said, there_W
        return ()

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        """The memory after the step, and which candidates are committed."""
        raise NotImplementedError

    def revoke(
        self, row: Row, proposal: Proposal, chosen_L: Bool[Array, " L"], geo: Geometry
    ) -> Bool[Array, " L"]:
        """Which tokens of the row's block, committed in earlier steps, become masks again.

        A row does not come back to blocks that it has left.
        """
        del proposal, chosen_L, geo
        return jnp.zeros_like(row.committed_L)

    # --- how long it takes ------------------------------------------------------------------------

    def forwards(self, schedule: Schedule, masks: int) -> int:
        """The most forwards that fill a block of so many masks, if no candidate is a mask."""
        return masks if self.adaptive else schedule.forwards(masks)


@settings
class Rule(Strategy):
    """A strategy that looks at confidences to say how many of the surest candidates to take."""

    schedules: ClassVar[tuple[str, ...]] = ("fixed", "capped")
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    by_confidence: ClassVar[bool] = False
    """Whether `count` looks at nothing but confidences, so that another strategy may use it."""

    def count(self, proposal: Proposal, among_L: Bool[Array, " L"]) -> Int[Array, ""]:
        """How many of the surest positions among some candidates, before the schedule's limits."""
        raise NotImplementedError

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        count = self.count(proposal, proposal.candidate_L)
        return memory, proposal.surest(jnp.clip(count, row.least, row.most))
