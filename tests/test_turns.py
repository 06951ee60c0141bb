"""Wide forwards by turns: which rows are computed, how often, and which are copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.decoding import turns

B = 7
NONE = np.arange(B)


def count(wanted, twins=NONE, size=2):
    """Turns that mark each row they compute: the outputs, and the marks as the cache."""

    def compute(row_T, marks_B):
        some = turns.take(marks_B, row_T) + 1
        return (row_T + 100, some), turns.put(marks_B, some, row_T)

    wanted_B, twin_B = jnp.asarray(wanted), jnp.asarray(twins, jnp.int32)
    run = jax.jit(turns.by_turns, static_argnums=(0, 4))
    out, marks_B = run(compute, jnp.arange(B) * 10, wanted_B, twin_B, size)
    return [leaf.tolist() for leaf in out], marks_B.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_every_wanted_row_is_computed_once(size):
    wanted = np.array([True, False, True, True, False, False, True])
    (rows, marks), cache = count(wanted, size=size)
    assert rows == [100, 0, 102, 103, 0, 0, 106]
    assert marks == [1, 0, 21, 31, 0, 0, 61]
    assert cache == [1, 10, 21, 31, 40, 50, 61]


def test_nothing_wanted():
    (rows, _), cache = count(np.zeros(B, bool))
    assert rows == [0] * B and cache == [0, 10, 20, 30, 40, 50, 60]


def test_a_twin_is_copied():
    """Rows 3 and 6 get what row 1 got, and row 5, which is not wanted, nothing."""
    wanted = np.array([True, True, True, True, True, False, True])
    (rows, _), cache = count(wanted, twins=[0, 1, 2, 1, 4, 1, 1])
    assert rows == [100, 101, 102, 101, 104, 0, 101]
    assert cache == [1, 11, 21, 11, 41, 50, 11]


def test_twins_are_fresh_rows_equal_in_everything():
    tokens = jnp.asarray([[1, 2], [1, 3], [1, 2], [1, 2], [1, 2]])
    valid = jnp.asarray([[1, 1], [1, 1], [1, 1], [0, 1], [1, 1]], bool)
    fresh = jnp.asarray([True, True, True, True, False])
    assert turns.twins((tokens, valid), fresh).tolist() == [0, 1, 0, 3, 4]
    assert turns.twins((tokens,), fresh).tolist() == [0, 1, 0, 0, 4]


@pytest.mark.parametrize(
    ("batch", "capacity", "size"),
    [
        (1, 4096, 1),  # one row is never split
        (8, 1024, 2),
        (5, 1024, 2),
        (4, 512, 4),  # fits in one turn
        (5, 512, 3),  # even turns: 3 and 2 rather than 4 and 1
        (8, 384, 4),
        (3, 5000, 1),
        (1000, 32, 1000),  # narrow: all at once
    ],
)
def test_rows_per_turn(batch, capacity, size):
    assert turns.rows_per_turn(batch, capacity) == size
