"""docs/evaluation.md: its code runs, its commands can work, and its tables are the library's."""

import dataclasses
import functools
import inspect
import re
import shlex
from pathlib import Path

import lm_eval.tasks
import pytest
from documents import Block, names, options_of, page, run_snippets
from lm_eval.tasks import TaskManager

from dlm_jax import checkpoint, evaluate, generate, models, sharding
from dlm_jax.cache import METHODS, CacheMethod
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.eval import arguments, defaults, evaluation, report, tasks
from dlm_jax.eval.arguments import Settings
from dlm_jax.eval.defaults import Recipe
from dlm_jax.eval.model import DiffusionLM

PAGE = page("docs/evaluation.md")
all_commands, section, table = PAGE.commands, PAGE.section, PAGE.table
PROGRAM = "python -m dlm_jax.evaluate "
GROUPS = {
    "bbh": "bbh_cot_fewshot_navigate",
    "minerva_math": "minerva_math_algebra",
    "mmlu_generative": "mmlu_anatomy_generative",
    "mmlu_pro": "mmlu_pro_law",
}
"""Groups of lm-evaluation-harness, each with a task in it."""

Plan = tuple[DecodeConfig, CacheMethod]


@functools.cache
def parsed(command: str):
    """The options of a command, which may be started by another program."""
    launcher, found, options = command.partition(PROGRAM)
    assert found and (not launcher or launcher.split()[0] in ("srun", "mpirun"))
    args = evaluate.parse(shlex.split(options))
    evaluate.check(args)
    return args


@functools.cache
def plans(command: str) -> list[tuple[str, Plan]]:
    """How the contenders of a command would decode its tasks, by the presets of the models."""
    args = parsed(command)
    config = models.PRESETS.get(args.model.lower())
    if config is None:
        config = checkpoint.inspect(checkpoint.find(args.model)).config
    variant = defaults.variant(args.variant, args.model, None)
    found = []
    for contender in evaluation._contenders(args, None):
        arguments.estimate(config, contender.settings)
        recipe = Recipe(config, variant, contender.settings)
        for name in args.tasks:
            task = GROUPS.get(name, name)
            # What the task itself asks for is not known here, so nothing may hang on it.
            assert "gen_length" in contender.settings.decode or task in (
                *defaults.GEN_LENGTHS,
                *defaults.OWN,
                *("arc_easy", "hellaswag"),
            )
            found.append((contender.label, recipe.plan(task, {"gen_length": 300})))
    return found


@pytest.mark.parametrize("command", all_commands(run=None), ids=lambda text: text[-70:])
def test_command_can_work(command):
    args = parsed(command)
    if args.mesh is not None:
        assert sharding.parse_mesh(args.mesh, 8)
    assert all(decode.gen_length != 300 or args.mc_num or "estimator" in command
               for _, (decode, _) in plans(command))  # fmt: skip


def test_the_blocks_are_marked_and_few_run():
    assert len(all_commands(run=None)) > 80
    assert {block.language for block in PAGE.blocks} == {"bash", "python"}
    assert all("--limit 2 " in command for command in all_commands(run=True))
    with pytest.raises(KeyError):
        Block(None, None, "bash", 'A="1"\npython $B').commands()


@pytest.mark.parametrize("command", all_commands(run=True), ids=lambda text: text[27:])
def test_command(command, capsys):
    assert evaluate.main(shlex.split(command.removeprefix(PROGRAM))) == 0
    out, _ = capsys.readouterr()
    head, _, *lines = [line for line in out.splitlines() if line.startswith("|")]
    labels = [line.split("|")[1].strip().removesuffix(" *") for line in lines]
    assert labels == [contender.label for contender in parsed(command).compare]
    _, score, *columns = [title.strip() for title in head.split("|")[1:-1]]
    assert score == "exact_match (first-number)"
    told = [names(cells[0]) for cells in table("The first table", "column")]
    assert [title for cell in told for title in cell] == ["cache", *columns]
    assert columns == [title for _, title, _ in report._COLUMNS]
    for note in re.findall(r"^\* .*$", out, re.M):
        assert "unlike none" in note or "compared with none" in note


def test_snippets_work_one_after_the_other():
    _, lines = run_snippets(PAGE.snippets)
    score, speed = map(float, lines)
    assert 0 <= score <= 1 and speed > 0


# --- the papers' tables ---------------------------------------------------------------------------


def paper(title: str) -> list[tuple[str, str, Plan]]:
    """Command, label and plan of all that is said of a paper."""
    return [(c, *plan) for c in all_commands(run=None, within=section(title)) for plan in plans(c)]


def test_what_is_decoded_otherwise_has_a_reference():
    """Where the page says that a `none` is decoded in the same way, it is."""
    cases = [
        ("d2Cache", "d2cache", "+sigma=10"),
        ("dKV-Cache", "dkv-greedy", "none:alg=random"),
    ]
    for title, cache, reference in cases:
        compared = 0
        for command in all_commands(run=None, within=section(title)):
            found = plans(command)
            expected = [plan[0] for label, plan in found if label.endswith(reference)]
            if expected:
                given = [plan[0] for _, plan in found if plan[1].name == cache]
                assert given and all(decode in expected for decode in given)
                compared += 1
        assert compared >= 5
    assert "its reference is `none:alg=random`" in " ".join(PAGE.prose.split())


def test_commands_of_d2cache():
    for _, _, (decode, method) in paper("d2Cache"):
        assert decode.pace == "fixed" and decode.alg == "maskgit_plus"
        assert decode.top_p in (None, 0.9)
        if method.name == "prefix":
            assert decode.block_length == 32
        if method.name == "d2cache" and decode.strategy.name == "surest":
            assert decode.block_length == decode.gen_length
            assert decode.sigma == method.sigma and method.inflate_w == 0
    periods = {
        (method.kp, method.kr)
        for command, _, (_, method) in paper("d2Cache")
        if method.name == "dllm" and "Dream-v0-Instruct-7B --tasks humaneval" in command
    }
    assert periods == {defaults.PERIODS["humaneval"][3]}


def test_commands_of_fast_dllm():
    for command, label, (decode, method) in paper("Fast-dLLM"):
        dream = "Dream" in command
        assert report.fields(decode).get("threshold", 1.0) >= 0.5
        assert decode.strategy.adaptive or decode.pace == ("timestep" if dream else "fixed")
        if method.name != "none" and "block_length=" not in label:
            assert decode.block_length == 32
            assert method.block_start == ("first-column" if dream else "shifted")
        elif dream:
            assert decode.block_length == decode.gen_length
            assert decode.steps in (None, decode.gen_length // 32)
        assert decode.top_p is None


def test_commands_of_dkv_cache():
    for command, _, (decode, method) in paper("dKV-Cache"):
        dream = "Dream" in command
        random = decode.strategy.name == "random"
        assert random or decode.alg == ("entropy" if dream else "maskgit_plus")
        assert not (random and dream) and random >= (method.name == "dkv-greedy")
        steps = {"dkv-decode": 4 if dream else 8, "dkv-greedy": 2, "dkv-pd": 4}
        if method.name in steps:
            assert method.cache_steps == steps[method.name]
        share = (decode.steps or decode.gen_length) / decode.gen_length
        assert share in ({1, 0.5, 0.25} if dream else {1, 0.625, 0.5})


def test_commands_of_dllm_cache():
    for command, _, (decode, method) in paper("dLLM-Cache"):
        assert decode.temperature == (0.2 if "Dream" in command else None)
        assert decode.alg == ("entropy" if "Dream" in command else "maskgit_plus")
        assert method.name == "none" or method.rou == 0.25
    assert len(paper("dLLM-Cache")) == 2 * 25


def test_tasks_of_the_commands_exist(caplog):
    folder = Path(str(lm_eval.tasks.__file__)).parent
    wanted = ["arc", "bbh/cot_fewshot", "benchmarks", "gpqa", "gsm8k", "hellaswag", "longbench"]
    wanted += ["minerva_math", "mmlu/generative", "mmlu_pro"]
    with caplog.at_level("ERROR"):
        manager = TaskManager(
            include_path=[*(folder / name for name in wanted), tasks.PATH], include_defaults=False
        )
    used = {name for command in all_commands(run=None) for name in parsed(command).tasks}
    assert used <= set(manager.all_tasks)
    assert set(GROUPS) <= set(manager.all_groups)
    assert set(GROUPS.values()) <= set(manager.all_subtasks)
    assert not (used - set(GROUPS)) & set(manager.all_groups)


# --- tables and words -----------------------------------------------------------------------------


def test_tasks():
    told = {}
    for cells in table("Tasks", "task"):
        told |= dict.fromkeys(names(cells[0]), cells)
    manager = TaskManager(include_path=tasks.PATH, include_defaults=False)
    assert sorted(told) == sorted(manager.all_subtasks)
    for name, cells in told.items():
        settings = manager.task_index[name].cfg
        if "num_fewshot" in settings:
            assert cells[2].split(",")[0] == str(settings["num_fewshot"])
        if name != "humaneval_64" and "until" in settings.get("generation_kwargs", {}):
            until = [text.encode("unicode_escape").decode() for text in names(cells[4])]
            until = [text.replace(r"\\|", "|").replace(r"\\n", "\n") for text in until]
            if not name.endswith("_64_instruct"):
                assert until == settings["generation_kwargs"]["until"]


def test_settings():
    rows = {names(cells[0])[0]: cells[1] for cells in table("Settings", "setting")}
    lengths = {}
    for part in re.split("; ", rows["gen_length"])[:2]:
        lengths |= dict.fromkeys(names(part), int(part.split()[0]))
    assert lengths == defaults.GEN_LENGTHS
    assert rows["gen_length"].endswith(f"or {defaults.GEN_LENGTH}")
    assert rows["block_length"].startswith(f"{defaults.BLOCK_LENGTH} for")
    config = models.PRESETS["llada-8b-instruct"]
    plan = Recipe(config, "inst", Settings(cache="d2cache")).plan("gsm8k", {})
    method = dataclasses.asdict(plan[1])
    expected = {name: f"{value:g}" for name, value in method.items()}
    assert dict(pair.split("=") for pair in names(rows["d2cache"])) == expected
    for cells in table("Settings", "`kp`, `kr`"):
        pairs = tuple(tuple(map(int, cell.split(", "))) for cell in cells[1:])
        for name in names(cells[0]) or ["other"]:
            assert pairs == defaults.PERIODS.get(name, (defaults._OTHER_PERIODS,) * 4)
    told = {name for cells in table("Settings", "`kp`, `kr`") for name in names(cells[0])}
    assert told == set(defaults.PERIODS)
    own = defaults.OWN["tiny_math"]
    assert f"{own['gen_length']} tokens in blocks of {own['block_length']}" in section("Settings")


def test_every_option_exists_and_those_of_evaluation_are_told():
    known = [options_of(command.parse) for command in (evaluate, generate)]
    told = set(PAGE.options)
    told |= {option.replace("--no-", "--") for option in told}
    launchers = {"--ntasks-per-node", "--gpus-per-node"}
    assert told - launchers <= known[0]
    assert known[0] - known[1] <= told


def test_arguments_of_the_model_class_are_told():
    said = set(re.findall(r"\w+", " ".join(names(PAGE.prose))))
    parameters = set(inspect.signature(DiffusionLM).parameters)
    objects = {"checkpoint", "token_freq", "batch_size", "device", "max_batch_size", "settings"}
    objects |= {"named"}
    assert parameters - objects <= said
    assert set(METHODS) <= set(re.findall(r"[\w-]+", PAGE.text))
