"""What a compiled program is read as, and generations compiled for a GPU that is not there."""

import importlib.util
import json
from pathlib import Path

import gpu_program
import hlo
import pytest
from roofline import Ceilings
from tiny_models import small_config

from dlm_jax import models

PROGRAM = (Path(__file__).parent / "compiled_program.txt").read_text(encoding="utf-8")
CEILINGS = Ceilings(flops=1e12, bytes=1e9)


def test_a_program_is_read():
    wide, narrow = hlo.read(PROGRAM)
    assert (wide.trips, narrow.trips) == (3, None)
    assert (wide.label, narrow.label) == ("step_96", "step_32_1")
    assert hlo.steps([wide, narrow]) == {"step_96": wide, "step_32_1": narrow}
    (turn,) = wide.loops
    assert [kernel.name for kernel in turn.kernels] == ["turned"]
    assert wide.count(turns=4) == 1 + 4
    assert [kernel.name for kernel in wide.copies] == ["turned", "copied"][::-1]
    assert [kernel.written for kernel in wide.large] == [2**21 + 4, 2**21]
    assert not narrow.copies and not narrow.large


def test_kernels_are_counted():
    _, narrow = hlo.read(PROGRAM)
    gemm, value, written, fused = narrow.kernels
    assert gemm.flops == 2 * 32 * 64 * 96
    assert gemm.moved == 2 * 32 * 64 + 2 * 64 * 96 + 4 * 32 * 96
    # A slice reads what it takes, and what is updated in place moves the updates only.
    assert value.moved == 4 * 32 * 32 + 2 * 32 * 32
    assert written.written == 2 * 32 * 32 and written.moved == 2 * 2 * 32 * 32 + 4 * 32
    assert not any(kernel.copies for kernel in narrow.kernels)
    assert fused.flops == 2 * (2 * 2 * 4 * 32 * 64 * 8)  # both products
    seconds = [kernel.seconds(CEILINGS) - hlo.LAUNCH_S for kernel in narrow.kernels]
    assert seconds[:3] == pytest.approx([gemm.moved / 1e9, value.moved / 1e9, written.moved / 1e9])
    assert narrow.seconds(CEILINGS, 1) == pytest.approx(sum(seconds) + 4 * hlo.LAUNCH_S)


def test_sizes():
    assert hlo.size("bf16[2,3]{1,0}") == 12
    assert hlo.size("(f32[4]{0}, s4[8]{0}, pred[])") == 16 + 4 + 1


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--layers", "0"], "whole number"),
        (["--option", "level"], "name=value"),
        (["--target", "a100"], "invalid choice"),
    ],
)
def test_arguments_that_are_wrong_in_themselves(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_program.parse(argv)
    assert ended.value.code == 2 and told in capsys.readouterr().err


installed = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))


@pytest.mark.skipif(installed, reason="the plug-in is installed")
def test_without_the_plugin_one_sentence_says_so(capsys):
    assert gpu_program.main([]) == 2
    assert "extra cuda12" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="needs jax's CUDA plug-in: the extra cuda12")
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_generation_for_a_gpu(family, tmp_path, monkeypatch, capsys):
    """A fused attention, and nothing of the size of a cache that is only copied."""
    sizes = dict(width=256, num_heads=4, num_kv_heads=4, head_dim=64, max_length=1024)
    config = small_config(family, **sizes)
    monkeypatch.setitem(models.PRESETS, "small", config)
    target = tmp_path / "program.json"
    argv = [
        *("--preset", "small", "--caches", "dual,d2cache", "--json", str(target)),
        *("--prompt-length", "512", "--gen-length", "512"),
    ]
    assert gpu_program.main(argv) == 0
    rows = json.loads(target.read_text())["rows"]
    dual = {row["step"]: row for row in rows if row["cache"] == "dual"}
    assert set(dual) == {"32", "1024"}
    layers = config.num_layers
    assert dual["32"]["kernels"] <= 13 * layers + 40
    for row in rows:
        assert row["copies"] == 0
        assert row["counted_ms"] > row["limit_ms"] > 0
    scores = 4 * config.num_heads * 1024 * 1024 / 1e6
    assert all(row["largest_mb"] < scores for row in dual.values())
    assert "compiled in" in capsys.readouterr().err
