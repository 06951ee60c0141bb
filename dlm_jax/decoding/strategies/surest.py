"""Plain decoding: the surest positions, as many as the schedule says."""

from typing import ClassVar

from dlm_jax.decoding.rows import Proposal, Row
from dlm_jax.decoding.settings import settings
from dlm_jax.decoding.strategies.base import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.typing import Array, Bool, PyTree


@settings
class Surest(Strategy):
    """Commits the surest candidates (LLaDA, arXiv 2502.09992, algorithm 5)."""

    name: ClassVar[str] = "surest"

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        return memory, proposal.surest(row.least)
