"""The benchmark: its FLOP counts against counts by hand, its refusals, and what it writes."""

import json

import bench
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import prompts, small_config

from dlm_jax import cache as cache_lib
from dlm_jax import models
from dlm_jax.config import DecodeConfig
from dlm_jax.decode import GenerateOutput
from dlm_jax.models import Transformer

P, G, BLOCK = 6, 8, 4
L = P + G
DECODE = DecodeConfig(gen_length=G, block_length=BLOCK, steps=G)
SMALL = [
    *("--preset", "small", "--prompt-length", str(P), "--gen-length", str(G)),
    *("--block-length", str(BLOCK), "--repeat", "2"),
]


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "small", small_config(num_layers=1))


def step_flops(method, config, batch=1):
    shapes = jax.eval_shape(bench.initialiser(config, np.dtype(np.float32)), jax.random.key(0))
    inputs = bench.Inputs(Transformer(config), shapes, prompts(batch, P), jax.random.key(0))
    return bench.step_flops(inputs, DECODE, method)


def by_hand(config, size, *, read):
    """Matrix products of `size` queries that attend to all slots, and of `read` rows of logits."""
    c = config
    attended = L * c.num_heads * c.head_dim
    per_query = (
        2 * c.width * c.num_heads * c.head_dim  # query and output projections
        + 2 * c.width * c.num_kv_heads * c.head_dim  # key and value projections
        + 2 * attended  # scores and sums of values
        + 3 * c.width * c.mlp_width
    )
    return 2 * (size * c.num_layers * per_query + read * c.width * c.vocab_size)


def test_flops_of_products_in_loops_and_branches():
    x_MK, x_KN = jnp.ones((3, 5)), jnp.ones((5, 7))

    def once(_):
        return jnp.einsum("MK,KN->MN", x_MK, x_KN)

    def flops(function):
        return bench.count_flops(jax.make_jaxpr(function)(jnp.float32(1)).jaxpr)

    assert flops(once) == 2 * 3 * 5 * 7
    assert flops(jax.jit(once)) == flops(jax.checkpoint(once)) == flops(once)
    assert flops(jax.vmap(once, axis_size=4, in_axes=None)) == flops(once)
    assert flops(
        lambda x: jnp.einsum("BMK,BKN->BMN", jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7)))
    ) == (4 * flops(once))
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c, once(c)), x, length=6)) == 6 * flops(once)
    assert flops(lambda x: jax.lax.cond(x > 0, once, lambda x: jnp.zeros((3, 7)), x)) == flops(once)
    with pytest.raises(ValueError, match="unknown length"):
        flops(lambda x: jax.lax.while_loop(lambda c: c < 9, lambda c: c + once(c).sum(), x))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_flops_of_steps(family):
    config = small_config(family)
    full = by_hand(config, L, read=BLOCK)
    assert step_flops(cache_lib.NoCache(), config) == [full]
    assert step_flops(cache_lib.NoCache(), config, batch=3) == [full]  # per row
    assert step_flops(cache_lib.Dual(), config) == [by_hand(config, BLOCK, read=BLOCK), full]


def test_flops_of_steps_that_refresh_part_of_a_layer():
    config, one_layer = small_config(), small_config(num_layers=1)
    changed = G // 2
    flops = step_flops(cache_lib.DLLMCache(rou=0.5), config)
    values = 2 * config.width * config.num_kv_heads * config.head_dim  # of one position
    full = by_hand(one_layer, L, read=BLOCK)  # the first layer always is
    # Values of the whole response, or of everything, tell what changed.
    assert flops == [
        full + by_hand(one_layer, changed, read=0) + (G - changed) * values,
        full + by_hand(one_layer, P + changed, read=0) + (G - changed) * values,
        full + by_hand(one_layer, G, read=0),
        by_hand(config, L, read=BLOCK),
    ]


def test_caches_by_name():
    methods = bench.parse_caches("dual,dllm:kp=9+rou=0.5,dual")
    assert methods == {
        "none": cache_lib.NoCache(),
        "dual": cache_lib.Dual(),
        "dllm:kp=9+rou=0.5": cache_lib.DLLMCache(kp=9, rou=0.5),
    }
    assert list(bench.parse_caches("all")) == list(cache_lib.METHODS)


def test_prompts_hold_no_mask():
    config = small_config(vocab_size=4, mask_id=1, eos_id=0, pad_id=0)
    assert set(np.unique(bench.random_prompts(config, 2, 50, seed=0))) == {0, 2, 3}


def test_a_method_that_must_know_the_order():
    config = small_config()
    assert bench.suited(cache_lib.DKVGreedy(), config, DECODE).alg == "random"
    assert bench.suited(cache_lib.Dual(), config, DECODE) == DECODE


def test_weights_are_made_in_their_dtype():
    init = bench.initialiser(small_config(), jnp.dtype("bfloat16"))
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}


def test_a_row_of_the_table():
    """Two rows, three forwards out of at most four: 10, 4 and 4 query slots for what was asked."""
    out = GenerateOutput(
        tokens=np.zeros((2, L), np.int32),
        committed_at=np.zeros((2, L), np.int32),
        confidence=np.zeros((2, L), np.float32),
        nfe=np.int32(3),
        steps=np.int32([3, 3]),
        history=None,
        positions_asked=np.float32([[10, 10], [3, 4], [2, 1], [0, 0]]),
        positions_computed=np.float32([[10, 10], [4, 4], [4, 4], [0, 0]]),
        variant=np.int32([1, 0, 0, -1]),
        computed=None,
        computed_layers=None,
        state=None,
    )
    case = bench.Case("x", cache_lib.Dual(), DECODE, [10**9, 6 * 10**9])
    row = bench.describe(case, out, compile_s=1.0, seconds=(6.0, 3.0, 1.0))
    assert row["forwards_by_positions"] == {"4": 2, "10": 1}
    assert row["positions_per_token"] == 18 / G
    assert row["waste"] == 3 / 18
    assert row["gflop_per_token"] == 8 / G
    assert row["seconds"] == 3 and row["ms_per_step"] == 1000
    assert row["tokens_per_s"] == 2 * G / 3
    baseline = row | {"seconds": 12.0, "gflop_per_token": 3.0}
    compared = bench.compare(row, baseline)
    assert compared["speedup"] == 4 and compared["predicted_speedup"] == 3
    assert compared["measured_to_predicted"] == 4 / 3


def test_rows(tmp_path, capsys):
    target, trace = tmp_path / "bench.json", tmp_path / "trace"
    argv = [*SMALL, "--caches", "dual", "--batch", "2", "--json", str(target)]
    assert bench.main([*argv, "--profile", str(trace)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(target.read_text())
    assert {"command", "device", "jax", "dtype", "shapes"} < document.keys()
    assert document["command"].startswith("python scripts/bench.py --preset small")
    none, dual = document["rows"]
    assert len(out.splitlines()) == 3
    assert len(err.splitlines()) == 5  # a line of progress for each and each round, and the trace
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "trace"]
    assert list(trace.rglob("*.xplane.pb"))

    for row in (none, dual):
        assert {key for _, key, _ in bench.COLUMNS} < row.keys()
        assert row["batch"] == len(row["seconds_all"]) == 2
        assert row["forwards"] == G and row["waste"] == 0
    assert none["speedup"] == none["predicted_speedup"] == 1
    assert none["positions_per_token"] == L
    # A full step at the start of each of two blocks.
    assert dual["forwards_by_positions"] == {str(BLOCK): 6, str(L): 2}
    config = models.PRESETS["small"]
    full, cached = by_hand(config, L, read=BLOCK), by_hand(config, BLOCK, read=BLOCK)
    assert dual["predicted_speedup"] == pytest.approx(8 * full / (6 * cached + 2 * full))
    assert dual["predicted_speedup"] > 1


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--preset", "llada-9b"], "bench-60m"),
        (["--caches", "dual,best"], "must be one of none"),
        (["--caches", "dual:size=3"], "no argument 'size'"),
        (["--caches", "dllm:kp=x"], "kp is 'x'; it must be of type int"),
        (["--caches", "dllm:kp=0"], "kp is 0"),
        (["--caches", "dllm:kp"], "type int"),
        (["--caches", "prefix:block_start=first-column"], "leave block_start out"),
        (["--block-length", "3"], "must divide gen_length, 8"),
        (["--tokens-per-step", "3"], "must divide --block-length, 4"),
        (["--prompt-length", "60"], "context ends at 64"),
        (["--json", "no/such/directory.json"], "writable directory"),
        (["--profile", __file__], "File exists"),
        (["--batch", "0"], "not a whole number from 1"),
        (["--seed", "-1"], "not a whole number from 0"),
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
