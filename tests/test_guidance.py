"""Classifier-free guidance: how the two predictions are combined, and what the copy is told."""

import jax.numpy as jnp
import numpy as np
from reference_rules import number

from dlm_jax.decoding import guidance


class TestGuidance:
    def test_scales_the_difference_that_the_prompt_makes(self):
        conditional = np.array([[[1.0, 2.0, -1.0]], [[0.0, 4.0, 8.0]]], np.float32)
        unconditional = np.array([[[0.5, 3.0, -1.0]], [[2.0, 4.0, 0.0]]], np.float32)
        for scale, expected in (
            (0.0, conditional),
            (1.0, [[[1.5, 1.0, -1.0]], [[-2.0, 4.0, 16.0]]]),
            (0.5, [[[1.25, 1.5, -1.0]], [[-1.0, 4.0, 12.0]]]),
        ):
            guided = guidance.combine(
                jnp.asarray(conditional), jnp.asarray(unconditional), number(scale)
            )
            np.testing.assert_allclose(guided, expected)

    def test_the_copy_keeps_only_what_was_generated(self):
        tokens = jnp.asarray([[5, 6, 39, 7], [1, 2, 3, 39]], jnp.int32)
        committed_at = jnp.asarray([[-1, -1, -1, 0], [-1, 4, 2, -1]], jnp.int32)
        both = guidance.canvases(tokens, committed_at >= 0, 39)
        assert both[:2].tolist() == tokens.tolist()
        assert both[2:].tolist() == [[39, 39, 39, 7], [39, 2, 3, 39]]

    def test_copies_come_after_all_rows(self):
        tree = (jnp.arange(6).reshape(2, 3), jnp.asarray([True, False]))
        twice = guidance.with_copy(tree)
        assert twice[0].tolist() == [[0, 1, 2], [3, 4, 5]] * 2
        for kept, whole in zip(guidance.without_copy(twice), tree, strict=True):
            np.testing.assert_array_equal(kept, whole)
