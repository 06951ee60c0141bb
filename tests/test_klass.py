"""KLASS: how far predictions moved, and which of them have become stable."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from reference_rules import number
from tiny_models import small, small_config

from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.start import start
from dlm_jax.decoding.step import step
from dlm_jax.decoding.strategies import Threshold, klass
from dlm_jax.geometry import Geometry


class TestKlass:
    LENGTH, SLOTS, VOCAB, HISTORY = 6, 4, 5, 2
    GEO = Geometry(prompt=2, gen=4, block=4, steps=None, shift=0)

    def begin(self, history: int) -> klass.Moves:
        """What is known of a row before its first step."""
        config = small_config(vocab_size=self.VOCAB, mask_id=4, eos_id=3, pad_id=3)
        return klass.Klass(Threshold(0.9), kl_history_length=history).init(config, self.GEO)

    def stable(self, known: klass.Moves, level: float) -> list[int]:
        return np.flatnonzero(klass.stable(known, number(level), self.LENGTH)).tolist()

    def predictions(self, seed: int) -> np.ndarray:
        p = np.random.default_rng(seed).dirichlet(np.ones(self.VOCAB), (2, 3))
        p[0, 0] = [1, 0, 0, 0, 0]  # filtered out tokens have no probability
        return p

    def test_divergences_are_those_of_the_definition(self):
        steps = [
            [[2, 4, 5], [3, 6, 6]],
            [[2, 3, 6], [3, 4, 6]],
            [[2, 4, 5], [2, 3, 4]],
            [[5, 4, 6], [2, 3, 4]],
        ]
        known = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), self.begin(self.HISTORY))
        follow = jax.vmap(functools.partial(klass.followed, length=self.LENGTH))
        before = np.zeros((2, self.SLOTS, self.VOCAB))
        history = [[[0.0] * self.HISTORY for _ in range(self.SLOTS)] for _ in range(2)]
        for seed, slots in enumerate(steps):
            p = self.predictions(seed)
            with np.errstate(divide="ignore"):
                log_p = jnp.asarray(np.log(p), jnp.float32)
            known = follow(known, log_p, jnp.asarray(slots, jnp.int32))
            for b in range(2):
                now = np.full((self.SLOTS, self.VOCAB), 1 / self.VOCAB)
                for w, slot in enumerate(slots[b]):
                    if slot < self.LENGTH:
                        now[slot - 2] = p[b, w]
                for s in range(self.SLOTS):
                    change = np.log(now[s] + 1e-12) - np.log(before[b, s] + 1e-12)
                    history[b][s] = [*history[b][s][1:], float((now[s] * change).sum())]
                before[b] = now
            np.testing.assert_allclose(known.divergence_Sh, history, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(known.probability_SV, before, rtol=1e-5)

    def test_the_first_step_moves_every_prediction(self):
        known = klass.followed(
            self.begin(1),
            jnp.log(jnp.full((3, self.VOCAB), 1 / self.VOCAB)),
            jnp.asarray([2, 3, 4], jnp.int32),
            self.LENGTH,
        )
        assert (known.divergence_Sh > 20).all()  # log(1/5) - log(1e-12), also where not read
        assert not self.stable(known, 20.0)

    def test_stable_needs_every_remembered_step_and_nothing_in_the_prompt(self):
        divergence = [[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.25, 0.125]]
        known = klass.Moves(jnp.zeros((4, 5)), jnp.asarray(divergence))
        for level, expected in ((0.25, [2]), (0.3125, [2, 5]), (1.0, [2, 3, 4, 5]), (0.0, [])):
            assert self.stable(known, level) == expected

    def test_steps_that_never_were_count_as_stable(self):
        assert klass.stable(self.begin(3), number(0.01), self.SLOTS).all()
        assert self.stable(self.begin(3), 0.01) == [2, 3, 4, 5]

    def test_what_is_known_of_a_row_that_is_done_stays(self):
        model, params = small("llada")
        mask = model.config.mask_id
        prompt_BP = np.int32([[5, mask, 7, mask, mask], [5, mask, 7, 8, 9]])
        decode = DecodeConfig(gen_length=0, infill=True, strategy=klass.Klass(Threshold(1.01)))
        setup, state = start(params, model, prompt_BP, key=jax.random.key(0), decode=decode)
        (shape,) = setup.method.step_shapes(setup.geo)
        seen = []
        for _ in range(3):
            state = jax.jit(step, static_argnums=2)(setup, state, shape)
            seen.append(state.strategy_memory)
        assert state.rows.step_B.tolist() == [3, 1]
        for before, after in itertools.pairwise(seen):
            for old, new in zip(before, after, strict=True):
                assert (old[0] != new[0]).any()
                np.testing.assert_array_equal(old[1], new[1])
