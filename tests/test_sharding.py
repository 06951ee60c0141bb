"""A model and a batch on several devices: everything becomes what it is on one.

A process has one CPU device, so most of this runs in a child process that has eight of them: this
file as a program, told which checks to make.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from places import CHECKPOINTS, ROOT
from tiny_models import prompts, small, small_config

from dlm_jax import DecodeConfig, cache, checkpoint, models, sharding
from dlm_jax.answers import Result
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.engine import Engine
from dlm_jax.keys import row_keys
from dlm_jax.models import Transformer

KEY = jax.random.key(7)
FIRST, SECOND = PartitionSpec("model"), PartitionSpec(None, "model")


# --- in this process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, devices, sizes",
    [
        (None, 1, (1, 1)),
        (None, 8, (8, 1)),
        ("data=4,model=2", 8, (4, 2)),
        (" model = 2 , data = 4 ", 8, (4, 2)),
        ("model=2", 8, (4, 2)),
        ("data=4", 8, (4, 1)),
        ("data=3,model=2", 8, (3, 2)),
        ("model=8", 8, (1, 8)),
    ],
)
def test_mesh_texts(text, devices, sizes):
    assert sharding.parse_mesh(text, devices) == sizes


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "it must be axes with their sizes, such as data=4,model=2"),
        ("data", "it must be axes with their sizes"),
        ("data=two", "it must be axes with their sizes"),
        ("data=4,", "it must be axes with their sizes"),
        ("data=-1", "it must be axes with their sizes"),
        ("batch=4", "the axis 'batch'; it must be one of data, model"),
        ("data=2,data=2", "the axis 'data' twice"),
        ("model=0", "model=0; it must be at least 1"),
        ("data=16", "takes 16 devices, and there are 8 here"),
        ("data=8,model=2", "takes 16 devices"),
        ("model=16", "takes 16 devices"),
        ("model=3", "model=3, which must divide the 8 devices"),
    ],
)
def test_unknown_mesh_texts(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sharding.parse_mesh(text, 8)


def test_a_mesh_of_one_device_is_nothing_new():
    model, params = small()
    decode = DecodeConfig(gen_length=2, temperature=5.0)
    opened = Checkpoint(model.config, params, None)
    rows = prompts(2, 5).tolist()
    plain = Engine(opened, decode, cache.make("none"))
    meshed = Engine(opened, decode, cache.make("none"), mesh=sharding.make_mesh())
    answers = plain.run(rows, KEY).answers
    assert all(answer.forwards == 2 for answer in answers)
    assert meshed.run(rows, KEY).answers == answers
    keys = row_keys(jax.random.key_data(KEY), 2)
    assert meshed.run(rows, keys).answers == plain.run(rows, keys).answers == answers
    with pytest.raises(ValueError, match=r"one per row, \(2,\)"):
        meshed.run(rows, jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match="cannot be watched"):
        meshed.run(rows, KEY, print)
    strange = Mesh(np.array(jax.devices()), ("x",))
    with pytest.raises(ValueError, match="they must be data, model"):
        Engine(opened, decode, cache.make("none"), mesh=strange)


def test_the_last_forward_counts_up_to_the_end_of_the_answer():
    model, params = small()
    config, decode = model.config, DecodeConfig(gen_length=4, block_length=4)
    engine = Engine(Checkpoint(config, params, None), decode, cache.make("none"))
    answer = engine._answer([1, config.eos_id, 3, 4], [2, 5, 9, 9], 10)
    assert (answer.last_forward, answer.forwards) == (3, 10)
    assert engine._answer([config.mask_id] * 4, [-1] * 4, 0).last_forward == 0


# --- in the child ---------------------------------------------------------------------------------


@functools.cache
def network(family: str, **changes) -> Checkpoint:
    if not changes:
        model, params = small(family)
        return Checkpoint(model.config, params, None)
    config = small_config(family, **changes)
    params = Transformer(config).init(jax.random.key(1), np.zeros((1, 4), np.int32))["params"]
    if "head" in params:  # peaky, as in `small`
        params["head"]["kernel"] = 8.0 * params["head"]["kernel"]
    return Checkpoint(config, params, None)


def some_rows(count: int) -> list[list[int]]:
    return [row[: 5 + i].tolist() for i, row in enumerate(prompts(count, 16))]


def run_both(
    opened: Checkpoint, method: str, mesh: str, rows: int, **settings
) -> tuple[Result, Result, Engine]:
    """The same batch on one device and on a mesh; what must be equal is checked."""
    settings = dict(gen_length=16, block_length=8) | settings
    decode = DecodeConfig.for_model(opened.config, **settings)
    alone = Engine(opened, decode, cache.make(method), history=True)
    spread = Engine(opened, decode, cache.make(method), history=True, mesh=sharding.make_mesh(mesh))
    prompt = some_rows(rows)
    if decode.infill:
        prompt = [[*row[:-i], *[opened.config.mask_id] * i] for i, row in enumerate(prompt, 1)]
    one, many = alone.run(prompt, KEY), spread.run(prompt, KEY)
    told = (method, mesh, settings)
    assert [a.ids for a in one.answers] == [a.ids for a in many.answers], told
    assert [a.forwards for a in one.answers] == [a.forwards for a in many.answers], told
    assert many.tokens_per_forward == one.tokens_per_forward and many.nfe <= one.nfe, told
    assert many.frames is not None and len(many.frames) == many.nfe, told
    assert many.frames[-1] == [a.ids for a in many.answers], told
    if not cache.METHODS[method].lockstep:  # else rows wait for those of their own part only
        assert many.answers == one.answers and many.frames == one.frames, told
        assert many.nfe == max(a.forwards for a in many.answers), told
    return one, many, spread


def programs(engine: Engine) -> list[str]:
    (compiled,) = engine._programs.values()
    return [program.as_text() for program in compiled]


def kept_heads(engine: Engine, rows: int, length: int = 48) -> set[int]:
    """Heads of the K/V buffers in the state of a program's loops."""
    loops = [line for line in programs(engine)[0].splitlines() if ") while(" in line]
    carried = "\n".join(line.split(") while(")[0] for line in loops)
    width = engine.checkpoint.config.head_dim
    return set(map(int, re.findall(rf"f32\[{rows},(\d+),{length},{width}\]", carried)))


def check_data() -> None:
    """Whole networks on every device: rows that end at different times, sampled, some of them only
    there to fill the parts."""
    opened = network("llada", num_layers=1)
    settings = dict(temperature=5.0, threshold=0.1)
    one, many, engine = run_both(opened, "none", "data=8", 5, **settings)
    (text,) = programs(engine)
    assert "replica_groups" not in text and "source_target" not in text, "parts need each other"
    assert len({a.forwards for a in many.answers}) > 1
    assert 0 < many.positions == one.positions
    again = engine.run(some_rows(5), KEY)
    assert again.compile_seconds < 0.5 and again.answers == many.answers


def check_lockstep() -> None:
    """Rows wait for those of their own part: a part is what it would be as a batch of its own."""
    opened = network("llada", num_layers=1)
    _, many, engine = run_both(opened, "dual", "data=4,model=2", 5, threshold=0.6)
    assert kept_heads(engine, 2) == {2}
    texts = programs(engine)
    assert len(texts) == 4 and all("replica_groups" in text for text in texts)
    alone = Engine(opened, engine.decode, cache.make("dual"))
    keys = row_keys(KEY, 5)
    rows = some_rows(5)
    parts = [alone.run([rows[i], rows[j]], keys[np.array([i, j])]) for i, j in [(0, 1), (2, 3)]]
    assert many.answers[:4] == [answer for part in parts for answer in part.answers]
    assert parts[0].nfe != parts[1].nfe
    assert many.nfe >= max(part.nfe for part in parts)


def check_restored(folder: str) -> None:
    """Checkpoints go straight to where the parameters belong."""
    sys.path.insert(0, str(ROOT))
    from convert.hf_to_orbax import convert

    mesh = sharding.make_mesh("data=2,model=2")
    for name in ("llada-tiny", "dream-tiny"):
        converted = Path(folder) / name
        convert(CHECKPOINTS / name, converted, None, verify_after=False)
        plain = checkpoint.load(CHECKPOINTS / name)
        where = sharding.param_shardings(plain.config, mesh)
        expected = models.flatten(plain.params)
        for directory in (CHECKPOINTS / name, converted):
            opened = checkpoint.load(directory, shardings=where)
            for path, leaf in models.flatten(opened.params).items():
                assert leaf.sharding == NamedSharding(mesh, spec(path)), path
                np.testing.assert_array_equal(leaf, expected[path])
            placed = sharding.place(opened.params, opened.config, mesh)
            for island in sharding.islands(mesh):
                seen = sharding.on_island(placed, island)
                for path, leaf in models.flatten(seen).items():
                    np.testing.assert_array_equal(leaf, expected[path])
                    there = {s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}
                    whole = models.flatten(opened.params)[path].addressable_shards
                    assert there <= {s.data.unsafe_buffer_pointer() for s in whole}, path


def spec(path: str) -> PartitionSpec:
    """Where a parameter belongs if everything can be divided."""
    layer, leaf = path.split("/")[-2:]
    if layer in ("q", "k", "v", "gate", "up", "head"):
        return FIRST if leaf == "bias" else SECOND
    return FIRST if layer in ("o", "down", "embed") else PartitionSpec()


def check_indivisible() -> None:
    """What the axis does not divide is replicated."""
    config = small_config("dream", num_heads=6, num_kv_heads=2, mlp_width=24, vocab_size=40)
    where = sharding.param_shardings(config, sharding.make_mesh("model=3,data=2"))
    divided = {path for path in models.param_shapes(config) if len(where(path).spec)}
    names = {path.split("/")[-2] + "/" + path.split("/")[-1] for path in divided}
    assert names == {"q/kernel", "q/bias", "o/kernel", "gate/kernel", "up/kernel", "down/kernel"}
    one = sharding.param_shardings(config, sharding.make_mesh("data=8"))
    assert all(one(path).is_fully_replicated for path in models.param_shapes(config))


def check_methods() -> None:
    """Every cache method, K/V divided by heads, and parts that end at different times."""
    for method in cache.METHODS:
        rule = {} if method == "dkv-greedy" else dict(threshold=0.8)
        rule["alg"] = "random" if method == "dkv-greedy" else "low_confidence"
        _, _, engine = run_both(network("llada"), method, "data=2,model=2", 5, **rule)
        assert kept_heads(engine, 3) == ({2} if cache.METHODS[method].keeps else set()), method


def check_families() -> None:
    """Heads in groups, a shift, biases, a tied head; axes that divide only some of the sizes."""
    six = network("dream", num_heads=6, num_kv_heads=2, width=24, vocab_size=42, tied_head=True)
    for opened, mesh, heads in (
        (network("dream"), "data=2,model=2", {1}),
        (network("dream"), "data=2,model=4", {1}),
        (six, "data=2,model=3", {2}),
    ):
        for method in ("dual", "dllm", "d2cache"):
            _, _, engine = run_both(opened, method, mesh, 5, threshold=0.5, alg="low_confidence")
            assert kept_heads(engine, 3) == heads, (mesh, method)


def check_settings() -> None:
    """Decodings that keep, draw or compute more."""
    for method, mesh, settings in (
        ("none", "data=2,model=2", dict(strategy="wino")),
        ("none", "data=8", dict(strategy="klass", threshold=0.5)),
        ("dual", "data=2,model=2", dict(cfg_scale=1.5, temperature=2.0, top_k=5, top_p=0.9)),
        ("dual", "data=4", dict(alg="random", temperature=1.0)),
        ("prefix", "data=2,model=2", dict(stop_until_eos=True, temperature=5.0)),
        ("none", "data=2,model=4", dict(gen_length=0, infill=True, block_length=None)),
    ):
        run_both(network("llada"), method, mesh, 5, **settings)


def check_wide() -> None:
    """Forwards that are wide enough to be taken in turns."""
    opened = network("llada", max_length=1024)
    settings = dict(gen_length=480, block_length=240, threshold=0.02)
    for method in ("none", "dual"):
        _, _, engine = run_both(opened, method, "data=2,model=2", 11, **settings)
        assert kept_heads(engine, 6, 512) == ({2} if method == "dual" else set()), method


def child(*checks: str) -> None:
    flags = dict(
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_PLATFORMS="cpu",
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *sys.path]),
    )
    done = subprocess.run(
        [sys.executable, __file__, *checks],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_eight_devices(tmp_path):
    child("data", f"restored:{tmp_path}")


@pytest.mark.slow
def test_eight_devices_in_lockstep():
    child("lockstep", "indivisible")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["methods", "families", "settings", "wide"])
def test_eight_devices_widely(check):
    child(check)


if __name__ == "__main__":
    import time

    import conftest  # noqa: F401, how tests set JAX

    for check in sys.argv[1:]:
        name, *arguments = check.split(":", 1)
        start = time.perf_counter()
        globals()[f"check_{name}"](*arguments)
        print(name, round(time.perf_counter() - start, 1), flush=True)
