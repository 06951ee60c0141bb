"""Files of prompts: batches, order, seeds, what is kept of an interrupted run, and Ctrl-C."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import CHECKPOINTS

from dlm_jax import checkpoint, compilation, generate, models, tokenizer
from dlm_jax.batching import fit
from dlm_jax.batching.batches import Request, answered, in_order
from dlm_jax.batching.responses import Responses
from dlm_jax.cli import output, plan
from dlm_jax.cli import run as cli_run
from dlm_jax.cli.interrupt import interruptible
from dlm_jax.cli.plan import Question
from dlm_jax.cli.prompts import Prompt
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine

ASKED = [f"Tom has {n} boxes with 4 apples each. How many apples are there?" for n in range(2, 8)]
SHORT = ["--gen-length=8", "--no-chat"]


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(capsys):
    """Runs the command with JSON lines; returns status, answers and what was told."""

    def command(*argv: str) -> tuple[int, list[dict], str]:
        status = generate.main([*SHORT, "--json", *argv])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return command


# --- batches --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_batches_answer_the_first_requests_first(groups, rows):
    requests = [Request(str(i), group, 1, None) for i, group in enumerate(groups)]
    batches = list(in_order(requests, lambda _group, _count: rows))
    flat = [int(request.key) for batch in batches for request in batch]
    assert sorted(flat) == list(range(len(groups)))
    assert all(len({request.group for request in batch}) == 1 for batch in batches)
    assert all(len(batch) <= rows for batch in batches)
    done: set[int] = set()
    for batch in batches:  # each begins with the first that has no answer
        first = min(set(range(len(groups))) - done)
        assert int(batch[0].key) == first
        done |= {int(request.key) for request in batch}


def test_what_is_asked_twice_is_answered_once():
    requests = [Request(key, 0, 1, None) for key in "abab"]
    responses = Responses()
    batches = in_order(requests, lambda _group, _count: 3)
    asked = [
        [request.key for request in batch]
        for batch in answered(batches, lambda _group, batch: [{}] * len(batch), responses)
    ]
    assert asked == [["a", "b"]] and "a" in responses and "b" in responses


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 8))
@example([1, 33, 49, 65, 97], 2)
def test_few_shapes_hold_all_prompts(lengths, rows):
    config = dataclasses.replace(models.PRESETS["bench-60m"], max_length=432)
    decode = DecodeConfig.for_model(config, gen_length=32)
    questions = [Question(Prompt("a"), [1] * n, decode, 0) for n in lengths]
    groups: dict[int, list[int]] = {}
    for request in plan.requests(questions, config, rows):
        groups.setdefault(request.group.slots, []).append(request.size)
    for slots, sizes in groups.items():
        assert max(sizes) <= slots <= min(tokenizer.slots(max(sizes)), 400)
    *shorter, _ = [groups[slots] for slots in sorted(groups)]
    assert all(len(sizes) >= rows for sizes in shorter)
    keys = [request.key for request in plan.requests(questions, config, rows)]
    assert len(set(keys)) == len(set(lengths))  # what is the same has the same key
    apart = plan.requests(questions, config, rows, apart=True)
    assert len({request.key for request in apart}) == len(lengths)


@pytest.mark.parametrize(
    "platform, count, free, wanted",
    [
        ("cpu", 100, 1e9, 16),
        ("cpu", 5, 1e9, 5),
        ("cpu", 100, 70.0, 4),  # 63 MiB of it, at 10 a row and 10 for all
        ("cpu", 100, 1.0, 1),
        ("gpu", 1000, 1e9, 256),
        ("gpu", 1000, 1000.0, 45),
        ("gpu", 1000, 1.0, 1),
    ],
)
def test_a_batch_is_as_large_as_the_memory(platform, count, free, wanted):
    def need(rows: int) -> float:
        return 10.0 + 10.0 * rows

    assert fit.rows_that_fit(need, count, free_mib=free, platform=platform) == wanted


def test_free_memory_is_a_plausible_number():
    import jax

    assert 64 < compilation.free_mib(jax.devices("cpu")[0]) < 2**24


# --- the command ----------------------------------------------------------------------------------


def test_a_file_is_answered_in_batches_in_its_order(run, tmp_path):
    lines = [{"prompt": text, "id": i} for i, text in enumerate(ASKED)]
    lines[1] |= {"gen_length": 16}
    lines[3]["prompt"] = " ".join([ASKED[3]] * 4)
    file = write(tmp_path / "a.jsonl", *lines)
    status, found, err = run("--prompt-file", file, "--batch-size=2")
    assert status == 0 and [line["id"] for line in found] == list(range(6))
    assert [len(line["tokens"]) for line in found] == [8, 16, 8, 8, 8, 8]
    assert "6 prompts in " in err
    for i in (0, 3):  # the same as alone
        (alone,) = run(lines[i]["prompt"])[1]
        assert alone["tokens"] == found[i]["tokens"] and alone["text"] == found[i]["text"]
    for line in found:
        assert line["stats"]["batch_tokens"] <= 2 * 16
    assert sum(line["stats"]["compile_seconds"] > 0 for line in found) >= 2


def test_a_sample_depends_on_its_own_seed_and_prompt_only(run, tmp_path):
    warm = ["--temperature=5", "--seed=7", "--batch-size=3"]
    lines = [
        {"prompt": ASKED[0], "seed": 5},
        {"prompt": ASKED[1]},
        {"prompt": ASKED[0]},
        {"prompt": ASKED[0], "seed": 5},
        {"prompt": ASKED[0]},
    ]
    found = run(*warm, "--prompt-file", write(tmp_path / "a.jsonl", *lines))[1]
    assert [line["seed"] for line in found] == [5, 8, 9, 5, 11]
    tokens = [line["tokens"] for line in found]
    assert tokens[0] == tokens[3] and tokens[0] != tokens[2] != tokens[4]
    again = {"prompt": ASKED[0], "seed": 11}
    assert (
        run(*warm, "--prompt-file", write(tmp_path / "b.jsonl", again))[1][0]["tokens"]
        == (tokens[4])
    )


def test_invalid_prompts_stop_the_run_or_become_errors(run, tmp_path, monkeypatch):
    lines = [
        {"prompt": ASKED[0]},
        {"prompt": "x " * 600, "id": "long"},
        {"prompt_ids": [10**9]},
        {"prompt": ASKED[0], "gen_length": 10**6},
        {"prom": 1},
        {"prompt": ASKED[1]},
    ]
    file = write(tmp_path / "a.jsonl", *lines)
    status, found, err = run("--prompt-file", file, "--skip-invalid")
    assert status == 0 and [sorted(line) for line in found].count(["error"]) == 1
    errors = [line.get("error", "") for line in found]
    assert errors[0] == errors[5] == ""
    assert "line 2, has" in errors[1] and found[1]["id"] == "long" and "line 3, holds" in errors[2]
    assert "1000000 are to be generated" in errors[3] and "line 5, must be" in errors[4]
    assert "4 of 6 prompts were left out, first: " in err

    def too_late(*_args, **_kwargs):
        raise AssertionError("long work was started")

    monkeypatch.setattr(checkpoint, "load", too_late)
    status, found, err = run("--prompt-file", file)
    assert (status, found) == (2, []) and "line 5, must be" in err  # read before the model is
    file = write(tmp_path / "b.jsonl", *lines[1:4])
    status, found, err = run("--prompt-file", file)
    assert (status, found) == (2, []) and "line 1, has" in err
    status, found, _ = run("--prompt-file", file, "--skip-invalid")
    assert status == 0 and len(found) == 3  # nothing is left to ask


def test_text_from_nothing(run, tmp_path):
    status, (found,), _ = run("--prompt", "")
    assert status == 0 and found["prompt"] == "" and len(found["tokens"]) == 8
    status, _, err = run("--prompt", "", "--chat")
    assert status == 2 and "must hold some text" in err


def test_a_conversation_is_put_as_the_template_does(tmp_path, capsys):
    turns = [{"role": "user", "content": ASKED[0]}]
    file = write(tmp_path / "a.jsonl", {"messages": turns}, {"prompt": ASKED[0]})
    assert generate.main(["--gen-length=8", "--json", "--prompt-file", file]) == 0
    talk, plain = map(json.loads, capsys.readouterr().out.splitlines())
    assert talk["tokens"] == plain["tokens"] and talk["messages"] == turns
    for option in ("--no-chat", "--infill"):
        assert generate.main([option, "--prompt-file", file]) == 2
        assert f"line 1, is a conversation; {option} cannot" in capsys.readouterr().err


# --- what is kept ---------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_the_rest(run, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", *ASKED)
    target, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    argv = ["--prompt-file", file, "--batch-size=2", "--output", str(target)]
    engine_run, batches = Engine.run, []

    def stop_at(number: int):
        def counted(self, rows, key, *args, **named):
            batches.append(rows)
            if len(batches) == number:
                raise KeyboardInterrupt
            return engine_run(self, rows, key, *args, **named)

        monkeypatch.setattr(Engine, "run", counted)

    stop_at(3)
    status, found, err = run(*argv)
    assert (status, found) == (130, []) and "4 of 6 answers are kept in" in err
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.jsonl.partial"]
    status, _, err = run(*argv)
    assert status == 2 and "go on with --resume, or delete it" in err
    batches.clear()
    stop_at(100)
    status, found, err = run(*argv, "--resume")
    assert (status, found) == (0, []) and len(batches) == 1 and not kept.exists()
    resumed = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["prompt"] for line in resumed] == ASKED
    status, whole, _ = run("--prompt-file", file)
    assert [line["tokens"] for line in whole] == [line["tokens"] for line in resumed]
    status, _, err = run(*argv, "--resume")
    assert status == 2 and "is complete; leave --resume out" in err


OTHERS = {
    "nothing": [],
    "dtype": ["--dtype=bfloat16"],
    "end": ["--eos=id:5"],
    "stop": ["--stop=apples"],
    "min p": ["--min-p=0.5"],
    "cache": ["--cache=dual"],
    "cache arguments": ["--cache=dllm", "--cache-args=kp=3"],
    "seed": ["--seed=1"],
    "length": ["--gen-length=16"],
    "chat": ["--chat"],
    "suppressed": ["--suppress=id:7"],
    "frequencies": ["--debias={tmp}/freq.json", "--alg=low_confidence"],
}


def test_what_answers_depend_on_is_in_their_keys(tmp_path, capsys):
    """What was kept is of use to the same settings only."""
    (tmp_path / "freq.json").write_text('{"num_token": 9, "p_baseline_dict": {"3": 4}}')
    keys = {}
    for name, options in OTHERS.items():
        argv = [*SHORT, "--temperature=1", ASKED[0]]
        argv += [option.replace("{tmp}", str(tmp_path)) for option in options]
        answering = cli_run.prepare(generate.parse(argv), [Prompt(ASKED[0])]).__self__
        keys[name] = answering.lines[0].request.key
    assert len(set(keys.values())) == len(OTHERS)
    again = cli_run.prepare(generate.parse([*SHORT, "--temperature=1"]), [Prompt(ASKED[0])])
    assert again.__self__.lines[0].request.key == keys["nothing"]


def test_what_other_settings_kept_is_neither_taken_nor_lost(tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.txt"
    kept = output.partial(target)
    responses = Responses(kept)
    responses.add("key of something else", {"text": "no", "tokens": [1], "stats": {}})
    argv = [*SHORT, ASKED[0], "--output", str(target), "--resume"]
    assert generate.main(argv) == 2 and "Another run" in capsys.readouterr().err
    responses.close()

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", interrupted)
        assert generate.main(argv) == 130
    assert len(list(kept.iterdir())) == 1
    assert generate.main(argv) == 0 and "no\n" not in target.read_text()
    assert not kept.exists()


def test_nothing_is_left_of_a_run_that_kept_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run", interrupted)
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    assert run(ASKED[0], "--output", str(target))[0] == 130
    assert os.listdir(tmp_path) == ["out.jsonl"] and target.read_text() == "old\n"


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--resume"], "name it with --output"),
        (["--output="], "must name a file"),
        (["--prompt-file", "{tmp}/a.jsonl", "--output", "{tmp}/../{name}/a.jsonl"], "is read by"),
        (["--prompt-file", "{tmp}/a.jsonl", "--history", "{tmp}/a.jsonl"], "is read by"),
        (["--output", "{tmp}/b", "--history", "{tmp}/b"], "name two files"),
        (["--output", "{tmp}/c", "--resume"], "holds something else; move that away"),
        (["--output", "{tmp}/d"], "holds something else; move that away"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--output", "{tmp}/no/file"], "cannot be written"),
        (["--output", "{tmp}"], "no regular file"),
        (["--interactive", "--output", "{tmp}/a"], "--output cannot go with it"),
        (["a", "b", "--history", "{tmp}/h", "--batch-size=1"], "--history is about one batch"),
    ],
)
def test_what_cannot_be_kept_is_refused(argv, wanted, tmp_path, capsys):
    write(tmp_path / "a.jsonl", "Hi")
    (tmp_path / "c.partial").mkdir()
    for name in ("c.partial/mine", "d.partial"):
        (tmp_path / name).write_text("mine")
    names = {"{tmp}": str(tmp_path), "{name}": tmp_path.name}
    for name, value in names.items():
        argv = [text.replace(name, value) for text in argv]
    try:
        assert generate.main(argv) == 2
    except SystemExit as exit_:  # the parser's way
        assert exit_.code == 2
    assert wanted in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "c.partial", "d.partial"]
    assert (tmp_path / "c.partial" / "mine").read_text() == "mine"


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_errors_and_results_of_work_in_a_thread():
    assert interruptible(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        interruptible(divmod, 1, 0)


def test_ctrl_c_ends_a_computation_within_two_seconds(tmp_path):
    """One batch of a long generation, which no thread could be stopped in."""
    file = write(tmp_path / "a.jsonl", *[{"prompt_ids": [1] * 200}] * 16)
    program = [sys.executable, "-m", "dlm_jax.generate", "--model", str(CHECKPOINTS / "llada-tiny")]
    target = tmp_path / "out.jsonl"
    argv = ["--prompt-file", file, "--gen-length=256", "--output", str(target), "--cfg-scale=1"]
    with subprocess.Popen([*program, *argv], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("denoising"):
                break
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        took = time.monotonic() - began
    assert process.returncode == 130 and "Traceback" not in err
    assert took < 2
    assert os.listdir(tmp_path) == ["a.jsonl"]
