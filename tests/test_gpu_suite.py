"""The suite for a GPU: what becomes of its stages and their results, whatever befalls them."""

import dataclasses
import inspect
import json
import re
import time
import weakref
from types import SimpleNamespace

import gpu_checks
import gpu_plan
import gpu_report
import gpu_stages
import gpu_suite
import jax
import numpy as np
import pytest
import replay
from golden_args import translate
from gpu_checks import Check, Line
from gpu_plan import Clock, Own, Stage
from gpu_suite import Record
from gpu_worker import Worker
from places import read_case

from dlm_jax import cache as cache_lib
from dlm_jax import models

FACTS = dict(command="python scripts/gpu_suite.py", commit=None, minutes=1.0, dry=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Processes start at once, and nobody is patient with what takes longer than expected."""
    monkeypatch.setattr(gpu_plan, "START_S", 0.0)
    monkeypatch.setattr(gpu_plan, "PATIENCE_S", 4.0)
    monkeypatch.setattr(gpu_report, "_sections", lambda document: iter(["results"]))


def stage(task: str, *, seconds: float = 0.1, own: Own | None = None, **arguments) -> Stage:
    return Stage("group", task, task, arguments, seconds, own)


def run(folder, *stages: Stage, seconds: float = 60.0, options: dict | None = None):
    """Runs the stages in real processes; returns what was written at the end, and the exit code."""
    record = Record(folder, FACTS)

    def start(own: Own) -> Worker:
        variables = dict(XLA_FLAGS=own.flags)
        return Worker("suite_session", options or {}, variables, folder / "worker.log")

    gpu_suite.run(stages, Clock(time.monotonic() + seconds), record, start)
    return json.loads((folder / "suite.json").read_text()), record.status


def outcomes(document) -> list[tuple[str, str]]:
    return [(stage["stage"], stage["status"]) for stage in document["stages"]]


def test_stages_share_a_process_but_those_that_have_their_own(tmp_path):
    flagged = stage("tell", own=Own(flags="--some_flag"))
    document, status = run(tmp_path, *[stage("tell")] * 2, flagged, stage("tell"))
    first, second, third, fourth = document["memory"]
    assert first["pid"] == second["pid"] and len({e["pid"] for e in document["memory"]}) == 3
    assert [entry["flags"] for entry in (second, third, fourth)] == ["", "--some_flag", ""]
    assert outcomes(document) == [("tell", "passed")] * 4 and status == 0
    assert (tmp_path / "suite.md").read_text() == "results\n"


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    document, status = run(tmp_path, stage("tell"), stage("hang"), stage("tell"))
    assert outcomes(document) == [("tell", "passed"), ("hang", "ended"), ("tell", "passed")]
    assert re.fullmatch(r"ended after \d s, its limit", document["stages"][1]["error"])
    assert 4 <= document["stages"][1]["seconds"] < 8
    # What it told before is kept, and what it shared with others is made anew.
    assert [entry["stage"] for entry in document["memory"]] == ["tell", "hang", "tell"]
    assert document["memory"][1]["pid"] != document["memory"][2]["pid"]
    assert status == 1


def test_results_survive_the_death_of_a_process(tmp_path):
    document, status = run(tmp_path, stage("tell"), stage("die"), stage("tell"))
    assert outcomes(document) == [("tell", "passed"), ("die", "ended"), ("tell", "passed")]
    assert document["stages"][1]["error"] == "died with status -6: the device is on fire"
    assert len(document["memory"]) == 3 and status == 1


def test_an_exception_is_told_with_its_traceback(tmp_path):
    document, status = run(tmp_path, stage("fail"), stage("tell"))
    failed = document["stages"][0]
    assert (failed["status"], failed["error"]) == ("failed", "out of luck")
    assert "suite_session.py" in failed["traceback"]
    # It may have left the device in a state that no other stage should find.
    assert document["memory"][0]["pid"] != document["memory"][1]["pid"] and status == 1


def test_a_check_that_failed_fails_its_stage(tmp_path):
    good, bad = (
        stage("tell", table="checks", name=name, **Check(outcome)._asdict())
        for name, outcome in (("one", "passed"), ("another", "failed"))
    )
    document, status = run(tmp_path, good, stage("tell"))
    assert status == 0
    document, status = run(tmp_path, bad._replace(name="bad"), good)
    assert outcomes(document) == [("bad", "failed"), ("tell", "passed")] and status == 1
    assert document["stages"][0]["error"] == "another"
    assert document["checks"][0]["pid"] == document["checks"][1]["pid"]


def test_what_does_not_fit_is_left_out(tmp_path):
    document, status = run(tmp_path, stage("hang", seconds=100), stage("tell"))
    assert outcomes(document) == [("hang", "left out"), ("tell", "passed")] and status == 0


def test_a_stage_is_cut_off_when_time_is_over(tmp_path):
    begun = time.monotonic()
    document, status = run(tmp_path, stage("hang"), stage("tell"), seconds=gpu_plan.SPARE_S + 2)
    assert time.monotonic() - begun < gpu_plan.SPARE_S + 2
    assert outcomes(document) == [("hang", "cut off"), ("tell", "left out")]
    assert status == 0  # nothing is wrong but the time


def test_a_first_process_that_can_run_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such device"):
        run(tmp_path, stage("tell"), options=dict(refuses="there is no such device"))
    record = Record(tmp_path, FACTS)
    processes = iter([{}, dict(refuses="it is gone")])
    gpu_suite.run(
        [stage("die"), stage("tell")],
        Clock(time.monotonic() + 60),
        record,
        lambda own: Worker("suite_session", next(processes), {}, tmp_path / "worker.log"),
    )
    assert outcomes(record.document) == [("die", "ended"), ("tell", "failed")]


def test_the_clock_learns_how_fast_the_device_is():
    clock = Clock(time.monotonic() + gpu_plan.SPARE_S + 100)
    assert clock.fits(99) and not clock.fits(101)
    clock.learn(10, 20)
    assert clock.pace == 2 and clock.fits(49) and not clock.fits(51)
    assert clock.limit(8) == gpu_plan.PATIENCE_S + 3 * 2 * 8
    assert clock.limit(100) == pytest.approx(100, abs=1)  # what is left
    clock.learn(30, 0)
    assert clock.pace == 0.5 and clock.limit(8) == gpu_plan.PATIENCE_S + 3 * 8
    clock.learn(1, 1000)
    assert clock.pace == 4.0


def test_the_environment_of_a_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--given")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    shared = gpu_suite.environment("programs", Own(), dry=False)
    assert shared["JAX_COMPILATION_CACHE_DIR"] == "programs"
    assert shared["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert not {"XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_COMPILATION_CACHE"} & shared.keys()
    tried = gpu_suite.environment("programs", Own("--tried", anew=True), dry=True)
    assert tried["XLA_FLAGS"] == "--given --tried" and tried["JAX_PLATFORMS"] == "cpu"
    assert tried["JAX_ENABLE_COMPILATION_CACHE"] == "false"


# --- the plan and the stages ----------------------------------------------------------------------


def test_the_plan():
    stages = gpu_plan.plan(layers=8)
    groups = [stage.group for stage in stages]
    assert list(dict.fromkeys(groups)) == list(gpu_plan.GROUPS)  # their order is that of the list
    assert groups == sorted(groups, key=list(gpu_plan.GROUPS).index)
    assert len({stage.name for stage in stages}) == len(stages)
    caches = [stage.arguments["cache"] for stage in stages if stage.group == "caches"]
    assert sorted(caches) == sorted(cache_lib.METHODS)
    assert {model: models.PRESETS[model].num_layers for model in gpu_plan.DEPTH} == gpu_plan.DEPTH
    for stage in stages:
        method = getattr(gpu_stages.Session, stage.task)
        inspect.signature(method).bind(None, **stage.arguments)


def test_there_must_be_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="no GPU here; --dry runs"):
        gpu_stages.Session(tmp_path, dry=False, ceilings=None)


def test_weights_are_made_once_per_model(monkeypatch, tmp_path):
    session, made = gpu_stages.Session(tmp_path, dry=True, ceilings=None), []

    def make(config, dtype, key):
        assert not made or held() is None, "two models may be more than the device holds"
        made.append((config.family, config.num_layers))
        names = [f"blocks_{i}" for i in range(config.num_layers)]
        return {name: np.zeros(1) for name in ("embed", *names)}

    monkeypatch.setattr(gpu_stages.random_weights, "make", make)
    configs = [gpu_stages.tiny(models.PRESETS[model]) for model in gpu_plan.DEPTH]
    few = dataclasses.replace(configs[0], num_layers=1)
    held = weakref.ref(session._params(configs[0])["embed"])
    assert session._params(few).keys() == {"embed", "blocks_0"}
    assert session._params(configs[0]).keys() == {"embed", "blocks_0", "blocks_1"}
    held = weakref.ref(session._params(configs[1])["embed"])
    session._params(few)
    assert made == [("llada", 2), ("dream", 2), ("llada", 1)]


def test_turns_are_put_back():
    before = gpu_stages.turns.POSITIONS
    with pytest.raises(RuntimeError), gpu_stages.turns_of(77):
        assert gpu_stages.turns.POSITIONS == 77
        raise RuntimeError
    assert before == gpu_stages.turns.POSITIONS


# --- the checks -----------------------------------------------------------------------------------


def test_there_is_a_recorded_run_of_every_cache():
    assert gpu_checks.CASES.keys() == cache_lib.METHODS.keys()
    for cache, name in gpu_checks.CASES.items():
        case = read_case(name)
        config = models.config_from_hf(
            json.loads(
                (gpu_checks.GOLDEN / "checkpoints" / case["model"] / "config.json").read_text()
            )
        )
        assert translate(case, config).cache.name == cache


def test_a_recorded_run_that_differs_has_failed(monkeypatch):
    monkeypatch.setattr(replay, "replay", lambda case, _: ("failed", f"{case['name']}, step 3"))
    name = gpu_checks.CASES["dual"]
    assert gpu_checks.golden("dual") == ("failed", f"{name}, step 3")
    monkeypatch.setattr(replay, "replay", lambda *_: ("unsupported", "new"))
    assert gpu_checks.golden("dual").outcome == "failed"
    monkeypatch.setattr(replay, "replay", lambda *_: ("passed", ""))
    assert gpu_checks.golden("dual").outcome == "passed"


LINE = Line(np.array([5, 6, 7]), np.array([-1, 1, 0]), np.array([0.0, 0.5, 0.9], np.float32))


def test_where_two_runs_of_a_row_part():
    def other(tokens=(5, 6, 7), committed_at=(-1, 1, 0), confidence=(0.0, 0.5, 0.9)):
        return Line(*map(np.array, (tokens, committed_at, confidence)))

    assert gpu_checks.part(LINE, other()) == ("", "")
    assert gpu_checks.part(LINE, other(confidence=(0.0, 0.51, 0.89))) == ("", "")
    found, _ = gpu_checks.part(LINE, other(confidence=(0.0, 0.6, 0.9)))
    assert "from step 1 on, by more than rounding" in found
    # Another choice is one of rounding if it was as sure.
    found, more = gpu_checks.part(LINE, other((5, 7, 6), (-1, 0, 1), (0.0, 0.88, 0.1)))
    assert not found and "otherwise from step 0 on" in more
    found, more = gpu_checks.part(LINE, other(tokens=(5, 8, 7)))
    assert not found and "otherwise from step 1 on" in more
    found, _ = gpu_checks.part(LINE, other((5, 7, 6), (-1, 0, 1), (0.0, 0.7, 0.1)))
    assert "from step 0 on, by more than rounding" in found
    found, _ = gpu_checks.part(LINE, other(committed_at=(-1, 0, 0)))
    assert "from step 0 on" in found


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (lambda rows, place: 0.0, None),
        (lambda rows, place: 1e-4 * rows.sum(), "beside another row and in another place"),
        (lambda rows, place: 1e-4 * place, "beside another row and in another place"),
        (lambda rows, place: 0.3 * (len(rows) == 1), "alone it differs from step 0 on"),
    ],
    ids=["none", "neighbours", "place", "batch"],
)
def test_rows_that_depend_on_one_another_are_found_out(leak, said, monkeypatch):
    def generate(params, model, prompt, *, key, decode, cache):
        told = [0.5 + leak(prompt[:, 0], place) for place in range(len(prompt))]
        told = np.repeat(np.array(told)[:, None], 3, axis=1)
        tokens, committed_at = np.repeat(prompt[:, :1], 3, axis=1), np.zeros(told.shape, int)
        return SimpleNamespace(tokens=tokens, committed_at=committed_at, confidence=told)

    config = models.PRESETS["bench-60m"]
    monkeypatch.setattr(gpu_checks, "diffusion_generate", generate)
    monkeypatch.setattr(gpu_checks, "_network", lambda: (models.Transformer(config), {}))
    monkeypatch.setattr(jax, "device_get", lambda out: out)
    outcome, detail = gpu_checks.rows("dual")
    assert outcome == ("failed" if said else "passed")
    assert (said or "") in detail


def test_a_check_that_raises_has_failed_and_the_others_go_on():
    def bad():
        raise RuntimeError("no such kernel")

    found = dict(gpu_checks.together(dict(bad=bad, good=lambda: Check("passed"))))
    assert found == dict(bad=("failed", "RuntimeError: no such kernel"), good=("passed", ""))


@pytest.mark.parametrize(
    ("difference", "outcome", "words"),
    [
        (0.001, "passed", ""),
        (0.5, "failed", "it differs from XLA's by 0.5"),
        (RuntimeError("no cuDNN"), "failed", "it does not run here (no cuDNN)"),
    ],
)
def test_fused_attention_is_compared_where_there_is_one(monkeypatch, difference, outcome, words):
    def found(_heads, _dtype):
        if isinstance(difference, Exception):
            raise difference
        return difference

    assert gpu_checks.attention() == ("skipped", "only GPUs have it")
    monkeypatch.setattr(gpu_checks.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu_checks.attention_lib, "fused_difference", found)
    assert gpu_checks.attention() == (outcome, words)


# --- the report -----------------------------------------------------------------------------------


def test_tables():
    rows = [dict(a="x|y", b=None, c=2.0, limit=1.0), dict(a="z", b=None, c=None, limit=1.0)]
    columns = (
        ("first", gpu_report._text("a")),
        ("empty", gpu_report._number("b", "{:.1f}")),
        ("share", gpu_report._with_share("c", "limit")),
    )
    assert gpu_report.table(rows, columns).splitlines() == [
        "| first | share |",
        "| --- | --- |",
        r"| x\|y | 2.00 (50%) |",
        "| z |  |",
    ]
    assert gpu_report.table([], columns) == ""


def test_speedups_are_over_none_of_the_same_network_and_batch():
    def row(cache, tokens, **changes):
        place = dict(model="m", layers=2, batch=1, cache=cache, tokens_per_s=tokens)
        return place | changes

    rows = [row("dual", 30.0), row("none", 10.0), row("dual", 5.0, batch=8), row("x", 5.0)]
    rows += [row("none", 2.0, batch=8, layers=1)]
    found = [row["speedup"] for row in gpu_report.with_speedups(rows)]
    assert found == [3.0, 1.0, None, 0.5, 1.0]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--minutes", "0"], "'0' is not a number from 1 to 60"),
        (["--minutes", "nan"], "'nan' is not a number from 1 to 60"),
        (["--minutes", "long"], "'long' is not a number from 1 to 60"),
        (["--layers", "33"], "'33' is not a whole number from 1 to 32"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--out", __file__], "is no folder; --out must name one, or a new one"),
        (["--out", "/dev/null/x"], "cannot be written; --out must name a writable folder"),
        (["--out", "."], "holds the results of another run; --out must name a new folder"),
    ],
)
def test_bad_input(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / gpu_suite.RESULTS).touch()
    monkeypatch.setattr(gpu_suite, "Worker", None)
    try:
        status = gpu_suite.main(["--out", "new", *argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert said in err and err.startswith("gpu_suite.py: ") and len(err.splitlines()) == 1


def test_a_target_is_needed(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_dry(tmp_path, monkeypatch, capsys):
    """All stages, on tiny models."""
    monkeypatch.undo()
    folder = tmp_path / "out"
    assert gpu_suite.main(["--dry", "--minutes", "30", "--out", str(folder)]) == 0
    document = json.loads((folder / "suite.json").read_text())
    planned = [stage.name for stage in gpu_plan.plan(8)]
    assert outcomes(document) == [(name, "passed") for name in planned]
    assert {row["cache"] for row in document["rows"]} == cache_lib.METHODS.keys()
    assert [step["step"] for step in document["profiles"]] == ["full", "cached"]
    for table in gpu_report.TABLES:
        assert document[table], table
    text = (folder / "suite.md").read_text()
    assert capsys.readouterr().out == f"{text}\n"
    shown = re.findall(r"^\| llada-8b-instruct \| 1 \| `([\w-]+)` \| 1 \|", text, re.M)
    assert sorted(shown) == sorted(cache_lib.METHODS)

    written = list(folder.iterdir())
    assert len(written) <= 8 and all(re.fullmatch(r"[\w.-]+", path.name) for path in written)
    assert all(path.is_file() and path.stat().st_size < 16 * 2**20 for path in written)
