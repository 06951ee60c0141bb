"""The settings that tasks are decoded with, and the variants of models that they depend on."""

import dataclasses
from types import SimpleNamespace

import pytest
from lm_eval.tasks import TaskManager

import dlm_jax
from dlm_jax import models
from dlm_jax.cache import METHODS, D2Cache, DKVGreedy, DLLMCache, NoCache
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.eval import defaults, report, tasks
from dlm_jax.eval.arguments import Settings
from dlm_jax.eval.defaults import Recipe

LLADA = models.llada.PRESETS["llada-8b-instruct"]
DREAM = models.dream.PRESETS["dream-v0-instruct-7b"]

MODELS = {
    "llada-base": (LLADA, "base"),
    "llada-inst": (LLADA, "inst"),
    "llada-1.5": (LLADA, "1.5"),
    "dream-base": (DREAM, "base"),
    "dream-inst": (DREAM, "inst"),
}
LISTED = sorted({*defaults.GEN_LENGTHS, *defaults.PERIODS, *defaults.OWN})
"""Tasks that have settings of their own."""


def plan(cache="none", task="gsm8k", model="llada-inst", wishes=None, *, cache_args=None, **decode):
    """Decoding and cache method of a task, where `decode` and `cache_args` are given."""
    config, variant = MODELS[model]
    settings = Settings(cache=cache, cache_args=cache_args or {}, decode=decode)
    return Recipe(config, variant, settings).plan(task, wishes or {})


# --- facts of the papers --------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "length"), [("gsm8k", 256), ("humaneval", 512)])
def test_lengths_are_those_of_the_d2cache_paper(task, length):
    for model in MODELS:
        assert plan(task=task, model=model)[0].gen_length == length


@pytest.mark.parametrize(
    ("model", "cache", "block"),
    [
        # Instruction-tuned models fill blocks of 32, base models everything at once.
        ("llada-inst", "none", 32),
        ("dream-inst", "dllm", 32),
        ("llada-base", "none", 512),
        ("dream-base", "dkv-decode", 512),
        ("llada-1.5", "none", 512),
        # Fast-dLLM's caches always have blocks, d2Cache never.
        ("llada-base", "prefix", 32),
        ("dream-base", "dual", 32),
        ("llada-inst", "d2cache", 512),
    ],
)
def test_blocks_are_those_of_the_d2cache_paper(model, cache, block):
    assert plan(cache, "mbpp", model)[0].block_length == block


@pytest.mark.parametrize("model", MODELS)
def test_one_token_per_step_the_most_probable_first(model):
    for cache in METHODS:
        decode, _ = plan(cache, "gsm8k", model)
        greedy = cache == "dkv-greedy"
        assert (decode.pace, decode.num_transfer_tokens, decode.steps) == ("fixed", 1, None)
        assert decode.strategy.name == ("random" if greedy else "surest")
        assert greedy or decode.alg == "maskgit_plus"
        assert (decode.temperature, decode.sigma is None) == (None, cache != "d2cache")
        assert decode.top_p == (0.9 if model.startswith("dream") else None)


def test_d2cache_has_the_parameters_of_its_paper():
    decode, method = plan("d2cache", "humaneval", "dream-base")
    assert decode.sigma == 10.0
    assert method == D2Cache(rollout_p=0.1, current_k=32, sigma=10.0, inflate_w=0)


@pytest.mark.parametrize(
    ("task", "model", "kp", "kr"),
    [
        ("gsm8k", "llada-inst", 50, 7),
        ("mbpp", "dream-base", 25, 8),
        ("mmlu_pro", "llada-inst", 50, 3),  # 51 in dLLM-Cache's own script
        ("bbh", "llada-base", 50, 4),  # what the framework has no pair for
        ("gsm8k", "llada-1.5", 50, 4),
    ],
)
def test_refresh_periods_are_those_of_the_framework(task, model, kp, kr):
    assert plan("dllm", task, model)[1] == DLLMCache(kp=kp, kr=kr, rou=0.25)


# --- what holds of every entry --------------------------------------------------------------------


@pytest.mark.parametrize("task", LISTED)
def test_a_task_with_settings_exists(task, manager):
    assert task in manager.all_tasks


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(tasks.PATH))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache", METHODS)
def test_every_task_can_be_decoded(cache, model):
    config, _ = MODELS[model]
    for task in (*LISTED, "anything_else"):
        decode, method = plan(cache, task, model)
        assert method.name == cache
        method.check(config, decode)
        assert 0 < decode.gen_length < config.max_length
        assert decode.gen_length % decode.block_length == 0
        # Nothing but the cache is what the tables of the papers compare.
        assert not decode.strategy.adaptive and not decode.guided
        assert decode.temperature is None and decode.top_k is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache", METHODS)
def test_what_a_user_gives_wins_with_every_task(cache, model):
    given = dict(gen_length=96, block_length=48, top_p=0.5, num_transfer_tokens=2, schedule="fixed")
    for task in (*LISTED, "anything_else"):
        decode, _ = plan(cache, task, model, dict(gen_length=128, top_p=0.7), **given)
        assert {name: getattr(decode, name) for name in given} == given
        usual = {field.name: field.default for field in dataclasses.fields(METHODS[cache])}
        assert plan(cache, task, model, cache_args=usual)[1] == METHODS[cache]()


@pytest.mark.parametrize("task", sorted(defaults.GEN_LENGTHS))
def test_a_listed_length_holds_whatever_the_task_wishes(task):
    wished = [plan(task=task, wishes=dict(gen_length=n))[0].gen_length for n in (96, 1024)]
    assert wished == [plan(task=task)[0].gen_length] * 2
    assert plan(task="anything_else", wishes=dict(gen_length=96))[0].gen_length == 96


@pytest.mark.parametrize("task", sorted(defaults.PERIODS))
def test_refresh_periods_differ_by_task_and_are_used_by_one_cache_alone(task):
    listed = {model for model in MODELS if model != "llada-1.5"}
    found = {model: plan("dllm", task, model)[1] for model in MODELS}
    other = plan("dllm", "anything_else")[1]
    assert found["llada-1.5"] == other
    assert any(found[model] != other for model in listed)
    for method in found.values():  # the prompt is what changes least
        assert 1 <= method.kr <= method.kp
    assert plan("none", task) == (plan("dllm", task)[0], NoCache())


# --- whose word counts ----------------------------------------------------------------------------


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
    assert decode.temperature is None
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
    told = report.fields(decode)
    for name, value in given.items():
        assert value in (told.get(name), told["strategy"])


def test_wino_needs_no_other_setting():
    decode, method = plan(strategy="wino")
    assert (decode.strategy.name, decode.pace, decode.alg) == ("wino", "fixed", "maskgit_plus")
    assert method == NoCache()


def test_a_cache_that_must_know_the_order_gets_a_random_one_unless_one_is_given():
    decode, method = plan("dkv-greedy")
    assert (decode.strategy.name, decode.pace, method) == ("random", "fixed", DKVGreedy())
    decode, _ = plan("dkv-greedy", alg="random", steps=128)
    assert (decode.strategy.name, decode.pace, decode.steps) == ("random", "even", 128)
    with pytest.raises(ValueError, match="order that depends on confidence.*must know the next"):
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
    recipe = Recipe(config, "inst", Settings())
    assert recipe.plan("gsm8k", {})[0].gen_length == 256
    with pytest.raises(ValueError) as error:
        recipe.plan("humaneval", {})
    assert str(error.value) == (
        "gen_length is 512 for humaneval; it must leave room for a prompt in the model's context "
        "of 512 tokens."
    )
    longest = Settings(decode=dict(gen_length=511))
    assert Recipe(config, "inst", longest).plan("mbpp", {})


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


# --- variants -------------------------------------------------------------------------------------


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
