"""scripts/draw_caches.py: pictures of real generations, and what stops it."""

import sys

import draw_caches
import numpy as np
import pytest

import dlm_jax
from dlm_jax import DecodeConfig, cache

SMALL = ["--gen-length", "8", "--block-length", "4", "--prompt", "Tom has 7 boxes."]


def test_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    out = tmp_path / "new" / "figures"
    assert draw_caches.main(["--out", str(out), "--caches", "dual", *SMALL]) == 0
    assert capsys.readouterr().out == f"{out / 'dual.png'}\n"
    assert [path.name for path in out.iterdir()] == ["dual.png"]  # nothing unfinished is left
    assert (out / "dual.png").read_bytes().startswith(b"\x89PNG")


def test_trace_is_what_was_computed():
    loaded = dlm_jax.load("llada-tiny-math")
    decode = DecodeConfig.for_model(loaded.config, gen_length=8, block_length=4)
    picture = draw_caches.trace(loaded, cache.make("dual"), "Tom has 7 boxes.", decode)
    block_L = (np.arange(picture.prompt + 8) - picture.prompt) // 4
    step_T1 = np.arange(8)[:, None]
    expected = (step_T1 % 4 == 0) | (block_L == step_T1 // 4)
    np.testing.assert_array_equal(picture.share_TL, expected)
    assert sorted(picture.committed_at_L[picture.prompt :]) == list(range(8))
    assert picture.title == "dual: block_start=shifted"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--caches", "dual,dial"], "dial"),
        (["--caches", "dual", "--block-length", "3"], "block_length is 3"),
        (["--caches", "dual", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(options, said, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    assert draw_caches.main(["--out", str(tmp_path), *options]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_caches.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "Drawing needs matplotlib: pip install '.[plot]'.\n"
