"""The command `dlm_jax.evaluate` from its options to its files, killed, in a cluster, on a mesh."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from places import GOLDEN

from dlm_jax import checkpoint, engine, evaluate
from dlm_jax.eval import evaluation, tasks

LIMIT, PICKS = 30, 6
PICKS_TASK = """
task: picks
custom_dataset: !function utils.load
test_split: test
output_type: multiple_choice
doc_to_text: "How many is {{question}}?"
doc_to_choice: ["13 apples", "26 in all, and then 5 more"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
PICKS_UTILS = """
import datasets

def load(**kwargs):
    questions = [{"question": question} for question in ("9 + 4", "12 + 14", "3 * 7 + 5 and 8")]
    return {"test": datasets.Dataset.from_list(questions)}
"""
ENV = dict(
    JAX_PLATFORMS="cpu",
    JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    HF_HUB_OFFLINE="1",
    PYTHONPATH=os.pathsep.join(sys.path),
)


def start(*argv: str | Path, **env: str) -> subprocess.Popen:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dlm_jax.evaluate", "--no-compile-cache", *map(str, argv)],
        cwd=Path(__file__).parent,  # from where Python finds the same package as the tests do
        env=os.environ | ENV | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def responses(folder: Path) -> dict[str, dict]:
    """Key -> response in a folder's files, which must not hold a key twice."""
    found = {}
    for path in folder.glob("responses-*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            assert entry["key"] not in found
            found[entry["key"]] = entry["response"]
    return found


def texts(folder: Path) -> dict[str, str]:
    return {k: response["text"] for k, response in responses(folder).items() if "text" in response}


def likelihoods(folder: Path) -> dict[str, float]:
    return {
        key: response["log_likelihood"]
        for key, response in responses(folder).items()
        if "text" not in response
    }


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """An evaluation that generates and one that compares likelihoods."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "picks.yaml").write_text(PICKS_TASK)
    (folder / "utils.py").write_text(PICKS_UTILS)
    tasks = [f"--include-path={folder}", "--tasks=tiny_math,picks", f"--limit={LIMIT}"]
    likelihood = ["--mc-num=4", "--mc-batch-size=2"]
    return ["--model=dream-tiny-math", *tasks, *likelihood, "--cache=dual", "--gen-length=32"]


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert evaluate.main([*argv, f"--output={folder}"]) == 0
    assert len(texts(folder)) == LIMIT and len(likelihoods(folder)) == PICKS
    return folder


def check_same(folder: Path, whole: Path) -> None:
    assert texts(folder) == texts(whole)
    assert likelihoods(folder) == pytest.approx(likelihoods(whole), abs=1e-3)
    assert [row["scores"] for row in rows(folder)] == [row["scores"] for row in rows(whole)]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(argv, whole, tmp_path, monkeypatch):
    process = start(*argv, f"--output={tmp_path}")
    file = tmp_path / "responses-0.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Killed within a line, in addition.
    with file.open("ab") as torn:
        torn.write(b'{"key": "00')
    known = file.read_bytes().count(b"\n")
    assert 3 <= known < LIMIT

    batches = []
    run = engine.Engine.run
    monkeypatch.setattr(
        engine.Engine, "run", lambda self, rows, key: batches.append(rows) or run(self, rows, key)
    )
    assert evaluate.main([*argv, f"--output={tmp_path}"]) == 0
    assert len(batches) == LIMIT - known
    file.write_bytes(b"".join(x for x in file.read_bytes().splitlines(True) if b"}" in x))
    check_same(tmp_path, whole)

    # A third run has nothing left to do.
    assert evaluate.main([*argv, f"--output={tmp_path}"]) == 0
    assert len(batches) == LIMIT - known


@pytest.mark.slow
def test_two_processes_share_the_work(argv, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    processes = [
        start(*argv, f"--output={tmp_path}", *cluster, f"--process-id={i}") for i in range(2)
    ]
    told = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "dual" in told[0][0] and told[1][0] == ""
    shares = [
        (tmp_path / f"responses-{i}.jsonl").read_text().count("\n") for i in range(len(processes))
    ]
    assert shares == [(LIMIT + PICKS) // 2] * 2
    check_same(tmp_path, whole)


@pytest.mark.slow
def test_weights_may_be_copied_to_each_host(tmp_path):
    """Sizes and contents are the same, times are not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = checkpoint.find("llada-tiny-math")
    processes = []
    for i in range(2):
        copy = tmp_path / str(i) / "model-base"
        shutil.copytree(source, copy)
        os.utime(copy / "model.safetensors", (i, i))
        argv = [f"--model={copy}", "--limit=2", "--gen-length=16", f"--process-id={i}"]
        cluster = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
        processes.append(start(*argv, *cluster))
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "variant base" in told[0][1] and "2 samples" in told[0][0]


def test_what_one_process_refuses_all_refuse():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--limit=1", f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    processes = [
        start(*cluster, "--process-id=0"),
        start(*cluster, "--process-id=1", "--mesh=data=7"),
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    assert all("data=7" in err and "(process 1)" in err for _, err in told)


@pytest.mark.slow
def test_eight_devices_give_the_texts_of_one(argv, whole, tmp_path):
    argv = [*argv, "--mesh=data=4,model=2", "--batch-size=2", f"--output={tmp_path}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    process = start(*argv, XLA_FLAGS=flags)
    told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    check_same(tmp_path, whole)
    machine = json.loads((tmp_path / "results.json").read_text())["machine"]
    assert machine["devices"] == 8


# --- the table ------------------------------------------------------------------------------------


def test_caches_are_compared_on_the_same_samples(tmp_path, capsys):
    argv = ["--limit=2", "--gen-length=32", "--batch-size=2", f"--output={tmp_path}"]
    compared = "none,dual:block_length=8,dkv-greedy,none:alg=random"
    assert evaluate.main([*argv, "--compare", compared]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "tiny_math, 2 samples, on cpu, batch 2"
    header, _, *cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ]
    assert header[:6] == [
        "cache",
        "exact_match (first-number)",
        "tokens/s",
        "speed-up",
        "tokens/forward",
        "agreement",
    ]
    assert [line[0] for line in cells] == [
        "none",
        "dual:block_length=8 *",
        "dkv-greedy *",
        "none:alg=random",
    ]
    none, dual, greedy, random = rows(tmp_path)
    assert none["agreement"] == none["speedup"] == 1.0
    assert greedy["against"] == "none:alg=random" and dual["against"] == "none"
    assert "block_length=8" in dual["note"] and "block_length=8" in out
    assert random["decode"]["strategy"] == greedy["decode"]["strategy"] == "random"
    assert dual["positions"] < none["positions"] and none["memory_mib"] > 0
    assert all(row["samples"] == 2 and row["forwards"] == 32 for row in (none, dual, greedy))
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    samples = [
        json.loads(line)
        for line in (tmp_path / "samples-tiny_math-none.jsonl").read_text().splitlines()
    ]
    assert [sample["doc_id"] for sample in samples] == [0, 1]
    assert {sample["resps"][0][0] for sample in samples} <= {*texts(tmp_path).values()}
    assert "tokens/s" in err


@pytest.mark.slow
def test_all_caches_are_compared(capsys):
    """The command of docs/evaluation.md, with fewer samples."""
    caches = "none,dkv-decode,dkv-greedy,dkv-prefill,dkv-pd,prefix,dual,dllm,d2cache"
    assert evaluate.main(["--limit=8", "--compare", caches]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table[2:]] == caches.split(",")


@pytest.mark.slow
def test_the_class_is_registered_with_lm_eval():
    results = lm_eval.simple_evaluate(
        model="dlm_jax",
        model_args="pretrained=llada-tiny-math,cache=d2cache,rollout_p=0.1,gen_length=16,seed=1",
        tasks=["tiny_math"],
        limit=2,
        batch_size=2,
        apply_chat_template=True,
        task_manager=TaskManager(include_path=tasks.PATH, include_defaults=False),
    )
    assert results is not None
    assert results["config"]["model"] == "dlm_jax"
    score = results["results"]["tiny_math"]["exact_match,first-number"]
    assert score in (0.0, 0.5, 1.0)
    assert len(results["samples"]["tiny_math"]) == 2


CODE_TASK = """
task: writes_code
custom_dataset: !function utils.load
test_split: test
output_type: generate_until
unsafe_code: true
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
metric_list:
  - metric: !function utils.run
    aggregation: mean
    higher_is_better: true
generation_kwargs:
  until: []
"""
CODE_UTILS = """
import datasets

def load(**kwargs):
    return {"test": datasets.Dataset.from_list([{"question": "Tom has 7 boxes."}])}

def run(references, predictions):
    open(RAN, "w").close()
    return 1.0
"""

GROUP = """
group: both
task: [one, two]
aggregate_metric_list:
  - metric: exact_match
    weight_by_size: true
"""


def test_a_group_is_one_table(tmp_path, capsys):
    text = CODE_TASK.replace("unsafe_code: true\n", "")
    text = text.replace("!function utils.run", "exact_match")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("writes_code", name))
    (tmp_path / "both.yaml").write_text(GROUP)
    (tmp_path / "utils.py").write_text(CODE_UTILS)
    output = tmp_path / "output"
    argv = ["--tasks=both", f"--include-path={tmp_path}", "--gen-length=8", f"--output={output}"]
    # As if lm-eval had no tasks of its own, whose index takes a while.
    with pytest.MonkeyPatch.context() as patch:
        known = functools.partial(TaskManager, include_defaults=False)
        patch.setattr(evaluation, "TaskManager", known)
        assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("both, 2 samples, on cpu, batch 1\n") and out.count("| cache") == 1
    one, two, both = rows(output)
    assert [row["task"] for row in (one, two, both)] == ["one", "two", "both"]
    assert one["group"] == two["group"] == "both" and "group" not in both
    assert both["scores"]["exact_match"][0] == 0.0
    assert both["samples"] == one["samples"] + two["samples"] == 2
    assert both["agreement"] == 1.0


DRAWN_TASK = """
task: drawn
custom_dataset: !function utils.load
test_split: test
process_docs: !function utils.draw
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
metric_list:
  - metric: exact_match
generation_kwargs:
  until: []
"""
DRAWN_UTILS = """
import os
import random

import datasets

def load(**kwargs):
    folder = os.environ["DRAWN"]  # where `datasets` keeps what was drawn, too
    with open(f"{folder}/data.jsonl", "w") as file:
        file.write('{"question": "How many?"}')
    files = {"test": f"{folder}/data.jsonl"}
    return datasets.load_dataset("json", data_files=files, cache_dir=folder)

def draw(docs):
    return docs.map(lambda doc: {"question": f"{doc['question']} {random.randrange(90)}"})
"""


def test_what_a_task_draws_is_seeded_and_a_name_may_be_long(tmp_path, monkeypatch):
    (tmp_path / "drawn.yaml").write_text(DRAWN_TASK)
    (tmp_path / "utils.py").write_text(DRAWN_UTILS)
    label = "none:" + "+".join(f"{name}=null" for name in ("threshold", "sigma", "top_p") * 9)
    argv = ["--tasks=drawn", f"--include-path={tmp_path}", "--gen-length=8", f"--compare={label}"]
    drawn = []
    for seed in (1, 1, 2):
        folder = tmp_path / f"cache{len(drawn)}"
        folder.mkdir()
        monkeypatch.setenv("DRAWN", str(folder))
        assert evaluate.main([*argv, f"--task-seed={seed}", f"--output={folder}"]) == 0
        (samples,) = folder.glob("samples-*.jsonl")
        drawn.append(json.loads(samples.read_text())["doc"]["question"])
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.loads((folder / "results.json").read_text())["model"]["variant"] == "inst"


# --- code that the model writes -------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
def test_code_is_run_only_if_that_is_allowed(tmp_path, allowed, capsys):
    ran, folder, output = (tmp_path / name for name in ("ran", "tasks", "output"))
    folder.mkdir()
    (folder / "writes_code.yaml").write_text(CODE_TASK)
    (folder / "utils.py").write_text(f"RAN = {str(ran)!r}\n{CODE_UTILS}")
    argv = ["--tasks=writes_code", f"--include-path={folder}", "--gen-length=8", "--limit=1"]
    if not allowed:
        assert evaluate.main(argv) == 2
        assert "--allow-code-execution" in capsys.readouterr().err
    else:
        argv.append("--allow-code-execution")
    assert evaluate.main([*argv, f"--output={output}"]) == 0
    assert ran.exists() == allowed
    out = capsys.readouterr().out
    assert ("1.0000" in out) == allowed and ("not scored" in out) != allowed
    (sample,) = (output / "samples-writes_code-none.jsonl").read_text().splitlines()
    assert json.loads(sample)["resps"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, told",
    [
        ([f"--model={GOLDEN / 'checkpoints' / 'llada-tiny'}"], "has no tokenizer"),
        (["--model=nowhere"], "neither a directory nor an embedded model"),
        (["--cache=none", "--cache-args=kp=3"], "kp"),
        (["--compare=none,dual", "--cache=dual"], "leave --cache and --cache-args out"),
        (["--compare=none,dull"], "cache is 'dull'"),
        (["--compare=none,dual:threshhold=0.9"], "There is no setting 'threshhold'"),
        (["--compare=none,dual:block_length=7"], "block_length is 7"),
        (["--gen-length=300"], "gen_length is 300"),
        (["--mesh=data=64"], "64"),
        (["--mesh=rows=1"], "rows"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--variant=huge"], "variant is 'huge'"),
        (["--system=Be brief.", "--no-chat"], "--chat"),
        (["--coordinator=127.0.0.1:1"], "go together"),
        (["--num-fewshot=-1"], "--num-fewshot"),
        (["--mc-num=3", "--mc-batch-size=2"], "a multiple of mc_batch_size"),
        (["--cache=dkv-decode", "--cache-args=steps=4"], "steps"),
        (["--compare=none:gen_length=abc"], "gen_length is 'abc'"),
        (["--strategy=klass"], "klass"),
    ],
)
def test_what_cannot_work_is_told_in_one_sentence(argv, told, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "load", functools.partial(pytest.fail, "reads the weights"))
    assert evaluate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dlm-jax-evaluate: ") and err.count("\n") == 1
    assert told in err


def test_a_task_that_does_not_exist(monkeypatch, capsys):
    # Without lm-eval's own tasks, whose index takes a while.
    monkeypatch.setattr(
        evaluation, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    assert evaluate.main(["--tasks=no_such_task"]) == 2
    err = capsys.readouterr().err
    assert "There is no task 'no_such_task'" in err and "tiny_math" in err


@pytest.mark.parametrize(
    "argv", [["--limit=0"], ["--limit=1.5"], ["--tasks=a,,b"], ["--compare=none,none"], ["x"]]
)
def test_options_that_are_wrong_in_themselves(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_output_must_be_a_folder_that_no_other_run_uses(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert evaluate.main([f"--output={file}"]) == 2
    assert "is no folder; --output must name one" in capsys.readouterr().err
    assert evaluate.main([f"--output={file / 'below'}"]) == 2
    assert "cannot be written; --output must name a writable" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main([]) == 2
    assert "dlm-jax[eval]" in capsys.readouterr().err


def test_help_needs_nothing_that_takes_time():
    code = (
        "import sys\nfrom dlm_jax import evaluate\ntry:\n    evaluate.parse(['--help'])\n"
        "except SystemExit:\n    assert not {'jax', 'lm_eval', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
