"""docs/caches.md: its code runs, and what it says of parameters, costs and figures holds."""

import dataclasses
import re
import shlex

import accuracy
import jax
import numpy as np
import pytest
from documents import argv_of, names, page, run_snippets
from places import ROOT
from tiny_models import prompts, small

from dlm_jax import arithmetic, cache, generate
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate

DOCS = ROOT / "docs"
PAGE = page("docs/caches.md")


def test_snippets_work_one_after_the_other():
    namespace, lines = run_snippets(PAGE.snippets)
    *answers, cost = lines
    assert [arithmetic.extract_answer(line) for line in answers] == [9 * 6 + 9, (22 - 8) // 2]
    assert re.fullmatch(r"48 forwards, \d+ positions asked, \d+ computed, of 80", cost)
    assert (namespace["periodic"].tokens != namespace["config"].mask_id).all()


def test_command(capsys):
    (command,) = PAGE.commands()
    assert generate.main(argv_of(command)) == 0
    assert arithmetic.extract_answer(capsys.readouterr().out) is not None


@pytest.mark.parametrize("name", cache.METHODS)
def test_every_method_has_its_line_its_section_and_its_figure(name):
    (line,) = re.findall(rf"^\| \[`{name}`\]\(#{name}\) \|([^|]*)\|", PAGE.text, re.M)
    told = names(line)
    fields = dataclasses.fields(cache.METHODS[name])
    assert told == [f"{field.name}={field.default!r}" for field in fields]
    section = PAGE.section(name)
    assert f"![{name}](caches/{name}.png)" in section
    for field in fields:
        assert f"`{field.name}" in section or "as for `" in section


def test_what_was_measured():
    """Every method has its accuracy, and the command measures what the table says."""
    rows = [names(cells[0]) for cells in PAGE.table("Accuracy", "cache")]
    assert {name for name, *_ in rows} == set(cache.METHODS)
    (command,) = PAGE.commands(run=False)
    args = accuracy.parse(argv_of(command, "python scripts/accuracy.py"))
    assert args.problems == 500 and args.caches == ["all"]
    tried = shlex.split(command)[-1]
    for name, *settings in rows:
        for setting in settings:
            assert f"dream-tiny-math/{name}:{setting}" in tried.split(",")


PROMPT, GEN, BLOCK = 8, 16, 4
LENGTH, BLOCKS_OF, STEPS = PROMPT + GEN, GEN // BLOCK, BLOCK
MASKS = [GEN - step for step in range(GEN)]
FORMULAS = {
    "none": lambda t, b, i: LENGTH,
    "dkv-decode": lambda t, b, i: LENGTH if i <= 1 or i % 3 == 0 else MASKS[t] + 1,
    "dkv-prefill": lambda t, b, i: GEN if t else LENGTH,
    "dkv-pd": lambda t, b, i: (GEN if t else LENGTH) if t % 3 == 0 else MASKS[t] + 1,
    "prefix": lambda t, b, i: GEN - b * BLOCK if i else LENGTH,
    "dual": lambda t, b, i: BLOCK if i else LENGTH,
    "dllm": lambda t, b, i: (
        (LENGTH + (GEN if t % 3 == 0 else GEN // 4) + (PROMPT if t % 5 == 0 else 0)) / 2
    ),
}
"""Positions in step t, the i-th of block b, with one token per step and two layers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_cost_is_what_the_formula_says(name):
    parameters = dict(cache_steps=3, kp=5, kr=3)
    fields = {field.name for field in dataclasses.fields(cache.METHODS[name])}
    model, params = small("llada")
    out = diffusion_generate(
        params,
        model,
        prompts(1, PROMPT),
        key=jax.random.key(0),
        decode=DecodeConfig(gen_length=GEN, block_length=BLOCK),
        cache=cache.make(name, **{key: parameters[key] for key in fields & set(parameters)}),
    )
    expected = [FORMULAS[name](t, *divmod(t, STEPS)) for t in range(GEN)]
    np.testing.assert_allclose(out.positions_asked[:, 0], expected)


@pytest.mark.parametrize("name", cache.METHODS)
def test_figures_are_small(name):
    data = (DOCS / "caches" / f"{name}.png").read_bytes()
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert size == (660, 352) and len(data) < 50_000
