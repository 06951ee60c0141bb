"""Decoding settings that have no meaning together, or none with the model or the prompt."""

import numpy as np
import pytest
from strategy_table import BLOCK, FREQUENCY, GEN, LENGTH, MASK, PROMPT, ROWS, VOCAB, run
from tiny_models import prompts

from dlm_jax.cache import make
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.state import Draws

REFUSED = [
    (dict(sigma=2.0, alg="entropy"), "alg is 'entropy', .* sigma"),
    (dict(infill=True, schedule="even"), "steps is None, but the schedule 'even'"),
    (dict(num_transfer_tokens=2), "num_transfer_tokens is 2, but the schedule 'even'"),
    (dict(gen_length=0, infill=True), "block_length is 6; it must divide gen_length, 0"),
    (dict(narrow_out_thres=None), "narrow_out_thres is None"),
    (dict(threshold=0.9, factor=1.0), "threshold and factor are both given"),
    (dict(threshold=0.9, gamma=0.1), "threshold and gamma are both given"),
    (dict(factor=0.9, gamma=0.1), "factor and gamma are both given"),
    (dict(strategy="remdm"), "strategy is 'remdm'; it must be one of klass, wino"),
    (dict(strategy="klass"), "strategy is 'klass', .* a threshold or a factor"),
    (dict(strategy="klass", gamma=0.1), "strategy is 'klass', .* a threshold or a factor"),
    (dict(strategy="klass", threshold=0.9, schedule="capped"), "schedule is 'capped'; .*klass"),
    (dict(strategy="klass", threshold=0.9, steps=8), "steps is 8, but strategy='klass' decides"),
    (dict(strategy="klass", threshold=0.9, alg_temp=0.1), "alg_temp is 0.1, .*'klass' leave it"),
    (dict(strategy="wino", threshold=0.9), "'wino', which has no meaning with threshold"),
    (dict(strategy="wino", factor=0.9), "'wino', which has no meaning with factor"),
    (dict(strategy="wino", gamma=0.9), "'wino', which has no meaning with gamma"),
    (dict(strategy="wino", cfg_scale=1.0), "'wino', which has no meaning with cfg_scale"),
    (dict(strategy="wino", infill=True), "'wino', which has no meaning with infill"),
    (dict(strategy="wino", alg="topk_margin"), "alg is 'topk_margin'; the strategy 'wino'"),
    (dict(strategy="wino", alg="random"), "alg is 'random', .* with wino"),
    (dict(strategy="wino", alg_temp=0.5), "alg_temp is 0.5, .*'wino' leave it out"),
    (dict(strategy="wino", steps=8), "steps is 8, but strategy='wino' decides"),
    (dict(threshold=0.9, steps=8), "steps is 8, but threshold decides"),
    (dict(gamma=0.9, steps=8), "steps is 8, but gamma decides"),
    (dict(factor=0.9, steps=8, schedule="fixed"), "steps is 8, but the schedule 'fixed' counts"),
    (dict(schedule="fixed", steps=8), "steps is 8, but the schedule 'fixed' counts tokens"),
    (dict(threshold=0.9, schedule="even"), "schedule is 'even'; with threshold"),
    (dict(factor=0.9, schedule="timestep"), "schedule is 'timestep'; with factor"),
    (dict(schedule="capped"), "schedule is 'capped', .*; give one of threshold, factor"),
    (dict(schedule="linear"), "schedule is 'linear'; it must be one of"),
    (dict(alg="origin", schedule="even"), "schedule is 'even'; with alg='origin'"),
    (dict(alg="origin", schedule="fixed"), "schedule is 'fixed'; with alg='origin'"),
    (dict(alg="origin", threshold=0.9), "alg is 'origin', which ignores confidence; .* threshold"),
    (dict(alg="origin", alg_temp=0.9), "alg is 'origin', which ignores confidence; .* alg_temp"),
    (dict(alg="random", sigma=1.0), "alg is 'random', which ignores confidence; with sigma"),
    (dict(alg="random", gamma=1.0), "alg is 'random', which ignores confidence; with gamma"),
    (dict(alg="surest"), "alg is 'surest'; it must be one of"),
    (dict(alg_temp=0.5, threshold=0.9), "alg_temp is 0.5, .* with threshold leave it out"),
    (dict(alg="entropy", threshold=0.9), "threshold is 0.9, but confidences of alg 'entropy'"),
    (dict(stop_until_eos=True, leave_early=False), "stop_until_eos .* leave_early is False"),
    (dict(gen_length=0, block_length=None), "gen_length is 0; .* unless infill=True"),
    (dict(gen_length=-4, block_length=None), "gen_length is -4"),
    (dict(block_length=5), "block_length is 5; it must divide gen_length"),
    (dict(steps=5), "steps is 5; it must be a positive multiple"),
    (dict(eps=0.0), "eps is 0.0"),
    *(
        ({name: value}, f"{name} is {value}; it must be a whole number")
        for name in ("num_transfer_tokens", "kl_history_length", "max_forwards", "top_k")
        for value in (0, -3)
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be 0 or above")
        for name in ("temperature", "alg_temp", "gamma", "cfg_scale")
        for value in (-1.0, float("nan"), float("inf"))
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be above 0")
        for name in ("factor", "sigma", "clip_alpha", "kl_threshold")
        for value in (0.0, float("nan"))
    ),
    *(
        ({name: float("nan")}, f"{name} is nan; it must be a confidence")
        for name in ("threshold", "wide_in_thres", "narrow_out_thres")
    ),
    (dict(max_forwards=1.5), "max_forwards is 1.5; it must be a whole number"),
    *((dict(top_p=value), f"top_p is {value}; it must lie in") for value in (0.0, 1.5)),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)


WRONG = [
    ("dream", dict(strategy="wino"), {}, "strategy is 'wino', .*dream predicts"),
    ("llada", dict(strategy="wino"), dict(cache=make("dual")), "cache is 'dual', .*'wino'"),
    ("llada", dict(suppress=(3, MASK)), {}, "suppress has the mask token"),
    ("llada", dict(suppress=(VOCAB,)), {}, "suppress has token id 40; it must lie in 0 to 39"),
    ("llada", dict(eos_id=-1), {}, "eos_id has token id -1"),
    ("llada", dict(alg="entropy"), dict(token_freq=FREQUENCY), "token_freq debiases .*'entropy'"),
    ("llada", dict(alg="topk_margin"), dict(token_freq=FREQUENCY), "token_freq debiases"),
    ("llada", {}, dict(token_freq=FREQUENCY[1:]), r"token_freq has shape \(39,\)"),
    ("llada", {}, dict(draws=Draws(order=np.ones((ROWS, LENGTH)))), "draws.order .*'low_conf"),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(order=np.ones((ROWS, GEN)))),
        r"draws.order has shape \(3, 12\)",
    ),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(transfer=np.ones((2, ROWS, LENGTH), bool))),
        "draws.transfer .* for alg 'origin' or an alg_temp",
    ),
    (
        "llada",
        dict(alg="origin"),
        dict(draws=Draws(transfer=np.ones((ROWS, LENGTH), bool))),
        r"draws.transfer has shape \(3, 18\)",
    ),
]


@pytest.mark.parametrize(("family", "arguments", "others", "words"), WRONG, ids=range(len(WRONG)))
def test_what_the_model_or_the_prompt_does_not_fit_is_refused(family, arguments, others, words):
    decode = DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)
    with pytest.raises(ValueError, match=words):
        run(family, prompts(ROWS, PROMPT), decode=decode, **others)
