"""What every cache method must keep, run over the method table and both model families.

A method that is added to the table is tested from then on; `PARAMETERS` holds values small enough
for the canvases here. Calls share their shapes, so that they share their compiled programs.
"""

import dataclasses
import re
from typing import ClassVar

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_models import prompts, small, small_config
from xla import compile_as_users_do

from dlm_jax import cache as cache_lib
from dlm_jax.cache.base import CacheMethod, StepShape
from dlm_jax.decoding import loop, turns
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate, diffusion_stream
from dlm_jax.decoding.start import start
from dlm_jax.decoding.step import step as denoise
from dlm_jax.models.base import Transformer

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
PROMPT = prompts(2, 6, seed=2)
MASK = np.array([[False, False, True, True, True, True], [True] * 6])
FAMILIES = ["llada", "dream"]
SLOW = {("none", "llada"), ("dkv-decode", "llada"), ("dkv-greedy", "dream"), ("prefix", "llada")}
SLOW |= {("dual", "dream"), ("dllm", "dream"), ("d2cache", "llada")}
SLOW |= {(name, family) for name in ("dkv-prefill", "dkv-pd") for family in FAMILIES}
"""Methods and families whose rows are compared with themselves alone only in the slow run, since a
method much like them, or the other family, is in the default run."""


@dataclasses.dataclass(frozen=True)
class EveryOther(CacheMethod):
    """Everything at even steps; at odd ones only what may be filled, with its predecessors."""

    name: ClassVar[str] = "every-other"

    def step_shapes(self, geo):
        return (StepShape(2 * geo.block), StepShape(geo.length))

    def init(self, geo):
        return jnp.zeros((), jnp.int32)

    def select(self, memory, row, geo):
        needed_L = row.eligible_L | jnp.roll(row.eligible_L, -1)
        return needed_L | (memory % 2 == 0)

    def observe(self, memory, row, obs, geo):
        return memory + 1


PARAMETERS = {
    "dkv-decode": dict(cache_steps=3),
    "dkv-greedy": dict(cache_steps=2, window_size=2),
    "dllm": dict(kp=5, kr=3, rou=0.25),
    "d2cache": dict(current_k=3, sigma=2.0, inflate_w=0),
}
"""Parameters other than the defaults."""
ALWAYS_FRESH = [
    cache_lib.DKVDecode(cache_steps=1),
    cache_lib.DKVGreedy(cache_steps=1),
    cache_lib.DLLMCache(kp=1, kr=1),
    cache_lib.Prefix(),
    cache_lib.Dual(),
]
"""Parameters with which no K/V is older than the step; the block caches with blocks of one."""


def make(name: str) -> CacheMethod:
    return cache_lib.make(name, **PARAMETERS.get(name, {}))


@pytest.fixture(params=cache_lib.METHODS)
def method(request) -> CacheMethod:
    return make(request.param)


PLANNED = {"none", "dual", "prefix", "dkv-prefill", "dkv-greedy"}
"""Methods whose step shapes follow from a schedule, with the parameters of these tests."""

one_step = jax.jit(denoise, static_argnames=("shape",))


def name_of(method: CacheMethod) -> str:
    return method.name


def some(methods, fast: set[str]) -> list:
    """All methods as parameters, of which only some belong to the default run."""
    return [
        method if method.name in fast else pytest.param(method, marks=pytest.mark.slow)
        for method in methods
    ]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def decoding(method: CacheMethod, **changes) -> DecodeConfig:
    alg = "random" if method.name == "dkv-greedy" else "low_confidence"
    return DecodeConfig(**dict(gen_length=8, block_length=4, steps=8, alg=alg) | changes)


def generate(family, method, prompt=PROMPT, mask=MASK, **arguments):
    model, params = small(family)
    arguments = (
        dict(key=KEYS, decode=decoding(method), record=("computed", "computed_layers", "history"))
        | arguments
    )
    out = diffusion_generate(params, model, prompt, mask, cache=method, **arguments)
    return jax.device_get(out)


@pytest.mark.parametrize("method", some(ALWAYS_FRESH, {"dkv-decode", "dllm", "dual"}), ids=name_of)
def test_always_fresh_equals_no_cache(method):
    decode = decoding(method, block_length=1 if isinstance(method, cache_lib.Prefix) else 4)
    plain = generate("dream", cache_lib.NoCache(), decode=decode)
    cached = generate("dream", method, decode=decode)
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_array_equal(plain.committed_at, cached.committed_at)
    np.testing.assert_array_equal(plain.computed, cached.computed)
    np.testing.assert_array_equal(plain.computed_layers, cached.computed_layers)
    np.testing.assert_allclose(plain.confidence, cached.confidence, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(
            make(name),
            family,
            id=f"{name}-{family}",
            marks=pytest.mark.slow if (name, family) in SLOW else [],
        )
        for name in cache_lib.METHODS
        for family in FAMILIES
    ],
)
def test_rows_alone_and_in_a_batch(method, family):
    """Every row: tokens, history, computed sets and confidences, whatever the layers see."""

    def check(row, pad, other, place):
        n = int(other.nfe)
        np.testing.assert_array_equal(together.tokens[row, pad:], other.tokens[place])
        np.testing.assert_array_equal(together.history[:n, row, pad:], other.history[:n, place])
        np.testing.assert_array_equal(together.computed[:n, row, pad:], other.computed[:n, place])
        np.testing.assert_array_equal(
            together.computed_layers[:n, row, :, pad:], other.computed_layers[:n, place]
        )
        np.testing.assert_allclose(
            together.confidence[row, pad:], other.confidence[place], rtol=1e-4, atol=1e-6
        )

    together = generate(family, method)
    check(0, 2, generate(family, method, PROMPT[:1, 2:], None, key=KEYS[:1]), 0)
    # The other row beside another neighbour, in the other place: the same compiled program.
    moved = np.stack([PROMPT[1], prompts(1, 6, seed=9)[0]])
    check(1, 0, generate(family, method, moved, np.ones((2, 6), bool), key=KEYS[::-1]), 0)
    assert not together.computed[:, 0, :2].any(), "padding is never computed"


def test_a_generation_is_complete_and_counted(method, family):
    """Every forward computes what it may fill, no mask is left, and the counts are those sets'."""
    out = generate(family, method)
    n, shift = int(out.nfe), int(family == "dream")
    assert (out.tokens[MASK.nonzero()] != 39).all() and (out.tokens[:, 6:] != 39).all()
    np.testing.assert_array_equal(out.tokens[:, :6], PROMPT)
    for step in range(n):
        for row in range(2):
            filled = np.flatnonzero(out.committed_at[row] == step)
            assert out.computed[step, row, filled - shift].all()
            assert len(filled), "this schedule fills something in every step"
    np.testing.assert_allclose(
        out.positions_asked[:n], out.computed_layers[:n].sum(-1).mean(-1), rtol=1e-6
    )
    assert (out.positions_computed[:n] >= out.positions_asked[:n]).all()
    assert (out.positions_asked[n:] == 0).all() and (out.positions_computed[n:] == 0).all()


@pytest.mark.parametrize(
    "method",
    some([*map(make, cache_lib.METHODS), EveryOther()], {"none", "dkv-greedy", "dllm", "d2cache"}),
    ids=name_of,
)
def test_drivers_agree(method):
    model, params = small("dream")
    decode = decoding(method)
    one = generate("dream", method)
    setup, state = start(params, model, PROMPT, MASK, key=KEYS, decode=decode, cache=method)
    assert bool(setup.plan) == (method.name in PLANNED)
    if setup.plan:
        record = ("computed", "computed_layers", "history")
        other = loop._generate(setup, state.rows.tokens_BL, record=record, planned=False)
        chex.assert_trees_all_equal(one, jax.device_get(other))
    frames = list(
        diffusion_stream(params, model, PROMPT, MASK, key=KEYS, decode=decode, cache=method)
    )
    assert len(frames) == one.nfe
    np.testing.assert_array_equal(frames[-1].tokens, one.tokens)
    np.testing.assert_array_equal(frames[-1].committed_at, one.committed_at)


def test_a_second_call_compiles_nothing(method, caplog):
    generate("dream", method)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        generate("dream", method, prompts(2, 6, seed=1))
    assert not [text for text in caplog.messages if "_generate" in text]


@pytest.mark.parametrize(
    "method",
    some([*map(make, cache_lib.METHODS), EveryOther()], {"dual", "dllm", "d2cache"}),
    ids=name_of,
)
def test_what_is_not_computed_is_not_written(method):
    """Bitwise; dLLM-Cache also keeps fresh values of the whole response, which is its method."""
    model, params = small("dream")
    setup, state = start(
        params,
        model,
        PROMPT,
        MASK,
        key=KEY,
        decode=decoding(method),
        cache=method,
        record=("computed_layers",) if method.name == "dllm" else (),
    )
    shapes = method.step_shapes(setup.geo)
    unwritten = 0
    for index in range(6):
        before = state
        state = one_step(setup, state, shapes[int(state.shape)])
        for layer, (old, new) in enumerate(zip(before.cache, state.cache, strict=True)):
            computed_BL = before.selected_BL
            if state.layer_sets is not None:
                computed_BL = state.layer_sets[layer][index]
            kept_BL = ~np.asarray(computed_BL)
            for (path, old_x), new_x in zip(
                jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True
            ):
                name, old_x, new_x = path[-1].name, np.asarray(old_x), np.asarray(new_x)
                if name == "v_BKLH" and method.name == "dllm":
                    kept_BL = kept_BL & (np.arange(14) < 6)
                if name.endswith("BKLH"):
                    old_x, new_x = old_x.swapaxes(1, 2), new_x.swapaxes(1, 2)
                np.testing.assert_array_equal(old_x[kept_BL], new_x[kept_BL])
                assert index or (old_x != new_x).any()
                unwritten += kept_BL[MASK.nonzero()[0], MASK.nonzero()[1]].sum()
    assert unwritten or method.name == "none"


@pytest.mark.parametrize(
    "method",
    [cache_lib.Prefix(), cache_lib.DKVDecode(cache_steps=3), cache_lib.D2Cache(current_k=3)],
    ids=name_of,
)
def test_fewer_step_shapes_change_no_token(method):
    outs = [
        generate("dream", method, decode=decoding(method, step_shapes=most)) for most in (1, 2, 6)
    ]
    for name in ("tokens", "committed_at", "positions_asked"):
        one, two, six = (getattr(out, name) for out in outs)
        np.testing.assert_array_equal(one, six)
        np.testing.assert_array_equal(two, six)
    computed = [out.positions_computed.sum() for out in outs]
    assert computed[0] >= computed[1] >= computed[2] and computed[0] > computed[2]


def test_finished_rows_write_nothing():
    """The first row has fewer masks to fill than the second, and is done before it."""
    model, params = small("llada")
    prompt = np.where(np.arange(6)[None] < [[0], [4]], 39, PROMPT).astype(np.int32)
    for method in (cache_lib.DLLMCache(kp=1, kr=1), cache_lib.D2Cache(current_k=3)):
        decode = decoding(method, infill=True, schedule="fixed", steps=None)
        setup, state = start(params, model, prompt, key=KEYS, decode=decode, cache=method)
        for _ in range(10):
            before = state
            state = one_step(setup, state, method.step_shapes(setup.geo)[int(state.shape)])
        assert int(before.rows.block_B[0]) == 2 and int(before.rows.block_B[1]) < 2
        first = jax.tree.map(
            lambda leaf: leaf[0], (before.cache, before.memory, before.rows.tokens_BL)
        )
        chex.assert_trees_all_equal(
            first,
            jax.tree.map(lambda leaf: leaf[0], (state.cache, state.memory, state.rows.tokens_BL)),
        )


@pytest.mark.parametrize("name", ["dual", pytest.param("dkv-decode", marks=pytest.mark.slow)])
def test_lockstep_changes_no_token(name):
    """Rows with different numbers of masks leave their blocks at different times."""
    prompt = np.where(np.arange(6)[None] < [[0], [4]], 39, PROMPT).astype(np.int32)
    outs = []
    for lockstep in (True, False):
        decode = decoding(make(name), infill=True, schedule="fixed", steps=None, lockstep=lockstep)
        outs.append(generate("dream", make(name), prompt, None, decode=decode))
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    assert (outs[0].committed_at != outs[1].committed_at).any()
    assert (outs[0].tokens != 39).all()


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "dual",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dkv-greedy", "d2cache", "dllm")),
    ],
)
def test_an_interrupted_generation_can_be_resumed(name, tmp_path):
    method = make(name)
    model, params = small("dream")
    whole = generate("dream", method)
    part = diffusion_generate(
        params,
        model,
        PROMPT,
        MASK,
        key=KEYS,
        decode=decoding(method, max_forwards=3),
        cache=method,
        record=("computed", "computed_layers", "history", "state"),
    )
    assert int(part.nfe) == 3 and (part.tokens == 39).any()
    if method.name == "none":
        bare = part.state._replace(layer_sets=None)
        with pytest.raises(ValueError, match="'computed_layers', which the state lacks"):
            generate("dream", method, state=bare)
        for other in (
            dict(prompt=PROMPT[:1], mask=MASK[:1], key=KEYS[:1]),
            dict(prompt=PROMPT[::-1].copy()),
            dict(decode=decoding(method, steps=4)),
            dict(method=make("d2cache")),
        ):
            with pytest.raises(ValueError, match="The state is not of this generation"):
                generate("dream", other.pop("method", method), state=part.state, **other)
    # Written to disk and read back, in two formats.
    state = jax.tree.map(lambda leaf: leaf + jnp.zeros_like(leaf), part.state)
    state = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    if method.name in ("dual", "dllm", "d2cache"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            state = checkpointer.restore(tmp_path / "state", state)
    resumed = diffusion_generate(
        params,
        model,
        PROMPT,
        MASK,
        key=KEYS,
        decode=decoding(method),
        cache=method,
        record=("computed", "computed_layers", "history"),
        state=state,
    )
    chex.assert_trees_all_equal(resumed, whole)


@pytest.mark.parametrize("name", ["none", pytest.param("d2cache", marks=pytest.mark.slow)])
def test_vmap_over_prompts_and_keys(name):
    method = make(name)
    model, params = small("llada")
    decode = decoding(method, temperature=0.7)
    batches, keys = prompts(3, 6).reshape(3, 1, 6), jax.random.split(KEY, 3)

    def one(prompt, key):
        out = diffusion_generate(params, model, prompt, key=key, decode=decode, cache=method)
        return out.tokens, out.nfe

    tokens, nfe = jax.vmap(one)(batches, keys)
    single = jax.jit(one)
    for i in range(3):
        want = single(batches[i], keys[i])
        np.testing.assert_array_equal(tokens[i], want[0])
        assert nfe[i] == want[1]


def test_donated_prompt_and_state():
    method = make("dual")
    model, params = small("llada")
    stop = decoding(method, max_forwards=3)

    def run(prompt, state, decode):
        return diffusion_generate(
            params,
            model,
            prompt,
            key=KEY,
            decode=decode,
            cache=method,
            record=("state",),
            state=state,
        )

    started = jax.jit(lambda prompt: run(prompt, None, stop))(PROMPT)
    resume = jax.jit(lambda prompt, state: run(prompt, state, stop).state, donate_argnums=1)
    again = resume(PROMPT, started.state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(started.state.cache))
    assert int(again.nfe) == 3


@pytest.fixture
def in_turns(monkeypatch):
    """Forwards over whole rows take them two at a time."""
    monkeypatch.setattr(turns, "WIDE", 0)
    monkeypatch.setattr(turns, "POSITIONS", 2 * 27)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("family", "method", "cfg_scale"),
    [
        pytest.param("llada", make("dllm"), 0.5, id="dllm-guided", marks=pytest.mark.slow),
        pytest.param("dream", make("dual"), 0.0, id="dual-dream"),
        *(
            pytest.param("llada", make(name), 0.0, id=name, marks=pytest.mark.slow)
            for name in cache_lib.METHODS
        ),
    ],
)
def test_turns_change_nothing(family, method, cfg_scale, monkeypatch, request):
    """Rows that end at different times, two of them equal, with padding."""
    prompt = np.concatenate([PROMPT, PROMPT[:1], prompts(2, 6, seed=5)])
    mask = np.concatenate([MASK, MASK[:1], np.ones((2, 6), bool)])
    eos_id = {"llada": 38, "dream": 4}[family]  # tokens that these models happen to choose
    decode = decoding(method, stop_until_eos=True, eos_id=eos_id, cfg_scale=cfg_scale)
    given = dict(prompt=prompt, mask=mask, key=jax.random.split(KEY, 5), decode=decode)
    whole = generate(family, method, **given)
    request.getfixturevalue("in_turns")
    monkeypatch.setattr(turns, "POSITIONS", 2 * 14)
    parts = generate(family, method, **given)
    assert len(set(whole.steps.tolist())) > 1
    chex.assert_trees_all_close(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("wide", ["whole", "in_turns"])
@pytest.mark.parametrize(
    "method",
    some(map(make, cache_lib.METHODS), {"dual"}),
    ids=name_of,
)
def test_no_cache_is_copied_inside_a_loop(method, wide, request):
    """Counts copies of the cache's shape in the optimised program; no activation has that shape.

    Only outside the loops may there be some, where the buffers are made.
    """
    if wide == "in_turns":
        request.getfixturevalue(wide)
    config = small_config("dream", width=20, head_dim=6, max_length=128)
    model = Transformer(config)
    params = model.init(KEY, np.zeros((1, 4), np.int32))["params"]
    decode = decoding(method, gen_length=16, block_length=8, steps=16)

    def run(params, prompt):
        return diffusion_generate(params, model, prompt, key=KEY, decode=decode, cache=method)

    lowered = jax.jit(run).lower(params, prompts(3, 11))
    text = compile_as_users_do(lowered).as_text()
    shapes = [f"f32[3,{config.num_kv_heads},27,6]"]
    if method.name == "dllm":
        shapes.append("f32[3,27,20]")
    for shape in shapes:
        assert method.name == "none" or shape in text
        assert _copies(text, shape) == []


def _copies(text: str, shape: str) -> list[str]:
    """Instructions that copy a buffer of the given shape, outside the entry computation.

    A fusion counts if it is fed such a buffer and ends in a copy.
    """
    found = []
    for computation in re.split(r"\n(?=\S)", text):
        head, *body = computation.split("\n")
        if head.startswith("ENTRY"):
            continue
        fused = "fused_computation" in head
        if fused and f": {shape}" not in head:
            continue
        found += [
            line.strip()
            for line in body
            if re.search(re.escape(shape) + r"\S* copy(-start)?\(", line)
        ]
    return found


def test_copies_are_found():
    """The counter above, on a loop that must copy its buffer: both values of it are kept."""

    def run(x):
        def body(_, pair):
            old, new = pair
            return new, new.at[1, 2].set(old[0, 0] + 1.0)

        return jax.lax.fori_loop(0, 5, body, (x, x))

    text = compile_as_users_do(jax.jit(run).lower(jnp.ones((3, 43, 7)))).as_text()
    assert _copies(text, "f32[3,43,7]")


def test_methods_by_name():
    assert cache_lib.make("none") == cache_lib.NoCache()
    assert cache_lib.make("dllm", kp=3) == cache_lib.DLLMCache(kp=3)
    for name in ("fast", "None"):
        with pytest.raises(ValueError, match="must be one of none, dkv-decode"):
            cache_lib.make(name)
    with pytest.raises(ValueError, match="no argument 'kp'; it takes no arguments"):
        cache_lib.make("none", kp=3)
    with pytest.raises(ValueError, match="no argument 'steps'; it takes kp, kr, rou"):
        cache_lib.make("dllm", steps=3)
