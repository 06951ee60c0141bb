"""The model for lm-evaluation-harness: settings, text and tokens, generation, and likelihoods."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHECKPOINTS
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import dlm_jax
from dlm_jax import checkpoint, models
from dlm_jax.cache import D2Cache, DKVGreedy, DLLMCache, Dual, NoCache
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Answer, Engine, Result
from dlm_jax.eval import arguments, defaults, runners
from dlm_jax.eval.defaults import Recipe
from dlm_jax.eval.model import DiffusionLM
from dlm_jax.eval.responses import Responses
from dlm_jax.eval.runners import Scorer
from dlm_jax.likelihood import LikelihoodConfig, log_likelihood

LLADA = models.llada.PRESETS["llada-8b-instruct"]
DREAM = models.dream.PRESETS["dream-v0-instruct-7b"]
EOS, MASK = 0, 1  # of the embedded models
CONTEXT = 64
QUESTION = "<|user|>Tom has 3 boxes with 4 apples each. How many apples?<|assistant|>"


# --- defaults: the table of the d2Cache framework -------------------------------------------------

MODELS = {
    "llada-base": (LLADA, "base"),
    "llada-inst": (LLADA, "inst"),
    "llada-1.5": (LLADA, "1.5"),
    "dream-base": (DREAM, "base"),
    "dream-inst": (DREAM, "inst"),
}
GEN_LENGTHS = {
    "gsm8k": 256,
    "gsm8k_cot": 256,
    "math-500": 256,
    "gpqa_main_generative_n_shot": 256,
    "mmlu_pro": 256,
    "humaneval": 512,
    "humaneval_instruct": 512,
    "mbpp": 512,
    "mbpp_instruct": 512,
    "longbench_hotpotqa": 512,
    "anything_else": 512,
}
# (kp, kr) of llada-base, llada-inst, dream-base, dream-inst
DLLM = {
    "gsm8k": [(25, 5), (50, 7), (100, 8), (25, 2)],
    "gsm8k_cot": [(25, 5), (50, 7), (100, 8), (25, 2)],
    "humaneval": [(50, 5), (25, 5), (5, 1), (50, 1)],
    "math-500": [(50, 8), (50, 1), (100, 4), (50, 1)],
    "mbpp": [(25, 4), (100, 5), (25, 8), (10, 8)],
    "gpqa_main_generative_n_shot": [(100, 8), (50, 6), (100, 8), (10, 8)],
    "mmlu_pro": [(100, 6), (50, 3), (25, 2), (5, 1)],
    "humaneval_instruct": [(50, 4)] * 4,
    "mbpp_instruct": [(50, 4)] * 4,
    "anything_else": [(50, 4)] * 4,
}
CACHES = ["none", "dkv-decode", "dkv-greedy", "dkv-prefill", "dkv-pd", "prefix", "dual", "dllm"]


def plan(cache="none", task="gsm8k", model="llada-inst", wishes=None, *, cache_args=None, **decode):
    """Decoding and cache method of a task, where `decode` and `cache_args` are given."""
    config, variant = MODELS[model]
    return Recipe(config, variant, cache, cache_args or {}, decode).plan(task, wishes or {})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache", [*CACHES, "d2cache"])
def test_lengths_and_blocks_are_those_of_the_framework(cache, model):
    for task, length in GEN_LENGTHS.items():
        decode, method = plan(cache, task, model)
        in_blocks = cache != "d2cache" and (cache in ("prefix", "dual") or model.endswith("inst"))
        assert (decode.gen_length, decode.block_length) == (length, 32 if in_blocks else length)
        assert method.name == cache


@pytest.mark.parametrize("model", MODELS)
def test_decoding_is_that_of_the_framework(model):
    for cache in (*CACHES, "d2cache"):
        decode, _ = plan(cache, "gsm8k", model)
        assert decode.alg == ("random" if cache == "dkv-greedy" else "maskgit_plus")
        assert (decode.pace, decode.num_transfer_tokens, decode.steps) == ("fixed", 1, None)
        assert (decode.temperature, decode.top_k) == (0.0, None)
        assert decode.top_p == (0.9 if model.startswith("dream") else None)
        assert decode.sigma == (10.0 if cache == "d2cache" else None)
        assert not decode.parallel and not decode.guided and decode.strategy is None


@pytest.mark.parametrize("task", DLLM)
def test_refresh_periods_are_those_of_the_framework(task):
    names = ("llada-base", "llada-inst", "dream-base", "dream-inst")
    for model, (kp, kr) in zip(names, DLLM[task], strict=True):
        assert plan("dllm", task, model)[1] == DLLMCache(kp=kp, kr=kr, rou=0.25)
    assert plan("dllm", task, "llada-1.5")[1] == DLLMCache(kp=50, kr=4, rou=0.25)


@pytest.mark.parametrize("model", MODELS)
def test_d2cache_has_the_framework_s_parameters(model):
    wanted = D2Cache(rollout_p=0.1, current_k=32, sigma=10.0, inflate_w=0)
    assert plan("d2cache", "humaneval", model)[1] == wanted


def test_what_is_given_comes_before_the_tables_and_these_before_the_task():
    wishes = dict(gen_length=100, temperature=0.7, top_p=0.5, top_k=20)
    decode, _ = plan("none", "gsm8k", "dream-inst", wishes, gen_length=64, top_p=0.75)
    assert (decode.gen_length, decode.temperature) == (64, 0.7)
    assert (decode.top_p, decode.top_k) == (0.75, 20)
    # A task that samples says from what; its length is the framework's.
    decode, _ = plan("none", "gsm8k", "dream-inst", wishes)
    assert (decode.gen_length, decode.top_p) == (256, 0.5)
    decode, _ = plan("none", "gsm8k", "llada-inst", wishes)
    assert (decode.gen_length, decode.top_p) == (256, 0.5)
    # A length that the task wishes makes one block where blocks of 32 do not fit.
    decode, _ = plan("none", "some_task", "llada-inst", wishes)
    assert (decode.gen_length, decode.block_length) == (100, 100)
    decode, _ = plan("none", "some_task", "llada-inst", dict(gen_length=96))
    assert (decode.gen_length, decode.block_length) == (96, 32)
    assert plan("none", "some_task", "llada-inst")[0].gen_length == 512
    decode, _ = plan("none", "gsm8k", "llada-inst", wishes, temperature=0.0)
    assert decode.temperature == 0.0
    decode, _ = plan("dual", "gsm8k", "llada-base", gen_length=64, block_length=16)
    assert (decode.gen_length, decode.block_length) == (64, 16)
    decode, _ = plan("d2cache", "gsm8k", "llada-inst", block_length=32)
    assert (decode.block_length, decode.sigma) == (32, 10.0)
    _, method = plan("dllm", "gsm8k", "llada-inst", cache_args=dict(kr=3))
    assert method == DLLMCache(kp=50, kr=3, rou=0.25)
    decode, method = plan("d2cache", cache_args=dict(inflate_w=4, sigma=3.0), sigma=5.0)
    assert method == D2Cache(rollout_p=0.1, current_k=32, sigma=3.0, inflate_w=4)
    assert decode.sigma == 5.0


def test_none_takes_back_what_the_tables_say():
    assert plan("d2cache", sigma=None)[0].sigma is None
    assert plan("none", model="dream-inst", top_p=None)[0].top_p is None
    assert plan("none", alg=None)[0].alg == "low_confidence"
    assert plan("none", model="dream-inst", alg=None)[0].alg == "entropy"
    assert plan("none", schedule=None)[0].pace == "even"
    assert plan("dual", threshold=None, temperature=None) == plan("dual")


@pytest.mark.parametrize("cache", ["none", "dual", "dllm"])
def test_the_tasks_of_a_group_are_decoded_like_the_group(cache):
    for model in MODELS:
        assert plan(cache, "mmlu_pro_biology", model) == plan(cache, "mmlu_pro", model)
    assert plan(cache, "mmlu_proverbs")[0].gen_length == 512


@pytest.mark.parametrize(
    ("given", "pace"),
    [
        (dict(steps=32), None),
        (dict(schedule="even"), "even"),
        (dict(schedule="timestep", steps=64), "timestep"),
        (dict(alg="origin"), "timestep"),
        (dict(alg="entropy"), "fixed"),
        (dict(alg="topk_margin"), "fixed"),
        (dict(alg="entropy", steps=64), None),
        (dict(strategy="klass", threshold=0.9), "fixed"),
        (dict(threshold=0.9), "fixed"),
        (dict(factor=1.0), "fixed"),
        (dict(gamma=0.1), "fixed"),
        (dict(threshold=0.9, schedule="capped", steps=64), "capped"),
        (dict(num_transfer_tokens=2), "fixed"),
        (dict(temperature=0.5, alg_temp=0.5), "fixed"),
    ],
)
@pytest.mark.parametrize("model", ["llada-inst", "dream-base"])
def test_what_is_given_does_not_clash_with_the_default_schedule(model, given, pace):
    family = "even" if model.startswith("llada") else "timestep"
    decode, _ = plan("none", "gsm8k", model, **given)
    assert decode.pace == (pace or family)
    for name, value in given.items():
        assert getattr(decode, name) == value


def test_wino_needs_no_other_setting():
    decode, method = plan(strategy="wino")
    assert (decode.strategy, decode.pace, decode.alg) == ("wino", "fixed", "maskgit_plus")
    assert method == NoCache()


def test_a_cache_that_must_know_the_order_gets_a_random_one_unless_one_is_given():
    decode, method = plan("dkv-greedy")
    assert (decode.alg, decode.pace, method) == ("random", "fixed", DKVGreedy())
    decode, _ = plan("dkv-greedy", alg="random", steps=128)
    assert (decode.alg, decode.pace, decode.steps) == ("random", "even", 128)
    with pytest.raises(ValueError, match="alg is 'entropy'.*must know the next tokens"):
        plan("dkv-greedy", alg="entropy")


@pytest.mark.parametrize(
    ("cache", "given", "words"),
    [
        ("dual", dict(strategy="wino"), "cache is 'dual', which keeps keys and values"),
        ("d2cache", dict(suppress=(10**6,)), "suppress has token id 1000000"),
        ("prefix", dict(suppress=(LLADA.mask_id,)), "suppress has the mask token"),
        ("none", dict(eos_id=10**6), "eos_id has token id 1000000"),
    ],
)
def test_a_refusal_is_about_what_was_given(cache, given, words):
    with pytest.raises(ValueError) as error:
        plan(cache, **given)
    assert words in str(error.value) and "random" not in str(error.value)


def test_sigma_can_be_switched_off_as_the_help_says():
    # --compare none,dual,d2cache:rollout_p=0.2+sigma=0
    decode, method = plan("d2cache", cache_args=dict(rollout_p=0.2), sigma=0)
    assert decode.sigma is None
    assert method == D2Cache(rollout_p=0.2, current_k=32, sigma=10.0, inflate_w=0)


def test_a_length_that_leaves_no_room_for_a_prompt_is_refused():
    config = dataclasses.replace(LLADA, max_length=512)
    recipe = Recipe(config, "inst", "none", {}, {})
    assert recipe.plan("gsm8k", {})[0].gen_length == 256
    with pytest.raises(ValueError) as error:
        recipe.plan("humaneval", {})
    assert str(error.value) == (
        "gen_length is 512 for humaneval; it must leave room for a prompt in the model's context "
        "of 512 tokens."
    )
    assert Recipe(config, "inst", "none", {}, dict(gen_length=511)).plan("mbpp", {})


@pytest.mark.parametrize("model", ["llada-inst", "llada-base", "dream-inst"])
@pytest.mark.parametrize("cache", ["none", "dual", "dllm", "d2cache"])
def test_tiny_math_is_decoded_in_one_way_whatever_the_cache(cache, model):
    decode, method = plan(cache, "tiny_math", model)
    assert decode == DecodeConfig.for_model(MODELS[model][0], gen_length=64, block_length=16)
    assert method == dlm_jax.cache.make(cache)
    decode, _ = plan(cache, "tiny_math", model, gen_length=32)
    assert (decode.gen_length, decode.block_length) == (32, 16)
    decode, _ = plan(cache, "tiny_math", model, gen_length=40)
    assert (decode.gen_length, 40 % (decode.block_length or 40)) == (40, 0)


def test_tiny_math_keeps_its_settings_against_the_wishes_of_the_task():
    decode, _ = plan("none", "tiny_math", wishes=dict(gen_length=256, temperature=0.5))
    assert (decode.gen_length, decode.block_length, decode.temperature) == (64, 16, 0.5)


# --- defaults: variants ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template", "wanted"),
    [
        ("LLaDA-8B-Instruct", "template", "inst"),
        ("LLaDA-8B-Base", "template", "base"),
        ("LLaDA-1.5", "template", "1.5"),
        ("Dream-v0-Instruct-7B", "template", "inst"),
        ("Dream-v0-Base-7B", "template", "base"),
        ("LLaDA-8B-Instruct", None, "inst"),
        ("my-model", "template", "inst"),
        ("my-model", None, "base"),
        ("my-model", "", "base"),
    ],
)
def test_a_variant_is_told_by_the_name_or_by_the_chat_template(name, template, wanted):
    assert defaults.variant(None, name, SimpleNamespace(chat_template=template)) == wanted


def test_a_given_variant_wins():
    for given in ("base", "inst", "1.5"):
        assert defaults.variant(given, "LLaDA-8B-Instruct", None) == given
    assert defaults.variant(None, "my-model", None) == "base"
    with pytest.raises(ValueError) as error:
        defaults.variant("chat", "LLaDA-8B-Instruct", None)
    assert str(error.value) == "variant is 'chat'; it must be one of base, inst, 1.5."


# --- arguments ------------------------------------------------------------------------------------


def test_settings_are_sorted_into_decoding_cache_and_likelihood():
    decode, method, likelihood = arguments.sort_out(
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
    assert decode == dict(gen_length=8, sigma=3.0, cfg_scale=0.5)
    assert method == dict(sigma=4.0, current_k=16, inflate_w=2)
    assert likelihood == dict(estimator="ar_ftb", log_type="btf", mc_num=32, batch_size=8)
    assert arguments.sort_out("none", {}) == ({}, {}, {})


def test_guidance_holds_for_likelihoods_if_their_estimator_has_it():
    guided = arguments.estimate(LLADA, dict(cfg_scale=0.5, gen_length=8), dict(mc_num=32))
    assert guided == LikelihoodConfig(estimator="mc_count", mc_num=32, cfg_scale=0.5)
    plain = arguments.estimate(DREAM, dict(cfg_scale=0.5), {})
    assert plain == LikelihoodConfig(estimator="mc_rate")
    assert arguments.estimate(DREAM, dict(cfg_scale=0.5), dict(estimator="mc_count")).guided
    assert arguments.estimate(LLADA, {}, {}) == LikelihoodConfig(estimator="mc_count")
    with pytest.raises(ValueError, match="estimator is 'mc'; it must be one of"):
        arguments.estimate(LLADA, {}, dict(estimator="mc"))


def test_no_parameter_of_a_cache_is_out_of_reach():
    for name, method in dlm_jax.cache.METHODS.items():
        for field in dataclasses.fields(method):
            found = arguments.sort_out(name, {f"cache_{field.name}": 1})
            assert found == ({}, {field.name: 1}, {})


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


# --- a model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """family -> an embedded model with a short context, as directory and checkpoint."""
    found = {}
    for family, name in (("llada", "max_sequence_length"), ("dream", "max_position_embeddings")):
        directory = tmp_path_factory.mktemp("models") / f"{family}-short"
        shutil.copytree(checkpoint.find(f"{family}-tiny-math"), directory)
        change(directory / "config.json", **{name: CONTEXT})
        found[family] = (directory, checkpoint.load(directory))
    return found


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def engines():
    """Engines by their settings, so that no program is compiled twice."""
    return {}


@pytest.fixture
def make(opened, engines, monkeypatch):
    """Makes a `DiffusionLM` of a family; few tokens and few samples unless others are given."""

    def engine(loaded, decode, method, *, token_freq, mesh) -> Engine:
        assert token_freq is None and mesh is None
        key = (loaded.config, decode, method)
        if key not in engines:
            engines[key] = Engine(loaded, decode, method)
        return engines[key]

    monkeypatch.setattr(runners, "Engine", engine)

    def make_model(family="llada", **settings) -> DiffusionLM:
        directory, loaded = opened[family]
        few = dict(gen_length=8) | (
            {"mc_num": 4, "mc_batch_size": 2} if settings.get("estimator") != "ar_ftb" else {}
        )
        return DiffusionLM(str(directory), checkpoint=loaded, **few | settings)

    return make_model


def asked(*contexts, task="some_task", **gen_kwargs) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, gen_kwargs), 0, (task, i, 1))
        for i, context in enumerate(contexts)
    ]


def generate(model, *contexts, **gen_kwargs) -> list[str]:
    return model.generate_until(asked(*contexts, **gen_kwargs), disable_tqdm=True)


def scored(model, *pairs) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0, ("some_task", 0, 1)) for pair in pairs]
    return model.loglikelihood(requests, disable_tqdm=True)


class Hook:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told = []

    def add_partial(self, *told) -> None:
        self.told.append(told)


class Scripted(Engine):
    """Says what it is told to, and remembers what it was asked."""

    memory_mib = 12.345

    def __init__(self, monkeypatch, ids: list[int]) -> None:
        """Stands for all engines that are made from now on; `ids` is what it says."""
        self.batches, self.made = [], []
        self._ids = ids
        monkeypatch.setattr(runners, "Engine", self._make)

    def _make(self, checkpoint, decode, method, *, token_freq, mesh) -> Engine:
        self.made.append((decode, method))
        return self

    def run(self, rows, key, draw=None) -> Result:
        assert key.shape in ((), (len(rows),))
        self.batches.append([list(row) for row in rows])
        answer = Answer(self._ids, [0] * len(self._ids), None, len(self._ids), 0, 6, 5)
        return Result(
            answers=[answer] * len(rows),
            frames=None,
            nfe=7,
            positions=40.06264,
            tokens_per_forward=1.0,
            compile_seconds=9.0,
            seconds=3.0,
        )


@pytest.fixture
def say(monkeypatch, opened):
    """Makes engines say a text, or the same tokens to everyone."""
    tok = opened["llada"][1].tokenizer

    def script(text) -> Scripted:
        ids = tok(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        return Scripted(monkeypatch, ids)

    return script


# --- text and tokens ------------------------------------------------------------------------------


def test_the_harness_knows_the_model_by_name(opened, monkeypatch, say):
    assert get_model("dlm_jax") is DiffusionLM
    directory, _ = opened["dream"]
    model = DiffusionLM.create_from_arg_string(
        f"pretrained={directory},cache=d2cache,gen_length=8,current_k=4,sigma=2.5,cache_sigma=3.5",
        dict(batch_size="2", max_batch_size=None, device=None),
    )
    engine = say("3 apples")
    assert generate(model, "a", "b", "c") == ["3 apples"] * 3
    ((decode, method),) = engine.made
    assert method == D2Cache(rollout_p=0.1, current_k=4, sigma=3.5, inflate_w=0)
    assert (decode.gen_length, decode.sigma, decode.top_p) == (8, 2.5, 0.9)
    assert [len(batch) for batch in engine.batches] == [2, 2]
    assert (model.eot_token_id, model.max_length, model.tokenizer_name) == (0, 64, "dream-short")


def test_without_a_beginning_of_text_token_a_text_is_encoded_as_it_is(make):
    model = make()
    assert model.tok_encode("3 apples") == model.tokenizer("3 apples")["input_ids"]
    assert model.prefix_token_id == EOS


@pytest.fixture
def with_bos(opened, tmp_path):
    """A directory whose tokenizer begins texts with <|user|>, which is token 2."""
    directory = tmp_path / "with-bos"
    shutil.copytree(opened["llada"][0], directory)
    change(directory / "tokenizer_config.json", bos_token="<|user|>")
    return directory


def test_a_text_begins_with_one_beginning_of_text_token(with_bos, opened):
    plain = opened["llada"][1].tokenizer("3 apples")["input_ids"]
    settings = dict(checkpoint=opened["llada"][1])
    model = DiffusionLM(str(with_bos), **settings)
    assert model.tok_encode("3 apples") == [2, *plain]
    assert model.tok_encode("<|user|>3 apples") == [2, *plain]
    assert model.tok_encode("3 apples", add_special_tokens=True) == [2, *plain]
    assert model.tok_encode("3 apples", add_special_tokens=False) == plain
    assert model.prefix_token_id == 2
    without = DiffusionLM(str(with_bos), add_bos=False, **settings)
    assert without.tok_encode("3 apples") == plain
    assert without.tok_encode("<|user|>3 apples") == [2, *plain]


def test_a_conversation_goes_up_to_the_answer_or_to_the_end_of_its_last_message(make):
    model = make()
    question = {"role": "user", "content": "How many?"}
    start = {"role": "assistant", "content": "There are"}
    assert model.apply_chat_template([question]) == "<|user|>How many?<|assistant|>"
    text = model.apply_chat_template([question, start], add_generation_prompt=False)
    assert text == "<|user|>How many?<|assistant|>There are"


# --- generation -----------------------------------------------------------------------------------


def test_a_text_ends_at_the_end_of_text_token(make, say):
    tok = make().tokenizer
    ids = [*tok("3 apples")["input_ids"], EOS, *tok("42")["input_ids"], EOS]
    say(ids)
    assert generate(make(), "How many?") == ["3 apples"]
    say([EOS, *ids])
    assert generate(make(), "How many?") == [""]
    say("3 apples<|assistant|>42")
    assert generate(make(eos_id=3), "How many?") == ["3 apples"]


def test_a_text_holds_neither_masks_nor_special_tokens(make, say):
    say([MASK, *make().tokenizer("3<|user|> apples")["input_ids"], MASK])
    assert generate(make(), "How many?") == ["3 apples"]


@pytest.mark.parametrize(
    ("until", "wanted"),
    [
        ([], "3 apples.\n\nTom has 4"),
        ("\n\n", "3 apples."),
        (["Tom", "\n\n"], "3 apples."),
        (["has", "Tom"], "3 apples.\n\n"),
        (["<|user|>"], "3 apples.\n\nTom"),
        (["<|user|>", "apples"], "3 "),
        (["3"], ""),
        (["Kim", ""], "3 apples.\n\nTom has 4"),
        ("<|endoftext|>", "3 apples.\n\nTom has 4"),
    ],
)
def test_a_text_ends_at_the_first_stop_string_which_may_be_a_special_token(
    make, say, until, wanted
):
    say("3 apples.\n\nTom<|user|> has 4<|endoftext|>Kim")
    assert generate(make(), "How many?", until=until) == [wanted]


def test_a_prompt_that_is_too_long_loses_its_beginning(make, say, caplog):
    engine = say("3")
    long = " ".join(["apples"] * 40 + ["pens"] * 40)
    ids = make().tok_encode(long)
    fits = make().tokenizer.decode(ids[-56:])
    with caplog.at_level("WARNING"):
        generate(make(), fits)
        assert not caplog.messages
        generate(make(), long)
    assert engine.batches == [[ids[-56:]], [ids[-56:]]]
    (warning,) = caplog.messages
    assert "some_task" in warning and "cut off" in warning


def test_generation_arguments_that_are_not_heeded_are_told_of(say, caplog):
    say("3")
    requests = [
        Instance("generate_until", {}, (text, kwargs), i, (task, i, 1))
        for i, (task, text, kwargs) in enumerate(
            [
                ("tiny_math", "How many?", dict(until=[], max_gen_toks=16, num_beams=4)),
                ("tiny_math", "How many now?", dict(until=[], max_gen_toks=16, num_beams=4)),
                ("some_task", "How many?", dict(until=[], max_gen_toks=16, do_sample=False)),
            ]
        )
    ]
    # With a length of the model's own there is nothing to tell but what has no meaning.
    for given, expected in ((None, 2), (8, 1)):
        caplog.clear()
        model = DiffusionLM(gen_length=given)
        with caplog.at_level("WARNING"):
            model.generate_until(requests, disable_tqdm=True)
        assert len(caplog.messages) == expected
        assert all(told.startswith("tiny_math, 2 prompts: ") for told in caplog.messages)
        assert "num_beams" in caplog.messages[-1]
    caplog.clear()


def test_an_empty_prompt_is_the_token_that_stands_before_a_text(make, say):
    engine = say("3")
    assert generate(make(), "") == ["3"]
    assert engine.batches == [[[EOS]]]


def test_short_batches_are_filled_up_and_not_measured(make, say):
    model, engine = make(batch_size=2), say("3 apples")
    tok = model.tokenizer
    contexts = ["Tom has 3 apples and", "Tom", "Tom has 3"]
    ids = [tok(context)["input_ids"] for context in contexts]
    requests = asked(*contexts[:2], task="one") + asked(contexts[2], task="two")
    assert model.generate_until(requests, disable_tqdm=True) == ["3 apples"] * 3
    assert engine.batches == [[ids[0], ids[2]], [ids[1], ids[1]]]
    assert len(engine.made) == 1
    # Three seconds for a batch, be it of two requests or of one and a copy.
    facts = dict(tokens=2, forwards=6, last_forward=5, positions=40.063, memory_mib=12.3)
    facts |= dict(setup="cpu, batch 2")
    shared = facts | dict(seconds=1.5, compile_seconds=4.5)
    alone = facts | dict(seconds=3.0, compile_seconds=9.0)
    assert model.measured == dict(
        one=[shared | dict(input_length=len(ids[0])), alone | dict(input_length=len(ids[1]))],
        two=[shared | dict(input_length=len(ids[2]))],
    )
    engine.batches.clear()
    generate(model, "Kim")
    assert engine.batches == [[tok("Kim")["input_ids"]]]  # no more rows than requests


def test_tasks_are_decoded_in_their_own_ways(make, say):
    model, engine = make(batch_size=4), say("3")
    requests = asked("a", "b") + asked("c", do_sample=True, temperature=0.5)
    assert model.generate_until(requests, disable_tqdm=True) == ["3"] * 3
    assert [decode.temperature for decode, _ in engine.made] == [0.0, 0.5]
    assert [len(batch) for batch in engine.batches] == [4 - 1] * 2


def test_the_harness_is_told_of_every_answer(make, say):
    model = make()
    model.cache_hook = Hook()
    say("3 apples\n")
    requests = asked("a", "b", until=["\n"])
    model.generate_until(requests, disable_tqdm=True)
    assert model.cache_hook.told == [
        ("generate_until", request.args, "3 apples") for request in requests
    ]


def test_answers_are_kept_for_whoever_asks_the_same(make, say):
    responses = Responses()
    engine = say("3 apples")

    def new(**settings):
        """How many prompts are asked anew."""
        engine.batches.clear()
        request = settings.pop("until", [])
        generate(make(responses=responses, **settings), "a", "b", until=request)
        return sum(len(batch) for batch in engine.batches)

    assert new() == 2
    assert new(batch_size=2) == 0
    assert new(cache="none", add_bos=False, mc_num=8, check_greedy=True, variant="inst") == 0
    assert new(seed=1) == 2
    assert new(gen_length=4) == 2
    assert new(cache="dual") == 2
    assert new(cache="dllm", kr=3) == 2
    assert new(cache="dllm", kr=2) == 2
    assert new(until=["\n"]) == 2
    assert new(token_freq=np.full(605, 0.5, np.float32)) == 2
    assert new(token_freq=np.full(605, 0.25, np.float32)) == 2
    assert new(family="dream") == 2
    assert new() == 0


def test_answers_are_kept_in_a_folder(make, say, tmp_path):
    say("3 apples")
    for number in range(2):
        responses = Responses(tmp_path)
        model = make(responses=responses)
        if number:
            say("something else")
        assert generate(model, "a", "b") == ["3 apples"] * 2
        assert [facts["tokens"] for facts in model.measured["some_task"]] == [2, 2]
        responses.close()


CONTEXTS = [
    "<|user|>Tom has 3 apples. He buys 4 apples. How many apples?<|assistant|>",
    "<|user|>Kim has 9 pens.<|assistant|>",
    QUESTION,
    "<|user|>Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many?<|assistant|>",
]


def test_answers_do_not_depend_on_the_batch_and_come_in_order(make, opened):
    model = make(batch_size=1)
    one = generate(model, *CONTEXTS)
    for facts, context in zip(model.measured["some_task"], CONTEXTS, strict=True):
        assert facts["input_length"] == len(model.tokenizer(context)["input_ids"])
        assert facts["tokens"] == facts["last_forward"] == facts["forwards"] == 8  # one per step
        assert facts["positions"] == 32 + 8  # the prompt is padded to 32 slots
        assert facts["seconds"] > 0 and facts["memory_mib"] > 6  # of which the parameters are 6
    assert generate(make(batch_size=3), *CONTEXTS) == one
    assert generate(make(batch_size=3), *CONTEXTS[::-1]) == one[::-1]
    loaded = opened["llada"][1]
    decode = DecodeConfig.for_model(
        loaded.config, gen_length=8, block_length=8, alg="maskgit_plus", schedule="fixed"
    )
    engine = Engine(loaded, decode, NoCache())
    for context, text in zip(CONTEXTS[:2], one[:2], strict=True):
        ids = loaded.tokenizer(context)["input_ids"]
        (answer,) = engine.run([ids], jax.random.key(0)).answers
        assert text == answer.text
    assert len(set(one)) > 1


def test_samples_of_one_request_differ_and_depend_on_seed_and_turn_alone(make):
    contexts = [CONTEXTS[0], QUESTION, CONTEXTS[0], CONTEXTS[0]]
    settings = dict(temperature=1.0, gen_length=8)
    samples = generate(make(batch_size=4, **settings), *contexts)
    assert len({samples[0], samples[2], samples[3]}) > 1
    assert generate(make(batch_size=4, **settings), *contexts) == samples
    # Alone, in another order, among others, and with another method.
    model = make(batch_size=1, **settings)
    assert generate(model, CONTEXTS[0], CONTEXTS[0]) == [samples[0], samples[2]]
    assert generate(model, CONTEXTS[1], *contexts[::-1])[1:] == [
        samples[0],
        samples[2],
        samples[1],
        samples[3],
    ]
    other = generate(make(batch_size=4, seed=1, **settings), *contexts)
    assert other != samples


# --- likelihood -----------------------------------------------------------------------------------

PAIRS = [
    (QUESTION, " 12 apples"),
    ("Tom has", " 3 boxes with 4 apples each. How"),
    ("Tom has 3 apples. He buys 4 ", "pens"),  # the space belongs to the continuation
]


def test_an_empty_continuation_is_certain(make):
    assert scored(make(), ("Tom has", "")) == [(0.0, False)]


TEXT = " ".join(["Tom has 3 boxes with 4 apples each."] * 7)  # longer than the context


def by_hand(loaded: Checkpoint, prompt: list[int], answer: list[int]) -> float:
    """The log-likelihood of token ids, one token after the other."""
    # Few shapes, which are few programs.
    sizes = [size for size in (4, 16, 63) if len(answer) <= size <= CONTEXT - len(prompt)]
    slots = min(sizes, default=len(answer))
    before, after = CONTEXT - slots - len(prompt), slots - len(answer)
    found = log_likelihood(
        loaded.params,
        loaded.model,
        np.array([[EOS] * before + prompt], np.int32),
        np.array([answer + [EOS] * after], np.int32),
        np.array([[False] * before + [True] * len(prompt)]),
        np.array([[True] * len(answer) + [False] * after]),
        config=LikelihoodConfig(estimator="ar_ftb"),
    )
    return float(found[0])


@pytest.fixture(scope="module")
def reader(opened) -> DiffusionLM:
    """Dream, token by token: nothing is drawn."""
    directory, loaded = opened["dream"]
    return DiffusionLM(str(directory), checkpoint=loaded, estimator="ar_ftb", batch_size=2)


def test_a_log_likelihood_is_that_of_the_tokens(reader, opened):
    loaded = opened["dream"][1]
    tok = loaded.tokenizer
    reader.cache_hook = Hook()
    found = scored(reader, *PAIRS, ("", "Tom has 3"))
    wanted = [
        by_hand(loaded, tok(QUESTION)["input_ids"], tok(" 12 apples")["input_ids"]),
        by_hand(loaded, tok("Tom has")["input_ids"], tok(PAIRS[1][1])["input_ids"]),
        by_hand(loaded, tok("Tom has 3 apples. He buys 4")["input_ids"], tok(" pens")["input_ids"]),
        by_hand(loaded, [EOS], tok("Tom has 3")["input_ids"]),
    ]
    np.testing.assert_allclose([score for score, _ in found], wanted, rtol=1e-4)
    assert [greedy for _, greedy in found] == [False] * 4
    assert reader.cache_hook.told == [
        ("loglikelihood", pair, result)
        for pair, result in zip([*PAIRS, ("", "Tom has 3")], found, strict=True)
    ]


def test_pairs_that_fill_the_context_can_share_a_batch(reader, opened):
    loaded = opened["dream"][1]
    context = " ".join(["apples"] * 80)
    answers = [" 3 pens", " 3 boxes with 4 apples each. How many pens?"]
    found = scored(reader, *((context, answer) for answer in answers))
    prompt = loaded.tokenizer(context)["input_ids"]
    for (score, _), text in zip(found, answers, strict=True):
        answer = loaded.tokenizer(text)["input_ids"]
        wanted = by_hand(loaded, prompt[len(answer) - CONTEXT :], answer)
        np.testing.assert_allclose(score, wanted, rtol=1e-4)


def test_a_text_that_is_longer_than_the_context_is_scored_in_windows(reader, opened):
    loaded = opened["dream"][1]
    text = TEXT
    ids = loaded.tokenizer(text)["input_ids"]
    assert 62 < len(ids) <= 78
    first, second = ids[:62], ids[62:]
    # The second window is filled up with what stands before it.
    before = ids[len(ids) - 63 : 62]
    wanted = by_hand(loaded, [EOS], first) + by_hand(loaded, before, second)
    short = by_hand(loaded, [EOS], ids[:5])
    start = loaded.tokenizer.decode(ids[:5])
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0),
        Instance("loglikelihood_rolling", {}, (start,), 1),
        Instance("loglikelihood_rolling", {}, ("",), 2),
    ]
    reader.cache_hook = Hook()
    found = reader.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, [wanted, short, 0.0], rtol=1e-4)
    # And of nothing else: windows are no requests.
    assert reader.cache_hook.told == [
        ("loglikelihood_rolling", request.args, total)
        for request, total in zip(requests, found, strict=True)
    ]


def test_last_windows_of_unequal_length_share_a_batch(reader):
    one = TEXT.replace("Tom", "Kim")
    texts = (one, one + " He gives away 5")
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    together = reader.loglikelihood_rolling(texts, disable_tqdm=True)
    alone = [reader.loglikelihood_rolling([text], disable_tqdm=True)[0] for text in texts]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_drawn_estimates_do_not_depend_on_the_batch(make):
    pairs = [*PAIRS, PAIRS[1], ("", "3 apples")]
    model = make(batch_size=3)
    found = [score for score, _ in scored(model, *pairs)]
    assert all(score < 0 and math.isfinite(score) for score in found)
    alone = scored(make(batch_size=1), *pairs[::-1])
    # The first of two equal requests is the other one then, and its estimate is that of the first.
    order = [4, 3, 2, 1, 0]
    order[1], order[3] = order[3], order[1]
    np.testing.assert_allclose([alone[i][0] for i in order], found, rtol=1e-4)
    assert abs(found[1] - found[3]) > 1e-3
    other = scored(make(batch_size=1, seed=1), PAIRS[1])
    assert min(abs(other[0][0] - found[1]), abs(other[0][0] - found[3])) > 1e-3


@pytest.fixture
def works(monkeypatch):
    """What scorers are asked; they find everything equally probable."""
    asked = []

    def score(self, group, batch, *, rows):
        asked.extend(request.work for request in batch)
        return [dict(log_likelihood=-1.5, greedy=False, seconds=0.1)] * len(batch)

    monkeypatch.setattr(Scorer, "__call__", score)
    return asked


def test_estimates_are_kept_for_whoever_asks_the_same(make, works):
    responses = Responses()

    def new(family="llada", **settings):
        """How many pairs are scored anew."""
        works.clear()
        assert scored(make(family, responses=responses, **settings), *PAIRS) == [(-1.5, False)] * 3
        return len(works)

    assert new() == 3
    assert new(batch_size=2, gen_length=4, cache="dual", temperature=1.0) == 0
    assert new(mc_num=6) == 3
    assert new(mc_batch_size=4) == 3
    assert new(cfg_scale=0.5) == 3
    assert new(seed=1) == 3
    assert new("dream") == 3
    assert new() == 0


def test_only_what_dream_s_estimator_scores_ends_with_the_end_of_text_token(make, works):
    tok = make().tokenizer
    prompt, answer = tok(QUESTION)["input_ids"], tok(" 12 apples")["input_ids"]
    for family, estimator, end in (
        ("dream", "mc_rate", [EOS]),
        ("dream", "ar_ftb", []),
        ("dream", "mc_count", []),
        ("llada", None, []),
        ("llada", "mc_rate", [EOS]),
    ):
        works.clear()
        scored(make(family, estimator=estimator), PAIRS[0])
        assert [(work.prompt, work.answer) for work in works] == [(prompt, answer + end)]


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt(make, works):
    context, long = " ".join(["apples"] * 80), " ".join(["pens"] * 90)
    tok = make().tokenizer
    pens = tok(" pens")["input_ids"]
    scored(make(), (context, " pens"), ("apples", " " + long))
    first, second = works
    assert (first.prompt, first.answer) == (tok(context)["input_ids"][-63:], pens)
    assert (second.prompt, second.answer) == ([], pens * 64)
    works.clear()
    scored(make("dream"), (context, " pens"))
    assert (works[0].prompt, works[0].answer) == (tok(context)["input_ids"][-62:], [*pens, EOS])


def test_dream_s_estimator_scores_an_answer_of_one_token(make, opened):
    """It never masks the last token of a row: without an end the score would be 0."""
    model, loaded = make("dream", mc_num=128, mc_batch_size=32), opened["dream"][1]
    ((score, _),) = scored(model, (QUESTION, "3"))
    tok = loaded.tokenizer
    prompt = tok(QUESTION)["input_ids"]
    tokens = jnp.array([[*prompt, MASK, EOS]], jnp.int32)
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, tokens)[0, len(prompt) - 1]
    exact = float(jax.nn.log_softmax(logits)[tok("3")["input_ids"][0]])
    # The token is masked with the probability that its weight is one over: once on average.
    assert 0.5 < score / exact < 1.7


def test_check_greedy_tells_what_the_model_would_say(make, opened):
    loaded = opened["llada"][1]
    first, second = (loaded.tokenizer(context)["input_ids"] for context in (QUESTION, CONTEXTS[1]))
    decode = DecodeConfig.for_model(loaded.config, gen_length=6, block_length=6)
    engine = Engine(loaded, decode, NoCache())
    said, other, _ = (
        answer.ids for answer in engine.run([first, second, second], jax.random.key(0)).answers
    )
    assert said != other and MASK not in said
    model = make(check_greedy=True, batch_size=3)
    requests = [(("", ""), first, said), (("", ""), first, other), (("", ""), second, other)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[0][0] > found[1][0]


@pytest.mark.parametrize("length", [5, 32])
def test_what_was_not_checked_is_asked_again_when_it_is(make, say, monkeypatch, length):
    monkeypatch.setattr(
        runners, "log_likelihood", lambda params, model, *rows, **kw: jnp.zeros(len(rows[0]))
    )
    answer = [7] * length  # 32 is also a length to which answers are padded
    say(answer)
    responses = Responses()
    requests = [(("", "sevens"), [5, 6], answer)]
    for check in (False, True, False):
        model = make(responses=responses, check_greedy=check)
        assert model._loglikelihood_tokens(requests, disable_tqdm=True) == [(0.0, check)]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(device="cuda"), "device and max_batch_size are not for this model"),
        (dict(max_batch_size=8), "device and max_batch_size are not for this model"),
        (dict(batch_size="auto"), "batch_size is 'auto'; it must be a whole number from 1 on"),
        (dict(batch_size=0), "batch_size is 0; it must be a whole number from 1 on"),
        (dict(seed=-1), "seed is -1; it must be a whole number from 0 on"),
        (dict(variant="chat"), "variant is 'chat'; it must be one of base, inst, 1.5"),
        (dict(gen_len=8), "There is no setting 'gen_len'"),
        (dict(cache="kv"), "cache is 'kv'; it must be one of none, "),
        (dict(cache="dllm", current_k=3), "for the cache dllm: kp, kr, rou"),
        (dict(infill=True), "infill is not for evaluation"),
        (dict(estimator="mc"), "estimator is 'mc'; it must be one of mc_count"),
        (
            dict(mc_num=10, mc_batch_size=4),
            "mc_num is 10; it must be a multiple of mc_batch_size, 4",
        ),
        (dict(mesh="data=64"), "takes 64 devices"),
        (dict(mesh="rows=1"), "has the axis 'rows'; it must be one of data, model"),
        (dict(pretrained=CHECKPOINTS / "llada-tiny"), "has no tokenizer; evaluation is about text"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_one_sentence_before_weights_are_read(
    opened, monkeypatch, given, words
):
    def load(*args, **kwargs):
        raise AssertionError("Weights are read.")

    monkeypatch.setattr(checkpoint, "load", load)
    given = dict(pretrained=opened["llada"][0]) | given
    with pytest.raises(ValueError) as error:
        DiffusionLM(str(given.pop("pretrained")), **given)
    sentence = str(error.value)
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence
    assert not re.search(r"\. [A-Z]", sentence)


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match="neither a directory nor an embedded model"):
        DiffusionLM("no-such-model")


def test_guidance_is_for_generation_whatever_the_estimator(make, say):
    """Dream's estimator has no guidance, but its answers can have it."""
    engine = say("3")
    assert generate(make("dream", cfg_scale=1.0), "a") == ["3"]
    assert engine.made[0][0].cfg_scale == 1.0


def test_settings_that_cannot_decode_are_refused_before_anything_is_generated(make, say):
    engine = say("3")
    for given, words in (
        (dict(alg="surest"), "alg is 'surest'"),
        (dict(cache="dllm", kp=0), "kp is 0; it must be at least 1"),
        (dict(gen_length=64), "gen_length is 64 for some_task"),
        (dict(gen_length=8, block_length=3), "block_length"),
        (dict(gen_length="eight"), "gen_length is 'eight'; it must not be a text"),
        (dict(gen_length=[8]), "A setting has a value of the wrong type"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            generate(make(**given), "a")
    assert engine.batches == []
    assert generate(make(cache="dual"), "a") == ["3"]
    assert engine.made[-1][1] == Dual()


@pytest.mark.parametrize(
    "text",
    [
        "cache=none,variant=1.5",
        "cache=dual,variant=inst,add_bos=no",
        "check_greedy=true,mesh=data=1",
    ],
)
def test_arguments_as_lm_eval_reads_them_from_a_text(text):
    model = DiffusionLM.create_from_arg_string(f"pretrained=llada-tiny-math,{text}")
    assert model.max_length == 256


def test_a_truth_value_is_none_of_other_words():
    with pytest.raises(ValueError, match="add_bos is 'maybe'; it must be true or false"):
        DiffusionLM(add_bos="maybe")


def test_a_variant_is_told_by_the_repository_in_the_cache_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--GSAI-ML--LLaDA-8B-Base" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    assert defaults.variant(None, snapshot, None) == "base"


def test_a_text_that_speaks_of_the_mask_token_is_answered():
    model = DiffusionLM(gen_length=8)
    mask = model.tokenizer.convert_ids_to_tokens(model.config.mask_id)
    assert model.tok_encode(f"5 {mask}apples") == model.tok_encode("5 ") + model.tok_encode(
        "apples"
    )
