"""WINO (arXiv 2507.18578), wide in and narrow out: commits boldly, revokes what turns out wrong.

Behind the canvas stands a shadow of the row's block, all masks. A shadow sees everything but the
token at its own position, so that its output says what the model would put there, given the rest. A
committed token that this makes too improbable becomes a mask again.
"""

from typing import Any

import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax import ranking
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Block, Transformer
from dlm_jax.queries import Queries, Slots
from dlm_jax.typing import Array, Bool, Float, Int, Params, PyTree


def span(
    block_B: Int[Array, " B"], active_B: Bool[Array, " B"], geo: Geometry
) -> Int[Array, "B S"]:
    """Slots of each row's block, `[B, S]`; L for a row that is not active."""
    slot_BS = geo.prompt + block_B[:, None] * geo.block + jnp.arange(geo.block)[None]
    return jnp.where(active_B[:, None], slot_BS, geo.length).astype(jnp.int32)


def predict(
    model: Transformer,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    selected_BL: Bool[Array, "B L"],
    slots: Slots,
    slot_BS: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
    """Hidden states that predict the block: at masks as always, at tokens those of their shadows.

    Args:
      tokens_BL: the canvas.
      selected_BL: what is computed of it.
      slots: all slots of the canvas.
      slot_BS: the block; L for rows that are not active.
    """
    config, length = model.config, tokens_BL.shape[1]
    index_BQ = jnp.concatenate([queries_lib.pack_index(selected_BL, length), slot_BS], axis=1)
    rotary_BQH = queries_lib.gather(slots.rotary_BLH, index_BQ)
    walked: Any = model.apply(
        {"params": params},
        jnp.concatenate([tokens_BL, jnp.full_like(slot_BS, config.mask_id)], axis=1),
        Queries(index_BQ, rotary_BQH, slots),
        ((),) * config.num_layers,
        (),
        ((0, config.num_layers, _layer),),
        method="walk",
    )
    hidden_BQD, _, _ = walked
    masked_BS = queries_lib.gather(tokens_BL, slot_BS) == config.mask_id
    shadow_BS = length + jnp.broadcast_to(jnp.arange(slot_BS.shape[1]), slot_BS.shape)
    return queries_lib.gather(hidden_BQD, jnp.where(masked_BS, slot_BS, shadow_BS))


def _layer(
    block: Block, carry: tuple[Array, PyTree], layer_cache: PyTree, queries: Queries
) -> tuple[tuple[Array, PyTree], PyTree]:
    """A block in which the canvas does not see the shadows, and no shadow its own token."""
    hidden, acc = carry
    length = queries.valid_BL.shape[1]
    index_BQ, size = queries.index_BQ, queries.index_BQ.shape[1]
    real_BQ = (index_BQ < length) & queries_lib.gather(queries.valid_BL, index_BQ)
    shadow_Q = jnp.arange(size) >= length
    hidden_QQ = ~shadow_Q[:, None] & shadow_Q[None]
    own_BQQ = (index_BQ[:, :, None] == index_BQ[:, None, :]) & (
        shadow_Q[:, None] & ~shadow_Q[None]
    )[None]
    normed = block.norm(hidden)
    q = block.query(normed, queries.rotary_BQH)
    k = block.key(normed, queries.rotary_BQH)
    v = block.value(normed)
    seen_BQQ = real_BQ[:, None, :] & ~hidden_QQ[None] & ~own_BQQ
    out, _ = block.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen_BQQ)
    hidden = hidden + out
    return (hidden + block.ffn(hidden), acc), layer_cache


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
      probability_L: of the tokens, according to their shadows.
      committed_L: tokens of the block that were committed in earlier steps.
      narrow_out_thres: what a probability must not be below.
      committed_now: tokens that this step commits.
      least: what the canvas must gain in the step.
    """
    doubtful_L = committed_L & (probability_L < narrow_out_thres)
    return ranking.top(-probability_L, doubtful_L, jnp.maximum(committed_now - least, 0))
