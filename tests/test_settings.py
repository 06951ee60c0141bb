"""Settings as pytrees: their leaves are numbers that may change, the rest is structure."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as rounds
from hypothesis import strategies as st
from tiny_models import prompts, small

from dlm_jax.decoding import settings
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.decoding.strategies import STRATEGIES, Factor, Klass, Random, Strategy, Threshold, Wino

NUMBERS = (0.5, 0.75)
"""Two values that any number may have; a whole one may have one and two."""
ALONE = DecodeConfig(gen_length=8)


def leaves_of(kind: type) -> list[dataclasses.Field]:
    """The fields whose metadata say that they are leaves."""
    return [field for field in dataclasses.fields(kind) if settings._DTYPE in field.metadata]


def values_of(field: dataclasses.Field) -> tuple[Any, Any]:
    """Two values of a field that is a leaf, or holds settings of its own."""
    dtype = field.metadata[settings._DTYPE]
    if dtype is None:
        return Threshold(0.5), Threshold(0.75)
    return (1, 2) if dtype == jnp.int32 else NUMBERS


def example(kind: type[Strategy]) -> Strategy:
    """One of its kind, with every leaf given."""
    return kind(**{field.name: values_of(field)[0] for field in leaves_of(kind)})


LEAVES = [(ALONE, field) for field in leaves_of(DecodeConfig)] + [
    (example(kind), field) for kind in STRATEGIES.values() for field in leaves_of(kind)
]
"""Settings, and a field of theirs that is a leaf, or holds some."""
every_leaf = pytest.mark.parametrize(
    ("holder", "field"),
    [pytest.param(*leaf, id=f"{type(leaf[0]).__name__}.{leaf[1].name}") for leaf in LEAVES],
)
CONFIGS = [ALONE, DecodeConfig(gen_length=8, temperature=0.5, top_k=3, sigma=2.0, max_forwards=5)]
CONFIGS += [DecodeConfig(gen_length=8, strategy=example(kind)) for kind in STRATEGIES.values()]
every_config = pytest.mark.parametrize(
    "decode", CONFIGS, ids=lambda decode: f"{decode.strategy.name}, {decode.temperature}"
)


@every_leaf
def test_two_values_of_a_leaf_are_one_structure(holder, field):
    one, two = (dataclasses.replace(holder, **{field.name: value}) for value in values_of(field))
    assert one != two
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert jax.tree.leaves(one) != jax.tree.leaves(two)
    # Within a configuration as well, and as arrays.
    if isinstance(holder, Strategy):
        one, two = (dataclasses.replace(ALONE, strategy=strategy) for strategy in (one, two))
        assert jax.tree.structure(one) == jax.tree.structure(two)
    arrays = jax.tree.structure(settings.traced(one))
    assert arrays == jax.tree.structure(settings.traced(two)) == jax.tree.structure(one)


@every_leaf
def test_a_leaf_is_named_by_its_path(holder, field):
    chosen = dataclasses.replace(holder, **{field.name: values_of(field)[0]})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(chosen)]
    assert any(path.startswith(f".{field.name}") for path in paths)


@every_leaf
def test_a_leaf_that_is_off_is_another_structure(holder, field):
    if field.default is None and field.metadata[settings._DTYPE] is not None:
        on = dataclasses.replace(holder, **{field.name: values_of(field)[0]})
        off = dataclasses.replace(holder, **{field.name: None})
        assert jax.tree.structure(on) != jax.tree.structure(off)
        assert len(jax.tree.leaves(on)) == len(jax.tree.leaves(off)) + 1


def test_what_the_documentation_calls_leaves_are_those():
    told = "temperature top_p top_k min_p alg_temp sigma clip_alpha cfg_scale max_forwards strategy"
    assert {field.name for field in leaves_of(DecodeConfig)} == set(told.split())


@pytest.mark.parametrize(
    "changes",
    [dict(gen_length=4), dict(alg="entropy"), dict(suppress=(3,)), dict(strategy=Wino())],
    ids=str,
)
def test_everything_else_is_structure(changes):
    assert jax.tree.structure(ALONE) != jax.tree.structure(dataclasses.replace(ALONE, **changes))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Factor(1.0), Factor(1.0, spare_last=True)),
        (Klass(Threshold(0.9)), Klass(Threshold(0.9), kl_history_length=3)),
        (Klass(Threshold(0.9)), Klass(Factor(0.9))),
        (Random(), Random(redrawn=True)),
    ],
)
def test_so_is_what_shapes_a_strategy(one, two):
    assert jax.tree.structure(one) != jax.tree.structure(two)


@every_config
def test_a_configuration_round_trips(decode):
    leaves, structure = jax.tree.flatten(decode)
    again = jax.tree.unflatten(structure, leaves)
    assert again == decode and again is not decode and hash(again) == hash(decode)
    assert jax.tree.structure(again) == structure and hash(structure) is not None
    for field in dataclasses.fields(decode):
        assert getattr(again, field.name) == getattr(decode, field.name)


@every_config
def test_rebuilding_does_not_validate(decode):
    """JAX puts anything in the place of leaves: objects, None, what a user may not say."""
    leaves, structure = jax.tree.flatten(decode)
    for anything in (-7.0, "text", object(), float("nan")):
        again = jax.tree.unflatten(structure, [anything] * len(leaves))
        assert jax.tree.leaves(again) == [anything] * len(leaves)
    assert jax.tree.leaves(jax.tree.map(lambda leaf: -leaf, decode)) == [-leaf for leaf in leaves]


@every_config
def test_traced_are_arrays_of_the_right_dtype(decode):
    told = settings.traced(decode)
    assert type(told) is DecodeConfig and type(told.strategy) is type(decode.strategy)
    for holder, plain in ((told, decode), (told.strategy, decode.strategy)):
        for field in dataclasses.fields(holder):
            value, dtype = getattr(holder, field.name), field.metadata.get(settings._DTYPE)
            if dtype is None:
                if settings._DTYPE not in field.metadata:
                    assert value == getattr(plain, field.name)
            elif getattr(plain, field.name) is None:
                assert value is None
            else:
                assert isinstance(value, jax.Array) and value.shape == ()
                whole = field.name in ("top_k", "max_forwards")
                assert value.dtype == dtype == (jnp.int32 if whole else jnp.float32)
                assert value == getattr(plain, field.name)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(told))


def test_traced_numbers_may_be_traced_already():
    @jax.jit
    def made(temperature: jax.Array, threshold: jax.Array) -> DecodeConfig:
        # Nothing is known of them, so nothing is refused, and what 0 switches off is on.
        decode = DecodeConfig(gen_length=8, temperature=temperature, threshold=threshold)
        assert decode.temperature is not None
        return settings.traced(decode)

    told = made(0.0, float("nan"))
    assert told.temperature == 0 and jnp.isnan(told.strategy.threshold)
    assert told.strategy.threshold.dtype == jnp.float32


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), jnp.float32(0)], ids=repr)
@pytest.mark.parametrize("name", ["temperature", "alg_temp", "cfg_scale"])
def test_zero_is_off(name, zero):
    off = DecodeConfig(gen_length=8, **{name: zero})
    assert getattr(off, name) is None and off == ALONE and hash(off) == hash(ALONE)
    assert getattr(DecodeConfig(gen_length=8, **{name: 0.25}), name) == 0.25


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), jnp.float32(1)], ids=repr)
def test_a_nucleus_of_everything_is_off(one):
    assert DecodeConfig(gen_length=8, top_p=one) == ALONE
    assert DecodeConfig(gen_length=8, top_p=0.999).top_p == 0.999


def test_short_forms_are_those_of_strategies():
    for name, kind in ((kind.shorthand, kind) for kind in STRATEGIES.values() if kind.shorthand):
        short = DecodeConfig(gen_length=8, **{name: 0.5})
        assert short == DecodeConfig(gen_length=8, strategy=kind(0.5))
        assert name not in {field.name for field in dataclasses.fields(short)}
    for name in (name for name, kind in STRATEGIES.items() if kind.as_alg):
        short = DecodeConfig(gen_length=8, alg=name)
        assert short == DecodeConfig(gen_length=8, strategy=name)
        assert (short.strategy, short.alg) == (STRATEGIES[name](), ALONE.alg)


# --- what a number may be -------------------------------------------------------------------------

NO_NUMBERS = [True, False, np.True_, jnp.asarray(True), np.asarray(False), "0.5", "nan", (0.5,), {}]
NO_NUMBERS += [None, 1j, jnp.ones(2), np.ones((1, 1))]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value):
    for check in (
        lambda: settings.check_number("size", value, "be small"),
        lambda: settings.check_number("size", value, "be small", least=0, most=2),
        lambda: settings.check_confidence("size", value),
    ):
        with pytest.raises(ValueError, match=r"^size is .*; it must be a number\.$") as caught:
            check()
        assert repr(value) in str(caught.value)
    with pytest.raises(
        ValueError, match="^size is .*; it must be a whole number from 0 on"
    ) as told:
        settings.check_whole("size", value, 0)
    assert str(value) in str(told.value)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32, np.asarray], ids=repr)
def test_numbers_that_are_not_finite_are_refused_unless_the_limit_is_not(kind):
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"size is -?(nan|inf); it must be a confidence\."):
            settings.check_confidence("size", kind(value))
        with pytest.raises(ValueError, match=r"size is -?(nan|inf); it must be a whole number"):
            settings.check_whole("size", kind(value), 0)
        for least in (0, -float("inf")):
            if value == float("inf") or (value < 0 and least < 0):
                settings.check_number("size", kind(value), "be", least=least, most=float("inf"))
            else:
                with pytest.raises(ValueError, match=r"size is -?(nan|inf); it must be so\."):
                    settings.check_number("size", kind(value), "be so", least=least, most=np.inf)


@rounds(max_examples=100, deadline=None, derandomize=True)
@given(
    value=st.integers(-3, 3) | st.integers(-6, 6).map(lambda n: n / 2),
    limits=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("least", "above", "most"), st.integers(-3, 3))
    ),
    kind=st.sampled_from([lambda x: x, np.float32, jnp.float32]),
)
def test_limits(value, limits, kind):
    within = value >= limits.get("least", -9) and value <= limits.get("most", 9)
    if within and value > limits.get("above", -9):
        settings.check_number("size", kind(value), "be so", **limits)
    else:
        with pytest.raises(ValueError, match=rf"^size is {float(value):g}(\.0)?; it must be so\.$"):
            settings.check_number("size", kind(value), "be so", **limits)


def test_whole_numbers():
    for value in (2, 5, np.int64(2), np.int32(9), jnp.int32(2), np.asarray(3), np.uint8(7)):
        settings.check_whole("size", value, 2)
    for value in (1, -2, 2.0, 2.5, np.float32(3), jnp.float32(3), jnp.int32(1), np.int64(0)):
        with pytest.raises(ValueError, match=rf"^size is {value}; .* a whole number from 2 on\.$"):
            settings.check_whole("size", value, 2)


def test_none_is_off_where_it_may_be_and_what_is_traced_is_taken_as_it_is():
    def check(value: Any, **optional: bool) -> None:
        settings.check_number("size", value, "be small", above=3, most=2, **optional)
        settings.check_whole("size", value, 10**9, **optional)

    check(None, optional=True)
    jax.eval_shape(check, jnp.float32(7))
    jax.eval_shape(lambda value: settings.check_confidence("size", value), jnp.float32(7))
    for wrong in (True, "7"):  # what is something must be a number all the same
        with pytest.raises(ValueError, match="it must be a number"):
            check(wrong, optional=True)
    assert not settings.concrete(None) and settings.concrete(0.0)
    assert not settings.positive(None) and not settings.positive(0.0) and settings.positive(0.1)

    @jax.jit
    def known(x: jax.Array) -> jax.Array:
        assert settings.positive(x) and not settings.concrete(x)
        return x

    known(0.0)


@pytest.mark.parametrize("value", [None, 0, 1, "true", np.True_, jnp.asarray(True), 0.5], ids=repr)
def test_a_flag_is_true_or_false(value):
    settings.check_flag("flag", True)
    settings.check_flag("flag", False)
    with pytest.raises(ValueError, match=r"^flag is .*; it must be true or false\.$") as caught:
        settings.check_flag("flag", value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "name", "value", "wanted"),
    [
        (Factor(1.0), "spare_last", 1, "true or false"),
        (Random(), "redrawn", None, "true or false"),
        (Klass(Threshold(0.9)), "kl_history_length", 1.5, "a whole number from 1 on"),
        (Klass(Threshold(0.9)), "kl_history_length", float("inf"), "a whole number from 1 on"),
        (Klass(Threshold(0.9)), "kl_history_length", "two", "a whole number from 1 on"),
    ],
)
def test_strategies_look_at_the_kind_of_what_shapes_them(given, name, value, wanted):
    """Of a user's, whose constructors no type checker watches."""
    changed = object.__new__(type(given))
    for field in dataclasses.fields(given):
        object.__setattr__(changed, field.name, getattr(given, field.name))
    object.__setattr__(changed, name, value)
    with pytest.raises(ValueError, match=f"^{name} is '?{value}'?; it must be {wanted}"):
        changed.__post_init__()


# --- programs -------------------------------------------------------------------------------------

ON = {"token_freq": np.random.default_rng(0).dirichlet(np.ones(40))}
EVERYTHING = DecodeConfig(
    gen_length=4,
    **{
        field.name: values_of(field)[0]
        for field in leaves_of(DecodeConfig)
        if field.metadata[settings._DTYPE] is not None
    },
)
"""Every number of a configuration is on."""
PROGRAMS = [EVERYTHING]
PROGRAMS += [
    DecodeConfig(gen_length=4, strategy=example(kind))
    for kind in STRATEGIES.values()
    if jax.tree.leaves(example(kind))
]


@pytest.mark.parametrize("decode", PROGRAMS, ids=lambda decode: decode.strategy.name)
def test_another_value_of_any_leaf_compiles_nothing(decode, caplog):
    model, params = small("llada")
    prompt, key = prompts(1, 4), jax.random.key(0)
    freq = ON if decode is EVERYTHING else {}

    def run(decode: DecodeConfig) -> None:
        diffusion_generate(params, model, prompt, key=key, decode=decode, **freq)

    run(decode)
    leaves, structure = jax.tree.flatten(decode)
    assert len(leaves) >= len(leaves_of(DecodeConfig)) - 1 if decode is EVERYTHING else leaves
    for i, leaf in enumerate(leaves):
        other = leaf + 1 if isinstance(leaf, int) else 0.9 * leaf
        with jax.log_compiles(), caplog.at_level("WARNING"):
            run(jax.tree.unflatten(structure, [*leaves[:i], other, *leaves[i + 1 :]]))
        assert not [text for text in caplog.messages if "Finished XLA compilation" in text], i


def test_the_programs_cover_every_leaf():
    told = {
        jax.tree_util.keystr(path[-1:]).lstrip(".")
        for decode in PROGRAMS
        for path, _ in jax.tree_util.tree_leaves_with_path(decode)
    }
    kinds = (DecodeConfig, *STRATEGIES.values())
    numbers = {
        field.name
        for kind in kinds
        for field in leaves_of(kind)
        if field.metadata[settings._DTYPE] is not None
    }
    assert told == numbers


def test_several_values_can_be_mapped_over():
    """As docs/architecture.md says."""
    model, params = small("llada")

    def run(threshold):
        decode = DecodeConfig(gen_length=8, block_length=4, threshold=threshold)
        out = diffusion_generate(params, model, prompts(1, 4), key=jax.random.key(0), decode=decode)
        return out.tokens, out.nfe

    values = (0.2, 0.9)
    tokens, nfe = jax.vmap(run)(jnp.asarray(values))
    for i, value in enumerate(values):
        alone = run(value)
        np.testing.assert_array_equal(tokens[i], alone[0])
        assert nfe[i] == alone[1]
    assert nfe[0] < nfe[1]
