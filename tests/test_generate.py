"""The command from its arguments to its output, on a recorded tiny model with a tokenizer added.

The model is random, so its text means nothing; what is checked is where every piece of it goes.
"""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from places import CHECKPOINTS
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dlm_jax import arithmetic, cache, checkpoint, evaluate, generate, tokenizer
from dlm_jax.answers import Answer, Result, Snapshot
from dlm_jax.cli import choices, live
from dlm_jax.cli.prompts import QUESTION
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.schedule import SCHEDULES
from dlm_jax.decoding.strategies import STRATEGIES, Klass, Threshold
from dlm_jax.engine import Engine, PromptError, check_rows

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, EOS, ASSISTANT, MASK = 316, 317, 318, 319
GEN = "--gen-length=8"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A checkpoint directory whose tokenizer has one token per byte."""
    directory = tmp_path_factory.mktemp("model")
    for file in (CHECKPOINTS / "llada-tiny").iterdir():
        shutil.copyfile(file, directory / file.name)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [f"unused{i}" for i in range(USER - len(letters))]
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|user|>", "<|endoftext|>", "<|assistant|>", "<|mask|>"])
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", mask_token="<|mask|>"
    )
    tok.chat_template = TEMPLATE
    tok.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """Samples, so that keys matter, and keeps the history."""
    opened = checkpoint.load(model)
    decode = DecodeConfig.for_model(opened.config, gen_length=8, temperature=1.0)
    return Engine(opened, decode, cache.make("none"), history=True)


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_text_goes_to_standard_output_and_the_rest_to_standard_error(model, capsys):
    assert generate.main(["--model", model, GEN, "How many?"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and "tokens/s" not in out and "How many?" not in out
    told = lines(err)
    assert told[0].startswith("loading ") and told[1] == "How many?"
    assert "compiling ..." in told and "denoising ..." in told
    assert "8 denoising steps, 8 model forwards" in told[-1]
    assert "tokens in" in told[-1] and "compiled in" in told[-1]


def test_a_ragged_batch_as_json_with_its_history(model, capsys, tmp_path):
    history = tmp_path / "history.json"
    prompts = ["Hi", "A longer prompt, of some more tokens."]
    argv = ["--model", model, GEN, "--json", "--history", str(history), "--no-chat"]
    assert generate.main([*argv, prompts[0], "--prompt", prompts[1], "--steps=4"]) == 0
    out = [json.loads(line) for line in lines(capsys.readouterr().out)]
    assert [line["prompt"] for line in out] == prompts
    for line in out:
        assert line.keys() == {"prompt", "text", "tokens", "stats"}
        assert len(line["tokens"]) == 8 and MASK not in line["tokens"]
        assert isinstance(line["text"], str)
        stats = line["stats"]
        assert (stats["steps"], stats["forwards"]) == (4, 4)
        assert stats["seconds"] > 0 and stats["compile_seconds"] > 0
        assert stats["positions_per_forward"] == 64 + 8  # the prompts are padded to 64 slots
        assert stats["tokens"] <= 8 and stats["batch_tokens"] <= 16
        assert stats["tokens_per_forward"] == 2

    written = json.loads(history.read_text())
    frames = np.array(written["frames"])  # [step, row, G]
    committed_at = np.array(written["committed_at"])  # [row, G]
    assert frames.shape == (4, 2, 8) and committed_at.shape == (2, 8)
    final = np.array([line["tokens"] for line in out])
    step = np.arange(4)[:, None, None]
    assert (frames == np.where(committed_at <= step, final, written["mask_id"])).all()
    assert os.listdir(tmp_path) == ["history.json"]


def test_the_help_lists_all_caches_schedules_and_strategies(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--help"])
    told = "".join(capsys.readouterr().out.split())  # lines break at hyphens
    assert told.split("--cacheNAME")[-1].startswith(",".join(cache.METHODS))
    assert all(name in told.split("--scheduleNAME")[-1][:80] for name in SCHEDULES)
    assert ",".join(STRATEGIES) in told.split("--strategyNAME")[-1]


def test_a_cache_computes_less(model, capsys):
    argv = ["--model", model, GEN, "--block-length=4", "Hi", "--no-chat"]
    assert generate.main([*argv, "--cache=dual", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert stats["forwards"] == 8
    assert stats["positions_per_forward"] == (2 * (32 + 8) + 6 * 4) / 8
    assert generate.main([*argv, "--cache=dllm", "--cache-args=kp=4,kr=2,rou=0.5"]) == 0
    assert "8 model forwards of " in capsys.readouterr().err


def test_masks_among_prompt_ids_are_filled(capsys, tmp_path, monkeypatch):
    """On a model without a tokenizer: ids go in and ids come out."""
    given = [[5, 6, MASK, MASK, 7], [9]]
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(given))
    results = []
    run = Engine.run

    def spy(*args, **named):
        results.append(run(*args, **named))
        return results[-1]

    monkeypatch.setattr(Engine, "run", spy)
    bare = str(CHECKPOINTS / "llada-tiny")
    argv = ["--model", bare, "--prompt-ids", str(file), "--gen-length=4"]
    assert generate.main([*argv, "--json"]) == 0
    out = [json.loads(line) for line in lines(capsys.readouterr().out)]
    assert [(line["prompt"], line["text"]) for line in out] == [(row, None) for row in given]
    first, second = (line["tokens"] for line in out)
    assert (len(first), first[:2], first[4]) == (9, [5, 6], 7)
    assert (len(second), second[0]) == (5, 9)
    assert MASK not in first + second
    assert [line["stats"]["tokens"] for line in out] == [6, 4]

    monkeypatch.setattr(Engine, "run", lambda *_, **__: results[0])
    assert generate.main(argv) == 0
    assert lines(capsys.readouterr().out) == [" ".join(map(str, row)) for row in (first, second)]


def test_the_masks_in_a_text_are_filled(model, capsys, tmp_path):
    """And nothing else: the text is the whole row, with one token per mask."""
    history = tmp_path / "history.json"
    prompts = ["a [MASK*3]b<|mask|>c", "[MASK]"]
    argv = ["--model", model, "--infill", "--json", "--history", str(history), *prompts]
    assert generate.main([*argv, "--suppress", "<|endoftext|>", "--suppress=id:97"]) == 0
    first, second = (json.loads(line) for line in lines(capsys.readouterr().out))
    assert (first["prompt"], second["prompt"]) == ("a [MASK*3]b<|mask|>c", "[MASK]")
    opened = tokenizer.open_tokenizer(model)
    a, blank, b, c = opened("a bc")["input_ids"]
    ids = first["tokens"]
    assert (ids[:2], ids[5], ids[7:]) == ([a, blank], b, [c]) and len(second["tokens"]) == 1
    assert not {MASK, EOS, 97} & set(ids[2:5] + [ids[6]] + second["tokens"])
    assert first["text"] == opened.decode(ids, skip_special_tokens=True)
    assert first["text"].startswith("a ") and first["text"].endswith("c")
    assert (first["stats"]["steps"], first["stats"]["forwards"]) == (None, 4)
    assert (first["stats"]["tokens"], second["stats"]["tokens"]) == (4, 1)
    assert first["stats"]["tokens_per_forward"] == 1
    committed_at = json.loads(history.read_text())["committed_at"]
    assert sorted(committed_at[0]) == [-1] * 4 + [0, 1, 2, 3] and committed_at[1] == [0]


def test_a_threshold_that_stops_at_the_end(capsys):
    """The embedded model is sure of most of its answer, and what follows the answer stays masks."""
    argv = ["--threshold=0.9", "--stop-at-eos", "--block-length=16", "--json"]
    assert generate.main(argv) == 0
    out, err = capsys.readouterr()
    (line,) = map(json.loads, lines(out))
    assert arithmetic.extract_answer(line["text"]) == 7 * 4 - 5
    stats, ids = line["stats"], line["tokens"]
    assert stats["steps"] is None and len(ids) == 64
    assert stats["forwards"] < stats["tokens"] < 64
    committed = len(ids) - ids.count(1)  # the mask token
    assert 1 in ids and stats["tokens_per_forward"] == round(committed / stats["forwards"], 3)
    assert "mask" not in line["text"] and "masks left" not in err
    assert f"{stats['tokens_per_forward']:.2f} tokens per forward" in err
    assert "denoising steps" not in err


def test_a_limit_leaves_masks_that_are_not_printed(capsys):
    argv = ["--strategy=wino", "--strategy-args=wide_in_thres=0.99", "--max-forwards=1"]
    assert generate.main([*argv, "--gen-length=32"]) == 0
    out, err = capsys.readouterr()
    assert "mask" not in out and "masks left: " in err and "1 model forwards" in err


def test_klass_and_debias_reach_the_decoding(model, capsys, tmp_path):
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps({"num_token": 100, "p_baseline_dict": {"97": 50}}))
    argv = ["--model", model, GEN, "Hi", "--seed=1", "--json", "--debias", str(shares)]
    strategy = ["--strategy=klass", "--threshold=0.5", "--strategy-args=kl_history_length=1.0"]
    made = []
    init = Engine.__init__

    def spy(self, *args, **kwargs):
        made.append((args[1], kwargs["token_freq"]))
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", spy)
        assert generate.main([*argv, *strategy, "--clip-alpha=5"]) == 0
    ((decode, token_freq),) = made
    assert MASK not in json.loads(capsys.readouterr().out)["tokens"]
    assert decode.strategy == Klass(Threshold(0.5), kl_threshold=0.01, kl_history_length=1)
    assert decode.clip_alpha == 5
    assert token_freq[97] == 0.5 and np.delete(token_freq, 97) == pytest.approx(0.01)


def test_options_of_decoding_are_its_arguments(model):
    """All that a user of the command may want, and nothing that a strategy is told apart."""
    passed = set(choices.passed(generate.parse([])))
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    assert passed - fields == {s.shorthand for s in STRATEGIES.values()} - {None}
    assert passed >= {"strategy", "alg", "schedule", "steps", "temperature", "max_forwards"}
    own = {field.name for s in STRATEGIES.values() for field in dataclasses.fields(s)}
    assert not (own - passed) & set(vars(generate.parse([])))


def test_the_default_question_is_held_out():
    assert arithmetic.is_held_out(QUESTION)


WRONG = {
    "wide": (["--top-k=9999999999"], "'9999999999' is not a whole number below"),
    "schedule": (["--schedule=odd"], "it must be one of even, timestep, fixed, capped"),
    "schedule and steps": (["--schedule=fixed", "--steps=4"], "leave steps out"),
    "rule and steps": (["--threshold=0.9", "--steps=4"], "set schedule='capped'"),
    "rules": (["--threshold=0.9", "--factor=1"], "threshold and factor are both given"),
    "transfer": (["--num-transfer-tokens=2"], "take the schedule 'fixed'"),
    "alg temp": (["--gamma=1", "--alg-temp=1"], "with gamma leave it out"),
    "sigma": (["--sigma=0"], "sigma is 0.0; it must be above 0"),
    "guidance": (["--cfg-scale=-1"], "cfg_scale is -1.0"),
    "forwards": (["--max-forwards=0"], "max_forwards is 0"),
    "strategy": (["--strategy=best"], "it must be one of surest, threshold, factor, "),
    "no such": (
        ["--strategy=best", "--strategy-args=alg=1"],
        "it must be one of surest, threshold, factor, ",
    ),
    "klass": (["--strategy=klass"], "give one of these two"),
    "wino and cache": (["--strategy=wino", "--cache=dual"], "so take the cache 'none'"),
    "wino and infill": (["--strategy=wino", "--infill", "[MASK]"], "no meaning with infill"),
    "rule twice": (
        ["--strategy=klass", "--factor=1", "--strategy-args=factor=2"],
        "factor is given twice; leave it out of --strategy-args, or --factor.",
    ),
    "no rule": (["--strategy=threshold"], "needs threshold; give it as threshold="),
    "wino and rule": (["--strategy=wino", "--gamma=1"], "has no argument 'gamma'; it takes wide_"),
    "no strategy": (["--strategy-args=kl_threshold=1"], "choose it with --strategy"),
    "strategy argument": (
        ["--strategy=wino", "--strategy-args=kl_threshold=1"],
        "has no argument 'kl_threshold'; it takes wide_in_thres, narrow_out_thres.",
    ),
    "strategy text": (
        ["--strategy=klass", "--factor=1", "--strategy-args=kl_threshold=low"],
        "kl_threshold is 'low'; it must be a number",
    ),
    "strategy inf": (
        ["--strategy=wino", "--strategy-args=wide_in_thres=Infinity"],
        "wide_in_thres is inf; it must be a confidence",
    ),
    "strategy whole": (
        ["--strategy=klass", "--factor=1", "--strategy-args=kl_history_length=0"],
        "kl_history_length is 0; it must be a whole number from 1 on",
    ),
    "suppress": (["--suppress=no"], "--suppress: 'no' is 2 tokens, "),
    "suppress mask": (["--suppress=<|mask|>"], "suppress has the mask token"),
    "suppress id": (["--suppress=id:320"], "suppress has token id 320; it must lie in 0 to 319"),
    "suppress number": (["--suppress=97"], "'97' is 2 tokens, [24, 22]; it must be exactly one"),
    "suppress nothing": (["--suppress="], "a token's text, or id:N"),
    "suppress surrogate": (["--suppress=\udcff"], "a token's text, or id:N"),
    "eos": (["--eos=no"], "--eos: 'no' is 2 tokens, "),
    "eos nothing": (["--eos="], "--eos is ''; it must be a token's text, or id:N"),
    "eos id": (["--eos=id:3", "--eos=id:320"], "eos_id has token id 320"),
    "eos mask": (["--eos=<|mask|>"], "eos_id has the mask token"),
    "min p": (["--min-p=1"], "min_p is 1.0; it must lie in [0, 1)"),
    "suppress no text": (
        ["--model", str(CHECKPOINTS / "llada-tiny"), "--suppress=a", "--prompt-ids={tmp}/one.json"],
        "give the token's id",
    ),
    "clip": (["--clip-alpha=3"], "it needs --debias"),
    "debias": (
        ["--debias={tmp}/flat.json"],
        "2 shares; it must have one for each of the 320",
    ),
    "debias file": (["--debias={tmp}/none"], "{tmp}/none: No such file"),
    "debias alg": (["--debias={tmp}/flat.json", "--alg=entropy"], "add --alg low_confidence or"),
    "mask": (["a <|mask|> b"], "The prompt holds the mask token; have it filled with --infill"),
    "one mask": (["a", "a <|mask|> b"], "Prompt 2 holds the mask token"),
    "no mask": (["--infill", "[MASK]", "b", "--gen-length=0"], "Prompt 2 holds no mask"),
    "no mask id": (["--infill", "--prompt-ids={tmp}/one.json", "--gen-length=0"], "put id 319"),
    "masks": (["--infill", "[MASK*none]"], "'[MASK*none]' must say how many"),
    "infill block": (["--infill", "[MASK]", "--gen-length=0", "--block-length=4"], "leave it out"),
    "infill end": (["--infill", "[MASK]", "--gen-length=0", "--stop-at-eos"], "leave it out"),
    "infill talk": (["--infill", "--interactive"], "--infill cannot go with it"),
    "length alone": (["--gen-length=0", "--prompt-ids={tmp}/one.json"], "unless infill=True"),
    "steps": (["--steps=3", "--block-length=4"], "steps is 3"),
    "no steps": (["--steps=0"], "steps is 0"),
    "block": (["--block-length=3"], "block_length is 3"),
    "length": (["--gen-length=0"], "gen_length is 0"),
    "no number": (["--gen-length=many"], "--gen-length"),
    "temperature": (["--temperature=-1"], "temperature is -1"),
    "nan": (["--temperature=nan"], "not a number"),
    "top p": (["--top-p=0"], "top_p is 0"),
    "top k": (["--top-k=0"], "top_k is 0"),
    "alg": (["--alg=best"], "it must be one of low_confidence"),
    "seed": (["--seed=-1"], "--seed"),
    "dtype": (["--dtype=int8"], "--dtype"),
    "cache": (["--cache=some"], "cache is 'some'; it must be one of none"),
    "cache argument": (["--cache-args=k=1"], "has no argument 'k'"),
    "cache arguments": (["--cache-args=k"], "name=value"),
    "cache value": (["--cache=dllm", "--cache-args=rou=2"], "rou is 2; it must lie in [0, 1]"),
    "cache order": (["--cache=dkv-greedy"], "so take the strategy random."),
    "cache shift": (["--cache=dkv-pd", "--cache-args=shift_type=un"], "leave shift_type out"),
    "cache unsound": (["--cache=dkv-pd", "--cache-args=shift_type=right"], "take 'un_right'"),
    "option": (["--frobnicate"], "--frobnicate"),
    "blank": (["--prompt", " \n"], "is blank"),
    "long": (["x" * 600], "context ends at 512"),
    "surrogate": (["\udcff"], "Unicode"),
    "no file": (["--prompt-file", "{tmp}/none"], "{tmp}/none: No such file"),
    "binary": (["--prompt-file", "{tmp}/binary"], "not UTF-8"),
    "no json": (["--prompt-ids", "{tmp}/binary.json"], "is not JSON"),
    "no lists": (["--prompt-ids", "{tmp}/flat.json"], "list of lists of token ids"),
    "no ids": (["--prompt-ids", "{tmp}/true.json"], "list of lists of token ids"),
    "big id": (["--prompt-ids", "{tmp}/big.json"], "token id 320; ids must lie in 0 to 319"),
    "small id": (["--prompt-ids", "{tmp}/small.json"], "token id -1"),
    "no id": (["--prompt-ids", "{tmp}/empty.json"], "Prompt 2 is empty"),
    "ids and text": (["--prompt-ids", "{tmp}/big.json", "text"], "no others beside it"),
    "ids as chat": (["--prompt-ids", "{tmp}/big.json", "--chat"], "leave --chat out"),
    "line": (["--prompt-file", "{tmp}/bad.jsonl"], "bad.jsonl, line 2,"),
    "no line": (["--prompt-file", "{tmp}/none.jsonl"], "holds no prompt"),
    "stop": (["--stop="], "--stop is empty"),
    "live": (["--live"], "must be a terminal"),
    "interactive": (["--interactive", "--json"], "--json cannot go with it"),
    "history": (["--history", "{tmp}/none/h.json"], "cannot be written"),
    "history directory": (["--history", "{tmp}"], "no regular file"),
    "history link": (["--history", "{tmp}/link"], "no regular file"),
    "model": (["--model", "{tmp}/none"], "neither a directory nor an embedded model"),
    "model files": (["--model", "{tmp}"], "config.json"),
    "no tokenizer": (["--model", str(CHECKPOINTS / "llada-tiny")], "--prompt-ids"),
    "stop no text": (
        ["--model", str(CHECKPOINTS / "llada-tiny"), "--stop=a", "--prompt-ids={tmp}/one.json"],
        "no tokenizer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_one_sentence_and_status_2(case, model, capsys, tmp_path, monkeypatch):
    def too_late(*_args, **_kwargs):
        raise AssertionError("long work was started")

    monkeypatch.setattr(checkpoint, "load", too_late)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "link").symlink_to("/dev/stdout")
    contents = {
        "binary.json": "{",
        "flat.json": "[1, 2]",
        "true.json": "[[true]]",
        "big.json": "[[320]]",
        "small.json": "[[-1]]",
        "empty.json": "[[1], []]",
        "one.json": "[[1]]",
        "bad.jsonl": '"good"\n{"prompt": 3}\n',
        "none.jsonl": "\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    argv, wanted = WRONG[case]
    argv = [argument.replace("{tmp}", str(tmp_path)) for argument in argv]
    if not any(argument.startswith("--gen-length") for argument in argv):
        argv.append(GEN)
    try:
        status = generate.main(["--model", model, *argv])
    except SystemExit as exit_:  # the parser's way
        status = exit_.code
    out, err = capsys.readouterr()
    told = [line for line in lines(err) if not line.startswith("loading ")]
    assert (status, out, len(told)) == (2, "", 1), err
    assert told[0].startswith("dlm-jax-generate: ")
    assert wanted.replace("{tmp}", str(tmp_path)) in told[0]


def test_chat_needs_a_template(model, capsys, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(model) / name, tmp_path / name)
    assert generate.main(["--model", str(tmp_path), "--chat", "Hi"]) == 2
    assert "has no chat template; leave --chat out" in capsys.readouterr().err


def test_stop_cuts_at_the_first():
    for text, wanted in (("Hello", "H"), ("xyz", "xyz"), ("", "")):
        assert tokenizer.cut(text, ["l", "e"]) == wanted
    assert tokenizer.cut("Hello", []) == "Hello"


def test_a_stop_text_of_special_tokens_reaches_every_answer(model, capsys, monkeypatch):
    """In a batch, in a conversation, and where only what was filled in can end a text."""
    letter = tokenizer.open_tokenizer(model).convert_tokens_to_ids

    def answer(text: str, committed_at: list[int]) -> Answer:
        ids = [USER if one == "|" else letter(one) for one in text]
        return Answer(ids, committed_at, text.replace("|", ""), len(ids), 0)

    def run(answer: Answer, *argv: str) -> str:
        result = Result([answer], None, 1, 4.0, 1.0, 0.0, 1.0)
        monkeypatch.setattr(Engine, "run", lambda *_, **__: result)
        assert generate.main(["--model", model, GEN, *argv]) == 0
        return capsys.readouterr().out.strip()

    stop = ["--stop", "<|user|>"]
    assert run(answer("Hi|you", [0] * 6), "x") == "Hiyou"
    assert run(answer("Hi|you", [0] * 6), "x", *stop) == "Hi"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert run(answer("Hi|you", [0] * 6), "--interactive", *stop) == "Hi"
    infill = ["--infill", "a<[MASK]b", *stop]
    assert run(answer("a<|b", [-1, -1, -1, 0]), *infill) == "a<b"  # given, so it ends nothing
    assert run(answer("a<|b", [-1, -1, 0, 0]), *infill) == "a<"


@pytest.mark.parametrize("command", [generate.main, evaluate.main])
def test_devices_are_asked_for_before_anything_else(command, capsys, monkeypatch):
    def devices():
        raise RuntimeError("there is none")

    monkeypatch.setattr(jax, "devices", devices)
    assert command([]) == 2
    assert "there is none" in capsys.readouterr().err


def test_a_warning_is_a_line_of_the_command(model, capsys, monkeypatch):
    def load(*_args, **_kwargs):
        warnings.warn("Something is odd.", stacklevel=1)
        raise OSError("Stop.")

    monkeypatch.setattr(checkpoint, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert generate.main(["--model", model, "x"]) in (1, 2)
    err = capsys.readouterr().err
    assert "dlm-jax-generate: Something is odd.\n" in err and "UserWarning" not in err


def test_cache_arguments_have_types():
    args = generate.parse(["--cache-args", "window=4,rate=0.5,on=true,name=first"])
    assert args.cache_args == {"window": 4, "rate": 0.5, "on": True, "name": "first"}


def test_a_conversation(model, capsys, monkeypatch):
    seen = []
    encode_chat = tokenizer.encode_chat

    def spy(tok, messages):
        seen.append(messages)
        return encode_chat(tok, messages)

    monkeypatch.setattr(tokenizer, "encode_chat", spy)
    typed = ["Hi", "/help", "", "Again", "/reset", "New", "x" * 600, "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    assert generate.main(["--model", model, "--gen-length=4", "--interactive"]) == 0
    out, err = capsys.readouterr()
    contents = [[message["content"] for message in messages] for messages in seen]
    assert contents[0] == ["Hi"]
    assert contents[1][0] == "Hi" and contents[1][2:] == ["Again"]
    assert contents[2] == ["New"]
    assert contents[1][1] in out  # what was answered is what was remembered
    assert "/help is no command" in err and "starts anew" in err
    assert "context ends at 512" in err and err.count("tokens/s") == 3


def test_a_conversation_without_template_and_end_of_input(model, capsys, monkeypatch):
    asked = []

    def run(_engine, rows, _key):
        asked.extend(rows)
        return Result([Answer([1], [0], "yes", 1, 0)], None, 1, 4.0, 1.0, 0.0, 1.0)

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi"))
    assert generate.main(["--model", model, "--interactive", "--no-chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "yes\nyes\n" and "every line is a prompt of its own" in err
    assert len(asked) == 2 and asked[0] == asked[1] and USER not in asked[0]


def test_watching_changes_nothing(engine):
    rows, key = [[1, 2, 3], [4]], jax.random.key(3)
    snapshots: list[Snapshot] = []
    watched = engine.run(rows, key, snapshots.append)
    plain = engine.run(rows, key)
    assert [answer.ids for answer in watched.answers] == [answer.ids for answer in plain.answers]
    assert watched.answers == plain.answers
    assert watched.frames == plain.frames == [snapshot.ids for snapshot in snapshots]
    assert watched.tokens_per_forward == plain.tokens_per_forward == 1
    assert [snapshot.pending for snapshot in snapshots] == [[7 - i] * 2 for i in range(8)]
    assert [snapshot.step for snapshot in snapshots] == list(range(plain.nfe))
    assert all(len(row) == 8 for row in snapshots[-1].confidence)


def test_a_program_is_compiled_once_and_the_key_decides(engine):
    rows = [[1, 2, 3], [4]]
    first = engine.run(rows, jax.random.key(0))
    again = engine.run(rows, jax.random.key(0))
    longer = engine.run([[1, 2, 3, 4], [5, 6]], jax.random.key(0))
    assert again.answers == first.answers
    assert max(again.compile_seconds, longer.compile_seconds) < 0.1
    assert engine.run(rows, jax.random.key(1)).answers != first.answers


def test_nothing_to_fill_is_no_error(engine):
    decode = DecodeConfig.for_model(engine.checkpoint.config, gen_length=0, infill=True)
    idle = Engine(engine.checkpoint, decode, cache.make("none"), history=True)
    for draw in (None, print):
        result = idle.run([[1, 2, 3], [4]], jax.random.key(0), draw)
        assert [answer.ids for answer in result.answers] == [[1, 2, 3], [4]]
        assert result.nfe <= 1 and result.frames == [[[1, 2, 3], [4]]] * result.nfe
        assert result.tokens == result.tokens_per_forward == 0


def test_padding_gives_way_to_a_full_context(engine):
    """512 slots hold 504 prompt tokens and 8 more, though 504 is no multiple of the bucket."""
    config = engine.checkpoint.config
    check_rows([[1] * 504], config, engine.decode)
    with pytest.raises(PromptError, match="505 tokens"):
        check_rows([[1] * 505], config, engine.decode)
    assert engine.run([[1] * 504], jax.random.key(0)).nfe == 8


def test_the_drawing_shows_masks_then_text(engine, monkeypatch):
    monkeypatch.setattr(live, "SLOWEST", 0.0)
    opened = engine.checkpoint
    row = opened.tokenizer("Why?")["input_ids"]
    hello = opened.tokenizer("Hello")["input_ids"]
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with live.Canvas(console, ["Why?"], [row], opened) as canvas:
        ids = [MASK] * 6
        for step, token in enumerate([*hello, EOS]):
            ids[step] = token
            at = [position if position <= step else -1 for position in range(6)]
            canvas.draw(Snapshot(step, [list(ids)], [at], [[0.5] * 6], [5 - step]))
            drawn = console.file.getvalue()  # type: ignore[attr-defined]
            if step == 1:
                assert "He" in drawn and live.MASK * 4 in drawn and "4 masks left" in drawn
    assert "Hello \N{MIDDLE DOT}" in drawn and "Why?" in drawn and "0 masks left" in drawn


def test_masks_that_are_not_to_be_filled_are_drawn_as_the_end(engine, monkeypatch):
    monkeypatch.setattr(live, "SLOWEST", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    ids = [*engine.checkpoint.tokenizer("Yo")["input_ids"], EOS, MASK, MASK]
    with live.Canvas(console, ["Why?"], [[1]], engine.checkpoint) as canvas:
        canvas.draw(Snapshot(0, [ids], [[0, 0, 0, -1, -1]], [[0.5] * 5], [0]))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Yo " + live.END * 3 in drawn and "0 masks left" in drawn and live.MASK not in drawn


def test_negative_entropies_become_colours():
    assert live._sureness([-0.0, -np.log(2), 0.25, 1.5]) == pytest.approx([1.0, 0.5, 0.25, 1.0])
    assert live._colour(0.0).triplet == live.UNSURE
    assert live._colour(0.5).triplet == live.HALF_SURE
    assert live._colour(1.0).triplet == live.SURE


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dlm_jax.generate", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKPOINTS,  # not the checkout: what is installed is tested
    )


def test_a_closed_pipe_is_no_error(model):
    with start("--model", model, GEN, "Hi") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert "tokens in" not in err and "Error" not in err and "Traceback" not in err


def test_an_interrupt_leaves_no_trace(model, tmp_path):
    target = tmp_path / "history.json"
    with start("--model", model, "--gen-length=256", "--history", str(target), "Hi") as process:
        for line in process.stderr:
            if line.startswith("compiling"):
                break
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []
