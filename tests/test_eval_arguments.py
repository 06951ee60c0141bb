"""What a user or a task gives as text, sorted into settings; what cannot work is refused."""

import dataclasses

import numpy as np
import pytest

import dlm_jax
from dlm_jax import models
from dlm_jax.decoding import strategies
from dlm_jax.eval import arguments
from dlm_jax.eval.arguments import Settings
from dlm_jax.likelihood import LikelihoodConfig
from dlm_jax.models import Config

LLADA = models.llada.PRESETS["llada-8b-instruct"]
DREAM = models.dream.PRESETS["dream-v0-instruct-7b"]


def test_settings_are_sorted_into_decoding_cache_and_likelihood():
    found = arguments.sort_out(
        "d2cache",
        dict(
            gen_length=8,
            sigma=3.0,
            cache_sigma=4.0,
            current_k=16,
            cache_inflate_w=2,
            cfg_scale=0.5,
            estimator="ar_ftb",
            log_type="btf",
            mc_num=32,
            mc_batch_size=8,
        ),
    )
    assert found == Settings(
        cache="d2cache",
        cache_args=dict(sigma=4.0, current_k=16, inflate_w=2),
        decode=dict(gen_length=8, sigma=3.0, cfg_scale=0.5),
        likelihood=dict(estimator="ar_ftb", log_type="btf", mc_num=32, batch_size=8),
    )
    assert arguments.sort_out("none", {}) == Settings()


def test_a_strategy_has_arguments_of_its_own():
    named = dict(strategy="klass", threshold=0.9, kl_threshold=0.1, kl_history_length=3)
    klass = strategies.make(named["strategy"], threshold=0.9, kl_threshold=0.1, kl_history_length=3)
    assert arguments.sort_out("none", named | dict(factor=None)) == Settings(
        decode=dict(strategy=klass, factor=None)
    )
    # Without any, the rule may come from elsewhere.
    plain = dict(strategy="klass", gen_length=8)
    assert arguments.sort_out("none", plain) == Settings(decode=plain)
    with pytest.raises(ValueError, match="There is no setting 'kl_threshold'"):
        arguments.sort_out("none", dict(kl_threshold=0.1))
    with pytest.raises(ValueError, match="strategy is 'klas'; it must be one of"):
        arguments.sort_out("none", dict(strategy="klas"))


def test_settings_have_others_below_them():
    own = Settings(cache="dual", decode=dict(sigma=None, steps=4), likelihood=dict(log_type="btf"))
    assert own.over(dict(sigma=3.0, top_p=0.9), dict(log_type="ftb", mc_num=4)) == Settings(
        cache="dual",
        decode=dict(sigma=None, top_p=0.9, steps=4),
        likelihood=dict(log_type="btf", mc_num=4),
    )
    assert own.over({}, {}) == own


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(cache="kv"), "cache is 'kv'; it must be one of none, "),
        (dict(cache="dllm", cache_args=dict(kq=3)), "The cache 'dllm' has no argument 'kq'; it"),
        (dict(cache="dllm", cache_args=dict(kp=0)), "kp is 0; it must be a whole number from 1 on"),
    ],
)
def test_settings_of_no_cache_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Settings(**given)


def estimate(config: Config, decode: dict, **likelihood) -> LikelihoodConfig:
    return arguments.estimate(config, Settings(decode=decode, likelihood=likelihood))


def test_guidance_holds_for_likelihoods_if_their_estimator_has_it():
    guided = estimate(LLADA, dict(cfg_scale=0.5, gen_length=8), mc_num=32)
    assert guided == LikelihoodConfig(estimator="mc_count", mc_num=32, cfg_scale=0.5)
    plain = estimate(DREAM, dict(cfg_scale=0.5))
    assert plain == LikelihoodConfig(estimator="mc_rate")
    assert estimate(DREAM, dict(cfg_scale=0.5), estimator="mc_count").guided
    assert estimate(LLADA, {}) == LikelihoodConfig(estimator="mc_count")
    with pytest.raises(ValueError, match="estimator is 'mc'; it must be one of"):
        estimate(LLADA, {}, estimator="mc")


def test_no_parameter_of_a_cache_is_out_of_reach():
    for name, method in dlm_jax.cache.METHODS.items():
        for field in dataclasses.fields(method):
            found = arguments.sort_out(name, {f"cache_{field.name}": field.default})
            assert found == Settings(cache=name, cache_args={field.name: field.default})


@pytest.mark.parametrize(
    ("cache", "given", "sentence"),
    [
        (
            "kv",
            {},
            "cache is 'kv'; it must be one of none, dkv-decode, dkv-greedy, dkv-prefill, dkv-pd, "
            "prefix, dual, dllm, d2cache.",
        ),
        (
            "dllm",
            dict(current_k=3),
            "There is no setting 'current_k'; settings are fields of DecodeConfig, such as "
            "gen_length, and for the cache dllm: kp, kr, rou.",
        ),
        (
            "none",
            dict(cache_kp=3),
            "There is no setting 'cache_kp'; settings are fields of DecodeConfig, such as "
            "gen_length, and for the cache none: none.",
        ),
        ("none", dict(infill=True), "infill is not for evaluation: prompts hold no masks."),
        (
            "none",
            dict(max_forwards=3),
            "max_forwards is not for evaluation: every answer must be complete.",
        ),
    ],
)
def test_unknown_and_unsuited_settings_are_refused(cache, given, sentence):
    with pytest.raises(ValueError) as error:
        arguments.sort_out(cache, given)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {}),
        (dict(until=["\n"]), {}),
        (dict(max_gen_toks=96), dict(gen_length=96)),
        (dict(max_gen_toks="96"), dict(gen_length=96)),
        (dict(max_gen_toks=None), {}),
        (dict(max_new_tokens=96), dict(gen_length=96)),
        (dict(max_tokens=96, max_gen_toks=64), dict(gen_length=64)),
        (dict(do_sample=False, temperature=0.8, top_p=0.95), {}),
        (dict(do_sample=False, temperature=0.0), {}),
        (dict(do_sample=True, temperature=0.0, top_p=0.95), {}),
        (dict(do_sample=True, temperature=0.25), dict(temperature=0.25)),
        (dict(temperature=0.25), dict(temperature=0.25)),  # as the harness reads it
        (dict(temperature=0.0), {}),
        (
            dict(do_sample=True, temperature="0.25", top_p=0.95, top_k=20),
            dict(temperature=0.25, top_p=0.95, top_k=20),
        ),
    ],
)
def test_the_wishes_of_a_task(given, wanted):
    found = arguments.wishes(given)
    assert found == wanted and {k: type(v) for k, v in found.items()} == {
        k: type(v) for k, v in wanted.items()
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, []),
        (dict(until=None), []),
        (dict(until=[]), []),
        (dict(until=""), []),
        (dict(until="Question:"), ["Question:"]),
        (dict(until=["Question:", "", "</s>"]), ["Question:", "</s>"]),
    ],
)
def test_stops(given, wanted):
    assert arguments.stops(given) == wanted


def test_whole_numbers_may_be_text():
    assert [arguments.whole("n", value) for value in (1, "16", np.int64(3))] == [1, 16, 3]
    assert arguments.whole("seed", 0, least=0) == 0
    for value, least in ((0, 1), ("auto", 1), ("auto:4", 1), (2.0, 1), (True, 1), (None, 1)):
        with pytest.raises(ValueError) as error:
            arguments.whole("batch_size", value, least=least)
        sentence = f"batch_size is {value!r}; it must be a whole number from {least} on."
        assert str(error.value) == sentence
    with pytest.raises(ValueError, match="seed is -1; it must be a whole number from 0 on."):
        arguments.whole("seed", -1, least=0)
