"""Rows small enough to count, as cache methods see them before and after a step."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dlm_jax import ranking
from dlm_jax.decoding.rows import Observation, Row
from dlm_jax.geometry import Geometry

LLADA = Geometry(prompt=3, gen=8, block=4, steps=8, shift=0)
DREAM = dataclasses.replace(LLADA, shift=1)
LENGTH = LLADA.length


def slots(positions, length=LENGTH):
    mask_L = np.zeros(length, bool)
    mask_L[list(positions)] = True
    return jnp.asarray(mask_L)


def positions(mask_L):
    return np.flatnonzero(mask_L).tolist()


def row(masked, *, block=0, block_step=0, step=0, least=1, order=None, geo=LLADA, padding=0):
    """A row before a step, given its masks."""
    masked_L = slots(masked)
    end = geo.prompt + (block + 1) * geo.block
    eligible_L = masked_L & (jnp.arange(LENGTH) < end)
    order_L = jnp.zeros(LENGTH) if order is None else jnp.asarray(order, jnp.float32)
    return Row(
        tokens_L=jnp.zeros(LENGTH, jnp.int32),
        valid_L=jnp.arange(LENGTH) >= padding,
        masked_L=masked_L,
        committed_L=jnp.zeros(LENGTH, bool),
        eligible_L=eligible_L,
        next_L=(
            eligible_L if order is None else ranking.top(-order_L, eligible_L, jnp.int32(least))
        ),
        order_L=order_L,
        attended_L=jnp.arange(LENGTH) >= padding,
        least=jnp.int32(least),
        most=jnp.int32(least),
        share=jnp.float32(0),
        block=jnp.int32(block),
        block_step=jnp.int32(block_step),
        step=jnp.int32(step),
    )


def observation(committed=(), computed=range(LENGTH), read=(), confidence=None, acc=()):
    confidence_L = jnp.full(LENGTH, -jnp.inf) if confidence is None else jnp.asarray(confidence)
    return Observation(
        computed_L=slots(computed),
        read_L=slots(read),
        chosen_L=slots(committed),
        confidence_L=confidence_L.astype(jnp.float32),
        tokens_L=slots(committed).astype(jnp.int32),
        acc=acc,
    )
