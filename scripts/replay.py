"""Replays recorded runs of the original implementations and compares them step by step.

    python scripts/replay.py --checkpoints tests/golden/checkpoints tests/golden/cases
    python scripts/replay.py --checkpoints DIR CASE.json DIR ...

A case holds a prompt, the arguments in the original's own vocabulary, and what the original did:
final tokens, the canvas after every model forward, and the positions it computed in every forward.
This script translates the arguments (`translate`, the only place that knows those vocabularies),
runs the public `dlm_jax.diffusion_generate` in float32, and prints per case `pass`, or where the
first difference is.

Exit code 0 only if every case passed; 1 if one failed or is not supported yet; 2 on bad input.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dlm_jax
from dlm_jax.cache import CacheMethod, NoCache
from dlm_jax.config import DecodeConfig
from dlm_jax.models import Config
from dlm_jax.typing import Params

AS_RECORDED = dict(ban_mask=False, lockstep=True)
"""The originals do not ban the mask token, and let a batch leave a block together."""


class Unsupported(Exception):
    """A case asks for something that dlm_jax does not do (yet); the message says what."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A case in this library's vocabulary."""

    decode: DecodeConfig
    cache: CacheMethod


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoints", type=Path, required=True, metavar="DIR")
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE.json|DIR")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    counts = dict(passed=0, failed=0, unsupported=0)
    try:
        cases = {path: _read(path) for path in _case_files(args.cases)}
        for path, case in cases.items():
            outcome, detail = replay(case, args.checkpoints)
            counts[outcome] += 1
            print(
                f"{path.stem}: {'pass' if outcome == 'passed' else f'{outcome}: {detail}'}",
                flush=True,
            )
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0 if counts["passed"] == len(cases) else 1


def replay(case: dict[str, Any], checkpoints: Path) -> tuple[str, str]:
    """Runs one case; returns `passed`, `failed` or `unsupported`, and why."""
    model, params = _load(checkpoints / case["model"])
    mask = case["prompt_mask"]
    try:
        run = translate(case, model.config)
        out = dlm_jax.diffusion_generate(
            params,
            model,
            np.asarray(case["prompt"], np.int32),
            None if mask is None else np.asarray(mask, bool),
            key=jax.random.key(0),
            decode=run.decode,
            cache=run.cache,
            record=("computed", "history"),
        )
    except Unsupported as reason:
        return "unsupported", str(reason)
    except (TypeError, ValueError) as error:
        return "failed", " ".join(str(error).split())
    difference = compare(case, jax.device_get(out))
    return ("failed", difference) if difference else ("passed", "")


# --- Translation ---------------------------------------------------------------------------------


def translate(case: dict[str, Any], config: Config) -> Run:
    """A case's arguments as a decoding configuration and a cache method.

    Raises:
      Unsupported: naming the entry point, or the first argument, that has no counterpart.
      ValueError: the case lacks an argument, or one has an impossible value.
    """
    entry = case["source"]["entry"]
    if entry not in _ENTRIES:
        raise Unsupported(f"entry point {entry}")
    read = _ENTRIES[entry]
    args = case["args"]
    unknown = sorted(set(args) - _ARGUMENTS[read] - {"mask_id", "mask_token_id", "env"})
    if unknown:
        raise Unsupported(f"{unknown[0]}={args[unknown[0]]}")
    for name, value in (args | args.get("env", {})).items():
        if name.lower() in ("mask_id", "mask_token_id"):
            _only(args | {name: value}, name, (config.mask_id, None))
    try:
        # Noise is not recorded.
        _only(args, "temperature", (0.0,))
        return read(args)
    except KeyError as error:
        raise ValueError(f"argument {error} of {entry} is missing") from error


def _llada_loop(args: dict[str, Any]) -> Run:
    """`generate` of dKV-Cache's plain LLaDA loop."""
    _only(args, "enable_cache", (None, False))
    _only(args, "cfg_scale", (0.0,))
    return Run(
        DecodeConfig(
            **AS_RECORDED,
            gen_length=args["gen_length"],
            block_length=args["block_length"],
            steps=args["steps"],
            schedule="even",
            leave_early=False,
            alg=_remasking(args),
            temperature=args["temperature"],
        ),
        NoCache(),
    )


def _fast_dllm_llada(args: dict[str, Any]) -> Run:
    """`generate` of Fast-dLLM: leaves a block when it is full."""
    _only(args, "threshold", (None,))
    run = _llada_loop(args | dict(cfg_scale=0.0))
    return dataclasses.replace(run, decode=dataclasses.replace(run.decode, leave_early=True))


def _dream_loop(args: dict[str, Any]) -> Run:
    """`diffusion_generate` of Dream, as dKV-Cache and Fast-dLLM ship it, without a cache."""
    _only(args, "use_cache", (None, False))
    _only(args, "num_return_sequences", (1,))
    _only(args, "alg_temp", (None, 0.0))
    # Fast-dLLM's threshold is only read by its algorithm "confidence_threshold".
    _only(args, "alg", ("maskgit_plus", "topk_margin", "entropy"))
    return Run(
        DecodeConfig(
            **AS_RECORDED,
            gen_length=args["max_new_tokens"],
            steps=args["steps"],
            schedule="timestep",
            eps=args["eps"],
            leave_early=False,
            alg=args["alg"],
            temperature=args["temperature"],
            top_p=args["top_p"],
            top_k=args["top_k"],
            infill=True,
        ),
        NoCache(),
    )


def _d2_framework(args: dict[str, Any]) -> Run:
    """The `vanilla` strategy of the d2Cache framework."""
    _only(args, "strategy", ("vanilla",))
    _only(args, "cache", (None,))
    for name in ("sigma", "gamma", "clip_alpha", "threshold", "factor"):
        _only(args, name, (None,))
    for name in ("debias", "stop_until_eos"):
        _only(args, name, (False,))
    return Run(
        DecodeConfig(
            **AS_RECORDED,
            gen_length=args["gen_length"],
            block_length=args["block_length"],
            schedule="fixed",
            num_transfer_tokens=args["num_transfer_tokens"],
            alg=args["alg"],
            temperature=args["temperature"],
            top_p=args["top_p"],
            top_k=args["top_k"],
        ),
        NoCache(),
    )


_ENTRIES: dict[str, Callable[[dict[str, Any]], Run]] = {
    # dKV-Cache
    "generation_utils.llada_generate.generate": _llada_loop,
    "generation_utils.dream_generation_utils.DreamGenerationMixin.diffusion_generate": _dream_loop,
    # Fast-dLLM
    "llada.generate.generate": _fast_dllm_llada,
    "dream.model.generation_utils.DreamGenerationMixin.diffusion_generate": _dream_loop,
    # d2Cache framework
    "src.generation.vanilla.vanilla_generate": _d2_framework,
}
"""What a case's `source.entry` names -> how its arguments are read."""

_HUGGING_FACE = {"alg", "alg_temp", "bos_token_id", "eos_token_id", "eps", "max_new_tokens"}
_HUGGING_FACE |= {"num_return_sequences", "output_history", "pad_token_id"}
_HUGGING_FACE |= {"return_dict_in_generate", "steps", "temperature", "top_k", "top_p"}
_ARGUMENTS: dict[Callable[[dict[str, Any]], Run], set[str]] = {
    _llada_loop: {"block_length", "cfg_scale", "enable_cache", "gen_length", "remasking", "steps"}
    | {"temperature"},
    _fast_dllm_llada: {"block_length", "gen_length", "remasking", "steps", "temperature"}
    | {"threshold"},
    _dream_loop: _HUGGING_FACE
    | {"cache_steps", "cache_type", "shift_type", "threshold", "use_cache"},
    _d2_framework: {"alg", "attn_implementation", "block_length", "cache", "clip_alpha", "debias"}
    | {"eos_token_id", "factor", "gamma", "gen_length", "num_transfer_tokens", "output_probs"}
    | {"output_hidden_states", "pad_token_id", "sigma", "stop_until_eos", "strategy"}
    | {"temperature", "threshold", "top_k", "top_p"},
}
"""Reader -> the arguments that it translates, or that change nothing in what is recorded.

(Special tokens other than the mask, what is returned, and what only matters with a cache.) Any
other argument makes a case unsupported.
"""


def _remasking(args: dict[str, Any]) -> str:
    _only(args, "remasking", ("low_confidence",))
    return args["remasking"]


def _only(args: dict[str, Any], name: str, values: tuple[Any, ...]) -> None:
    if args.get(name, values[0]) not in values:
        raise Unsupported(f"{name}={args[name]}")


# --- Comparison ----------------------------------------------------------------------------------


def compare(case: dict[str, Any], out: dlm_jax.GenerateOutput) -> str:
    """The first difference between a recorded run and ours, or the empty string."""
    expected = case["expected"]
    if int(out.nfe) != expected["nfe"]:
        return f"{int(out.nfe)} model forwards, recorded {expected['nfe']}"
    for name in ("history", "computed"):
        if len(expected[name]) != expected["nfe"]:
            return f"{len(expected[name])} entries of {name} for {expected['nfe']} model forwards"
    generated = len(expected["tokens"][0]) - len(case["prompt"][0])
    for step, (canvas, computed) in enumerate(
        zip(expected["history"], expected["computed"], strict=True)
    ):
        found = _first_difference(out.history[step, :, -generated:], np.asarray(canvas))
        if found:
            return f"step {step}, {found}"
        found = _computed_difference(case, out, step, computed)
        if found:
            return f"step {step}, {found}"
    found = _first_difference(out.tokens, np.asarray(expected["tokens"]))
    return f"final tokens, {found}" if found else ""


def _first_difference(ours: np.ndarray, recorded: np.ndarray) -> str:
    if ours.shape != recorded.shape:
        return f"shape {ours.shape}, recorded {recorded.shape}"
    different = np.argwhere(ours != recorded)
    if not len(different):
        return ""
    row, position = different[0]
    return (
        f"row {row}, position {position}: token {ours[row, position]}, "
        f"recorded {recorded[row, position]}"
    )


def _computed_difference(
    case: dict[str, Any], out: dlm_jax.GenerateOutput, step: int, recorded: list | None
) -> str:
    """Compares the computed sets of one forward, for rows that still have something to fill."""
    rows, length = out.tokens.shape
    mask = case["prompt_mask"]
    if recorded is not None and len(recorded) != rows:
        return f"computed sets of {len(recorded)} rows for {rows}"
    for row, ours in enumerate(out.computed[step]):
        if not ours.any():
            # A row that is done with its block: some originals go on feeding it, some do not.
            continue
        valid = np.ones(length, bool)
        if mask is not None:
            valid[: len(mask[row])] = np.asarray(mask[row], bool)
        positions = recorded[row] if recorded is not None else None
        if positions is not None and positions != sorted(set(positions) & set(range(length))):
            return f"row {row}: the recorded positions are no ascending list of positions"
        wanted = np.ones(length, bool)
        if positions is not None:
            wanted = np.isin(np.arange(length), positions)
        different = np.flatnonzero(ours != (wanted & valid))
        if len(different):
            verb = "computed" if ours[different[0]] else "not computed"
            return f"row {row}, position {different[0]}: {verb}, unlike the recorded run"
    return ""


# --- Files ---------------------------------------------------------------------------------------


def _case_files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.json"))
            if not found:
                raise ValueError(f"{path} holds no *.json; give a folder of cases.")
            yield from found
        else:
            yield path


def _read(path: Path) -> dict[str, Any]:
    try:
        case = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a recorded case.") from error
    missing = {"name", "source", "model", "prompt", "prompt_mask", "args", "expected"} - set(case)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; give a recorded case.")
    missing = {"tokens", "history", "computed", "nfe"} - set(case["expected"])
    if missing:
        raise ValueError(f"{path}: expected lacks {', '.join(sorted(missing))}.")
    return case


@functools.cache
def _load(path: Path) -> tuple[dlm_jax.Transformer, Params]:
    checkpoint = dlm_jax.load(path, dtype="float32")
    return checkpoint.model, checkpoint.params


if __name__ == "__main__":
    sys.exit(main())
