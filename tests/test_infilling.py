"""Masks in the prompt are filled, with every strategy that can."""

import numpy as np
import pytest
from generation_replay import check
from strategy_table import GEN, MASK, PROMPT, ROWS, TABLE, config, padding, run
from tiny_models import prompts, small

from dlm_jax.cache import make
from dlm_jax.decoding.config import DecodeConfig

INFILLED = ["plain", "threshold", "gamma", "sigma", "klass", "origin", "random", "cfg", "until eos"]
INFILLED += ["alg_temp", "threshold, capped", "debias", "past eos"]


INFILLED = [
    pytest.param(
        family,
        name,
        gen_length,
        id=f"{family}, {name}, {gen_length}",
        marks=[]
        if (family, name, gen_length) in [("llada", "plain", 0), ("dream", "threshold", GEN)]
        else [pytest.mark.slow],
    )
    for name in INFILLED
    for family in TABLE[name].families
    for gen_length in (GEN, 0)
]


@pytest.mark.parametrize(("family", "name", "gen_length"), INFILLED)
def test_masks_in_the_prompt_are_filled_and_the_rest_of_it_is_kept(family, name, gen_length):
    blocks = {} if gen_length else dict(block_length=None)
    decode = config(name, family, infill=True, gen_length=gen_length, **blocks)
    prompt, mask = prompts(ROWS, PROMPT, seed=12), padding(0, 1, 2)
    holes = np.zeros(prompt.shape, bool)
    holes[0, [0, 3, 5]] = holes[1, [1, 4]] = True
    prompt[holes] = MASK
    out = run(family, prompt, mask, decode=decode, debiased=TABLE[name].debiased)
    check(out, prompt, decode)
    assert (out.tokens[:, :PROMPT] != MASK).all() and out.tokens.shape[1] == PROMPT + gen_length


def test_caches_fill_masks_where_nothing_is_generated():
    """Two ways to begin a block that does not exist are one, and d2Cache has nothing to choose."""
    prompt, mask = prompts(2, PROMPT, seed=3), padding(0, 2)[:2]
    prompt[0, [0, 2]] = prompt[1, [4, 5]] = MASK
    decode = config("threshold", "dream", infill=True, gen_length=0, block_length=None)
    shifted, first_column = (
        run("dream", prompt, mask, decode=decode, cache=make("dual", block_start=start))
        for start in ("shifted", "first-column")
    )
    assert (shifted.tokens != MASK).all()
    np.testing.assert_array_equal(shifted.tokens, first_column.tokens)
    assert shifted.positions_asked[0].tolist() == mask.sum(axis=1).tolist()
    with pytest.raises(ValueError, match="gen_length is 0; the cache 'd2cache'"):
        run("dream", prompt, mask, decode=decode, cache=make("d2cache"))


def test_padding_changes_neither_pace_nor_noise_of_infilling():
    """Without a number of steps there is one per mask, not one per slot of the padded prompt."""
    prompt = prompts(1, PROMPT, seed=5)
    prompt[0, [2, 4, 5]] = MASK
    padded = np.pad(prompt, ((0, 0), (4, 0)), constant_values=1)
    decode = DecodeConfig.for_model(
        small("dream")[0].config, gen_length=0, infill=True, temperature=1.5
    )
    alone = run("dream", prompt, decode=decode)
    behind = run("dream", padded, np.arange(10)[None] >= 4, decode=decode)
    assert alone.nfe == behind.nfe == 3
    np.testing.assert_array_equal(alone.tokens[0], behind.tokens[0, 4:])
