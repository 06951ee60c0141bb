"""Runs of one configuration of `bench.py`: compiled ahead of time, timed in turns, traced."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_report
import jax
import numpy as np
from bench_report import Case, Row, Times
from roofline import Ceilings, measure_ceilings

from dlm_jax import compilation
from dlm_jax.cache import CacheMethod
from dlm_jax.cache.base import StepShape
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import GenerateOutput, diffusion_generate
from dlm_jax.decoding.progress import unfinished
from dlm_jax.decoding.start import start
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.decoding.step import step
from dlm_jax.models import Transformer
from dlm_jax.typing import Array, Params

FIRST_FORWARDS = 8
"""Of the run that warms a program up."""
SHORT_RUNS = 3
"""Runs of one forward, and of none, in each round."""
ALL = np.iinfo(np.int32).max
"""As many forwards as a generation needs."""

Run = Callable[..., tuple[GenerateOutput, float]]
"""A compiled generation, of at most so many forwards if told: its result and its seconds."""


class Inputs(NamedTuple):
    """What all cases of a configuration share."""

    model: Transformer
    params: Params
    """Or their shapes, where nothing is to be run."""
    prompt_BP: np.ndarray
    key: Array


class Program(NamedTuple):
    """A compiled generation."""

    run: Run
    facts: Row
    """What compiling it took, and the memory that it needs."""


def compile_ahead(inputs: Inputs, decode: DecodeConfig, method: CacheMethod) -> Program:
    """A generation, compiled from shapes; it can be run if `inputs` holds parameters."""
    model, params, prompt_BP, key = inputs

    def generate(params: Params, prompt_BP: Array, key: Array, limit: Array) -> GenerateOutput:
        limited = dataclasses.replace(decode, max_forwards=limit)
        return diffusion_generate(params, model, prompt_BP, key=key, decode=limited, cache=method)

    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        start = time.perf_counter()
        lowered = jax.jit(generate).lower(params, prompt_BP, key, np.int32(1))
        program = lowered.compile(compilation.options())
        seconds = time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_listener(listen)

    def run(limit: int = ALL) -> tuple[GenerateOutput, float]:
        start = time.perf_counter()
        out = jax.block_until_ready(program(params, prompt_BP, key, np.int32(limit)))
        return out, time.perf_counter() - start

    facts = dict(compile_s=seconds, compile_cached=bool(hits))
    return Program(run, facts | compilation.memory_mib(program))


def process_peak_mib() -> float | None:
    """The most that the process has had on the device so far, where the backend counts it."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**20


def measure(
    cases: Sequence[Case],
    inputs: Inputs,
    repeat: int,
    ceilings: Ceilings | None,
    forwards: int = ALL,
) -> Iterator[Row]:
    """Compiles all cases of a configuration, warms them up and times them in turns.

    Ceilings that are not given are measured in every round, and the best are taken: on a shared
    machine they change as much as anything else. Generations end after so many forwards.
    """
    batch, prompt = inputs.prompt_BP.shape
    where = f"batch {batch}, prompt {prompt}, {cases[0].decode.gen_length} tokens"
    programs = []
    for i, case in enumerate(cases, 1):
        program = compile_ahead(inputs, case.decode, case.method)
        _, first = program.run(FIRST_FORWARDS)
        programs.append(program)
        note(
            f"{where}, {i}/{len(cases)} {case.label}: compiled in "
            f"{program.facts['compile_s']:.1f} s, {FIRST_FORWARDS} forwards in {first:.2f} s"
        )
    times = [Times([], [], []) for _ in cases]
    outs: list[GenerateOutput] = []
    seen = [ceilings] if ceilings else []
    for i in range(repeat):
        outs = []
        if ceilings is None:
            seen.append(measure_ceilings(jax.tree.leaves(inputs.params)[0].dtype))
        for (run, _), (whole, one, none) in zip(programs, times, strict=True):
            out, seconds = run(forwards)
            outs.append(jax.device_get(out))
            whole.append(seconds)
            for _ in range(SHORT_RUNS):
                one.append(run(1)[1])
                none.append(run(0)[1])
        note(f"{where}, round {i + 1}/{repeat} done")
    best = Ceilings(*map(max, zip(*seen, strict=True)))
    for case, program, out, spent in zip(cases, programs, outs, times, strict=True):
        row = bench_report.describe(case, out, spent, best) | program.facts
        yield row | dict(process_peak_mib=process_peak_mib())


def dry_run(cases: Sequence[Case], inputs: Inputs, ceilings: Ceilings) -> Iterator[Row]:
    """Compiles all cases of a configuration and says what they need."""
    batch, prompt = inputs.prompt_BP.shape
    for i, case in enumerate(cases, 1):
        program = compile_ahead(inputs, case.decode, case.method)
        note(
            f"batch {batch}, prompt {prompt}, {case.decode.gen_length} tokens, "
            f"{i}/{len(cases)} {case.label}: compiled in {program.facts['compile_s']:.1f} s"
        )
        yield bench_report.count(case, batch, ceilings) | program.facts


class Traced(NamedTuple):
    """A step of which there is a trace."""

    folder: Path
    shape: int
    """Which of the method's step shapes it has."""


def profile(case: Case, inputs: Inputs, directory: Path) -> Iterator[Traced]:
    """Writes profiler traces of a full forward and of a cached step, one folder each.

    Neither is the first run of its program. The program stands beside the trace in `step.hlo.txt`:
    its operations are what the trace names, and it says what they were made from. The steps are
    those that generations make first and repeat, each compiled by itself.
    """
    model, params, prompt_BP, key = inputs

    def begin() -> tuple[Setup, DecodeState]:
        return start(params, model, prompt_BP, key=key, decode=case.decode, cache=case.method)

    @functools.partial(jax.jit, static_argnames="shape", donate_argnums=1)
    def one_step(setup: Setup, state: DecodeState, shape: StepShape) -> DecodeState:
        return step(setup, state, shape)

    setup, state = begin()
    shapes, programs, full = case.method.step_shapes(setup.geo), {}, int(state.shape)

    def run(state: DecodeState) -> DecodeState:
        shape = int(state.shape)
        if shape not in programs:
            programs[shape] = one_step.lower(setup, state, shapes[shape]).compile()
        return jax.block_until_ready(programs[shape](setup, state))

    def trace(state: DecodeState, name: str) -> Traced:
        folder, shape = directory / name, int(state.shape)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.hlo.txt").write_text(programs[shape].as_text(), encoding="utf-8")
        with jax.profiler.trace(folder):
            run(state)
        note(
            f"traced a {name} step of {case.label}, batch {len(prompt_BP)}, "
            f"{shapes[shape].capacity} positions a row: python scripts/trace_summary.py {folder}"
        )
        return Traced(folder, shape)

    state = run(state)
    yield trace(begin()[1], "full")
    while len(shapes) > 1 and unfinished(setup, state):
        if int(state.shape) in programs and int(state.shape) != full:
            yield trace(state, "cached")
            return
        state = run(state)
    note(f"{case.label} repeats no cached step here, so none was traced")


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
