"""A decoding strategy and a cache method are one file and one line of a table each."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from places import ROOT
from tiny_models import prompts, small
from toys.neighbour import Neighbour
from toys.periodic import Periodic

from dlm_jax import cache, generate
from dlm_jax.decoding import strategies
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate

ASKED = ["--strategy=neighbour", "--strategy-args=relaxed=0.4", "--cache=periodic"]
ASKED += ["--cache-args=every=3", "--gen-length=48", "--block-length=16"]


@pytest.fixture
def tables(monkeypatch):
    """The line of each table."""
    monkeypatch.setitem(strategies.STRATEGIES, Neighbour.name, Neighbour)
    monkeypatch.setitem(cache.METHODS, Periodic.name, Periodic)


@pytest.mark.parametrize("family", ["llada", pytest.param("dream", marks=pytest.mark.slow)])
def test_from_python(family, tables):
    model, params = small(family)
    prompt, keys = prompts(2, 6), jax.random.split(jax.random.key(0), 2)

    def run(decode, method):
        out = diffusion_generate(
            params, model, prompt, key=keys, decode=decode, cache=method, record=("computed",)
        )
        return jax.device_get(out)

    sizes = dict(gen_length=12, block_length=6, alg="maskgit_plus")
    by_name = DecodeConfig(**sizes, strategy="neighbour")
    assert by_name == DecodeConfig(**sizes, strategy=Neighbour())
    out = run(by_name, cache.make("periodic", every=3))
    assert (out.tokens != model.config.mask_id).all()
    assert out.computed[0].all() and not out.computed[1].all()
    # Beside no sure token nothing else is committed; below everything, all is.
    alone = run(DecodeConfig(**sizes, strategy=Neighbour(2.0, 2.0)), cache.NoCache())
    assert alone.nfe == 12
    bold = run(DecodeConfig(**sizes, strategy=Neighbour(2.0, 0.0)), cache.NoCache())
    np.testing.assert_array_equal(alone.committed_at, bold.committed_at)
    assert run(DecodeConfig(**sizes, strategy=Neighbour(-1.0)), cache.NoCache()).nfe == 2


def test_from_the_command_line(tables, capsys):
    assert generate.main(ASKED) == 0
    assert "#### 23" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "neighbour" in told and "periodic" in told


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--strategy=neighbour", "--strategy-args=radius=2"],
            "The strategy 'neighbour' has no argument 'radius'; it takes threshold, relaxed.",
        ),
        (["--strategy=neighbour", "--strategy-args=relaxed=low"], "relaxed is 'low'; it must be"),
        (["--strategy=neighbor"], "strategy is 'neighbor'; it must be one of surest, threshold"),
        (["--cache=periodic", "--cache-args=often=2"], "no argument 'often'; it takes every."),
        (
            ["--cache=periodic", "--cache-args=every=0"],
            "every is 0; it must be a whole number from 1 on.",
        ),
        (["--cache=periodical"], "cache is 'periodical'; it must be one of none, dkv-decode"),
    ],
)
def test_wrong_arguments(argv, sentence, tables, capsys):
    assert generate.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and sentence in err


@pytest.mark.slow
def test_rows_and_numbers_need_no_care(tables):
    """Rows do not see each other, and another value of an argument compiles nothing."""
    model, params = small("llada")
    prompt, keys = prompts(3, 6), jax.random.split(jax.random.key(0), 3)
    compiled = []

    @jax.jit
    def run(prompt, keys, decode):
        compiled.append(decode)
        return diffusion_generate(
            params, model, prompt, key=keys, decode=decode, cache=Periodic(3)
        ).tokens

    decode = DecodeConfig(gen_length=12, block_length=6, strategy=Neighbour(0.6, 0.2))
    together = run(prompt, keys, decode)
    run(prompt, keys, DecodeConfig(gen_length=12, block_length=6, strategy=Neighbour(0.3, 0.1)))
    assert len(compiled) == 1
    for row in range(3):
        some = slice(row, row + 1)
        np.testing.assert_array_equal(run(prompt[some], keys[some], decode)[0], together[row])


@pytest.mark.slow
def test_a_file_and_a_line_are_all(tmp_path):
    """In a copy of the package, by the command as users start it."""
    shutil.copytree(ROOT / "dlm_jax", tmp_path / "dlm_jax")
    for toy, room, first in (
        ("neighbour.Neighbour", "decoding/strategies", '"surest": "surest.Surest"'),
        ("periodic.Periodic", "cache", '"none": "none.NoCache"'),
    ):
        module = toy.partition(".")[0]
        folder = tmp_path / "dlm_jax" / room
        shutil.copy(ROOT / "tests" / "toys" / f"{module}.py", folder)
        text = (folder / "__init__.py").read_text()
        assert text.count(f"        {first},\n") == 1
        line = f'        "{module}": "{toy}",\n'
        text = text.replace(f"        {first},\n", f"        {first},\n{line}")
        (folder / "__init__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "dlm_jax.generate", *ASKED],
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "#### 23" in done.stdout, done.stderr
