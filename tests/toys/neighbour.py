"""A decoding strategy in one file: what is sure, and its right neighbour if that is nearly so."""

from typing import ClassVar

import jax.numpy as jnp

from dlm_jax.decoding.settings import Number, check_confidence, number, settings
from dlm_jax.decoding.strategies.base import Strategy


@settings
class Neighbour(Strategy):
    """Commits every candidate that is sure, and beside it one that nearly is; at least the surest.

    Memory: how many steps the row has made.
    """

    threshold: Number = number(0.9)
    relaxed: Number = number(0.5)

    name: ClassVar[str] = "neighbour"
    schedules: ClassVar[tuple[str, ...]] = ("fixed",)
    adaptive: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self):
        check_confidence("threshold", self.threshold)
        check_confidence("relaxed", self.relaxed)

    def init(self, config, geo):
        return jnp.zeros((), jnp.int32)

    def choose(self, memory, row, proposal, geo):
        sure_L = proposal.reaching(self.threshold)
        beside_L = jnp.pad(sure_L[:-1], (1, 0)) & proposal.reaching(self.relaxed)
        return memory + 1, sure_L | beside_L | proposal.surest(row.least)
