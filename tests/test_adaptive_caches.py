"""dLLM-Cache and d2Cache by hand: what they compute, and what they choose by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_rows import DREAM, LENGTH, LLADA, observation, positions, row, slots
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, small

from dlm_jax import cache, ranking
from dlm_jax.cache import d2cache
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate


class TestDLLM:
    def test_layers_compute_what_is_due(self):
        """kp=4, kr=3: the prompt at 0 and 4, the response at 0, 3 and 6, two positions between."""
        model, params = small("llada")
        out = diffusion_generate(
            params,
            model,
            prompts(1, 3),
            key=jax.random.key(0),
            decode=DecodeConfig(gen_length=8),
            cache=cache.DLLMCache(kp=4, kr=3, rou=0.3),
            record=("computed", "computed_layers"),
        )
        prompt, response = range(3), range(3, 11)
        assert out.computed.all() and out.computed_layers[:, 0, 0].all()
        for step, sets_L in enumerate(out.computed_layers[:, 0, 1]):
            computed = positions(sets_L)
            assert (set(prompt) <= set(computed)) == (step in (0, 4))
            here = [position for position in computed if position in response]
            assert here == list(response) if step in (0, 3, 6) else len(here) == 2
        # Layer 0 is full; layer 1 has slots for what is due, and no more.
        later = [11, 2, 2, 8, 5, 2, 8, 2]
        np.testing.assert_array_equal(out.positions_asked[:, 0], [(11 + n) / 2 for n in later])
        np.testing.assert_array_equal(out.positions_computed, out.positions_asked)

    def test_rows_at_different_steps(self):
        """Rows that refresh in different steps do so by themselves, in one step shape."""
        method = cache.DLLMCache(kp=4, kr=3)
        rows = [row(range(3, 11), step=step) for step in (4, 6, 7, 12)]
        begun = [method.init_acc(one, jnp.arange(LENGTH, dtype=jnp.int32), LLADA) for one in rows]
        assert [bool(acc.prompt_B) for acc in begun] == [True, False, False, True]
        assert [bool(acc.response_B) for acc in begun] == [False, True, False, True]
        for some, capacity in ((slice(0, 2), LENGTH), (slice(2, 3), 2), (slice(1, 3), 8)):
            serves = [method.serves(one, one.valid_L, LLADA) for one in rows[some]]
            shape = method.step_shapes(LLADA)[int(np.argmax(np.all(serves, axis=0)))]
            assert method.capacity(shape.mode, LLADA) == capacity

    @pytest.mark.parametrize("rou", [0.0, 0.1])
    def test_a_share_of_less_than_one_position_computes_none(self, rou):
        assert cache.DLLMCache(rou=rou).capacity(0, LLADA) == 0
        model, params = small("dream")
        out = diffusion_generate(
            params,
            model,
            prompts(2, 3),
            key=jax.random.key(0),
            decode=DecodeConfig(gen_length=8),
            cache=cache.DLLMCache(kp=50, kr=4, rou=rou),
            record=("computed_layers",),
        )
        assert not out.computed_layers[1:4, :, 1].any()
        assert (out.tokens != 39).all()


class TestD2:
    @given(
        st.sampled_from([1, 7, 20]).flatmap(
            lambda size: st.lists(st.booleans(), min_size=size, max_size=size)
        ),
        st.floats(0.5, 20),
    )
    @settings(deadline=None, max_examples=30)
    def test_density_is_the_weighted_share_of_what_is_known(self, known, sigma):
        size = len(known)
        canvas = [1.0] * size + [float(k) for k in known] + [float(known[-1])] * size
        norm = sum(np.exp(-(d**2) / (2 * sigma**2)) for d in range(-3 * size, 3 * size))
        want = [
            sum(
                there * np.exp(-((size + i - j) ** 2) / (2 * sigma**2))
                for j, there in enumerate(canvas)
            )
            / norm
            for i in range(size)
        ]
        got = jax.jit(ranking.certainty_density)(jnp.asarray(known), jnp.float32(sigma))
        np.testing.assert_allclose(got, want, atol=1e-5)

    def test_nucleus_stops_before_the_share_is_exceeded(self):
        weight_L = jnp.asarray([1.0, 5.0, 0.0, 3.0, 1.0])
        assert positions(d2cache._nucleus(weight_L, 0.81)) == [1, 3]
        assert positions(d2cache._nucleus(weight_L, 0.79)) == [1]
        assert positions(d2cache._nucleus(weight_L, 0.0)) == [1]  # at least one
        assert positions(d2cache._nucleus(jnp.zeros(3), 0.5)) == []
        many_L = jnp.asarray(np.random.default_rng(0).random(400), jnp.float32)
        assert d2cache._nucleus(many_L, 1.0).all()  # whatever the sum is rounded to

    def test_gaps(self):
        selected_L = slots([0, 3, 8])
        assert positions(d2cache._fill_gaps(selected_L, 2)) == [0, 3, 8]
        assert positions(d2cache._fill_gaps(selected_L, 3)) == [0, 1, 2, 3, 8]
        assert positions(d2cache._fill_gaps(selected_L, 5)) == list(range(9))
        assert positions(d2cache._fill_gaps(slots([]), 5)) == []
        assert positions(d2cache._fill_gaps(slots([4]), 5)) == [4]

    @pytest.mark.parametrize("geo", [LLADA, DREAM])
    def test_choice_of_the_next_set(self, geo):
        """Stage one: two masks of the block; stage two: the one position that is attended most."""
        method = cache.D2Cache(current_k=2, rollout_p=0.0, sigma=1.0, inflate_w=0)
        before = row(range(3, 11), geo=geo)
        confidence = np.zeros(LENGTH)
        confidence[[3, 6, 9, 5]] = [0.9, 0.5, 0.99, 0.7]
        received = np.zeros((LENGTH, LENGTH))
        received[0, [1, 8]] = [2.0, 3.0]
        acc = d2cache.Rollout(jnp.asarray(received, jnp.float32), jnp.arange(LENGTH))
        seen = observation([3], read=range(3, 11), confidence=confidence, acc=acc)
        memory = method.observe(method.init(geo), before, seen, geo)
        # 9 is surer, but belongs to a later block; 3 was committed and is computed once more.
        needed = [5, 6] if geo is LLADA else [4, 5]
        assert positions(memory.selected_L) == sorted([3, *needed, 8])
        np.testing.assert_allclose(memory.confidence_L[3:], confidence[3:], rtol=1e-6)

        # In a step that reads less, the other confidences stay.
        seen = observation([5], computed=[5, 6], read=[5, 6], confidence=confidence / 2, acc=acc)
        memory = method.observe(memory, row([4, *range(5, 11)], geo=geo, step=1), seen, geo)
        np.testing.assert_allclose(memory.confidence_L[jnp.asarray([5, 6, 9])], [0.35, 0.25, 0.99])

    def test_the_end_of_the_prompt_is_there_for_the_first_token_only(self):
        method = cache.D2Cache(current_k=1, rollout_p=0.0, sigma=1.0, inflate_w=0)
        received = np.zeros((LENGTH, LENGTH))
        received[0, 2] = 5.0  # the network looks there most
        acc = d2cache.Rollout(jnp.asarray(received, jnp.float32), jnp.arange(LENGTH))
        for best, end in ((3, True), (5, False)):
            confidence = np.full(LENGTH, 0.01)
            confidence[best] = 0.9
            seen = observation([6], read=range(3, 11), confidence=confidence, acc=acc)
            memory = method.observe(method.init(DREAM), row(range(3, 11), geo=DREAM), seen, DREAM)
            assert bool(memory.selected_L[2]) == end

    def test_there_is_always_something_to_fill(self):
        method = cache.D2Cache()
        memory = method.init(LLADA)._replace(selected_L=slots([0, 9]))
        now = row([5, 9], block_step=2)
        assert positions(method.select(memory, now, LLADA)) == [0, 5, 9]

    def test_rollout_equals_the_product_of_matrices(self):
        """Two layers over a subset of queries, against dense matrices."""
        rng = np.random.default_rng(0)
        weights = rng.random((2, 1, 2, 3, LENGTH)).astype(np.float32)
        weights /= weights.sum(-1, keepdims=True)
        index_BQ = jnp.asarray([[2, 5, 7, LENGTH]])
        rolled = np.eye(LENGTH)
        for layer in weights:
            step = np.eye(LENGTH)
            step[[2, 5, 7]] = layer[0].mean(0)
            step = step + np.eye(LENGTH)
            rolled = step / step.sum(-1, keepdims=True) @ rolled

        method = cache.D2Cache()
        begun = method.init_acc(row(range(3, 11)), index_BQ[0], LLADA)
        acc = jax.tree.map(lambda leaf: leaf[None], begun)
        for layer in weights:
            full = np.concatenate([layer, np.full((1, 2, 1, LENGTH), 0.3, np.float32)], axis=2)
            told_BQL = jnp.asarray(full).mean(axis=1)  # over the heads
            acc = d2cache._roll(acc, told_BQL, jnp.ones((1, LENGTH), bool))
        np.testing.assert_allclose(acc.rows_BQL[0, :3], rolled[[2, 5, 7]], atol=1e-6)
        assert not acc.rows_BQL[0, 3].any()
