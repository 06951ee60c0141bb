"""What a caller can put into a generation: a function of the logits, and random choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_replay import check
from strategy_table import BLOCK, GEN, LENGTH, PROMPT, ROWS, VOCAB, config, padding, run
from tiny_models import prompts

from dlm_jax.decoding.state import Draws
from dlm_jax.decoding.strategies import Random


class TestHooks:
    """`logits_processor`."""

    def test_sees_the_canvas_and_bans_what_is_on_it(self):
        def once(tokens, logits, step):
            used = jax.nn.one_hot(tokens, VOCAB, dtype=bool).any(axis=1)
            return jnp.where(used[:, None], -jnp.inf, logits)

        prompt = prompts(ROWS, PROMPT, seed=14)
        out = run("llada", prompt, decode=config("fixed"), logits_processor=once)
        for known, text in zip(prompt, out.tokens, strict=True):
            assert len(set(text[PROMPT:])) == GEN and not set(text[PROMPT:]) & set(known)

    @pytest.mark.parametrize("family", ["dream", pytest.param("llada", marks=pytest.mark.slow)])
    def test_knows_the_forward_and_the_slots(self, family):
        def counted(tokens, logits, step, positions):
            """Forces token 5 at one slot, and the number of the forward elsewhere."""
            forced = jnp.where(positions == PROMPT + 7, 5, 10 + step)
            return 100.0 * jax.nn.one_hot(forced, VOCAB)

        prompt, mask = prompts(ROWS, PROMPT, seed=15), padding(0, 4, 1)
        out = run(family, prompt, mask, decode=config("fixed"), logits_processor=counted)
        expected = 10 + out.committed_at[:, PROMPT:]
        expected[:, 7] = 5
        np.testing.assert_array_equal(out.tokens[:, PROMPT:], expected)

    def test_must_keep_the_shape(self):
        with pytest.raises(ValueError, match="logits_processor returned shape"):
            run(
                "llada",
                prompts(ROWS, PROMPT),
                decode=config("fixed"),
                logits_processor=lambda tokens, logits, step: logits[:, :1],
            )


class TestDraws:
    """Random choices that are given."""

    @pytest.mark.parametrize(
        ("family", "name"),
        [("llada", "origin"), pytest.param("dream", "alg_temp", marks=pytest.mark.slow)],
    )
    def test_transfer_says_what_each_forward_fills(self, family, name):
        decode = config(name, family)
        steps = decode.steps
        transfer = np.random.default_rng(3).random((steps, ROWS, LENGTH)) < 0.4
        transfer[[steps // 2 - 1, steps - 1]] = True  # the last step of each block
        prompt = prompts(ROWS, PROMPT, seed=16)
        out = run(family, prompt, decode=decode, draws=Draws(transfer=transfer))
        check(out, prompt, decode)
        for row in range(ROWS):
            left, step = np.arange(PROMPT, LENGTH), 0
            while len(left):
                block = left[left < PROMPT + ((left[0] - PROMPT) // BLOCK + 1) * BLOCK]
                filled = block[transfer[step, row, block]]
                assert (out.committed_at[row, filled] == step).all()
                left, step = np.setdiff1d(left, filled), step + 1
            assert step == out.steps[row]

    @pytest.mark.parametrize(
        "shape",
        [pytest.param((ROWS, LENGTH), marks=pytest.mark.slow), (7, ROWS, LENGTH)],
        ids=["one order", "an order per forward"],
    )
    def test_order_says_what_comes_first(self, shape):
        order = np.random.default_rng(4).random(shape).astype(np.float32)
        prompt = prompts(ROWS, PROMPT, seed=17)
        decode = config("random", strategy=Random(redrawn=order.ndim == 3))
        out = run("llada", prompt, decode=decode, draws=Draws(order=order))
        check(out, prompt, decode)
        for row in range(ROWS):
            left = set(range(PROMPT, LENGTH))
            for step in range(4):
                now = order[row] if order.ndim == 2 else order[min(step, 6), row]
                block = [p for p in left if p < PROMPT + (1 + step // 2) * BLOCK]
                filled = sorted(block, key=now.__getitem__)[:3]
                assert (out.committed_at[row, filled] == step).all()
                left -= set(filled)
            assert not left
