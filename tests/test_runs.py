"""Plans: which step shapes a generation goes through, where the schedule alone decides."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import prompts, small

from dlm_jax import cache
from dlm_jax.cache import runs
from dlm_jax.cache.runs import Repeat, Run
from dlm_jax.decoding import loop
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.start import start
from dlm_jax.decoding.state import Draws

parts = st.recursive(
    st.builds(Run, st.integers(0, 3), st.integers(0, 4)),
    lambda inner: st.builds(Repeat, st.lists(inner, max_size=3).map(tuple), st.integers(0, 3)),
    max_leaves=8,
)


def slowly(part: Run | Repeat) -> list[int]:
    once = [part.shape] if isinstance(part, Run) else [x for p in part.parts for x in slowly(p)]
    return once * part.count


@settings(deadline=None)
@given(st.lists(parts, max_size=3))
def test_a_plan_is_its_steps(given_parts):
    found = runs.present(given_parts)
    assert runs.shapes(found) == [x for part in given_parts for x in slowly(part)]
    assert runs.length(found) == len(runs.shapes(found))

    def check(parts):
        for part in parts:
            assert part.count > 0
            if isinstance(part, Repeat):
                assert part.parts
                check(part.parts)

    check(found)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (cache.make("none"), "0" * 12),
        (cache.make("dual"), "1000" * 3),
        (cache.make("prefix"), "3222" + "3111" + "3000"),
        (cache.make("dkv-prefill"), "1" + "0" * 11),
        (cache.make("dkv-greedy", cache_steps=3, window_size=0), "1001" * 3),
        (cache.make("dllm", kp=6, kr=3), "300200" * 2),
        (cache.make("dllm", kp=8, kr=2), ""),  # eight bodies
        (cache.make("dllm", kp=5, kr=2), ""),
        (cache.make("dkv-decode"), ""),
        (cache.make("d2cache"), ""),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_methods_plan(family, method, wanted):
    model, params = small(family)
    decode = DecodeConfig(gen_length=12, block_length=4, steps=12).for_cache(method)
    setup, _ = start(
        params, model, prompts(2, 20), key=jax.random.key(0), decode=decode, cache=method
    )
    assert "".join(map(str, runs.shapes(setup.plan))) == wanted
    if wanted:
        assert runs.length(setup.plan) == setup.most_forwards


@pytest.mark.parametrize(
    "changes",
    [
        dict(stop_until_eos=True),
        dict(threshold=0.9),
        dict(max_forwards=5),
        dict(infill=True, leave_early=False),
        dict(ban_mask=False, leave_early=False),
        dict(leave_early=False),
        dict(alg="origin", schedule="timestep"),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_hangs_on_data_is_not_planned(changes):
    model, params = small()
    sizes = dict(gen_length=8, block_length=4) | ({} if "threshold" in changes else dict(steps=8))
    decode, method = DecodeConfig(**sizes, **changes), cache.make("dual")
    setup, _ = start(
        params, model, prompts(2, 5), key=jax.random.key(0), decode=decode, cache=method
    )
    assert setup.plan == ()


def test_given_transfers_are_not_planned():
    model, params = small()
    decode = DecodeConfig(gen_length=8, block_length=4, steps=8, alg_temp=0.5)
    given_TBL = np.zeros((8, 2, 13), bool)
    setup, _ = start(
        params,
        model,
        prompts(2, 5),
        key=jax.random.key(0),
        decode=decode,
        cache=cache.make("dual"),
        draws=Draws(transfer=given_TBL),
    )
    assert setup.plan == ()


@pytest.mark.parametrize("most, planned", [(6, False), (4, False), (32, True)])
def test_no_more_bodies_than_step_shapes(most, planned):
    model, params = small()
    decode = DecodeConfig(gen_length=32, block_length=4, steps=32, step_shapes=most)
    setup, _ = start(
        params,
        model,
        prompts(1, 5),
        key=jax.random.key(0),
        decode=decode,
        cache=cache.make("prefix"),
    )
    assert bool(setup.plan) == planned
    assert runs.bodies(setup.plan) <= most


def test_a_subclass_that_selects_otherwise_has_no_plan():
    @dataclasses.dataclass(frozen=True)
    class Wider(cache.Dual):
        def select(self, memory, row, geo):
            return super().select(memory, row, geo) | row.masked_L

    @dataclasses.dataclass(frozen=True)
    class Renamed(cache.Dual):
        name = "renamed"

    geo = DecodeConfig(gen_length=8, block_length=4).geometry(prompt=8, shift=0)
    assert cache.Dual().plan(geo, 4) == Renamed().plan(geo, 4) != ()
    assert Wider().plan(geo, 4) == ()


STEPS = {"fewer": 2, "as many": 4, "more": 6}
"""Denoising steps of a block of four."""


@pytest.mark.parametrize(
    "steps",
    [
        "as many",
        pytest.param("fewer", marks=pytest.mark.slow),
        pytest.param("more", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("dual", "dream"),
        ("prefix", "llada"),
        ("dkv-prefill", "dream"),
        ("dkv-greedy", "llada"),
        ("dllm", "dream"),
    ],
)
def test_a_planned_generation_is_the_same(name, family, steps):
    """As the driver gives that looks after every step which shape does for all rows."""
    arguments = dict(dllm=dict(kp=4, kr=2), **{"dkv-greedy": dict(cache_steps=3)})
    method, (model, params) = cache.make(name, **arguments.get(name, {})), small(family)
    schedule = "timestep" if steps == "more" else "even"
    decode = DecodeConfig(
        gen_length=8, block_length=4, steps=2 * STEPS[steps], schedule=schedule
    ).for_cache(method)
    prompt, mask = prompts(2, 5), np.arange(5)[None] >= [[2], [0]]
    setup, state = start(
        params, model, prompt, mask, key=jax.random.key(3), decode=decode, cache=method
    )
    assert setup.plan
    record = ("computed", "computed_layers", "history")
    one, other = (
        jax.device_get(loop._generate(setup, state.rows.tokens_BL, record=record, planned=planned))
        for planned in (True, False)
    )
    for field in ("tokens", "committed_at", "nfe", "steps", "positions_asked", *record):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    # Every planned shape holds what the other driver found to be needed.
    shapes = method.step_shapes(setup.geo)
    pairs = zip(one.shape[: one.nfe], other.shape[: other.nfe], strict=True)
    for planned, needed in ((shapes[i], shapes[j]) for i, j in pairs):
        assert planned.capacity >= needed.capacity and planned.mode & needed.mode == needed.mode
