"""Replays recorded runs of the original implementations and compares them step by step.

    python scripts/replay.py --checkpoints tests/golden/checkpoints tests/golden/cases
    python scripts/replay.py --checkpoints DIR CASE.json DIR ...

A case holds a prompt, the arguments in the original's own vocabulary, and what the original did:
final tokens, the canvas after every model forward, and the positions it computed in every forward.
This script has the arguments translated (`golden_args.translate`, in the only module that knows
those vocabularies), runs the public `dlm_jax.diffusion_generate` in float32, and prints per case
`pass`, or where the first difference is. A case may hold an answer and its log-likelihood instead
of a generation (`golden_likelihood.py`, `dlm_jax.log_likelihood`).

Exit code 0 only if every case passed; 1 if one failed or is not supported yet; 2 on bad input.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from golden_args import Unsupported, translate
from golden_likelihood import translate_likelihood

import dlm_jax
from dlm_jax import compilation
from dlm_jax.typing import Params

Generated = Any
"""A `dlm_jax.GenerateOutput` on the host: its arrays are NumPy's."""

TOLERANCE = 1e-5
"""Relative, of a log-likelihood: the recorded ones are float32 sums in another order."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--checkpoints", type=Path, required=True, metavar="DIR")
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE.json|DIR")
    compilation.add_option(parser.add_argument)
    args = parser.parse_args(argv)
    compilation.use_cache(args.compile_cache)
    jax.config.update("jax_default_matmul_precision", "highest")
    counts = dict(passed=0, failed=0, unsupported=0)
    try:
        compilation.check_devices()
        cases = {path: _read(path) for path in _case_files(args.cases)}
        for path, case in cases.items():
            outcome, detail = replay(case, args.checkpoints)
            jax.clear_caches()  # a process can only hold so many programs, and no case shares one
            counts[outcome] += 1
            print(
                f"{path.stem}: {'pass' if outcome == 'passed' else f'{outcome}: {detail}'}",
                flush=True,
            )
    except (OSError, ValueError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}."
        print(f"replay: {sentence}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0 if counts["passed"] == len(cases) else 1


def replay(case: dict[str, Any], checkpoints: Path) -> tuple[str, str]:
    """Runs one case; returns `passed`, `failed` or `unsupported`, and why."""
    model, params = _load(checkpoints / case["model"])
    try:
        difference = _replay(case, model, params)
    except Unsupported as reason:
        return "unsupported", str(reason)
    except (IndexError, TypeError, ValueError) as error:
        return "failed", " ".join(str(error).split())
    return ("failed", difference) if difference else ("passed", "")


def _replay(case: dict[str, Any], model: dlm_jax.Transformer, params: Params) -> str:
    """Runs one case; returns the first difference, or the empty string."""
    if "log_likelihood" in case["expected"]:
        return _replay_likelihood(case, model, params)
    mask = case["prompt_mask"]
    extra = ("computed_layers",) if "computed_layers" in case["expected"] else ()
    run = translate(case, model.config)
    out = dlm_jax.diffusion_generate(
        params,
        model,
        np.asarray(case["prompt"], np.int32),
        None if mask is None else np.asarray(mask, bool),
        key=jax.random.key(0),
        decode=run.decode,
        cache=run.cache,
        record=("computed", *extra, "history"),
        draws=run.draws,
        token_freq=run.token_freq,
    )
    return compare(case, jax.device_get(out))


def _replay_likelihood(case: dict[str, Any], model: dlm_jax.Transformer, params: Params) -> str:
    run = translate_likelihood(case, model.config)
    prompt, answer = (np.asarray(case[name], np.int32) for name in ("prompt", "answer"))
    out = dlm_jax.log_likelihood(params, model, prompt, answer, config=run.config, draws=run.draws)
    expected = case["expected"]
    forwards = run.config.forwards(prompt.shape[1], answer.shape[1])
    if forwards != expected["nfe"]:
        return f"{forwards} model forwards, recorded {expected['nfe']}"
    ours, recorded = np.asarray(out), np.atleast_1d(expected["log_likelihood"])
    if ours.shape != recorded.shape:
        return f"{len(ours)} rows, recorded {len(recorded)}"
    for row, (value, wanted) in enumerate(zip(ours, recorded, strict=True)):
        if not abs(value - wanted) <= TOLERANCE * abs(wanted):
            return f"row {row}: log-likelihood {value:.6f}, recorded {wanted:.6f}"
    return ""


# --- Comparison ----------------------------------------------------------------------------------


def compare(case: dict[str, Any], out: Generated) -> str:
    """The first difference between a recorded run and ours, or the empty string."""
    expected = case["expected"]
    if int(out.nfe) != expected["nfe"]:
        return f"{int(out.nfe)} model forwards, recorded {expected['nfe']}"
    for name in ("history", "computed", "computed_layers"):
        if name in expected and len(expected[name]) != expected["nfe"]:
            return f"{len(expected[name])} entries of {name} for {expected['nfe']} model forwards"
    generated = len(expected["tokens"][0]) - len(case["prompt"][0])
    for step, canvas in enumerate(expected["history"]):
        found = (
            _first_difference(out.history[step, :, -generated:], np.asarray(canvas))
            or _computed_difference(case, out, step)
            or _layers_difference(case, out, step)
        )
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


def _computed_difference(case: dict[str, Any], out: Generated, step: int) -> str:
    """Compares the computed sets of one forward, for rows that still have something to fill."""
    recorded = case["expected"]["computed"][step]
    rows, length = out.tokens.shape
    if recorded is None:
        recorded = [None] * rows
    if len(recorded) != rows:
        return f"computed sets of {len(recorded)} rows for {rows}"
    for row in _active_rows(out, step):
        found = _set_difference(out.computed[step, row], recorded[row], _valid(case, row, length))
        if found:
            return f"row {row}{found}"
    return ""


def _layers_difference(case: dict[str, Any], out: Generated, step: int) -> str:
    """The same for the sets of every layer, where they are recorded."""
    if "computed_layers" not in case["expected"]:
        return ""
    recorded = case["expected"]["computed_layers"][step]
    _, rows, layers, length = out.computed_layers.shape
    if len(recorded) != rows:
        return f"computed sets of {len(recorded)} rows for {rows}"
    for row in _active_rows(out, step):
        if len(recorded[row]) != layers:
            return f"row {row}: computed sets of {len(recorded[row])} layers for {layers}"
        for layer, positions in enumerate(recorded[row]):
            ours = out.computed_layers[step, row, layer]
            found = _set_difference(ours, positions, _valid(case, row, length))
            if found:
                return f"row {row}, layer {layer}{found}"
    return ""


def _active_rows(out: Generated, step: int) -> list[int]:
    """Rows that compute something; of those done with their block, some originals still feed."""
    return np.flatnonzero(out.computed[step].any(axis=-1)).tolist()


def _valid(case: dict[str, Any], row: int, length: int) -> np.ndarray:
    """Which positions of a row are not padding."""
    valid = np.ones(length, bool)
    if case["prompt_mask"] is not None:
        mask = np.asarray(case["prompt_mask"][row], bool)
        valid[: len(mask)] = mask
    return valid


def _set_difference(ours: np.ndarray, positions: list[int] | None, valid: np.ndarray) -> str:
    """Compares a set of ours with recorded positions; None are all."""
    wanted = valid
    if positions is not None:
        if positions != sorted(set(positions) & set(range(len(ours)))):
            return ": the recorded positions are no ascending list of positions"
        wanted = valid & np.isin(np.arange(len(ours)), positions)
    different = np.flatnonzero(ours != wanted)
    if not len(different):
        return ""
    verb = "computed" if ours[different[0]] else "not computed"
    return f", position {different[0]}: {verb}, unlike the recorded run"


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
        case = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a recorded case.") from error
    wanted = {"name", "source", "model", "prompt", "prompt_mask", "args", "expected"}
    recorded = {"tokens", "history", "computed", "nfe"}
    if "log_likelihood" in case.get("expected", {}):
        wanted, recorded = wanted | {"answer"}, {"log_likelihood", "nfe"}
    missing = wanted - set(case)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; give a recorded case.")
    missing = recorded - set(case["expected"])
    if missing:
        raise ValueError(f"{path}: expected lacks {', '.join(sorted(missing))}.")
    return case


@functools.cache
def _load(path: Path) -> tuple[dlm_jax.Transformer, Params]:
    checkpoint = dlm_jax.load(path, dtype="float32")
    return checkpoint.model, checkpoint.params


if __name__ == "__main__":
    sys.exit(main())
