"""Queries, the choice of positions, configurations: small pure functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import small, small_config

from dlm_jax import cache, models, queries, ranking
from dlm_jax.decoding import strategies
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.models import dream, hf, llada
from dlm_jax.models.base import source_slot
from dlm_jax.models.layers import rotary, rotate

masks = hnp.arrays(bool, (2, 9))


class TestQueries:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(mask=masks, extra=st.integers(0, 3))
    def test_pack_lists_the_set_and_says_where_each_is(self, mask, extra):
        capacity = int(mask.sum(-1).max()) + extra
        if not capacity:
            return
        index, where = queries.pack_index(jnp.asarray(mask), capacity)
        for row in range(2):
            chosen = np.flatnonzero(mask[row])
            if capacity == 9:  # everything keeps its place
                assert index[row].tolist() == np.where(mask[row], np.arange(9), 9).tolist()
            else:
                assert index[row].tolist() == chosen.tolist() + [9] * (capacity - len(chosen))
        for row in range(2):
            slot = np.arange(9) if capacity == 9 else np.cumsum(mask[row]) - 1
            expected = np.where(mask[row], slot, capacity)
            assert where[row].tolist() == expected.tolist()

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(mask=masks)
    def test_scatter_writes_the_set_and_nothing_else(self, mask):
        values = jnp.arange(36.0).reshape(2, 9, 2)
        index, _ = queries.pack_index(jnp.asarray(mask), 9)
        written = queries.scatter(values, -queries.gather(values, index), index)
        expected = jnp.where(jnp.broadcast_to(mask[..., None], values.shape), -values, values)
        np.testing.assert_array_equal(written, expected)

    @settings(max_examples=30, deadline=None)
    @given(mask=masks, capacity=st.integers(1, 9))
    def test_what_is_too_much_is_left_out(self, mask, capacity):
        index, where = queries.pack_index(jnp.asarray(mask), capacity)
        assert index.shape == (2, capacity) and where.shape == (2, 9)
        for row in range(2) if capacity < 9 else ():
            first = np.flatnonzero(mask[row])[:capacity]
            assert index[row, : len(first)].tolist() == first.tolist()
            assert np.flatnonzero(where[row] < capacity).tolist() == first.tolist()

    def test_look_up_is_the_inverse_of_taking(self):
        index, where = queries.pack_index(jnp.asarray([[False, True, False, True, True]]), 4)
        values = jnp.asarray([10, 20, 30, 40], jnp.int32)
        assert queries.look_up(values, where[0], -1).tolist() == [-1, 10, -1, 20, 30]

    def test_positions_count_from_the_first_real_token(self):
        valid = jnp.asarray([[False, False, True, True], [True, True, True, True]])
        assert queries.positions(valid).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


class TestTop:
    @settings(max_examples=40, deadline=None)
    @given(
        score=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf, np.nan]), min_size=7),
        data=st.data(),
    )
    def test_comparing_ranks_as_sorting_does(self, score, data):
        size = len(score)
        eligible = jnp.asarray(data.draw(hnp.arrays(bool, size)))
        score_L = jnp.asarray(score, jnp.float32)
        compared = ranking.rank(score_L, eligible)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "FEW", 0)
            np.testing.assert_array_equal(compared, ranking.rank(score_L, eligible))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        confidence=st.lists(st.integers(-3, 3), min_size=6, max_size=6),
        eligible=hnp.arrays(bool, 6),
        quota=st.integers(0, 8),
    )
    def test_takes_the_surest_eligible_positions_leftmost_first(self, confidence, eligible, quota):
        ranked = sorted(np.flatnonzero(eligible), key=lambda position: -confidence[position])
        chosen = ranking.top(
            jnp.asarray(confidence, jnp.float32), jnp.asarray(eligible), jnp.int32(quota)
        )
        assert np.flatnonzero(chosen).tolist() == sorted(
            int(position) for position in ranked[:quota]
        )

    def test_unread_positions_are_never_taken(self):
        chosen = ranking.top(
            jnp.asarray([-jnp.inf, 0.5, -jnp.inf]), jnp.asarray([False, True, False]), jnp.int32(3)
        )
        assert chosen.tolist() == [False, True, False]


class TestShift:
    def test_predictions_are_read_one_to_the_left_within_the_row(self):
        valid = jnp.asarray([[False, True, True, True]])
        slots = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
        assert source_slot(slots, valid, 1).tolist() == [[1, 1, 2, 4]]
        assert source_slot(slots, valid, 0).tolist() == [[1, 2, 3, 4]]


class TestLayers:
    def test_rotation_depends_on_relative_positions_only(self):
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

        def score(at_q, at_k):
            return jnp.sum(
                rotate(q, rotary(jnp.asarray([[at_q]]), 8, 1e4))
                * rotate(k, rotary(jnp.asarray([[at_k]]), 8, 1e4))
            )

        np.testing.assert_allclose(score(3, 7), score(103, 107), rtol=1e-4)
        assert abs(score(3, 7) - score(3, 9)) > 1e-3

    def test_a_bfloat16_model_reads_out_float32(self):
        model, params = small("dream")
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        tokens = np.arange(6, dtype=np.int32)[None]
        logits = model.apply({"params": narrow}, tokens)
        assert logits.dtype == jnp.float32
        wide = model.apply({"params": params}, tokens)
        assert 0 < np.abs(logits - wide).max() < 0.1 * np.abs(wide).max()

    def test_a_tied_head_is_the_embedding(self):
        model = models.Transformer(small_config(tied_head=True))
        params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
        assert "head" not in params
        hidden = jnp.ones((1, 1, 16))
        logits = model.apply({"params": params}, hidden, method="unembed")
        np.testing.assert_allclose(logits[0, 0], params["embed"]["embedding"].sum(-1), rtol=1e-5)


class TestDecodeConfig:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(gen_length=0), "gen_length is 0"),
            (dict(block_length=0), "block_length is 0"),
            (dict(temperature=float("nan")), "temperature is nan"),
            (dict(temperature=np.float32(-1)), "temperature is -1.0"),
            (dict(gen_length=10, block_length=4), "must divide gen_length, 10"),
            (dict(gen_length=8, block_length=4, steps=3), "multiple of the number of blocks, 2"),
            (dict(steps=0), "steps is 0"),
            (dict(schedule="linear"), "must be one of even, timestep, fixed"),
            (dict(schedule="fixed", steps=4), "leave steps out"),
            (dict(schedule="fixed", num_transfer_tokens=0), "num_transfer_tokens is 0"),
            (dict(alg="other"), "alg is 'other'"),
            (dict(temperature=-0.1), "temperature is -0.1"),
            (dict(top_p=0.0), "top_p is 0.0"),
            (dict(top_p=1.1), "top_p is 1.1"),
            (dict(top_k=0), "top_k is 0"),
            (dict(eps=0.0), "eps is 0.0"),
        ],
    )
    def test_bad_values_are_named(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            DecodeConfig(**arguments)

    def test_defaults_are_the_model_familys(self):
        config = DecodeConfig.for_model(small_config(), gen_length=48)
        assert (config.schedule, config.alg, config.block_length) == ("even", "low_confidence", 24)
        config = DecodeConfig.for_model(small_config("dream"), gen_length=48, temperature=None)
        assert (config.schedule, config.alg, config.block_length) == ("timestep", "entropy", None)
        config = DecodeConfig.for_model(small_config(), block_length=4, alg="entropy")
        assert (config.block_length, config.alg) == (4, "entropy")

    def test_a_default_block_that_does_not_fit_is_lowered_to_half_at_most(self):
        lengths = {n: DecodeConfig.for_model(small_config(), gen_length=n) for n in (64, 34, 127)}
        assert [config.block_length for config in lengths.values()] == [32, 17, None]

    def test_an_answer_ends_at_the_model_s_token_unless_another_one_is_given(self):
        config = small_config(eos_id=38)
        assert DecodeConfig().ends_of_text(config) == (38,)
        assert DecodeConfig(eos_id=0).ends_of_text(config) == (0,)

    def test_a_cache_that_must_know_the_order_gets_a_random_one(self):
        greedy, dual = cache.make("dkv-greedy"), cache.make("dual")
        config = DecodeConfig(gen_length=8, alg="entropy", temperature=0.5)
        assert config.for_cache(greedy) == dataclasses.replace(config, alg="random")
        assert config.for_cache(greedy).strategy == strategies.Random()
        drawn = config.for_cache(greedy)
        assert drawn.for_cache(greedy) is drawn and config.for_cache(dual) is config
        with pytest.raises(ValueError, match="With the cache 'dkv-greedy', .*, alg is 'random'"):
            DecodeConfig(threshold=0.9).for_cache(greedy)

    @pytest.mark.parametrize("method", cache.METHODS.values())
    def test_what_a_cache_says_about_the_order_is_what_it_refuses(self, method):
        model, config = small_config(), DecodeConfig(gen_length=8, block_length=4)
        if method.needs_order:
            with pytest.raises(ValueError, match="must know the next tokens"):
                method().check(model, config)
        method().check(model, config.for_cache(method()))


class TestModelConfigs:
    LLADA, DREAM = llada.to_hf(small_config()), dream.to_hf(small_config("dream"))

    @pytest.mark.parametrize(
        ("raw", "change", "words"),
        [
            (LLADA, dict(alibi=True), "alibi is True"),
            (LLADA, dict(layer_norm_type="low_precision"), "layer_norm_type is 'low_precision'"),
            (LLADA, dict(block_type="sequential"), "block_type"),
            (LLADA, dict(rope=False), "rope is False"),
            (LLADA, dict(multi_query_attention=True), "multi_query_attention"),
            (LLADA, dict(include_bias=True), "include_bias"),
            (LLADA, dict(scale_logits=True), "scale_logits"),
            (LLADA, dict(clip_qkv=8.0), "clip_qkv is 8.0"),
            (LLADA, dict(rope_scaling=dict(type="linear", factor=2)), "type 'linear'"),
            (LLADA, dict(rope=None), "rope"),
            (LLADA, dict(sliding_window=128), "sliding_window is 128"),
            (LLADA, dict(use_sliding_window=True), "use_sliding_window is True"),
            (LLADA, dict(d_model=None), "d_model is missing"),
            (LLADA, dict(mask_token_id=None), "mask_token_id is missing"),
            (LLADA, dict(mask_token_id=40), "mask_token_id is 40"),
            (LLADA, dict(n_heads=3), "multiple of n_heads, 3"),
            (LLADA, dict(architectures=None, model_type="gpt2"), "must be one of llada, dream"),
            (DREAM, dict(use_sliding_window=True), "use_sliding_window is True"),
            (DREAM, dict(rope_scaling=dict(rope_type="yarn")), "type 'yarn'"),
            (DREAM, dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
            (DREAM, dict(num_key_value_heads=3), "num_kv_heads is 3"),
        ],
    )
    def test_what_is_not_implemented_is_refused_by_name(self, raw, change, words):
        with pytest.raises(ValueError, match=words):
            models.config_from_hf(raw | change)

    @pytest.mark.parametrize("name", sorted(models.PRESETS))
    def test_presets_round_trip(self, name):
        config = models.PRESETS[name]
        assert models.config_from_hf(models.config_to_hf(config)) == config

    def test_presets_have_the_published_sizes(self):
        billions = {
            name: sum(np.prod(shape) for shape in models.param_shapes(config).values()) / 1e9
            for name, config in models.PRESETS.items()
        }
        assert round(billions["llada-8b-instruct"], 2) == 8.02
        assert round(billions["dream-v0-instruct-7b"], 2) == 7.62
        assert round(billions["bench-60m"], 3) == 0.060

    def test_tensors_round_trip(self):
        config = small_config("dream")
        rng = np.random.default_rng(0)
        for path, shape in models.param_shapes(config).items():
            array = rng.normal(size=shape)
            tensor = hf.from_param(path, array)
            param = np.empty(shape)
            hf.as_tensor(path, param)[...] = tensor
            np.testing.assert_array_equal(param, array)

    def test_configs_are_hashable_and_checked(self):
        config = small_config()
        assert hash(config) == hash(dataclasses.replace(config))
        with pytest.raises(ValueError, match="must divide num_heads"):
            small_config(num_kv_heads=3)
        with pytest.raises(ValueError, match="even number"):
            small_config(head_dim=3)

    def test_a_context_has_room_for_a_prompt_and_an_answer(self):
        config = small_config(max_length=64)
        assert (config.room(0), config.room(60), config.room(70)) == (64, 4, -6)
        for prompt, answer in ((4, 60), (0, 64), (64, 0)):
            config.check_length(prompt, answer)
        with pytest.raises(ValueError, match=r"have 5 \+ 60 tokens; the .* context ends at 64\."):
            config.check_length(5, 60)
        with pytest.raises(ValueError, match=r"have 0 \+ 65 tokens"):
            config.check_length(0, 65)
