"""The cache methods by hand: which positions they ask for, on canvases small enough to count."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_rows import DREAM, LENGTH, LLADA, observation, positions, row, slots
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, small, small_config
from toys.periodic import Periodic

from dlm_jax import cache
from dlm_jax.cache import dkv
from dlm_jax.cache.base import buckets
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import Draws, diffusion_generate
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Transformer, sources


class TestBuckets:
    @given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 300), st.integers(1, 8))
    @settings(deadline=None)
    def test_few_ascending_and_large_enough(self, sizes, gen, most):
        geo = Geometry(prompt=5, gen=gen, block=gen, steps=None, shift=0, step_shapes=most)
        capacities = [shape.capacity for shape in buckets(sizes, geo)]
        assert capacities == sorted(set(capacities)) and capacities[-1] == geo.length
        assert len(capacities) <= most
        assert all(capacity in [*sizes, geo.length] for capacity in capacities)

    def test_few_sizes_keep_their_own(self):
        assert [shape.capacity for shape in buckets([8, 4, 4], LLADA)] == [4, 8, 11]

    @pytest.mark.parametrize("most", [1, 2, 3, 6])
    @pytest.mark.parametrize("name", cache.METHODS)
    def test_no_method_compiles_more_step_shapes(self, name, most):
        decode = DecodeConfig(gen_length=256, block_length=32, step_shapes=most)
        geo = decode.geometry(prompt=128, shift=1)
        shapes = cache.make(name).step_shapes(geo)
        modes = {shape.mode for shape in shapes}
        assert 1 <= len(shapes) <= max(most, len(modes)) and len(set(shapes)) == len(shapes)
        assert shapes[-1].capacity == geo.length


class TestSources:
    def test_without_shift_they_are_the_positions(self):
        assert positions(sources(slots([3, 7]), jnp.ones(LENGTH, bool), 0)) == [3, 7]

    def test_with_shift_they_lie_one_to_the_left(self):
        valid_L = jnp.ones(LENGTH, bool)
        assert positions(sources(slots([3, 7, 10]), valid_L, 1)) == [2, 6, 9]

    def test_a_rows_first_token_is_its_own(self):
        assert positions(sources(slots([0, 1]), jnp.ones(LENGTH, bool), 1)) == [0]
        assert positions(sources(slots([2, 5]), jnp.arange(LENGTH) >= 2, 1)) == [2, 4]

    def test_padding_is_no_source(self):
        assert positions(sources(slots([0, 1, 2, 3]), jnp.arange(LENGTH) >= 2, 1)) == [2]


class TestBlockCaches:
    @pytest.mark.parametrize("method", [cache.Prefix(), cache.Dual()])
    def test_a_blocks_first_step_is_full(self, method):
        for geo in (LLADA, DREAM):
            assert method.select((), row(range(7, 11), block=1, geo=geo), geo).all()

    def test_later_steps(self):
        later = row([8, 9, 10], block=1, block_step=1)
        assert positions(cache.Prefix().select((), later, LLADA)) == [7, 8, 9, 10]
        assert positions(cache.Prefix().select((), later, DREAM)) == [6, 7, 8, 9]
        first = row([5, *range(7, 11)], block=0, block_step=3)
        assert positions(cache.Prefix().select((), first, LLADA)) == list(range(3, 11))
        assert positions(cache.Dual().select((), first, LLADA)) == [3, 4, 5, 6]
        assert positions(cache.Dual().select((), first, DREAM)) == [2, 3, 4, 5]
        column = cache.Dual(block_start="first-column")
        assert positions(column.select((), first, DREAM)) == [3, 4, 5, 6]

    def test_the_first_column_is_committed_alone(self):
        method = cache.Dual(block_start="first-column")
        full = method.restrict((), row(range(7, 11), block=1, least=3), DREAM)
        assert positions(full.eligible_L) == [7] and int(full.least) == 1
        none = method.restrict((), row(range(7, 11), block=1, least=0), DREAM)
        assert int(none.least) == 1
        later = row(range(8, 11), block=1, block_step=1, least=3)
        assert method.restrict((), later, DREAM) is not later
        assert positions(method.restrict((), later, DREAM).eligible_L) == [8, 9, 10]
        assert int(method.restrict((), later, DREAM).least) == 3

    def test_masks_in_the_prompt_belong_to_the_first_block(self):
        infill = row([1, 5, *range(7, 11)], block_step=2)
        assert positions(cache.Dual().select((), infill, LLADA)) == [1, 3, 4, 5, 6]
        assert positions(cache.Dual().select((), infill, DREAM)) == [0, 2, 3, 4, 5]


class TestDKV:
    def test_what_is_settled(self):
        some = row([5, 6, 8, 9, 10], step=4)
        assert positions(dkv.settled(some, LLADA, None)) == [0, 1, 2, 3, 4, 7]
        # 4 waits for 5; 6 is a mask whose successor is decoded; nobody reads the last one.
        assert positions(dkv.settled(some, DREAM, None)) == [0, 1, 2, 3, 6, 10]
        assert positions(dkv.settled(some, DREAM, "un")) == [0, 1, 2, 3, 6, 10]
        assert positions(dkv.settled(some, DREAM, "un_right")) == [0, 1, 2, 3]
        assert positions(dkv.settled(row([5], step=4), DREAM, "un_right")) == [
            *range(4),
            *range(6, 11),
        ]

    def test_what_is_settled_at_the_start(self):
        start = row(range(3, 11))
        for shift_type in (None, "un", "un_right"):
            assert positions(dkv.settled(start, DREAM, shift_type)) == [0, 1]

    def test_decode_waits_one_step(self):
        method = cache.DKVDecode(cache_steps=4)
        memory = method.init(LLADA)
        for block_step in (0, 1):
            assert method.select(memory, row(range(3, 11), block_step=block_step), LLADA).all()
        # Step 1 starts with token 5 decoded, and decodes 3: step 2 keeps 5 but not 3.
        memory = method.observe(
            memory, row([3, 4, *range(6, 11)], block_step=1), observation([3]), LLADA
        )
        now = row([4, *range(6, 11)], block_step=2)
        assert positions(method.select(memory, now, LLADA)) == [3, 4, *range(6, 11)]
        assert method.select(memory, now._replace(block_step=jnp.int32(4)), LLADA).all()

    def test_decode_with_a_shift_counts_over_the_generation(self):
        method = cache.DKVDecode(cache_steps=4)
        memory = method.observe(method.init(DREAM), row(range(3, 11)), observation([3]), DREAM)
        now = row(range(4, 11), step=1, block_step=1)
        assert positions(method.select(memory, now, DREAM)) == list(range(2, 11))
        again = row([7, 8], step=5, block=1, block_step=0)
        assert positions(method.select(memory, again, DREAM)) == list(range(2, 11))
        assert method.select(memory, again._replace(step=jnp.int32(8)), DREAM).all()

    @pytest.mark.parametrize("geo", [LLADA, DREAM])
    def test_the_prompt_is_computed_once(self, geo):
        first = geo.prompt - geo.shift
        prefill, pd = cache.DKVPrefill(), cache.DKVPD(cache_steps=3)
        start, later = row(range(3, 11)), row([4, 5, 6, 8, 9, 10], step=4)
        for method in (prefill, pd):
            memory = method.init(geo)
            assert method.select(memory, start, geo).all()
            memory = method.observe(memory, start, observation([3]), geo)
            memory = method.observe(memory, later, observation([4]), geo)
            refresh = later._replace(step=jnp.int32(6))
            assert positions(method.select(memory, refresh, geo)) == list(range(first, 11))
        between = positions(pd.select(memory, later._replace(step=jnp.int32(5)), geo))
        # 3 and 7 were decoded before the previous step, in which 4 was.
        assert between == ([4, 5, 6, 8, 9, 10] if not geo.shift else [3, 4, 5, 7, 8, 9])

    def greedy(self, geo, window_size, *, committed=(5,), masked=(3, 4, 5, 6, 8, 9, 10), least=1):
        method = cache.DKVGreedy(cache_steps=4, window_size=window_size)
        geo = dataclasses.replace(geo, most_per_step=least)
        order = np.arange(LENGTH)[::-1] + 0.0  # from right to left
        now = row(set(masked) - set(committed), block_step=1, least=least, order=order, geo=geo)
        memory = method.observe(method.init(geo), row(masked), observation(committed), geo)
        assert method.select(memory, now._replace(block_step=jnp.int32(4)), geo).all()
        return positions(method.select(memory, now, geo))

    def test_greedy_without_window(self):
        assert self.greedy(LLADA, 0) == [5, 6]
        assert self.greedy(DREAM, 0) == [5]
        assert self.greedy(DREAM, 0, committed=(3,)) == [3, 5]

    def test_greedy_window_takes_the_left_neighbour_first(self):
        # Around 6: 5 is there already, 7 is no mask, then 4 and 8.
        assert self.greedy(LLADA, 1) == [4, 5, 6]
        assert self.greedy(LLADA, 2) == [4, 5, 6, 8]
        # The predecessor of 6 was just committed; around it come 4, 6 and 3.
        assert self.greedy(DREAM, 3) == [3, 4, 5, 6]

    def test_greedy_windows_of_several_tokens_do_not_overlap(self):
        # 6 takes 8; 4, next in order, takes 3. What was decoded before is no part of a window.
        assert self.greedy(LLADA, 1, least=2, masked=(3, 4, 5, 6, 8)) == [3, 4, 5, 6, 8]

    def test_greedy_windows_end_where_the_masks_end(self):
        assert self.greedy(LLADA, 20) == [3, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize(
    "changes",
    [
        dict(schedule="even", steps=4),
        dict(schedule="timestep", steps=2),
        dict(schedule="fixed", num_transfer_tokens=2),
    ],
    ids=lambda changes: changes["schedule"],
)
def test_the_first_column_alone_delays_a_block_but_leaves_no_mask(changes):
    model, params = small("dream")
    out = diffusion_generate(
        params,
        model,
        prompts(1, 3),
        key=jax.random.key(0),
        decode=DecodeConfig(gen_length=8, block_length=4, **changes),
        cache=cache.Dual(block_start="first-column"),
        record=("history",),
    )
    assert (out.tokens != 39).all()
    starts = np.asarray(out.committed_at[0, [3, 7]])
    assert [int((out.committed_at == start).sum()) for start in starts] == [1, 1]


@pytest.mark.parametrize(
    "name",
    [
        "dkv-decode",
        "d2cache",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("dkv-prefill", "dkv-pd", "dual")),
    ],
)
def test_masks_anywhere_in_the_prompt_are_filled(name):
    """A row's first token too, which Dream predicts at its own position; padded and not."""
    model, params = small("dream")
    prompt = prompts(2, 4).copy()
    prompt[0, [0, 2]] = prompt[1, [1, 3]] = 39
    out = diffusion_generate(
        params,
        model,
        prompt,
        np.array([[True] * 4, [False, True, True, True]]),
        key=jax.random.key(0),
        decode=DecodeConfig(gen_length=8, block_length=4, infill=True),
        cache=cache.make(name),
    )
    assert (out.tokens[0] != 39).all() and (out.tokens[1, 1:] != 39).all()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("dkv-pd", "llada"),
        *(
            pytest.param(name, "llada", marks=pytest.mark.slow)
            for name in ("prefix", "dkv-decode", "d2cache")
        ),
        pytest.param("d2cache", "dream", marks=pytest.mark.slow),
        # Their step shapes are exactly what they ask for.
        *(
            pytest.param(name, "dream", marks=pytest.mark.slow)
            for name in ("none", "dkv-greedy", "dkv-prefill", "dual", "dllm")
        ),
    ],
)
def test_padding_waste(name, family):
    """Default parameters at the size of a real task: less than a quarter of the slots is empty."""
    config = small_config(family, max_length=384)
    model = Transformer(config)
    params = model.init(jax.random.key(1), np.zeros((1, 4), np.int32))["params"]
    params["head"]["kernel"] = 8.0 * params["head"]["kernel"]
    alg = "random" if name == "dkv-greedy" else None
    decode = DecodeConfig.for_model(config, gen_length=256, block_length=32, alg=alg)
    out = diffusion_generate(
        params, model, prompts(1, 128), key=jax.random.key(0), decode=decode, cache=cache.make(name)
    )
    asked, computed = float(out.positions_asked.sum()), float(out.positions_computed.sum())
    assert (computed - asked) / computed < 0.25
    everything = float(out.nfe) * 384
    assert computed == everything if name == "none" else computed < 0.75 * everything


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("dkv-decode", dict(cache_steps=0), "cache_steps is 0; it must be a whole number from 1"),
        ("dkv-decode", dict(shift_type="right"), "take 'un_right'"),
        ("dkv-decode", dict(shift_type="left"), "must be un or un_right"),
        ("dkv-pd", dict(cache_steps=-1), "cache_steps is -1; it must be a whole number from 1"),
        ("dkv-pd", dict(shift_type="right"), "take 'un_right'"),
        ("dkv-greedy", dict(cache_steps=0), "cache_steps is 0; it must be a whole number from 1"),
        ("dkv-greedy", dict(window_size=-1), "window_size is -1; it must be a whole number from 0"),
        ("prefix", dict(block_start="last"), "must be one of shifted, first-column"),
        ("dllm", dict(kp=0), "kp is 0; it must be a whole number from 1"),
        ("dllm", dict(kr=0), "kr is 0; it must be a whole number from 1"),
        ("dllm", dict(rou=1.5), r"rou is 1.5; it must lie in \[0, 1\]"),
        ("d2cache", dict(rollout_p=-0.1), r"rollout_p is -0.1; it must lie in \[0, 1\]"),
        ("d2cache", dict(current_k=0), "current_k is 0; it must be a whole number from 1"),
        ("d2cache", dict(sigma=0), "sigma is 0; it must be above 0"),
        ("d2cache", dict(inflate_w=-1), "inflate_w is -1; it must be a whole number from 0"),
        ("d2cache", dict(sigma=float("nan")), "sigma is nan; it must be above 0"),
    ],
)
def test_parameters_out_of_range(name, parameters, words):
    with pytest.raises(ValueError, match=words):
        cache.make(name, **parameters)


def test_parameters_of_the_wrong_type():
    """Of a method that the tests' own type checker does not see, where it would be first."""
    for wrong in (2.5, "2", True, None, float("inf")):
        with pytest.raises(ValueError, match="every is .*; it must be a whole number from 1 on"):
            Periodic(every=wrong)
    assert hash(Periodic(every=np.int64(5)))
    # The compiled programs are looked up by parameters, and an array cannot be.
    for kind in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match=r"every is .*rray\(3.*; it must not be an array\.$"):
            Periodic(every=kind(3))
    with pytest.raises(ValueError, match="every is .*; it must not be an array"):
        jax.eval_shape(lambda every: Periodic(every).every, 3)
    with pytest.raises(ValueError, match="sigma is inf; it must be above 0"):
        cache.make("d2cache", sigma=float("inf"))


@pytest.mark.parametrize(
    ("family", "method", "changes", "words"),
    [
        ("llada", cache.DKVDecode(shift_type="un"), {}, "llada predicts a token at its own"),
        ("llada", cache.DKVPD(shift_type="un_right"), {}, "leave shift_type out"),
        ("llada", cache.Dual(block_start="first-column"), {}, "leave block_start out"),
        (
            "llada",
            cache.DKVGreedy(),
            {},
            "strategy='surest' is an order that depends on confidence",
        ),
        ("dream", cache.DKVGreedy(), dict(alg="entropy"), "so take the strategy random"),
    ],
)
def test_meaningless_combinations_are_refused(family, method, changes, words):
    model, params = small(family)
    with pytest.raises(ValueError, match=words):
        diffusion_generate(
            params,
            model,
            prompts(1, 3),
            key=jax.random.key(0),
            decode=DecodeConfig(gen_length=8, **changes),
            cache=method,
        )


def test_calls_that_are_no_calls():
    model, params = small("llada")
    for wrong, words in (
        (dict(record="state"), "record is 'state'; it must be a tuple of names"),
        (dict(record=("state", "all")), "it must be a tuple of names"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            untyped(diffusion_generate)(
                params,
                model,
                prompts(1, 3),
                key=jax.random.key(0),
                **dict(decode=DecodeConfig(gen_length=8)) | wrong,
            )
    with pytest.raises(ValueError, match="max_forwards is 2.7; it must be a whole number"):
        DecodeConfig(max_forwards=2.7)


def untyped(function):
    """The function without the type checks that the tests put around it."""
    return inspect.unwrap(function)


def test_a_given_order_is_followed():
    model, params = small("llada")
    order = np.random.default_rng(3).permutation(22).reshape(2, 11)

    def run(draws):
        return diffusion_generate(
            params,
            model,
            prompts(2, 3),
            key=jax.random.key(0),
            decode=DecodeConfig(gen_length=8, block_length=4, alg="random"),
            cache=cache.DKVGreedy(),
            draws=draws,
        )

    out = run(Draws(order=order))
    for start in (3, 7):
        block = slice(start, start + 4)
        np.testing.assert_array_equal(
            np.argsort(out.committed_at[:, block]), np.argsort(order[:, block])
        )
    with pytest.raises(ValueError, match=r"draws.order has shape \(2, 8\) .* \(2, 11\)"):
        run(Draws(order=order[:, 3:]))


def test_a_random_order_depends_on_the_key_of_the_row():
    model, params = small("llada")

    def run(key):
        return diffusion_generate(
            params,
            model,
            prompts(2, 3),
            key=key,
            decode=DecodeConfig(gen_length=16, alg="random"),
        ).committed_at

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()
