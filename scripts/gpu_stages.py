"""What the stages of `gpu_suite.py` do, in the process that has the device."""

import contextlib
import dataclasses
import gzip
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import bench
import bench_run
import gpu_checks
import jax
import jax.numpy as jnp
import random_weights
import roofline
import trace_summary
from bench_report import Case, Row
from bench_run import Inputs
from gpu_worker import Entry
from roofline import Ceilings, Product

import dlm_jax
from dlm_jax import cache as cache_lib
from dlm_jax import files, models
from dlm_jax.decoding import turns
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.models import Config, Transformer
from dlm_jax.typing import Params

DTYPE = jnp.dtype("bfloat16")
LARGEST_TRACE = 8 * 2**20
"""Bytes; a larger trace is not kept, only what it adds up to."""
TOP = 30
"""Parts and kernels of a traced step that are told."""


class Sizes(NamedTuple):
    """How much is generated."""

    prompt: int
    decode: DecodeConfig
    forwards: int
    """Of a generation that is cut short."""
    forwards_full: int
    """The same with `none`, whose forwards are all full."""
    rounds: int
    recorded: tuple[str, ...]
    """Caches of which a recorded run is replayed."""
    beside: tuple[str, ...]
    """Caches with which rows are compared: those that do it each in their own way."""


LARGE = Sizes(
    prompt=512,
    decode=DecodeConfig(gen_length=512, block_length=32, steps=512),
    forwards=64,
    forwards_full=8,
    rounds=2,
    recorded=tuple(cache_lib.METHODS),
    beside=("dual", "dkv-decode", "dllm", "d2cache"),
)
TINY = Sizes(
    prompt=16,
    decode=DecodeConfig(gen_length=16, block_length=8, steps=16),
    forwards=10,
    forwards_full=2,
    rounds=1,
    recorded=("dual",),
    beside=("dual",),
)


class Session:
    """What the stages of a process share. Every stage is a method that gives its results."""

    def __init__(self, folder: Path, dry: bool, ceilings: Mapping[str, float] | None) -> None:
        """Finds the device.

        Args:
          folder: to write to.
          dry: models and lengths are tiny, and the device may be a CPU.
          ceilings: of the device, if they are known already.

        Raises:
          ValueError: there is no GPU; one sentence.
        """
        if not dry and jax.default_backend() != "gpu":
            raise ValueError("JAX finds no GPU here; --dry runs all stages on a CPU.")
        self.folder, self.dry = folder, dry
        self.sizes = TINY if dry else LARGE
        self.ceilings = bench.H200 if ceilings is None else Ceilings(**ceilings)
        self._loaded: tuple[Config, Params] | None = None
        self._products: dict[tuple[Config, str], list[list[Product]]] = {}

    # --- stages ---------------------------------------------------------------------------------

    def device(self) -> Iterator[Entry]:
        """The card, versions, and what it can do at best."""
        self.ceilings = roofline.measure_ceilings(DTYPE)
        device = jax.devices()[0]
        yield (
            "device",
            dict(
                device=device.device_kind,
                memory_mib=(device.memory_stats() or {}).get("bytes_limit", 0) / 2**20 or None,
                platform=device.client.platform_version,
                jax=jax.__version__,
                dlm_jax=dlm_jax.__version__,
                python=sys.version.split()[0],
                ceilings=self.ceilings._asdict(),
            ),
        )

    def checks(self) -> Iterator[Entry]:
        """Correctness on the device."""
        todo = gpu_checks.all_checks(self.sizes.recorded, self.sizes.beside)
        for name, check in gpu_checks.together(todo):
            yield "checks", dict(name=name, **check._asdict())

    def generate(
        self,
        model: str,
        layers: int,
        cache: str,
        batch: int,
        whole: bool = False,
        option: str | None = None,
        positions: int | None = None,
        attention: str = "auto",
    ) -> Iterator[Entry]:
        """Measures one program, as a row of `bench.py`.

        Args:
          model: a preset.
          layers: of it.
          cache: method, with its defaults.
          batch: rows.
          whole: all of the generation, where otherwise the first steps have to do.
          option: what is tried.
          positions: of a turn; None leaves what is usual.
          attention: whose.
        """
        case, inputs = self._case(model, layers, cache, batch)
        network = Transformer(inputs.model.config, attention=attention)
        inputs = inputs._replace(model=network)
        short = self.sizes.forwards_full if cache == "none" else self.sizes.forwards
        forwards = bench_run.ALL if whole else short
        rounds = self.sizes.rounds + whole
        with turns_of(positions):
            (row,) = bench_run.measure([case], inputs, rounds, self.ceilings, forwards)
        tried = dict(option=option, positions=positions)
        yield "rows", self._where(model, inputs) | tried | row

    def profile(self, model: str, layers: int, cache: str) -> Iterator[Entry]:
        """Where the time of a full forward and of a cached step goes, at batch 1."""
        case, inputs = self._case(model, layers, cache, 1)
        with tempfile.TemporaryDirectory() as directory:
            for folder, shape in bench_run.profile(case, inputs, Path(directory)):
                summary = trace_summary.read(folder)
                self._keep(folder)
                yield (
                    "profiles",
                    self._where(model, inputs)
                    | dict(
                        cache=cache,
                        step=folder.name,
                        ms=summary.span_ms,
                        ms_busy=summary.busy_ms,
                        ms_limit=1e3 * self.ceilings.seconds(case.steps[shape], 1),
                        operations=len(summary.operations),
                        parts=[part._asdict() for part in summary.parts[:TOP]],
                        kernels=[part._asdict() for part in summary.kernels[:TOP]],
                    ),
                )

    def memory(self, model: str, layers: int, cache: str, batch: int) -> Iterator[Entry]:
        """The peak of a process that makes weights and generates, and does nothing else."""
        case, inputs = self._case(model, layers, cache, batch)
        program = bench_run.compile_ahead(inputs, case.decode, case.method)
        program.run(self.sizes.forwards_full)
        peak = bench_run.process_peak_mib()
        entry = dict(cache=cache, batch=batch, process_peak_mib=peak)
        yield "memory", self._where(model, inputs) | entry | program.facts

    # --- what they need -------------------------------------------------------------------------

    def _case(self, model: str, layers: int, cache: str, batch: int) -> tuple[Case, Inputs]:
        """A cache method and all that it needs to run on the first layers of a model."""
        config = dataclasses.replace(models.PRESETS[model], num_layers=layers)
        if self.dry:
            config = tiny(config)
        network, method = Transformer(config), cache_lib.make(cache)
        decode = self.sizes.decode.for_cache(method)
        prompts = bench.random_prompts(config, batch, self.sizes.prompt, seed=0)
        if (config, cache) not in self._products:
            shapes = random_weights.shapes(config, DTYPE)
            products = roofline.step_products(network, shapes, prompts, decode, method)
            self._products[config, cache] = products
        case = Case(cache, method, decode, self._products[config, cache])
        return case, Inputs(network, self._params(config), prompts, jax.random.key(0))

    def _params(self, config: Config) -> Params:
        """Random weights; those that are there already, as far as they do."""
        if self._loaded is None or not begins(config, self._loaded[0]):
            self._loaded = None  # what is there makes room
            made = random_weights.make(config, DTYPE, jax.random.key(0))
            self._loaded = config, jax.block_until_ready(made)
        there, params = self._loaded
        behind = {f"blocks_{i}" for i in range(config.num_layers, there.num_layers)}
        return {name: part for name, part in params.items() if name not in behind}

    def _where(self, model: str, inputs: Inputs) -> Row:
        """What a result is of."""
        return dict(
            model=model,
            layers=inputs.model.config.num_layers,
            prompt_length=self.sizes.prompt,
            dtype=DTYPE.name,
        )

    def _keep(self, folder: Path) -> None:
        """Takes along the trace of a step and its program, if they are not too large."""
        trace = trace_summary.find_trace(folder).read_bytes()
        program = gzip.compress((folder / trace_summary.PROGRAM).read_bytes())
        for name, data in (("trace.json.gz", trace), ("hlo.txt.gz", program)):
            if len(data) < LARGEST_TRACE:
                files.write(self.folder / f"{folder.name}.{name}", data)


def begins(config: Config, other: Config) -> bool:
    """Whether a model is the first layers of another."""
    deep = dataclasses.replace(config, num_layers=other.num_layers)
    return deep == other and config.num_layers <= other.num_layers


def tiny(config: Config) -> Config:
    """The same family, small enough for a CPU to compile and run in seconds."""
    return dataclasses.replace(
        config,
        vocab_size=64,
        width=32,
        mlp_width=48,
        num_layers=2 if config.num_layers > 16 else 1,
        num_heads=4,
        num_kv_heads=max(1, 4 * config.num_kv_heads // config.num_heads),
        head_dim=8,
        mask_id=63,
        eos_id=62,
        more_eos_ids=(),
        pad_id=62,
    )


@contextlib.contextmanager
def turns_of(positions: int | None) -> Iterator[None]:
    """Wide forwards go by turns of so many positions; None leaves what is usual."""
    if positions is None:
        yield
        return
    usual = turns.POSITIONS
    # No argument of anything that is compiled, so that JAX would not know of the change.
    jax.clear_caches()
    turns.POSITIONS = positions
    try:
        yield
    finally:
        turns.POSITIONS = usual
        jax.clear_caches()
