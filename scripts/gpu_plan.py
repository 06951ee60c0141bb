"""What `gpu_suite.py` runs, the most valuable first, and how long each stage may take.

Nothing here is imported that takes long: the process that watches over the stages has no JAX.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

GROUPS = {
    "device": "the card, versions, what it can do at best",
    "checks": "correctness on the device",
    "dual": "LLaDA-8B with `dual` and `none` at batch 1, with traces of both steps of `dual`",
    "caches": "every cache at batch 1, on a part of the layers",
    "batches": "batch 8 and 32",
    "dream": "Dream-7B",
    "options": "options of the compiler, and the size of a turn",
    "memory": "peak memory of a process that does one thing",
}
"""Groups of stages, as `--only` names them, in their order."""

SHAPES = {
    "dkv-greedy": 2,
    "dkv-prefill": 2,
    "prefix": 6,
    "dllm": 4,
    "d2cache": 6,
    "dkv-decode": 6,
    "dkv-pd": 6,
}
"""Caches besides `none` and `dual`, and about how many step shapes are compiled for each."""
OPTIONS = {
    "nothing": "",
    "command buffers around loops": "--xla_gpu_enable_command_buffer=+WHILE",
    "no autotuning": "--xla_gpu_autotune_level=0",
    "autotuning level 2": "--xla_gpu_autotune_level=2",
}
"""Flags of XLA to try; every one takes a process of its own."""
POSITIONS = (1024, 4096, 8192)
"""Positions of a turn to try, beside those of `dlm_jax/decoding/turns.py`."""

START_S, WEIGHTS_S, SHAPE_S = 12.0, 12.0, 0.5
"""Seconds to start a process on a GPU, to make the weights of 7B or 8B, and to compile and count a
step shape, per layer of it."""
LLADA, DREAM = "llada-8b-instruct", "dream-v0-instruct-7b"
DEPTH = {LLADA: 32, DREAM: 28}
"""Layers of each model."""

SPARE_S = 3.0
"""Left at the end to end a process and to write."""
PATIENCE_S, PATIENCE = 30.0, 3.0
"""A stage is ended after so many seconds and so many times what is expected: it hangs."""
PACE = (0.5, 4.0)
"""How much faster or slower than expected the device is taken to be, at most."""


class Own(NamedTuple):
    """What is special about a process that runs one stage only."""

    flags: str = ""
    """Flags of XLA, which a process reads once."""
    anew: bool = False
    """Whether everything is compiled anew, autotuning included."""


class Stage(NamedTuple):
    """Something to run in one go."""

    group: str
    name: str
    task: str
    """The method of `gpu_stages.Session` that runs it, and its arguments."""
    arguments: dict[str, Any]
    seconds: float
    """That it is expected to take in a process that runs already."""
    own: Own | None = None
    """None if it shares a process with others."""


class Clock:
    """How much time is left, and what it is likely to do for. All times are in seconds.

    Attributes:
      until: when it is over, in the time of `time.monotonic`.
      pace: how long stages took, over how long they were expected to.
    """

    def __init__(self, until: float) -> None:
        self.until, self.pace = until, 1.0
        self._took, self._expected = 0.0, 0.0

    @property
    def left(self) -> float:
        """What is left for stages."""
        return self.until - SPARE_S - time.monotonic()

    def fits(self, expected: float) -> bool:
        """Whether a stage can be expected to end in time."""
        return self.pace * expected <= self.left

    def limit(self, expected: float) -> float:
        """How long a stage may take."""
        return max(0.0, min(self.left, PATIENCE_S + PATIENCE * max(1.0, self.pace) * expected))

    def learn(self, expected: float, took: float) -> None:
        """Takes in how long a stage took that was not cut short."""
        self._took += took
        self._expected += expected
        self.pace = min(max(self._took / self._expected, PACE[0]), PACE[1])


def plan(layers: int) -> list[Stage]:
    """All stages in their order.

    Args:
      layers: of LLaDA-8B, in those stages that compile many programs to compare them.
    """
    return [
        *_first(),
        *_caches(layers),
        *_batches(),
        *_dream(),
        *_options(layers),
        *_memory(),
    ]


def _generate(group: str, cache: str, batch: int, *, model: str = LLADA, **arguments: Any) -> Stage:
    """A stage that measures one program."""
    layers = arguments.setdefault("layers", DEPTH[model])
    compiling = SHAPE_S * layers * {"none": 1, "dual": 2, **SHAPES}[cache]
    running = 5.0 + 0.35 * batch * layers / DEPTH[model]
    return Stage(
        group,
        f"{model}, {layers} layers, {cache}, batch {batch}",
        "generate",
        dict(model=model, cache=cache, batch=batch, **arguments),
        compiling + running,
    )


def _first() -> Iterator[Stage]:
    yield Stage("device", "device", "device", {}, 5.0)
    yield Stage("checks", "recorded runs, rows, attention", "checks", {}, 75.0)
    dual = _generate("dual", "dual", 1, whole=True)
    yield dual._replace(seconds=dual.seconds + WEIGHTS_S + 10.0)
    yield _generate("dual", "none", 1)
    arguments = dict(model=LLADA, layers=DEPTH[LLADA], cache="dual")
    yield Stage("dual", "traces of both steps", "profile", arguments, 45.0)


def _caches(layers: int) -> Iterator[Stage]:
    for cache in ("none", "dual", *SHAPES):
        yield _generate("caches", cache, 1, layers=layers)


def _batches() -> Iterator[Stage]:
    for batch in (8, 32):
        for cache in ("dual", "none"):
            yield _generate("batches", cache, batch)


def _dream() -> Iterator[Stage]:
    dual = _generate("dream", "dual", 1, model=DREAM)
    yield dual._replace(seconds=dual.seconds + WEIGHTS_S)
    yield _generate("dream", "none", 1, model=DREAM)


def _options(layers: int) -> Iterator[Stage]:
    """Each beside the same program without it, in a process that is as new."""
    for option, flags in OPTIONS.items():
        stage = _generate("options", "dual", 1, layers=layers, option=option)
        yield stage._replace(
            name=f"option: {option}",
            seconds=stage.seconds + WEIGHTS_S * layers / DEPTH[LLADA],
            own=Own(flags, anew=True),
        )
    plain = _generate("options", "dual", 1, layers=layers, option="XLA's attention")
    arguments = plain.arguments | dict(attention="xla")
    yield plain._replace(name="option: XLA's attention", arguments=arguments, own=Own(anew=True))
    for positions in (None, *POSITIONS):
        stage = _generate("options", "none", 8, layers=layers, positions=positions)
        yield stage._replace(name=f"turns of {positions or 'the usual'} positions")


def _memory() -> Iterator[Stage]:
    for batch in (1, 8):
        stage = _generate("memory", "dual", batch)
        yield stage._replace(
            name=f"memory of {stage.name}",
            task="memory",
            seconds=stage.seconds + WEIGHTS_S,
            own=Own(),
        )
