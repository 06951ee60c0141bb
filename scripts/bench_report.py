"""What `bench.py` makes of its measurements: rows, a table and a picture."""

import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from roofline import Ceilings, Product, total_bytes, total_flops

from dlm_jax.cache import CacheMethod
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import GenerateOutput
from dlm_jax.files import write

Row = dict[str, Any]
"""One configuration; an element of `rows` in the JSON file."""
Columns = tuple[tuple[str, str, str], ...]
"""Heading, key of the row, format."""

_WHERE: Columns = (
    ("cache", "cache", "{}"),
    ("batch", "batch", "{}"),
    ("prompt", "prompt_length", "{}"),
    ("gen", "gen_length", "{}"),
    ("compile s", "compile_s", "{:.1f}"),
)
MEASURED: Columns = (
    *_WHERE,
    ("ms/full", "ms_full", "{:.2f}"),
    ("ms/cached", "ms_cached", "{:.2f}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("predicted", "predicted_speedup", "{:.2f}"),
    ("positions/token", "positions_per_token", "{:.1f}"),
    ("limit tokens/s", "limit_tokens_per_s", "{:.1f}"),
    ("of limit", "limit_fraction", "{:.1%}"),
    ("program MiB", "program_mib", "{:.0f}"),
    ("process peak MiB", "process_peak_mib", "{:.0f}"),
)
COUNTED: Columns = (
    *_WHERE,
    ("arguments MiB", "arguments_mib", "{:.0f}"),
    ("temporaries MiB", "temporaries_mib", "{:.0f}"),
    ("GFLOP/full", "gflop_full", "{:.1f}"),
    ("GB/full", "gb_full", "{:.2f}"),
    ("limit ms/full", "ms_full_limit", "{:.2f}"),
    ("GFLOP/cached", "gflop_cached", "{:.1f}"),
    ("GB/cached", "gb_cached", "{:.2f}"),
    ("limit ms/cached", "ms_cached_limit", "{:.2f}"),
)


class Case(NamedTuple):
    """A cache method to measure."""

    label: str
    method: CacheMethod
    decode: DecodeConfig
    steps: list[list[Product]]
    """The matrix products of each step shape, as `roofline.step_products` finds them."""


class Times(NamedTuple):
    """Seconds of repeated runs of one program."""

    whole: list[float]
    """The generation."""
    one: list[float]
    """Its first forward only."""
    none: list[float]
    """No forward: what a run costs apart from them."""


def describe(case: Case, out: GenerateOutput, times: Times, ceilings: Ceilings) -> Row:
    """What one case did, and what it could have done.

    A *full* forward is one of the shape of the first, which computes everything; the others are
    *cached* steps. With one shape only, a full forward takes the time of the generation over their
    number. Else it takes what a run of one forward does more than a run of none, and a cached step
    the rest of the generation over their number. All are medians of the repeated runs.

    Args:
      case: the case.
      out: its result, on the host.
      times: its runs.
      ceilings: of the device.
    """
    batch, gen, nfe = len(out.tokens), case.decode.gen_length, int(out.nfe)
    filled = int((np.asarray(out.committed_at[:, -gen:]) >= 0).sum())  # all, or what time was for
    shape_T, slots_T = np.asarray(out.shape[:nfe]), np.asarray(out.positions_computed[:nfe, 0])
    computed, asked = float(slots_T.sum()), float(out.positions_asked[:nfe].mean(axis=1).sum())
    sizes, counts = np.unique(slots_T, return_counts=True)

    whole, one, none = map(statistics.median, times)
    full_T = shape_T == shape_T[0]
    full, cached = int(full_T.sum()), int((~full_T).sum())
    full_s = one - none if cached else (whole - none) / full
    limit_T = np.array([ceilings.seconds(products, batch) for products in case.steps])[shape_T]
    limit_s = float(limit_T.sum())
    return {
        "cache": case.label,
        "batch": batch,
        "alg": case.decode.alg,
        "gen_length": gen,
        "seconds": whole,
        "seconds_all": times.whole,
        "forwards": nfe,
        "full_forwards": full,
        "cached_steps": cached,
        "forwards_by_positions": dict(zip(map("{:g}".format, sizes), counts.tolist(), strict=True)),
        "ms_full": 1e3 * full_s,
        "ms_cached": 1e3 * (whole - none - full * full_s) / cached if cached else None,
        "ms_per_step": 1e3 * whole / nfe,
        "ms_outside": 1e3 * none,
        "tokens_per_s": filled / whole,
        "positions_per_token": computed * batch / filled,
        "waste": (computed - asked) / computed,
        "gflop_per_token": sum(total_flops(case.steps[i], batch) for i in shape_T) / filled / 1e9,
        "ceilings": ceilings._asdict(),
        "ms_full_limit": 1e3 * float(limit_T[full_T].mean()),
        "ms_cached_limit": 1e3 * float(limit_T[~full_T].mean()) if cached else None,
        "limit_s": limit_s,
        "limit_tokens_per_s": filled / limit_s,
        "limit_fraction": limit_s / whole,
    }


def compare(row: Row, baseline: Row) -> Row:
    """The row with its speed-up over the baseline, measured and predicted from FLOPs."""
    speedup = row["tokens_per_s"] / baseline["tokens_per_s"]
    predicted = baseline["gflop_per_token"] / row["gflop_per_token"]
    return row | dict(
        speedup=speedup, predicted_speedup=predicted, measured_to_predicted=speedup / predicted
    )


def compare_all(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one configuration, each compared with the first."""
    baseline: Row = {}
    for row in rows:
        baseline = baseline or row
        yield compare(row, baseline)


def count(case: Case, batch: int, ceilings: Ceilings) -> Row:
    """What steps of a case need, from shapes alone; of the cached ones, the smallest shape."""
    steps = [
        {
            "gflop": total_flops(products, batch) / 1e9,
            "gb": total_bytes(products, batch) / 1e9,
            "ms_limit": 1e3 * ceilings.seconds(products, batch),
        }
        for products in case.steps
    ]
    cached = min(steps[:-1], key=lambda step: step["gflop"], default=dict.fromkeys(steps[0]))
    return {
        "cache": case.label,
        "batch": batch,
        "alg": case.decode.alg,
        "gen_length": case.decode.gen_length,
        "ceilings": ceilings._asdict(),
        "steps": steps,
        "gflop_full": steps[-1]["gflop"],
        "gb_full": steps[-1]["gb"],
        "ms_full_limit": steps[-1]["ms_limit"],
        "gflop_cached": cached["gflop"],
        "gb_cached": cached["gb"],
        "ms_cached_limit": cached["ms_limit"],
    }


def table(rows: Sequence[Row], columns: Columns) -> str:
    """The rows as aligned text under their headings, without columns that are empty."""
    kept = [column for column in columns if any(row[column[1]] is not None for row in rows)]
    cells = [[heading for heading, _, _ in kept]]
    cells += [[_cell(row, key, form) for _, key, form in kept] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([name.ljust(first), *map(str.rjust, numbers, others)]) for name, *numbers in cells
    ]
    if any(row["compile_cached"] for row in rows):
        lines.append("* taken from the compilation cache")
    return "\n".join(lines)


def _cell(row: Row, key: str, form: str) -> str:
    mark = "*" if key == "compile_s" and row["compile_cached"] else ""
    return "-" if row[key] is None else form.format(row[key]) + mark


# --- the picture ----------------------------------------------------------------------------------

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's, which the colour-blind can tell apart: one per configuration."""


def picture(rows: Sequence[Row], title: str) -> Any:
    """Speed-up by cache, measured and predicted, beside the fraction of the limit, as a figure."""
    from matplotlib.figure import Figure

    names = ("batch", "prompt_length", "gen_length")
    labels = list(dict.fromkeys(row["cache"] for row in rows))
    settings = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    height = 0.8 / len(settings)
    size = (9.2, 1.3 + 0.24 * len(labels) * max(1.4, len(settings)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        which = settings.index(tuple(row[name] for name in names))
        at = labels.index(row["cache"]) + (which - (len(settings) - 1) / 2) * height
        bar = dict(height=0.9 * height, color=_COLOURS[which % len(_COLOURS)])
        left.barh(at, row["speedup"], **bar)
        left.plot(
            [row["predicted_speedup"]] * 2,
            [at - 0.45 * height, at + 0.45 * height],
            color="black",
            linewidth=2,
        )
        right.barh(at, 100 * row["limit_fraction"], **bar)
    for axes, heading in (
        (left, "speed-up over none (line: predicted from FLOPs)"),
        (right, "share of the roofline limit (%)"),
    ):
        axes.set_xlabel(heading, fontsize=9)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=9)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    if len(settings) > 1:
        from matplotlib.patches import Patch

        told = ["batch {}, prompt {}, {} tokens".format(*setting) for setting in settings]
        handles = [
            Patch(color=_COLOURS[i % len(_COLOURS)], label=text) for i, text in enumerate(told)
        ]
        columns = min(len(handles), 3)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes the picture; a file that is there already is replaced only by a whole one."""
    image = io.BytesIO()
    picture(rows, title).savefig(image, format="png", metadata={"Software": None})
    write(path, image.getvalue())
