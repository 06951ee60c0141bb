"""Dream's `origin`: chance decides of every mask by itself."""

from typing import ClassVar

from dlm_jax.decoding.rows import CHOICE, Proposal, Row
from dlm_jax.decoding.settings import settings
from dlm_jax.decoding.strategies.base import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Bool, PyTree


@settings
class Origin(Strategy):
    """Commits every mask by itself, as probably as the timestep says (Dream's `origin`)."""

    name: ClassVar[str] = "origin"
    as_alg: ClassVar[bool] = True
    schedules: ClassVar[tuple[str, ...]] = ("timestep",)
    exact: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    drawn: ClassVar[bool] = True

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        return memory, proposal.candidate_L & (proposal.chance.uniform_L(CHOICE) <= row.share)
