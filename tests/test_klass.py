"""KLASS: how far predictions moved, and which of them have settled."""

import jax.numpy as jnp
import numpy as np
from reference_rules import number

from dlm_jax.decoding.strategies import klass


class TestKlass:
    LENGTH, SLOTS, VOCAB, HISTORY = 6, 4, 5, 2

    def predictions(self, seed: int) -> np.ndarray:
        p = np.random.default_rng(seed).dirichlet(np.ones(self.VOCAB), (2, 3))
        p[0, 0] = [1, 0, 0, 0, 0]  # filtered out tokens have no probability
        return p

    def test_divergences_are_those_of_the_definition(self):
        steps = [
            ([[2, 4, 5], [3, 6, 6]], [True, True]),
            ([[2, 3, 6], [3, 4, 6]], [True, True]),
            ([[2, 4, 5], [2, 3, 4]], [True, False]),
            ([[5, 4, 6], [2, 3, 4]], [True, True]),
        ]
        known = klass.begin(2, self.SLOTS, self.VOCAB, self.HISTORY)
        before = np.zeros((2, self.SLOTS, self.VOCAB))
        history = [[[0.0] * self.HISTORY for _ in range(self.SLOTS)] for _ in range(2)]
        for seed, (slots, active) in enumerate(steps):
            p = self.predictions(seed)
            with np.errstate(divide="ignore"):
                log_p = jnp.asarray(np.log(p), jnp.float32)
            known = klass.update(
                known,
                log_p,
                jnp.asarray(slots, jnp.int32),
                jnp.asarray(active),
                self.LENGTH,
            )
            for b in range(2):
                if not active[b]:
                    continue
                now = np.full((self.SLOTS, self.VOCAB), 1 / self.VOCAB)
                for w, slot in enumerate(slots[b]):
                    if slot < self.LENGTH:
                        now[slot - 2] = p[b, w]
                for s in range(self.SLOTS):
                    moved = np.log(now[s] + 1e-12) - np.log(before[b, s] + 1e-12)
                    history[b][s] = [*history[b][s][1:], float((now[s] * moved).sum())]
                before[b] = now
            np.testing.assert_allclose(known.divergence_BSh, history, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(known.probability_BSV, before, rtol=1e-5)

    def test_the_first_step_moves_every_prediction(self):
        known = klass.update(
            klass.begin(2, self.SLOTS, self.VOCAB, 1),
            jnp.log(jnp.full((2, 3, self.VOCAB), 1 / self.VOCAB)),
            jnp.asarray([[2, 3, 4]] * 2, jnp.int32),
            jnp.ones(2, bool),
            self.LENGTH,
        )
        assert (known.divergence_BSh > 20).all()  # log(1/5) - log(1e-12), also where not read
        assert not klass.settled(known, number(20.0), self.LENGTH).any()

    def test_settled_needs_every_remembered_step_and_nothing_in_the_prompt(self):
        divergence = [[[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.25, 0.125]]]
        known = klass.Stability(jnp.zeros((1, 4, 5)), jnp.asarray(divergence))
        for level, expected in ((0.25, [2]), (0.3125, [2, 5]), (1.0, [2, 3, 4, 5]), (0.0, [])):
            settled = klass.settled(known, number(level), self.LENGTH)
            assert np.flatnonzero(settled[0]).tolist() == expected

    def test_steps_that_never_were_count_as_settled(self):
        assert klass.settled(klass.begin(1, 4, 5, 3), number(0.01), 4).all()
