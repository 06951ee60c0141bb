"""What the network would put where a token stands, given everything but that token.

Behind the canvas stand shadows of some slots, all masks. A shadow sees everything but the token at
its own position, so that its output says what the model would put there (WINO, arXiv 2507.18578).
The canvas does not see the shadows.
"""

from typing import Any

import jax.numpy as jnp

from dlm_jax import queries as queries_lib
from dlm_jax.models.base import Block, Transformer
from dlm_jax.queries import Queries, Slots
from dlm_jax.typing import Array, Bool, Float, Int, Params, PyTree


def predict(
    model: Transformer,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    selected_BL: Bool[Array, "B L"],
    attended_BL: Bool[Array, "B L"],
    slots: Slots,
    slot_BW: Int[Array, "B W"],
) -> Float[Array, "B W D"]:
    """Hidden states that predict some slots: at masks as always, at tokens those of their shadows.

    Args:
      model: predicts a token at its own position.
      params: its parameters.
      tokens_BL: the canvas.
      selected_BL: what is computed of it.
      attended_BL: what may be attended to of it.
      slots: all slots of the canvas.
      slot_BW: the slots; L marks an unused entry.
    """
    config, length = model.config, tokens_BL.shape[1]
    own_BL, _ = queries_lib.pack_index(selected_BL, length)
    index_BQ = jnp.concatenate([own_BL, slot_BW], axis=1)
    rotary_BQH = queries_lib.gather(slots.rotary_BLH, index_BQ)
    walked: Any = model.apply(
        {"params": params},
        jnp.concatenate([tokens_BL, jnp.full_like(slot_BW, config.mask_id)], axis=1),
        Queries(index_BQ, own_BL, rotary_BQH, slots, attended_BL),
        ((),) * config.num_layers,
        (),
        ((0, config.num_layers, _layer),),
        method="walk",
    )
    hidden_BQD, _, _ = walked
    masked_BW = queries_lib.gather(tokens_BL, slot_BW) == config.mask_id
    shadow_BW = length + jnp.broadcast_to(jnp.arange(slot_BW.shape[1]), slot_BW.shape)
    return queries_lib.gather(hidden_BQD, jnp.where(masked_BW, slot_BW, shadow_BW))


def _layer(
    block: Block, carry: tuple[Array, PyTree], layer_cache: PyTree, queries: Queries
) -> tuple[tuple[Array, PyTree], PyTree]:
    """A block in which the canvas does not see the shadows, and no shadow its own token."""
    hidden, acc = carry
    length = queries.attended_BL.shape[1]
    index_BQ, size = queries.index_BQ, queries.index_BQ.shape[1]
    real_BQ = (index_BQ < length) & queries_lib.gather(queries.attended_BL, index_BQ)
    shadow_Q = jnp.arange(size) >= length
    hidden_QQ = ~shadow_Q[:, None] & shadow_Q[None]
    own_BQQ = (index_BQ[:, :, None] == index_BQ[:, None, :]) & (
        shadow_Q[:, None] & ~shadow_Q[None]
    )[None]
    normed = block.norm(hidden)
    q = block.query(normed, queries.rotary_BQH)
    kv = block.kv(block.key(normed, queries.rotary_BQH), block.value(normed))
    seen_BQQ = real_BQ[:, None, :] & ~hidden_QQ[None] & ~own_BQQ
    hidden = hidden + block.attend(q, kv, seen_BQQ)
    return (hidden + block.ffn(hidden), acc), layer_cache
