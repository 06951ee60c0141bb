"""What cache methods and decoding strategies see of a row: before, during and after a step.

Their functions are written for one row and mapped over the batch, so that rows cannot leak into one
another. `Row` is one row; `Rows` is every row of a batch, with an axis B in front of everything.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import queries, ranking
from dlm_jax.typing import Array, Bool, Float, Int, Key, PyTree


class Row(NamedTuple):
    """What is known of one row before a step."""

    tokens_L: Int[Array, " L"]
    """The canvas."""
    valid_L: Bool[Array, " L"]
    """Slots that hold a token or a mask, not padding."""
    masked_L: Bool[Array, " L"]
    """Masks that may be filled at some time, in any block; also those behind the end of a text."""
    committed_L: Bool[Array, " L"]
    """Tokens that earlier steps committed; those that were given are not among them."""
    eligible_L: Bool[Array, " L"]
    """Masks that this step may fill; none in a row that is done."""
    next_L: Bool[Array, " L"]
    """What this step will fill, where an order is drawn in advance; elsewhere all that it may."""
    order_L: Float[Array, " L"]
    """Lower is filled earlier, where an order is drawn in advance; elsewhere all are equal."""
    attended_L: Bool[Array, " L"]
    """Slots that the queries of this step may attend to."""
    least: Int[Array, ""]
    """How many positions this step is to fill at least, ..."""
    most: Int[Array, ""]
    """... and at most, where the strategy looks at data."""
    share: Float[Array, ""]
    """The share of the block's masks that the schedule wants filled in this step."""
    block: Int[Array, ""]
    """Index of the row's block; the number of blocks when the row is done."""
    block_step: Int[Array, ""]
    """Denoising step within the block."""
    step: Int[Array, ""]
    """Denoising step of this row over the whole generation."""


class Rows(NamedTuple):
    """A `Row` for each row of the batch; the fields are those of `Row`, in the same order."""

    tokens_BL: Int[Array, "B L"]
    valid_BL: Bool[Array, "B L"]
    masked_BL: Bool[Array, "B L"]
    committed_BL: Bool[Array, "B L"]
    eligible_BL: Bool[Array, "B L"]
    next_BL: Bool[Array, "B L"]
    order_BL: Float[Array, "B L"]
    attended_BL: Bool[Array, "B L"]
    least_B: Int[Array, " B"]
    most_B: Int[Array, " B"]
    share_B: Float[Array, " B"]
    block_B: Int[Array, " B"]
    block_step_B: Int[Array, " B"]
    step_B: Int[Array, " B"]

    @property
    def active_B(self) -> Bool[Array, " B"]:
        """Rows that have something to fill in this step."""
        return jnp.any(self.eligible_BL, axis=-1)


def per_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a `Row`, and perhaps of more that belongs to one row, over whole batches."""

    def one(rows: Rows, *others: Any) -> Any:
        return function(Row(*rows), *others)

    return jax.vmap(one)


class Chance(NamedTuple):
    """Where one row's random numbers of one step come from."""

    key: Key[Array, ""]
    """The row's."""
    step: Int[Array, ""]
    """The row's denoising step."""
    position_L: Int[Array, " L"]
    """Rotary positions, which padding does not change."""

    def keys_L(self, purpose: int) -> Key[Array, " L"]:
        """A key per position; different purposes have independent ones."""
        fold = jax.random.fold_in
        key_L = jax.vmap(fold, (None, 0))(fold(self.key, self.step), self.position_L)
        return jax.vmap(fold, (0, None))(key_L, purpose) if purpose else key_L

    def uniform_L(self, purpose: int) -> Float[Array, " L"]:
        """A number in [0, 1) for every position."""
        return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(
            self.keys_L(purpose)
        )


TOKEN, CHOICE, ORDER = 0, 1, 2
"""Purposes of random numbers: sampling tokens, choosing candidates, an order for one forward."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What the model proposes for one row in a step."""

    read_L: Bool[Array, " L"]
    """Masks whose predictions were read."""
    candidate_L: Bool[Array, " L"]
    """Of these, the ones that the step may fill."""
    confidence_L: Float[Array, " L"]
    """How sure the model is, times the certainty prior if there is one: what rules compare with
    one another. -inf where nothing was read."""
    score_L: Float[Array, " L"]
    """The same to rank by: with more resolution, or with noise."""
    kept: PyTree
    """What `Strategy.read` kept of the distributions, `[W, ...]`."""
    slot_W: Int[Array, " W"]
    """Where that was, ascending; L marks an unused entry."""
    place_L: Int[Array, " L"]
    """The entry of every slot; W marks one that has none."""
    chance: Chance
    level: Callable[[Array], Array]
    """The score that a confidence means."""

    def reaching(self, confidence: Float[Array, ""]) -> Bool[Array, " L"]:
        """The candidates that are at least so sure."""
        return self.candidate_L & (self.score_L >= self.level(confidence))

    def surest(
        self, count: Int[Array, ""], among_L: Bool[Array, " L"] | None = None
    ) -> Bool[Array, " L"]:
        """So many of the candidates, or of those `among` them; the leftmost among equals."""
        among_L = self.candidate_L if among_L is None else among_L
        # Only what was read can be a candidate, and that is mostly a block.
        there_W = self.slot_W < among_L.shape[0]
        score_W, among_W = (x.at[self.slot_W].get(mode="clip") for x in (self.score_L, among_L))
        return self.place(ranking.top(score_W, among_W & there_W, count), False)

    def place(self, kept_W: Array, fill: float | int) -> Array:
        """An array `[W]` of what was kept at its slots `[L]`, and `fill` elsewhere."""
        return queries.look_up(kept_W, self.place_L, fill)


class Observation(NamedTuple):
    """What a step did to one row."""

    computed_L: Bool[Array, " L"]
    """Positions that entered the network."""
    read_L: Bool[Array, " L"]
    """Masks whose predictions were read."""
    chosen_L: Bool[Array, " L"]
    """Positions that were filled; the mask token, unless it is banned, may be what they got."""
    confidence_L: Float[Array, " L"]
    """How sure the model was of its candidates, without any prior; -inf where none was read."""
    tokens_L: Int[Array, " L"]
    """The canvas after the step."""
    acc: PyTree
    """What the layer functions accumulated."""
