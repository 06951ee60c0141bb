"""Decoding settings that have no meaning together, or none with the model or the prompt."""

import numpy as np
import pytest
from strategy_table import BLOCK, FREQUENCY, GEN, LENGTH, MASK, PROMPT, ROWS, VOCAB, run
from tiny_models import prompts

from dlm_jax.cache import make
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.state import Draws
from dlm_jax.decoding.strategies import (
    STRATEGIES,
    EntropyBound,
    Factor,
    Klass,
    Random,
    Threshold,
    Wino,
)
from dlm_jax.decoding.strategies import make as make_strategy

REFUSED = [
    (dict(sigma=2.0, alg="entropy"), "alg is 'entropy', .* sigma"),
    (dict(infill=True, schedule="even"), "steps is None, but the schedule 'even'"),
    (dict(num_transfer_tokens=2), "num_transfer_tokens is 2, but the schedule 'even'"),
    (dict(gen_length=0, infill=True), "block_length is 6; it must divide gen_length, 0"),
    (dict(clip_alpha=None), "clip_alpha is None; it must be a number"),
    (dict(threshold=0.9, factor=1.0), "threshold and factor are both given"),
    (dict(threshold=0.9, gamma=0.1), "threshold and gamma are both given"),
    (dict(factor=0.9, gamma=0.1), "factor and gamma are both given"),
    (dict(strategy="remdm"), f"strategy is 'remdm'; it must be one of {', '.join(STRATEGIES)}"),
    (dict(strategy=0.9), f"strategy is 0.9; it must be a name among {', '.join(STRATEGIES)}"),
    (dict(strategy="threshold"), "'threshold' needs threshold; give it as threshold="),
    (dict(strategy=Factor(1.0), threshold=0.9), r"threshold and Factor\(factor=1.0.* both given"),
    (dict(strategy="factor", threshold=0.9), "'factor' has no argument 'threshold'; .* factor"),
    (dict(strategy="klass", threshold=0.9, factor=1.0), "threshold and factor are both given"),
    (dict(strategy="klass"), "strategy is 'klass', .* a threshold or a factor"),
    (dict(strategy="klass", gamma=0.1), "strategy is 'klass', .* a threshold or a factor"),
    (
        dict(strategy="klass", threshold=0.9, schedule="capped"),
        "schedule is 'capped'; .*'klass'.*'fixed'",
    ),
    (dict(strategy="klass", threshold=0.9, steps=8), "steps is 8, but strategy='klass' decides"),
    (dict(strategy="klass", threshold=0.9, alg_temp=0.1), "alg_temp is 0.1, .*'klass' leave it"),
    *(
        (
            dict(strategy=strategy) | {name: 0.9},
            f"'{strategy}' has no argument '{name}'; it takes {takes}",
        )
        for name in ("threshold", "factor", "gamma")
        for strategy, takes in (
            ("wino", "wide_in_thres, narrow_out_thres"),
            ("random", "redrawn"),
            ("origin", "no arguments"),
        )
    ),
    (dict(strategy=Wino(), threshold=0.9), r"threshold and Wino\(.* are both given"),
    (dict(strategy="wino", cfg_scale=1.0), "'wino', which has no meaning with cfg_scale"),
    (dict(strategy="wino", infill=True), "'wino', which has no meaning with infill"),
    (dict(strategy="wino", alg="topk_margin"), "alg is 'topk_margin'; the strategy 'wino'"),
    (dict(strategy="wino", alg="random"), "alg is 'random', .* with strategy='wino'"),
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
    (dict(alg="origin", schedule="even"), "schedule is 'even'; with strategy='origin'.*'timestep'"),
    (
        dict(alg="origin", schedule="fixed"),
        "schedule is 'fixed'; with strategy='origin'.*'timestep'",
    ),
    (dict(alg="origin", threshold=0.9), "alg is 'origin', which ignores confidence; .* threshold"),
    (dict(alg="origin", strategy="random"), "alg is 'origin', which .* strategy='random'"),
    (dict(alg="origin", alg_temp=0.9), "alg_temp is 0.9, but strategy='origin' ignores confidence"),
    (dict(alg="origin", sigma=1.0), "sigma is 1.0, but strategy='origin' ignores confidence"),
    (dict(alg="random", alg_temp=0.9), "alg_temp is 0.9, but strategy='random' ignores confidence"),
    (dict(alg="random", sigma=1.0), "sigma is 1.0, but strategy='random' ignores confidence"),
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
        for name in ("num_transfer_tokens", "max_forwards", "top_k")
        for value in (0, -3)
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be 0 or above")
        for name in ("temperature", "alg_temp", "gamma", "cfg_scale")
        for value in (-1.0, float("nan"), float("inf"))
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be above 0")
        for name in ("factor", "sigma", "clip_alpha")
        for value in (0.0, float("nan"))
    ),
    *(
        (dict(threshold=value), f"threshold is {value}; it must be a confidence")
        for value in (float("nan"), float("inf"))
    ),
    (dict(max_forwards=1.5), "max_forwards is 1.5; it must be a whole number"),
    *((dict(top_p=value), f"top_p is {value}; it must lie in") for value in (0.0, 1.5)),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)


STRATEGIES_REFUSED = [
    ("remdm", {}, f"strategy is 'remdm'; it must be one of {', '.join(STRATEGIES)}"),
    ("wino", dict(narrow_out_thres=None), "narrow_out_thres is None; it must be a number"),
    ("wino", dict(wide_in_thres=None), "wide_in_thres is None; it must be a number"),
    *(
        ("wino", {name: value}, f"{name} is {value}; it must be a confidence")
        for name in ("wide_in_thres", "narrow_out_thres")
        for value in (float("nan"), float("inf"))
    ),
    *(
        (
            "klass",
            dict(threshold=0.9, kl_history_length=value),
            f"kl_history_length is {value}; it must be a whole number from 1 on",
        )
        for value in (0, -3)
    ),
    *(
        (
            "klass",
            dict(threshold=0.9, kl_threshold=value),
            f"kl_threshold is {value}; it must be above 0",
        )
        for value in (0.0, float("nan"))
    ),
    ("klass", dict(threshold=0.9, kl_threshold=None), "kl_threshold is None; it must be a number"),
    ("klass", dict(threshold=0.9, gamma=0.1), "threshold and gamma are both given"),
    ("klass", dict(gamma=0.1), "strategy is 'klass', .* a threshold or a factor"),
    ("klass", {}, "strategy is 'klass', .* a threshold or a factor"),
    ("klass", dict(threshold=float("nan")), "threshold is nan; it must be a confidence"),
    ("klass", dict(kl=0.3), "'klass' has no argument 'kl'; it takes threshold, factor, gamma, kl_"),
    ("factor", {}, "'factor' needs factor; give it as factor="),
    ("entropy-bound", dict(gamma=-1.0), "gamma is -1.0; it must be 0 or above"),
    ("surest", dict(threshold=0.9), "'surest' has no argument 'threshold'; it takes no arguments"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "words"), STRATEGIES_REFUSED, ids=range(len(STRATEGIES_REFUSED))
)
def test_what_a_strategy_does_not_take_is_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_strategy(name, **arguments)


def test_a_strategy_that_narrows_a_rule_takes_only_one_that_looks_at_confidences():
    words = "strategy is 'klass', .* a threshold or a factor"
    with pytest.raises(ValueError, match=words):
        Klass(EntropyBound(0.1))
    for rule in (Threshold(0.9), Factor(1.0)):
        assert Klass(rule).rule == rule


WRONG = [
    ("dream", dict(strategy="wino"), {}, "strategy is 'wino', .*dream predicts"),
    ("llada", dict(strategy="wino"), dict(cache=make("dual")), "cache is 'dual', .*'wino'"),
    ("llada", dict(suppress=(3, MASK)), {}, "suppress has the mask token"),
    ("llada", dict(suppress=(VOCAB,)), {}, "suppress has token id 40; it must lie in 0 to 39"),
    ("llada", dict(eos_id=-1), {}, "eos_id has token id -1"),
    ("llada", dict(alg="entropy"), dict(token_freq=FREQUENCY), "token_freq debiases .*'entropy'"),
    ("llada", dict(alg="topk_margin"), dict(token_freq=FREQUENCY), "token_freq debiases"),
    ("llada", {}, dict(token_freq=FREQUENCY[1:]), r"token_freq has shape \(39,\)"),
    (
        "llada",
        {},
        dict(draws=Draws(order=np.ones((ROWS, LENGTH)))),
        "draws.order .*'surest'; .* 'random'",
    ),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(order=np.ones((ROWS, GEN)))),
        r"draws.order has shape \(3, 12\)",
    ),
    *(
        (
            "llada",
            dict(strategy=Random(redrawn=redrawn)),
            dict(draws=Draws(order=np.ones(shape))),
            "draws.order has shape .*'random', or one such array per forward if that is redrawn",
        )
        for redrawn, shape in ((True, (ROWS, LENGTH)), (False, (4, ROWS, LENGTH)))
    ),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(transfer=np.ones((2, ROWS, LENGTH), bool))),
        "draws.transfer .* for the strategy 'origin' or an alg_temp",
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
