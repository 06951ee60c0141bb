"""docs/performance.md: its commands can work, and its columns are the benchmark's."""

import re

import bench
import bench_report
import gpu_plan
import gpu_program
import gpu_suite
import jax.numpy as jnp
import measure_convert_memory
import random_weights
import trace_summary
from documents import argv_of, page

PAGE = page("docs/performance.md")


def test_commands_can_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = PAGE.commands(run=False)
    assert len(commands) > 7 and not PAGE.commands()
    for command in commands:
        script = command.split()[1].removeprefix("scripts/")
        argv = argv_of(command, f"python scripts/{script}")
        if script == "bench.py":
            args = bench.parse(argv)
            config, _ = bench.open_config(args.preset)
            assert bench.plan(args, config, random_weights.shapes(config, jnp.dtype("float32")))
        elif script == "gpu_suite.py":
            assert gpu_suite.parse(argv).out
        elif script == "gpu_program.py":
            args = gpu_program.parse(argv)
            assert bench.make_caches(args.caches) and bench.open_config(args.preset)
        elif script == "measure_convert_memory.py":
            assert measure_convert_memory.parse(argv).verify
        else:
            assert script == "trace_summary.py"
            assert trace_summary.main([*argv, "--top", "1"]) == 2  # there is no such folder


def test_groups_of_the_suite_are_listed():
    told = re.findall(r"^\| `(\w+)` \|", PAGE.section("On a GPU"), re.M)
    assert told == list(gpu_plan.GROUPS)


def test_columns_are_those_of_the_benchmark():
    told = set(re.findall(r"^\| `([^`]+)` \| `(\w+)`", PAGE.section("What the columns mean"), re.M))
    settings = {"cache", "batch", "prompt_length", "gen_length"}
    assert told == {(name, key) for name, key, _ in bench_report.MEASURED if key not in settings}


def test_the_contents_are_the_headings():
    (contents,) = re.findall(r"^((?:- \[.*\n)+)", PAGE.prose, re.M)
    listed = re.findall(r"\[(.*)\]", contents)
    assert listed == re.findall(r"^## (.*)$", PAGE.prose, re.M)
