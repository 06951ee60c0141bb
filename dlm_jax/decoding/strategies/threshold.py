"""Threshold decoding (Fast-dLLM, arXiv 2505.22618, algorithm 1)."""

from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp

from dlm_jax.decoding.rows import Proposal
from dlm_jax.decoding.settings import Number, check_confidence, concrete, number, settings
from dlm_jax.decoding.strategies.base import Rule
from dlm_jax.typing import Array, Bool, Int

if TYPE_CHECKING:
    from dlm_jax.decoding.config import DecodeConfig


@settings
class Threshold(Rule):
    """Commits every candidate that is at least so sure.

    Attributes:
      threshold: a confidence.
    """

    threshold: Number = number()

    name: ClassVar[str] = "threshold"
    shorthand: ClassVar[str | None] = "threshold"
    by_confidence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_confidence("threshold", self.threshold)

    def check(self, decode: "DecodeConfig") -> None:
        if decode.measure.negative and concrete(self.threshold) and self.threshold > 0:
            raise ValueError(
                f"threshold is {self.threshold}, but confidences of alg {decode.alg!r} are never "
                "above 0; take alg 'maskgit_plus' or 'topk_margin'."
            )

    def count(self, proposal: Proposal, among_L: Bool[Array, " L"]) -> Int[Array, ""]:
        return jnp.sum(among_L & proposal.reaching(self.threshold), dtype=jnp.int32)
