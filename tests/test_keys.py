"""One key per row: made of one, or as they were given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.keys import row_keys

KEY = jax.random.key(3)


def same(one: jax.Array, other: jax.Array) -> bool:
    return bool(jnp.array_equal(jax.random.key_data(one), jax.random.key_data(other)))


def test_a_row_s_key_depends_on_its_number_only():
    keys = row_keys(KEY, 5)
    assert keys.shape == (5,) and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 5
    assert same(keys[:2], row_keys(KEY, 2))
    assert same(keys[3], jax.random.fold_in(KEY, 3))


def test_keys_of_the_older_kind():
    assert same(row_keys(jax.random.key_data(KEY), 3), row_keys(KEY, 3))
    assert same(row_keys(jax.random.PRNGKey(3), 3), row_keys(KEY, 3))
    many = jax.random.split(KEY, 3)
    assert same(row_keys(jax.random.key_data(many), 3), many)


def test_one_per_row_stays_and_a_compiled_call_gives_the_same():
    many = jax.random.split(KEY, 3)
    assert row_keys(many, 3) is many
    assert same(jax.jit(row_keys, static_argnums=1)(KEY, 3), row_keys(KEY, 3))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (0,)])
def test_keys_for_other_rows_are_refused(shape):
    with pytest.raises(ValueError, match=r"it must be one key, or one per row, \(3,\)\."):
        row_keys(jax.random.split(KEY, shape), 3)
