"""Measures what decoding several tokens per step costs: accuracy against tokens per forward.

    python scripts/sweep_decoding.py --json sweep.json --plot sweep.png
    python scripts/sweep_decoding.py --models dream-tiny-math --caches dual --problems 100

The held-out word problems are those of `accuracy.py`. The settings are the lines of `LINES`, from
one token per step to what is bold for the embedded models. A confidence is always the probability
of the candidate (`low_confidence`), also with Dream. What a cache or model refuses is left out.

Standard output is a table in Markdown:

    correct            answers whose number after #### is right
    tokens per forward tokens that a row committed, per forward in which it had something to fill,
                       those behind the end of the answer included; mean over the rows
    forwards           model forwards per batch: those of its slowest row
    answer             tokens of the answers up to their end, mean over the rows

The picture (`pip install '.[plot]'`) shows the same, a panel per model and cache.
"""

import argparse
import io
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accuracy import SUREST, check, encode, make_parser, solve
from train_tiny import accuracy

from dlm_jax import DecodeConfig, cache, checkpoint, compilation, tokenizer
from dlm_jax.arithmetic import Problem, problems
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.cli.options import check_picture
from dlm_jax.decoding import strategies
from dlm_jax.engine import check_rows
from dlm_jax.files import write, write_json

Row = dict[str, Any]


def _each(name: str, values: Sequence[float], **others: Any) -> dict[str, dict[str, Any]]:
    return {f"{value:g}": {name: value} | others for value in values}


LINES: dict[str, dict[str, dict[str, Any]]] = {
    "fixed number": _each("num_transfer_tokens", (1, 2, 4), schedule="fixed"),
    "threshold": _each("threshold", (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "factor": _each("factor", (0.1, 0.5, 1.0, 2.0, 3.0, 4.0)),
    "gamma": _each("gamma", (0.0001, 0.001, 0.01, 0.1, 1.0)),
    **{
        f"klass, kl_threshold {kl:g}": _each(
            "threshold", (0.9, 0.8, 0.7, 0.6), strategy="klass", kl_threshold=kl
        )
        for kl in (0.01, 0.1)
    },
    "wino": _each("wide_in_thres", (0.8, 0.7, 0.6), strategy="wino", narrow_out_thres=0.9),
}
"""What is swept: line -> label -> settings, the most careful ones first.

They are arguments of `DecodeConfig`, or those of `strategies.make` if there is the name of a
strategy among them. Settings of a line that differ in a traced number run the same compiled
program.
"""
BASELINE = ("fixed number", "1")
"""One token per step, the surest one."""

_STYLES = {
    "fixed number": ("#000000", "s"),
    "threshold": ("#0072b2", "o"),
    "factor": ("#e69f00", "^"),
    "gamma": ("#009e73", "D"),
    "klass, kl_threshold 0.01": ("#56b4e9", "v"),
    "klass, kl_threshold 0.1": ("#cc79a7", "P"),
    "wino": ("#d55e00", "X"),
}
"""Colour (Okabe and Ito's, which the colour-blind can tell apart) and marker of each line."""


class Trial(NamedTuple):
    """A setting with one cache method."""

    line: str
    label: str
    decode: DecodeConfig
    cache: CacheMethod


def plan(args: argparse.Namespace, opened: Checkpoint) -> list[Trial]:
    """All trials of a model, those of one cache together, the baseline first.

    Raises:
      ValueError: the sizes, or a cache for this model, make no sense.
    """
    sizes = dict(gen_length=args.gen_length, block_length=args.block_length or None)
    trials = []
    for method in map(cache.make, args.caches):
        for line, settings in LINES.items():
            for label, options in settings.items():
                decode = DecodeConfig(**sizes, alg=SUREST, **_given(options))
                try:
                    method.check(opened.config, decode)
                except ValueError:
                    if (line, label) == BASELINE:
                        raise
                    continue
                trials.append(Trial(line, label, decode, method))
    return trials


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What `DecodeConfig` takes for some settings."""
    if "strategy" not in options:
        return options
    own = {name: value for name, value in options.items() if name != "strategy"}
    return dict(strategy=strategies.make(options["strategy"], **own))


def measure(
    args: argparse.Namespace,
    drawn: list[Problem],
    model: str,
    opened: Checkpoint,
    trials: list[Trial],
    keep: Callable[[Row], None],
) -> None:
    """Runs the trials of a model; `keep` is called with the row of the table for each."""
    rows = encode(opened, drawn)
    for trial in trials:
        start = time.perf_counter()
        outcome = solve(opened, rows, trial, seed=args.seed, batch=args.batch)
        share = accuracy(drawn, outcome.texts)
        correct = round(share * len(drawn))
        keep(
            dict(
                model=model,
                cache=trial.cache.name,
                line=trial.line,
                label=trial.label,
                settings=LINES[trial.line][trial.label],
                correct=correct,
                total=len(drawn),
                accuracy=round(share, 4),
                standard_error=round(math.sqrt(share * (1 - share) / len(drawn)), 4),
                tokens_per_forward=round(outcome.tokens_per_forward, 3),
                forwards=round(outcome.forwards, 2),
                answer_tokens=round(outcome.answer, 2),
            )
        )
        print(
            f"{model}, {trial.cache.name}, {trial.line} {trial.label}: "
            f"{correct} of {len(drawn)}, {outcome.tokens_per_forward:.2f} tokens per forward, "
            f"in {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def markdown(table: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| model | cache | setting | correct | | tokens per forward | forwards | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        lines.append(
            f"| {row['model']} | {row['cache']} | {row['line']} {row['label']} "
            f"| {row['correct']}/{row['total']} | {row['accuracy']:.1%} "
            f"| {row['tokens_per_forward']:.2f} | {row['forwards']:g} "
            f"| {row['answer_tokens']:.1f} |"
        )
    return "\n".join(lines)


# --- the picture ----------------------------------------------------------------------------------


def picture(table: list[Row]) -> Any:
    """The table as a figure: a panel per model and cache, in it a curve per line of settings."""
    from matplotlib.figure import Figure

    models, caches = (list(dict.fromkeys(row[k] for row in table)) for k in ("model", "cache"))
    size = (4.6 * max(len(models), 1.5), 3.5 * len(caches) + 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(caches), len(models), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    labels = []
    for axes, (name, model) in zip(grid.flat, itertools.product(caches, models), strict=True):
        panel = [row for row in table if (row["model"], row["cache"]) == (model, name)]
        axes.set_title(f"{model}, cache {name}", fontsize=10)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.tick_params(labelsize=9, labelbottom=True, labelleft=True)
        axes.margins(0.09)
        for line, (colour, marker) in _STYLES.items():
            rows = [row for row in panel if row["line"] == line]
            if not rows:
                continue
            points = [_point(row) for row in rows]
            (handles[line],) = axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.2
            )
            ends = [row for row in (rows[0], rows[-1]) if _of(row) != BASELINE]
            labels += [(axes, _point(row), row["label"], colour) for row in ends]
        for row in panel:
            if _of(row) == BASELINE:
                axes.axhline(100 * row["accuracy"], color="#999999", linewidth=0.8, dashes=(4, 3))
                (star,) = axes.plot(*_point(row), "*", color="black", markersize=13, zorder=4)
    handles["one token per step"] = star
    for axes in grid[-1]:
        axes.set_xlabel("tokens per forward", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("correct (%)", fontsize=10)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 * len(models)),
        fontsize=9,
    )
    _annotate(figure, labels)
    return figure


def draw(table: list[Row], path: Path) -> None:
    """Writes the picture; a file that is there already is replaced only by a whole one."""
    image = io.BytesIO()
    picture(table).savefig(image, format="png", metadata={"Software": None})
    write(path, image.getvalue())


def _of(row: Row) -> tuple[str, str]:
    return row["line"], row["label"]


def _point(row: Row) -> tuple[float, float]:
    return row["tokens_per_forward"], 100 * row["accuracy"]


def _annotate(figure: Any, labels: Iterable[tuple[Any, tuple[float, float], str, str]]) -> None:
    """Writes each label near its point, where it covers as little as can be."""
    figure.draw_without_rendering()
    taken: dict[Any, np.ndarray] = {}
    for axes, point, text, colour in labels:
        if axes not in taken:
            taken[axes] = np.concatenate([_drawn(line) for line in axes.get_lines()])
        note = axes.annotate(
            text,
            point,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontsize=9,
            zorder=5,
        )
        note.set_in_layout(False)
        frame, box = (artist.get_window_extent().extents for artist in (axes, note))
        boxes = box + np.tile(_AROUND, 2) * figure.dpi / 72
        inside = (boxes[:, :2] > frame[:2]).all(-1) & (boxes[:, 2:] < frame[2:]).all(-1)
        cost = np.where(inside, _overlap(boxes[:, None], taken[axes]).sum(-1), np.inf)
        best = int(np.argmin(cost))
        note.set_position(_AROUND[best])
        # Another label covers nothing of this one if it can help it.
        taken[axes] = np.concatenate([taken[axes], np.repeat(boxes[[best]], 20, axis=0)])


def _drawn(line: Any) -> np.ndarray:
    """Small boxes in pixels along a line, and larger ones on its markers."""
    corners = line.get_transform().transform(line.get_xydata())
    along = [
        np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 4)))
        for a, b in itertools.pairwise(corners)
    ]
    thin = np.concatenate([corners[:1], *along])
    thick = corners if line.get_marker() != "None" else corners[:0]
    return np.concatenate(
        [
            np.concatenate([at - half, at + half], axis=-1)
            for at, half in ((thin, 2.0), (np.repeat(thick, 4, axis=0), 5.0))
        ]
    )


_AROUND = np.array(
    [
        (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
        for radius in (11, 14, 18, 24, 32, 42)
        for angle in range(0, 360, 20)
    ]
)
"""Where a label may stand, in points from its own; the best places first."""


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The area that two rectangles (left, bottom, right, top) share."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.prod(np.maximum(sides, 0.0), axis=-1)


# --- the command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = make_parser(__doc__, caches=["none", "dual"], problems=200)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table")
    parser.set_defaults(cache_args=[])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(argv)
    compilation.use_cache(args.compile_cache)
    try:
        compilation.check_devices()
        check(args)
        if args.plot is not None:
            check_picture(args.plot, "--plot")
        drawn = list(itertools.islice(problems(args.seed, "heldout"), args.problems))
        opened = {name: checkpoint.load(name) for name in args.models}
        trials = {name: plan(args, opened[name]) for name in args.models}
        for name in args.models:
            if not tokenizer.has_chat_template(opened[name].tokenizer):
                raise ValueError(f"{name} has no chat template; it must be a model that chats.")
            check_rows(encode(opened[name], drawn), opened[name].config, trials[name][0].decode)
        settings = ("problems", "seed", "gen_length", "block_length", "batch")
        document = {name: getattr(args, name) for name in settings} | {"alg": SUREST}
        table: list[Row] = []

        def keep(row: Row) -> None:
            table.append(row)
            if args.json is not None:  # after every setting: the whole takes long
                write_json(args.json, document | {"rows": table})

        for name in args.models:
            measure(args, drawn, name, opened[name], trials[name], keep)
        print(markdown(table))
        if args.plot is not None:
            draw(table, args.plot)
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}."
        print(f"sweep_decoding: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
