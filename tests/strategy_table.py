"""The decoding strategies that tests run over, and small generations with them."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_models import small

from dlm_jax.decoding import strategies
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate

ROWS, PROMPT, GEN, BLOCK = 3, 6, 12, 6
LENGTH = PROMPT + GEN
MASK, VOCAB = 39, 40
KEYS = jax.random.split(jax.random.key(7), ROWS)
FREQUENCY = np.random.default_rng(0).dirichlet(np.ones(VOCAB))
COMMON = {"llada": 21, "dream": 32}
"""A token that the small models like to predict."""


class Strategy(NamedTuple):
    """One row of `TABLE`."""

    arguments: dict[str, Any]
    """Of `decoding`; numbers among them are traced."""
    numbers: dict[str, st.SearchStrategy] = {}
    """Other values for the traced ones."""
    families: tuple[str, ...] = ("llada", "dream")
    debiased: bool = False


def among(low: float, high: float) -> st.SearchStrategy:
    return st.floats(low, high)


TABLE = {
    "plain": Strategy(dict(alg="maskgit_plus", steps=4)),
    "fixed": Strategy(dict(schedule="fixed")),
    "timestep": Strategy(dict(schedule="timestep", alg="entropy", steps=8)),
    "threshold": Strategy(dict(threshold=0.7), dict(threshold=among(-0.1, 1.1))),
    "threshold, two at least": Strategy(
        dict(threshold=0.9, num_transfer_tokens=2, alg="topk_margin"),
        dict(threshold=among(0, 1.1)),
    ),
    "threshold, capped": Strategy(
        dict(threshold=0.7, schedule="capped", steps=4), dict(threshold=among(0, 1.1))
    ),
    "factor": Strategy(dict(factor=1.0), dict(factor=among(0.01, 4))),
    "factor, spare last": Strategy(
        dict(strategy="factor", factor=1.0, spare_last=True, alg="maskgit_plus"),
        dict(factor=among(0.01, 4)),
    ),
    "gamma": Strategy(dict(gamma=0.5), dict(gamma=among(0, 3))),
    "sigma": Strategy(dict(sigma=2.0, alg="maskgit_plus", steps=4), dict(sigma=among(0.25, 40))),
    "sigma, threshold": Strategy(
        dict(sigma=4.0, threshold=0.5), dict(sigma=among(0.25, 40), threshold=among(0, 1))
    ),
    "klass": Strategy(
        dict(strategy="klass", threshold=0.7, kl_threshold=0.3),
        dict(threshold=among(0, 1), kl_threshold=among(0.001, 3)),
    ),
    "klass, factor": Strategy(
        dict(
            strategy="klass",
            factor=1.0,
            kl_threshold=0.3,
            kl_history_length=1,
            num_transfer_tokens=2,
        ),
        dict(factor=among(0.1, 4), kl_threshold=among(0.001, 3)),
    ),
    "wino": Strategy(
        dict(strategy="wino", block_length=GEN),
        dict(wide_in_thres=among(0, 1), narrow_out_thres=among(0, 1)),
        families=("llada",),
    ),
    "wino in blocks": Strategy(
        dict(strategy="wino", alg="maskgit_plus", num_transfer_tokens=2, sigma=5.0),
        dict(wide_in_thres=among(0, 1), narrow_out_thres=among(0, 1), sigma=among(0.25, 40)),
        families=("llada",),
    ),
    "origin": Strategy(dict(alg="origin", steps=8)),
    "alg_temp": Strategy(dict(alg_temp=0.5, steps=4), dict(alg_temp=among(0.01, 5))),
    "random": Strategy(dict(alg="random", steps=4)),
    "debias": Strategy(dict(steps=4), dict(clip_alpha=among(0.5, 10)), debiased=True),
    "debias, threshold": Strategy(
        dict(threshold=2.0), dict(clip_alpha=among(0.5, 10), threshold=among(0, 5)), debiased=True
    ),
    "cfg": Strategy(dict(cfg_scale=1.0, steps=4), dict(cfg_scale=among(0.1, 3))),
    "until eos": Strategy(dict(stop_until_eos=True, threshold=0.8), dict(threshold=among(0, 1.1))),
    "past eos": Strategy(
        dict(stop_until_eos=True, fill_past_eos=True, threshold=0.8),
        dict(threshold=among(0, 1.1)),
    ),
    "suppress": Strategy(dict(suppress=(21, 17, 32, 1), gamma=0.5), dict(gamma=among(0, 3))),
    "sampled": Strategy(dict(temperature=1.0), dict(temperature=among(0.1, 4))),
}
ON_DREAM = {"timestep", "threshold, capped", "alg_temp", "debias, threshold", "sampled"}
NOT_ON_LLADA = {"timestep", "threshold, two at least", "factor, spare last", "klass, factor"}
NOT_ON_LLADA |= {"alg_temp", "debias", "wino in blocks", "threshold, capped", "suppress", "sampled"}
NOT_ON_LLADA |= {"debias, threshold", "past eos"}


def is_slow(name: str, family: str) -> bool:
    """Most strategies are fast with one family; the other one takes as long again."""
    return name not in ON_DREAM if family == "dream" else name in NOT_ON_LLADA


def cases(*names: str) -> pytest.MarkDecorator:
    """Parametrises over `name` and `family`: the given strategies, or all."""
    return pytest.mark.parametrize(
        ("name", "family"),
        [
            pytest.param(
                name,
                family,
                marks=[pytest.mark.slow] if is_slow(name, family) else [],
                id=f"{family}, {name}",
            )
            for name in names or TABLE
            for family in TABLE[name].families
        ],
    )


def config(name: str, family: str = "llada", **changes) -> DecodeConfig:
    base = dict(gen_length=GEN, block_length=BLOCK)
    if TABLE[name].arguments.get("stop_until_eos"):
        base |= dict(eos_id=COMMON[family])
    return decoding(**base | TABLE[name].arguments | changes)


def decoding(**arguments: Any) -> DecodeConfig:
    """A configuration; a strategy may be a name, with its arguments among the rest."""
    name = arguments.get("strategy")
    if isinstance(name, str):
        known = strategies.arguments(name)
        own = {argument: arguments.pop(argument) for argument in known if argument in arguments}
        arguments["strategy"] = strategies.make(name, **own)
    return DecodeConfig(**arguments)


def parameter(decode: DecodeConfig, name: str) -> Any:
    """A setting of the decoding, of its strategy, or of the rule that this narrows; or None."""
    strategy = decode.strategy
    holders = (holder for holder in (strategy, getattr(strategy, "rule", None), decode) if holder)
    return next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)


def run(family: str, prompt, mask=None, *, decode: DecodeConfig, debiased=False, **arguments):
    """A generation with its history, on the host."""
    model, params = small(family)
    if debiased:
        arguments["token_freq"] = FREQUENCY
    if mask is None:
        mask = np.ones(prompt.shape, bool)
    arguments = dict(key=KEYS[: len(prompt)], record=("history",)) | arguments
    out = diffusion_generate(params, model, prompt, mask, decode=decode, **arguments)
    out = jax.device_get(out)
    return out._replace(history=out.history[: out.nfe])


def padding(*pads: int, length: int = PROMPT) -> np.ndarray:
    return np.arange(length)[None] >= np.asarray(pads)[:, None]
