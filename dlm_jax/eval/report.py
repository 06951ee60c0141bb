"""What an evaluation found: figures of every task and contender, as a table, JSON and a picture.

A row is a JSON-able dict:

    task, contender, cache     what was measured; `contender` as the user wrote it
    group                      the group that the task was evaluated in, which has a row of its own
    scores                     name -> [value, standard error or None]
    num_fewshot, version,      of a task, as lm-eval has them
      higher_is_better
    samples, tokens            how many; tokens up to the ends of the answers
    tokens_per_second          these tokens per second of decoding, compilation apart
    tokens_per_step            these tokens per model forward until the last of them, mean
    latency                    seconds per sample: a batch's time divided by its samples, mean
    forwards, positions        model forwards per sample, and positions that each computed, mean
    input_length               tokens of the prompt, mean
    memory_mib                 memory that the largest compiled program needs on a device
    compile_seconds            seconds of compiling, which are in no other figure
    setups                     on what and in which batches; several if responses were kept
    decode, parameters         settings of the decoding (`fields`) and of the cache method
    against, speedup,          the contender it is compared with, tokens_per_second of one by the
      agreement, note          other, share of equal texts, and what the table should say of that
"""

import dataclasses
import itertools
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.strategies import Strategy

Row = dict[str, Any]

LONGEST_NAME = 32
"""Of a contender in a picture, in characters."""

_COLUMNS = (
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("speedup", "speed-up", "{:.2f}x"),
    ("tokens_per_step", "tokens/forward", "{:.2f}"),
    ("agreement", "agreement", "{:.1%}"),
    ("latency", "latency", "{:.3f} s"),
    ("forwards", "forwards", "{:.1f}"),
    ("positions", "positions", "{:.1f}"),
    ("input_length", "input", "{:.1f}"),
    ("memory_mib", "memory", "{:.0f} MiB"),
    ("compile_seconds", "compiling", "{:.1f} s"),
)


def measures(samples: Sequence[Mapping[str, Any]]) -> Row:
    """What was measured of generated samples (`runners.Generator`), as a part of a row."""
    if not samples:
        return {}
    tokens = sum(sample["tokens"] for sample in samples)
    seconds = sum(sample["seconds"] for sample in samples)

    def mean(name: str) -> float:
        return statistics.fmean(sample[name] for sample in samples)

    return dict(
        samples=len(samples),
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds > 0 else None,
        tokens_per_step=statistics.fmean(s["tokens"] / max(s["last_forward"], 1) for s in samples),
        latency=mean("seconds"),
        forwards=mean("forwards"),
        positions=mean("positions"),
        input_length=mean("input_length"),
        memory_mib=max(sample["memory_mib"] for sample in samples),
        compile_seconds=sum(sample["compile_seconds"] for sample in samples),
        setups=sorted({sample["setup"] for sample in samples}),
    )


def scores(results: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """lm-eval's results of a task: name of a score -> its value and standard error."""
    found: dict[str, list[float | None]] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or metric == "bypass" or not kind:
            continue
        if isinstance(value, int | float):
            error = results.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            found[name] = [float(value), float(error) if isinstance(error, int | float) else None]
    return found


def compare(row: Row, responses: Sequence[Any], all_rows: Sequence[tuple[Row, list[Any]]]) -> Row:
    """Adds speed-up and agreement to a row of a task whose samples are generated.

    Both are against `none` decoded in the same way, if that is among all rows, or else against the
    first `none`, which is then noted.

    Args:
      row: what was measured of a contender.
      responses: its responses, by sample.
      all_rows: rows and responses of all contenders and tasks.
    """
    references = [
        (other, expected)
        for other, expected in all_rows
        if other["cache"] == "none" and other["task"] == row["task"] and "decode" in other
    ]
    if not references:
        return row
    alike = [pair for pair in references if pair[0]["decode"] == row["decode"]]
    none, expected = (alike or references)[0]
    same = [given == other for given, other in zip(responses, expected, strict=True)]
    compared = dict(
        against=none["contender"],
        speedup=_ratio(row.get("tokens_per_second"), none.get("tokens_per_second")),
        agreement=sum(same) / len(same),
    )
    if not alike:
        own, other = row["decode"], none["decode"]
        # What is off may be None, 0 or False, or something that only another strategy has.
        differ = [name for name in own if (own[name] or None) != (other.get(name) or None)]
        settings = ", ".join(f"{name}={own[name]}" for name in differ)
        compared["note"] = (
            f"decoded with {settings}, unlike {none['contender']}: its speed-up and agreement are "
            "not the cache's alone"
        )
    elif none is not references[0][0] and none is not row:
        compared["note"] = f"compared with {none['contender']}, which is decoded in the same way"
    return row | compared


def fields(decode: DecodeConfig | Strategy) -> dict[str, Any]:
    """Name -> value of all settings; those of a strategy stand beside its name."""
    told = {}
    for field in dataclasses.fields(decode):
        value = getattr(decode, field.name)
        if isinstance(value, Strategy):
            told |= {field.name: value.name} | fields(value)
        else:
            told[field.name] = value
    return told


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def markdown(rows: Sequence[Row]) -> str:
    """A table per task, or per group without those of its tasks, and what there is to note."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows if "group" not in row):
        of_task = [row for row in rows if row["task"] == task]
        parts.append(f"{_title(task, of_task)}\n\n{_table(of_task)}")
    notes = dict.fromkeys(
        f"* {row['contender']} is {row['note']}." for row in rows if "note" in row
    )
    return "\n\n".join([*parts, *notes])


def _title(task: str, rows: Sequence[Row]) -> str:
    samples = {f"{row['samples']} samples" for row in rows if "samples" in row}
    setups = {setup for row in rows for setup in row.get("setups", [])}
    where = " and ".join(sorted(setups))
    return ", ".join([task, *sorted(samples), *([f"on {where}"] if where else [])])


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["scores"])) or ["score"]
    shown = [column for column in _COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [["cache", *names, *(title for _, title, _ in shown)]]
    for row in rows:
        values = ((row.get(name), form) for name, _, form in shown)
        cells.append(
            [row["contender"] + (" *" if "note" in row else "")]
            + [_score(row["scores"].get(name)) for name in names]
            + ["" if value is None else form.format(value) for value, form in values]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def _score(score: Sequence[float | None] | None) -> str:
    if score is None:
        return "not scored"
    value, error = score
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both coordinates, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws score over throughput for every task that has both, with the Pareto frontier."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row["scores"] and row.get("tokens_per_second")]
    tasks = list(dict.fromkeys(row["task"] for row in drawn))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.6, 4.2 * max(len(tasks), 1)), layout="constrained")
        FigureCanvasAgg(figure)
        for i, task in enumerate(tasks, 1):
            axes = figure.add_subplot(len(tasks), 1, i)
            _draw(axes, task, [row for row in drawn if row["task"] == task])
        figure.savefig(path, dpi=150)


def _draw(axes: Any, task: str, rows: Sequence[Row]) -> None:
    name = next(iter(rows[0]["scores"]))
    points = []
    markers = itertools.cycle("osD^vP*X")
    for row in sorted(rows, key=lambda row: -row["tokens_per_second"]):
        value, error = row["scores"].get(name, (None, None))
        if value is None:
            continue
        points.append((row["tokens_per_second"], value))
        label = textwrap.shorten(row["contender"].replace("+", " +"), LONGEST_NAME)
        style = dict(fmt=next(markers), markersize=6, capsize=2, elinewidth=0.8, label=label)
        axes.errorbar(*points[-1], yerr=error, **style)
    sign = -1 if (rows[0].get("higher_is_better") or {}).get(name.split()[0]) is False else 1
    best = [(x, sign * y) for x, y in frontier([(x, sign * y) for x, y in points])]
    axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0)
    axes.set(title=task, xlabel="tokens/s up to the end of the answer", ylabel=name)
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
