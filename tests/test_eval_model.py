"""The model for lm-evaluation-harness: text and tokens, generation, and what it refuses."""

import re
import shutil

import jax
import numpy as np
import pytest
from eval_models import (
    CONTEXTS,
    EOS,
    MASK,
    QUESTION,
    Hook,
    asked,
    change,
    generate,
)
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from places import CHECKPOINTS

from dlm_jax import checkpoint
from dlm_jax.batching.responses import Responses
from dlm_jax.cache import D2Cache, Dual, NoCache
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine
from dlm_jax.eval import defaults
from dlm_jax.eval.arguments import Settings
from dlm_jax.eval.model import DiffusionLM

pytest_plugins = ["eval_fixtures"]


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
    assert [decode.temperature for decode, _ in engine.made] == [None, 0.5]
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
        (dict(settings=Settings(), steps=8), "settings is given, which stands for all others"),
        (dict(settings=Settings(), cache="dual"), "settings is given, which stands for all others"),
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


def test_settings_may_be_sorted_already(opened):
    directory, loaded = opened["llada"]
    sorted_ = Settings(
        cache="d2cache",
        cache_args=dict(sigma=4.0),
        decode=dict(gen_length=8, sigma=3.0),
        likelihood=dict(mc_num=4, batch_size=2),
    )
    given = dict(gen_length=8, sigma=3.0, cache_sigma=4.0, mc_num=4, mc_batch_size=2)
    one = DiffusionLM(str(directory), checkpoint=loaded, settings=sorted_)
    other = DiffusionLM(str(directory), checkpoint=loaded, cache="d2cache", **given)
    assert one._recipe == other._recipe and one._likelihood == other._likelihood


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
        (dict(cache="dllm", kp=0), "kp is 0; it must be a whole number from 1 on"),
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
