"""What must hold on the device at hand: for `gpu_suite.py`, and for `pytest -m gpu`.

Recorded runs of the originals in float32; rows of a batch in bfloat16, which must not depend on one
another; and fused attention against XLA's own. Programs are small, so that most of the time goes
into compiling them, several at once.
"""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import random_weights
import replay

from dlm_jax import cache as cache_lib
from dlm_jax import models
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import GenerateOutput, diffusion_generate
from dlm_jax.models import Transformer
from dlm_jax.models import attention as attention_lib
from dlm_jax.typing import Params

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
CASES = {
    "none": "d2fw-vanilla-dream-g24-b8-n1-bs3-pad",
    "dkv-decode": "llada-dkv-decode-c4-b16-s24-bs3",
    "dkv-greedy": "llada-dkv-greedy-w2-c4-b16-s16-bs2",
    "dkv-prefill": "dream-dkv-prefill-entropy-pad-s20-bs3",
    "dkv-pd": "dream-dkv-pd-un-c4-entropy-pad-s24-bs2",
    "prefix": "d2fw-prefix-llada-g24-b8-bs3-pad",
    "dual": "fastdllm-llada-dual-fixed-g48b16s15",
    "dllm": "dllm-dream-g24-b12-kp8-kr2-rou0.25-bs2-pad",
    "d2cache": "d2cache-llada-g32-b16-p0.1-k8-w4-factor3.0-bs2-row0-mended",
}
"""A recorded run of each cache: both families, batches, padding."""
HEADS = attention_lib.Heads(queries=32, kv=32, width=128)
"""Of LLaDA-8B, whose attention is compared."""
PROMPT, DECODE = 48, DecodeConfig(gen_length=16, block_length=8, steps=16)
"""Of the runs in which rows are compared."""
ROUNDING = 0.1
"""How far a probability can be off in bfloat16 where another program computes it, relative."""
PEAKED = 4.0
"""Factor of the random head: probabilities are then far enough apart to tell rounding from more."""
THREADS = 8


class Check(NamedTuple):
    """Whether something held."""

    outcome: str
    """`passed`, `failed` or `skipped`."""
    detail: str = ""
    """What differs, or what else there is to know."""


def all_checks(
    recorded: Iterable[str] = tuple(CASES), beside: Iterable[str] = tuple(CASES)
) -> dict[str, Callable[[], Check]]:
    """All checks by what they are about.

    Args:
      recorded: caches of which a recorded run is replayed.
      beside: caches with which rows are compared.
    """
    return {
        "fused attention": attention,
        **{f"recorded run, {cache}": functools.partial(golden, cache) for cache in recorded},
        **{f"rows, {cache}": functools.partial(rows, cache) for cache in beside},
    }


def together(checks: Mapping[str, Callable[[], Check]]) -> Iterator[tuple[str, Check]]:
    """The checks as they come to an end; several compile at once. One that raises has failed."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        names = {pool.submit(check): name for name, check in checks.items()}
        for done in concurrent.futures.as_completed(names):
            error = done.exception()
            failed = Check("failed", f"{type(error).__name__}: {error}")
            yield names[done], failed if error else done.result()


# --- what is checked ------------------------------------------------------------------------------


def golden(cache: str) -> Check:
    """Tokens, history and computed sets of a recorded run, in float32."""
    text = (GOLDEN / "cases" / f"{CASES[cache]}.json").read_text(encoding="utf-8")
    outcome, detail = replay.replay(json.loads(text), GOLDEN / "checkpoints")
    return Check("passed" if outcome == "passed" else "failed", detail)


def rows(cache: str) -> Check:
    """A row beside others, in bfloat16.

    In the same program it must be the same bit for bit, whoever is beside it and wherever it is.
    Alone it runs in another program, which rounds differently: there it may choose otherwise where
    rounding decides.
    """
    model, params = _network()
    method = cache_lib.make(cache)
    decode = DECODE.for_cache(method)
    prompt = np.random.default_rng(0).integers(0, model.config.mask_id, (3, PROMPT), np.int32)
    keys = jax.random.split(jax.random.key(0), 3)

    def run(*chosen: int) -> GenerateOutput:
        some = np.array(chosen)
        out = diffusion_generate(
            params, model, prompt[some], key=keys[some], decode=decode, cache=method
        )
        return jax.device_get(out)

    beside, moved, alone = Line.of(run(0, 1), 0), Line.of(run(2, 0), 1), Line.of(run(0), 0)
    if not all(map(np.array_equal, beside, moved)):
        found, more = "beside another row and in another place it differs", ""
    else:
        found, more = part(beside, alone)
    return Check("failed" if found else "passed", found or more)


def attention() -> Check:
    """Fused attention against XLA's own, on this device."""
    if jax.default_backend() != "gpu":
        return Check("skipped", "only GPUs have it")
    reason = attention_lib.disagreement(HEADS, "bfloat16")
    return Check("failed" if reason else "passed", reason)


# --- comparing rows -------------------------------------------------------------------------------


class Line(NamedTuple):
    """What became of one row."""

    tokens_L: np.ndarray
    committed_at_L: np.ndarray
    confidence_L: np.ndarray

    @classmethod
    def of(cls, out: GenerateOutput, row: int) -> "Line":
        """A row of a result."""
        return cls(*(np.asarray(x[row]) for x in (out.tokens, out.committed_at, out.confidence)))


def part(one: Line, other: Line) -> tuple[str, str]:
    """Compares two runs of a row up to where they part.

    Returns:
      A difference that rounding does not explain, or the empty string; and what else to know.
    """
    for step in range(int(one.committed_at_L.max()) + 1):
        (here, there) = (np.flatnonzero(line.committed_at_L == step) for line in (one, other))
        sure = [np.sort(line.confidence_L[at]) for line, at in ((one, here), (other, there))]
        if len(here) != len(there) or not np.allclose(*sure, rtol=ROUNDING, atol=0):
            return f"alone it differs from step {step} on, by more than rounding", ""
        same = np.array_equal(here, there)
        if not same or not np.array_equal(one.tokens_L[here], other.tokens_L[there]):
            return "", f"alone it chooses otherwise from step {step} on, where rounding decides"
    return "", ""


@functools.cache
def _network() -> tuple[Transformer, Params]:
    """A small network in bfloat16, of the shape of a real one."""
    ids = dict(vocab_size=2048, mask_id=2047, eos_id=2046, pad_id=2046)
    config = dataclasses.replace(models.PRESETS["bench-60m"], num_layers=2, **ids)
    params = random_weights.make(config, jnp.dtype("bfloat16"), jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"] * jnp.bfloat16(PEAKED)
    return Transformer(config), params
