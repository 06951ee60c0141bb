"""The benchmark: what it makes of its measurements, its refusals, and what it writes."""

import contextlib
import json

import bench
import bench_report
import bench_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import trace_summary
from bench_report import Case, Times
from counted_flops import BLOCK, DECODE, G, L, P, flops_by_hand
from roofline import Ceilings, Product
from tiny_models import prompts, small_config

from dlm_jax import cache as cache_lib
from dlm_jax import models
from dlm_jax.decoding.loop import GenerateOutput
from dlm_jax.decoding.step import step
from dlm_jax.models import Transformer

SMALL = [
    *("--preset", "small", "--prompt-length", str(P), "--gen-length", str(G)),
    *("--block-length", str(BLOCK), "--repeat", "2", "--ceilings", "0.1,0.02"),
]


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "small", small_config(num_layers=1))


def caches(text: str) -> dict[str, cache_lib.CacheMethod]:
    return bench.make_caches(bench.parse(["--caches", text]).caches)


def test_caches_by_name():
    assert caches("dual,dllm:kp=9+rou=0.5") == {
        "none": cache_lib.NoCache(),
        "dual": cache_lib.Dual(),
        "dllm:kp=9+rou=0.5": cache_lib.DLLMCache(kp=9, rou=0.5),
    }
    assert list(caches("all")) == list(cache_lib.METHODS)
    assert list(caches("dllm:kp=9,all,none")) == [
        "none",
        "dllm:kp=9",
        *[name for name in cache_lib.METHODS if name != "none"],
    ]


def test_prompts_hold_no_mask():
    config = small_config(vocab_size=4, mask_id=1, eos_id=0, pad_id=0)
    assert set(np.unique(bench.random_prompts(config, 2, 50, seed=0))) == {0, 2, 3}


def test_a_method_that_must_know_the_order_is_measured_in_a_random_one():
    args = bench.parse([*SMALL, "--caches", "dkv-greedy,dual"])
    config = models.PRESETS["small"]
    shapes = random_weights.shapes(config, jnp.dtype("float32"))
    ((_, cases),) = bench.plan(args, config, shapes)
    assert [(case.label, case.decode.strategy.name) for case in cases] == [
        ("none", "surest"),
        ("dkv-greedy", "random"),
        ("dual", "surest"),
    ]


def test_weights():
    config = small_config("dream", width=64, mlp_width=96, head_dim=16)
    dtype = jnp.dtype("bfloat16")
    params = random_weights.make(config, dtype, jax.random.key(0))
    shapes = random_weights.shapes(config, dtype)
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {dtype}
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in models.flatten(params).items()}
    assert (flat["final_norm/scale"] == 1).all() and not flat["blocks_0/q/bias"].any()
    for layer, inputs in dict(q=64, k=64, o=4 * 16, gate=64, down=96).items():
        kernel = flat[f"blocks_1/{layer}/kernel"]
        assert kernel.std() == pytest.approx(inputs**-0.5, rel=0.1), layer
        assert (kernel != flat[f"blocks_0/{layer}/kernel"]).mean() > 0.9
    assert flat["head/kernel"].std() == pytest.approx(1 / 8, rel=0.1)


def test_large_weights_are_drawn_in_pieces(monkeypatch):
    monkeypatch.setattr(random_weights, "_PIECE", 2**8)
    shape, dtype = (96, 512), jnp.dtype("float32")
    lowered = random_weights.normal.lower(jax.random.key(0), shape, dtype, 0.5)
    stats = lowered.compile().memory_analysis()
    assert stats.temp_size_in_bytes < stats.output_size_in_bytes / 4
    drawn = random_weights.normal(jax.random.key(0), shape, dtype, 0.5)
    assert drawn.std() == pytest.approx(0.5, rel=0.05)
    assert len(np.unique(drawn)) > 0.9 * drawn.size  # no piece is the copy of another


OUT = GenerateOutput(
    tokens=np.zeros((2, L), np.int32),
    committed_at=np.zeros((2, L), np.int32),
    confidence=np.zeros((2, L), np.float32),
    nfe=np.int32(3),
    steps=np.int32([3, 3]),
    not_finite_at=np.int32([-1, -1]),
    history=None,
    positions_asked=np.float32([[10, 10], [3, 4], [2, 1], [0, 0]]),
    positions_computed=np.float32([[10, 10], [4, 4], [4, 4], [0, 0]]),
    shape=np.int32([1, 0, 0, -1]),
    computed=None,
    computed_layers=None,
    state=None,
)
"""Two rows, three forwards out of at most four: 10, 4 and 4 query slots for what was asked."""
STEPS = [[Product(10**9, 0, 10**6)], [Product(6 * 10**9, 0, 0)]]
"""A cached step, here bound by bytes, and a full one, bound by FLOPs."""
CEILINGS = Ceilings(flops=24e9, bytes=4e6)
CASE = Case("x", cache_lib.Dual(), DECODE, STEPS)


def test_a_row_of_the_table():
    times = Times(whole=[7.0, 3.2, 1.0], one=[1.2, 0.9, 1.3], none=[0.2, 0.1, 0.3])
    row = bench_report.describe(CASE, OUT, times, CEILINGS)
    assert row["forwards_by_positions"] == {"4": 2, "10": 1}
    assert row["positions_per_token"] == 18 / G
    assert row["waste"] == 3 / 18
    assert row["gflop_per_token"] == 8 / G
    assert row["seconds"] == 3.2 and row["ms_per_step"] == pytest.approx(3200 / 3)
    assert row["tokens_per_s"] == 2 * G / 3.2
    assert (row["full_forwards"], row["cached_steps"]) == (1, 2)
    assert row["ms_full"] == pytest.approx(1000)
    assert row["ms_cached"] == pytest.approx(1000)  # 3.2 s less what stands around, less a full one
    assert row["ms_full_limit"] == pytest.approx(500) == row["ms_cached_limit"]
    assert row["limit_fraction"] == pytest.approx(1.5 / 3.2)
    assert row["limit_tokens_per_s"] == pytest.approx(2 * G / 1.5)
    baseline = row | {"tokens_per_s": row["tokens_per_s"] / 4, "gflop_per_token": 3.0}
    compared = bench_report.compare(row, baseline)
    assert compared["speedup"] == 4 and compared["predicted_speedup"] == 3
    assert compared["measured_to_predicted"] == 4 / 3


def test_a_row_of_a_generation_that_was_cut_short():
    committed_at = np.where(np.arange(L)[None] < L - 1, -1, np.zeros((2, L), np.int32))
    out = OUT._replace(committed_at=committed_at)
    row = bench_report.describe(CASE, out, Times([2.0], [1.0], [0.0]), CEILINGS)
    assert row["tokens_per_s"] == 1.0  # one token of each row
    assert row["positions_per_token"] == 18 and row["gflop_per_token"] == 8
    assert row["limit_tokens_per_s"] == pytest.approx(2 / 1.5)


def test_a_row_of_one_step_shape():
    out = OUT._replace(shape=np.int32([0, 0, 0, -1]))
    case = CASE._replace(method=cache_lib.NoCache(), steps=STEPS[1:])
    row = bench_report.describe(case, out, Times([3.2], [9.0], [0.2]), CEILINGS)
    assert row["ms_full"] == pytest.approx(1000)  # whatever the run of one forward says
    assert row["ms_cached"] is None and row["ms_cached_limit"] is None


def test_what_is_counted():
    row = bench_report.count(CASE, 2, CEILINGS)
    assert (row["gflop_full"], row["gflop_cached"]) == (12, 2)
    assert (row["gb_full"], row["gb_cached"]) == (0, 0.002)
    assert row["ms_full_limit"] == row["ms_cached_limit"] == 500
    alone = bench_report.count(CASE._replace(steps=STEPS[1:]), 1, CEILINGS)
    assert alone["gflop_full"] == 6 and alone["gflop_cached"] is None


def test_table_marks_what_was_compiled_before():
    row = dict(cache="x", compile_s=1.0, compile_cached=True, peak=None, ms=None)
    columns = (
        ("cache", "cache", "{}"),
        ("compile s", "compile_s", "{:.1f}"),
        ("peak", "peak", "{}"),
        ("ms", "ms", "{}"),
    )
    lines = bench_report.table([row, row | dict(compile_cached=False, ms=2)], columns).splitlines()
    assert lines[0].split() == [
        "cache",
        "compile",
        "s",
        "ms",
    ]  # a column without values is left out
    assert lines[1].split() == ["x", "1.0*", "-"] and lines[2].split() == ["x", "1.0", "2"]
    assert lines[3].startswith("* ")


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    row = dict(prompt_length=8, gen_length=8, speedup=3.0, predicted_speedup=4.0)
    rows = [
        row | dict(cache=name, batch=batch, limit_fraction=share)
        for name, batch, share in (("none", 1, 0.5), ("dual", 1, 0.25), ("dual", 8, 0.1))
    ]
    left, right = bench_report.picture(rows, "a title").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["none", "dual"]
    assert [bar.get_width() for bar in left.patches] == [3.0] * 3
    assert [bar.get_width() for bar in right.patches] == [50.0, 25.0, 10.0]
    assert all(list(line.get_xdata()) == [4.0, 4.0] for line in left.lines[:3])
    bench_report.draw(rows, "a title", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_rows(tmp_path, capsys):
    target = tmp_path / "bench.json"
    argv = [*SMALL, "--caches", "dual", "--batch", "2", "--json", str(target)]
    assert bench.main(argv) == 0
    out, err = capsys.readouterr()
    document = json.loads(target.read_text())
    assert document["command"].startswith("python scripts/bench.py --preset small")
    assert document["ceilings_measured"] is False
    assert {"device", "jax", "dtype", "preset", "parameters"} < document.keys()
    none, dual = document["rows"]
    assert len(out.splitlines()) == 3
    assert len(err.splitlines()) == 4  # progress for each cache and each round
    assert list(tmp_path.iterdir()) == [target]

    for row in (none, dual):
        assert {key for _, key, _ in bench_report.MEASURED} < row.keys()
        assert row["batch"] == len(row["seconds_all"]) == 2
        assert (row["prompt_length"], row["gen_length"], row["block_length"]) == (P, G, BLOCK)
        assert row["forwards"] == G and row["waste"] == 0
        assert row["ceilings"] == dict(flops=1e11, bytes=2e10)
        assert row["limit_fraction"] > 0
        assert row["program_mib"] > row["arguments_mib"] > 0
    assert none["speedup"] == none["predicted_speedup"] == 1
    assert none["positions_per_token"] == L
    assert none["full_forwards"] == G and dual["full_forwards"] == 2
    # A full step at the start of each of two blocks.
    assert dual["forwards_by_positions"] == {str(BLOCK): 6, str(L): 2}
    config = models.PRESETS["small"]
    full, cached = (flops_by_hand(config, size, read=BLOCK) for size in (L, BLOCK))
    assert dual["predicted_speedup"] == pytest.approx(8 * full / (6 * cached + 2 * full))
    assert dual["predicted_speedup"] > 1


def test_dry_run_of_several_lengths(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(random_weights, "make", None)  # no weights
    target = tmp_path / "dry.json"
    argv = [*SMALL, "--caches", "none", "--gen-length", "4", "8", "--batch", "2"]
    assert bench.main([*argv, "--dtype", "bfloat16", "--dry-run", "--json", str(target)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    rows = json.loads(target.read_text())["rows"]
    assert [(row["gen_length"], row["batch"]) for row in rows] == [(4, 2), (8, 2)]
    for row in rows:
        assert row["dtype"] == "bfloat16" and row["compile_s"] > 0 and row["arguments_mib"] > 0
    full = flops_by_hand(models.PRESETS["small"], L, read=BLOCK)
    assert rows[1]["gflop_full"] * 1e9 == pytest.approx(2 * full)


def test_profile_traces_a_full_forward_and_a_cached_step(tmp_path, monkeypatch, capsys):
    compiled, before, real = [], {}, jax.profiler.trace

    @contextlib.contextmanager
    def trace(folder):
        before[folder.name] = list(compiled)
        with real(folder):
            yield

    def spy(setup, state, shape):
        compiled.append(shape.capacity)
        return step(setup, state, shape)

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(bench_run, "step", spy)
    config = models.PRESETS["small"]
    params = random_weights.make(config, jnp.dtype("float32"), jax.random.key(0))
    inputs = bench_run.Inputs(Transformer(config), params, prompts(1, P), jax.random.key(0))
    traced = list(bench_run.profile(CASE, inputs, tmp_path))
    assert traced == [(tmp_path / "full", 1), (tmp_path / "cached", 0)]
    # What is traced was compiled, and ran, before.
    assert before == {"full": [L], "cached": [L, BLOCK]} and compiled == [L, BLOCK]

    for folder, _ in traced:
        assert len(list(folder.rglob("*.xplane.pb"))) == 1
        summary = trace_summary.read(folder)
        assert 0 < summary.busy_ms <= summary.span_ms
        assert trace_summary.main([str(folder), "--top", "1000"]) == 0
        span, heading, *lines, total = capsys.readouterr().out.splitlines()
        assert span.startswith(f"{folder}: operations ran for ") and total.split()[-1] == "all"
        assert heading.split()[:2] == ["ms", "share"]
        parts = {line.split()[-1]: int(line.split()[2]) for line in lines}
        assert sum(parts.values()) == int(total.split()[2]) == len(summary.operations)
        products = sum(count for name, count in parts.items() if name.endswith("dot_general"))
        assert products >= config.num_layers * 7 + 1  # q, k, v, o, gate, up, down; and the head
    assert trace_summary.main([str(tmp_path), "--by", "kernel", "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 4  # both steps


def test_a_method_of_one_step_shape_has_no_cached_step(tmp_path):
    config = models.PRESETS["small"]
    params = random_weights.make(config, jnp.dtype("float32"), jax.random.key(0))
    inputs = bench_run.Inputs(Transformer(config), params, prompts(1, P), jax.random.key(0))
    traced = bench_run.profile(CASE._replace(method=cache_lib.NoCache()), inputs, tmp_path)
    assert [folder.name for folder, _ in traced] == ["full"]


def test_trace_summary():
    program = """
  %fusion.1 = f32[2]{0} fusion(%a), metadata={op_name="jit(step)/walk/blocks_0.ffn/up"}
  %while.3 = (f32[2]{0}) while(%tuple), body=%b, metadata={op_name="jit(step)/walk/while"}
  ROOT fusion.2 = f32[2]{0} fusion(b), metadata={op_name="jit(one_step)/walk/blocks_1.ffn/up"}
"""

    def event(operation, begin, end, name=None, tid=3):
        place = dict(ph="X", pid=1, tid=tid, name=name or operation)
        return place | dict(ts=1e3 * begin, dur=1e3 * (end - begin), args=dict(hlo_op=operation))

    def name(kind, name, **place):
        return dict(ph="M", pid=1, name=f"{kind}_name", args=dict(name=name)) | place

    events = [event("fusion.1", 10, 12), event("copy.7", 11, 15), event("while.3", 9, 99)]
    events += [event("fusion.2", 17, 20)]
    events += [dict(ph="X", pid=1, tid=3, ts=0, dur=9e9, name="host")]
    thread = [name("process", "/host:CPU"), name("thread", "tf_XLAEigen", tid=3)]
    summary = trace_summary.summarize([*thread, *events], program)
    Part = trace_summary.Part
    assert summary.parts == [Part("walk/blocks.ffn/up", 5.0, 2), Part("copy", 4.0, 1)]
    assert summary.kernels == [Part("fusion", 5.0, 2), Part("copy", 4.0, 1)]
    assert (summary.span_ms, summary.busy_ms) == (10.0, 8.0)

    # On a GPU, all that ran on a stream, by the names of its kernels; other lines repeat it.
    device = [name("process", "/device:GPU:0"), name("thread", "Stream #7(Compute)", tid=5)]
    device += [name("thread", "XLA Ops", tid=3), *events]
    device += [event("fusion.1", 1, 3, name="gemm_fusion_dot_12", tid=5)]
    device += [event("fusion.2", 4, 5, name="gemm_fusion_dot_7", tid=5)]
    device += [dict(ph="X", pid=1, tid=5, ts=6e3, dur=1e3, name="MemcpyD2D")]
    device += [dict(ph="X", pid=1, tid=5, ts=7e3, dur=4e3, name="fusion_2")]
    summary = trace_summary.summarize(device, program)
    assert summary.kernels == [
        Part("fusion", 4.0, 1),
        Part("gemm_fusion_dot", 3.0, 2),
        Part("MemcpyD2D", 1.0, 1),
    ]
    assert summary.parts == [Part("walk/blocks.ffn/up", 7.0, 3), Part("MemcpyD2D", 1.0, 1)]
    assert (summary.span_ms, summary.busy_ms) == (10.0, 8.0)


def test_trace_summary_of_nothing(tmp_path, capsys):
    assert trace_summary.main([str(tmp_path)]) == 2
    assert "--profile writes one" in capsys.readouterr().err


def test_short_names_of_presets():
    for short, config in (("llada-8b", models.llada._8B), ("dream-7b", models.dream._7B)):
        assert bench.open_config(short) == (models.Config(**config), None)


def test_default_dtype():
    assert bench.choose_dtype(None, small_config()).name == "float32"
    assert bench.choose_dtype(None, bench.open_config("dream-7b")[0]).name == "bfloat16"
    assert bench.choose_dtype("float16", small_config()).name == "float16"


def test_a_model_that_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 2**15 if "PAGES" in name else 2**18)
    argv = ["--preset", "llada-8b", "--caches", "none", "--dtype", "float32"]
    assert bench.main(argv) == 2
    said = capsys.readouterr().err
    assert "29.9 GiB, and the device has 8.0 GiB" in said and "--dry-run" in said


def test_a_run_that_exhausts_the_memory(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(bench, "bench", fail)
    assert bench.main(SMALL) == 1
    assert "Not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--preset", "llada-9b"], "bench-60m"),
        (["--caches", "dual,best"], "must be one of none"),
        (["--caches", "dual:size=3"], "no argument 'size'"),
        (["--caches", "dual,dual"], "not a list of different names"),
        (["--caches", "dllm:kp=0"], "kp is 0"),
        (["--caches", "dllm:kp"], "'kp' is not of the form name=value"),
        (["--caches", "prefix:block_start=first-column"], "leave block_start out"),
        (["--block-length", "3"], "must divide gen_length, 8"),
        (["--tokens-per-step", "3"], "must divide --block-length, 4"),
        (["--prompt-length", "60"], "context ends at 64"),
        (["--json", "no/such/directory.json"], "writable directory"),
        (["--json", "/dev/null"], "is no regular file; --json must"),
        (["--profile", __file__], "is no folder; --profile must name one, or a new one"),
        (["--batch", "0"], "not a whole number from 1"),
        (["--seed", "-1"], "not a whole number from 0"),
        (["--plot", "bench.svg"], "must name a PNG file"),
        (["--plot", "no/such/directory.png"], "writable directory"),
        (["--dry-run", "--profile", "trace"], "leave --plot and --profile out"),
        (["--ceilings", "790"], "not two positive numbers"),
        (["--ceilings", "790,inf"], "not two positive numbers"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_input(argv, said, capsys):
    try:
        status = bench.main([*SMALL, *argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert said in err and err.startswith("bench.py: ") and len(err.splitlines()) == 1
