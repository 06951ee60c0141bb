"""WINO: what it revokes, and the shadows by which it judges a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_rules import SIZE, flags, number, often, parts, row, rows
from tiny_models import small_config

from dlm_jax.decoding import shadow
from dlm_jax.decoding.rows import Row
from dlm_jax.decoding.strategies import wino
from dlm_jax.geometry import Geometry
from dlm_jax.models import Transformer
from dlm_jax.models.base import lay_out, unembed


class TestWino:
    def test_the_most_is_seven_tenths_between_five_and_twenty(self):
        for least in (1, 7, 30):
            expected = [max(min(max(int(0.7 * masks), 5), 20), least) for masks in range(80)]
            most_B = wino.most(jnp.arange(80), jnp.full(80, least))
            assert most_B.tolist() == expected

    def revoked(self, probability, committed, threshold, now, least) -> list[int]:
        taken = wino.revoked(
            row(probability),
            jnp.asarray(committed),
            number(threshold),
            jnp.int32(now),
            jnp.int32(least),
        )
        return np.flatnonzero(taken).tolist()

    def test_revoked_by_hand(self):
        probability, all_of_them = [0.5, 0.25, 0.75, 0.125], [True] * 4
        assert self.revoked(probability, all_of_them, 0.75, 9, 1) == [0, 1, 3]
        # Only as many as the canvas gains beyond the least.
        assert self.revoked(probability, all_of_them, 0.75, 3, 1) == [1, 3]
        assert self.revoked(probability, all_of_them, 0.75, 3, 2) == [3]
        assert self.revoked(probability, all_of_them, 0.75, 1, 1) == []
        assert self.revoked(probability, all_of_them, 0.75, 0, 1) == []
        # What is as probable as demanded stays; so does what was not committed.
        assert self.revoked(probability, all_of_them, 0.5, 9, 1) == [1, 3]
        assert self.revoked(probability, [True, True, True, False], 0.75, 9, 1) == [0, 1]

    @often
    @given(
        probability=rows,
        committed=flags,
        threshold=parts,
        now=st.integers(0, SIZE),
        least=st.integers(1, 3),
    )
    def test_revoked_definition(self, probability, committed, threshold, now, least):
        doubtful = [p for p in range(SIZE) if committed[p] and probability[p] < threshold]
        doubtful.sort(key=lambda p: probability[p])
        expected = sorted(doubtful[: max(now - least, 0)])
        assert self.revoked(probability, committed, threshold, now, least) == expected

    def test_all_of_a_row_s_block_is_read_and_nothing_of_a_row_that_is_done(self):
        """Whatever the cache method wants."""
        geo = Geometry(prompt=3, gen=6, block=2, steps=None, shift=0)
        nothing = Row(**dict.fromkeys(Row._fields, jnp.int32(0)))
        for block, expected in enumerate([[3, 4], [5, 6], [7, 8], []]):
            row = nothing._replace(block=jnp.int32(block))
            for wanted in (False, True):
                read_L = wino.Wino().readable(row, jnp.full(9, wanted), geo)
                assert np.flatnonzero(read_L).tolist() == expected


MASK, BLOCK = 39, [3, 4, 5, 6]


@pytest.fixture(scope="module")
def predict():
    """Canvas -> logits over `BLOCK` with shadows, and everywhere without them.

    Of two equal rows, the second without its first two tokens. One layer, so that a shadow hears of
    its own token from nobody.
    """
    model = Transformer(small_config(num_layers=1))
    params = jax.jit(model.init)(jax.random.key(2), np.zeros((1, 4), np.int32))["params"]
    valid_BL = jnp.asarray([[True] * 9, [False] * 2 + [True] * 7])

    @jax.jit
    def both(tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = jnp.asarray([BLOCK] * 2, jnp.int32)
        layout = lay_out(model.config, valid_BL)
        hidden = shadow.predict(model, params, tokens_BL, valid_BL, valid_BL, layout, slots)
        return unembed(model, params, hidden), model.apply({"params": params}, tokens_BL)

    return lambda canvas: jax.device_get(both(jnp.asarray([canvas] * 2, jnp.int32)))


def canvas(*block: int) -> list[int]:
    return [7, 8, 9, *block, MASK, MASK]


class TestShadows:
    def test_at_masks_they_change_nothing(self, predict):
        logits, plain = predict(canvas(MASK, 11, MASK, 12))
        np.testing.assert_allclose(logits[0][[0, 2]], plain[0][[3, 5]], rtol=1e-4, atol=1e-5)
        assert (np.abs(logits[0] - plain[0][BLOCK]).max(axis=-1)[[1, 3]] > 1e-3).all()

    def test_a_token_is_judged_by_all_others_but_not_by_itself(self, predict):
        before, _ = predict(canvas(10, 11, MASK, 12))
        after, _ = predict(canvas(10, 20, MASK, 12))
        np.testing.assert_array_equal(before[:, 1], after[:, 1])
        assert (np.abs(before - after).max(axis=-1)[:, [0, 2, 3]] > 1e-3).all()

    def test_padding_is_not_seen(self, predict):
        one, _ = predict([7, 8, 9, 10, 11, MASK, 12, 13, 14])
        two, _ = predict([1, 2, 9, 10, 11, MASK, 12, 13, 14])
        np.testing.assert_array_equal(one[1], two[1])
        assert (one[0] != two[0]).any()
