"""An order of the positions that confidence has no say in."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dlm_jax import ranking
from dlm_jax.decoding.rows import Proposal, Row
from dlm_jax.decoding.settings import check_flag, settings
from dlm_jax.decoding.strategies.base import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config
from dlm_jax.typing import Array, Bool, PyTree


@settings
class Random(Strategy):
    """Commits positions in an order drawn in advance (LLaDA's `random`, for dKV-Cache-Greedy).

    Memory: positions that the order has come to. It does not come back to them, even if the
    candidate was the mask token where that is not banned.

    Attributes:
      redrawn: draw a new order in every forward instead, as LLaDA's plain loop does.
    """

    redrawn: bool = False

    name: ClassVar[str] = "random"
    as_alg: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flag("redrawn", self.redrawn)

    @property
    def redraws(self) -> bool:
        return self.redrawn

    def init(self, config: Config, geo: Geometry) -> PyTree:
        return () if self.redrawn else jnp.zeros(geo.length, bool)

    def restrict(self, memory: PyTree, row: Row, geo: Geometry) -> Row:
        if self.redrawn:
            return row
        return row._replace(eligible_L=row.eligible_L & ~memory)

    def next(self, row: Row) -> Bool[Array, " L"]:
        return ranking.top(-row.order_L, row.eligible_L, row.least)

    def choose(
        self, memory: PyTree, row: Row, proposal: Proposal, geo: Geometry
    ) -> tuple[PyTree, Bool[Array, " L"]]:
        chosen_L = ranking.top(-row.order_L, proposal.candidate_L, row.least)
        return jax.tree.map(lambda passed_L: passed_L | chosen_L, memory), chosen_L
