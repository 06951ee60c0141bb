"""What is drawn at random, against the distributions that it should follow."""

from typing import Any

import jax
import numpy as np
import pytest
from generation_replay import network, softmax
from strategy_table import MASK
from tiny_models import prompts, small

from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate


class TestDistributions:
    """Chi-square tests; bounds are the 99.9% quantiles of as many categories less one."""

    ROWS, PROMPT = 3000, 4

    def generate(self, family: str, **arguments) -> tuple[Any, np.ndarray]:
        """First forwards from one prompt, and the logits that they all see."""
        model, params = small(family)
        decode = DecodeConfig(max_forwards=1, **arguments)
        prompt = prompts(1, self.PROMPT, seed=5)
        out = diffusion_generate(
            params,
            model,
            np.repeat(prompt, self.ROWS, axis=0),
            key=jax.random.key(3),
            decode=decode,
        )
        canvas = np.pad(prompt, ((0, 0), (0, decode.gen_length)), constant_values=MASK)
        valid = np.ones(canvas.shape, bool)
        logits = np.asarray(network(family, False, False)(canvas, valid, valid, canvas))[0]
        logits = logits.astype(np.float64)
        begin = self.PROMPT - model.config.shift
        return jax.device_get(out), logits[begin : begin + decode.gen_length]

    def assert_as_expected(self, counts, shares, bound: float) -> None:
        expected = self.ROWS * np.asarray(shares)
        assert np.sum(counts) == self.ROWS and expected.sum() == pytest.approx(self.ROWS)
        assert expected.min() > 5
        assert np.sum((np.asarray(counts) - expected) ** 2 / expected) < bound

    def test_tokens_follow_the_softmax(self):
        out, logits = self.generate("dream", gen_length=1, temperature=2.5)
        p = softmax(logits[0, :MASK] / 2.5)
        frequent = np.argsort(-p)[:9]
        counts = [(out.tokens[:, -1] == token).sum() for token in frequent]
        counts, shares = [*counts, self.ROWS - sum(counts)], [*p[frequent], 1 - p[frequent].sum()]
        self.assert_as_expected(counts, shares, 27.88)

    def test_positions_follow_the_softmax_of_confidence(self):
        """Two in a step: the first by the softmax, the second by that of the others."""
        out, logits = self.generate(
            "llada", gen_length=4, schedule="fixed", num_transfer_tokens=2, alg_temp=0.3
        )
        p = softmax(logits)
        weight = softmax(p[:, :MASK].max(axis=-1) / 0.3)
        pairs = [(i, j) for i in range(4) for j in range(i)]
        shares = [
            weight[i] * weight[j] / (1 - weight[i]) + weight[j] * weight[i] / (1 - weight[j])
            for i, j in pairs
        ]
        first = out.committed_at[:, self.PROMPT :] == 0
        counts = [(first[:, i] & first[:, j]).sum() for i, j in pairs]
        assert max(shares) > 2 * min(shares)
        self.assert_as_expected(counts, shares, 20.52)

    def test_origin_fills_every_position_by_itself(self):
        out, _ = self.generate("llada", gen_length=8, steps=4, alg="origin", eps=0.2)
        first = out.committed_at[:, self.PROMPT :] == 0  # from time 1 to time 0.8
        choose = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1])
        binomial = choose * 0.2 ** np.arange(9) * 0.8 ** np.arange(8, -1, -1)
        counts = np.bincount(first.sum(axis=1), minlength=9)
        merged = [*counts[:4], counts[4:].sum()], [*binomial[:4], binomial[4:].sum()]
        self.assert_as_expected(*merged, 18.47)
        per_position = first.sum(axis=0)
        assert np.abs(per_position - 600).max() < 4 * np.sqrt(3000 * 0.2 * 0.8)

    @pytest.mark.slow
    def test_the_order_of_random_is_uniform(self):
        out, _ = self.generate("dream", gen_length=5, schedule="fixed", alg="random")
        first = (out.committed_at[:, self.PROMPT :] == 0).sum(axis=0)
        self.assert_as_expected(first, [0.2] * 5, 18.47)
