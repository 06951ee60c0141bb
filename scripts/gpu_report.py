"""What `gpu_suite.py` makes of its results: tables in Markdown, for docs/performance.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

TABLES = ("device", "checks", "rows", "profiles", "memory", "stages")
"""The lists of results in `suite.json`, one entry each."""
TOP = 12
"""Parts and kernels that are shown of a traced step."""

Row = Mapping[str, Any]
Columns = tuple[tuple[str, Callable[[Row], str]], ...]
"""Heading, and what stands below it."""


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key]).replace("|", r"\|")


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else form.format(row[key])


def _with_share(key: str, limit: str) -> Callable[[Row], str]:
    """Milliseconds, and how much of the limit that is."""
    return lambda row: "" if row[key] is None else f"{row[key]:.2f} ({row[limit] / row[key]:.0%})"


def _compiled(row: Row) -> str:
    return f"{row['compile_s']:.1f}{' (kept)' if row['compile_cached'] else ''}"


_MODEL: Columns = (("model", _text("model")), ("layers", _text("layers")))
_CASE: Columns = (("cache", lambda row: f"`{row['cache']}`"), ("batch", _text("batch")))
_TIMES: Columns = (
    ("ms/full (of limit)", _with_share("ms_full", "ms_full_limit")),
    ("ms/cached (of limit)", _with_share("ms_cached", "ms_cached_limit")),
    ("tokens/s", _number("tokens_per_s", "{:.1f}")),
)
_MEMORY: Columns = (
    ("compile s", _compiled),
    ("program MiB", _number("program_mib", "{:.0f}")),
    ("process peak MiB", _number("process_peak_mib", "{:.0f}")),
)
ROWS: Columns = (
    *(*_MODEL, *_CASE, *_TIMES),
    ("of limit", _number("limit_fraction", "{:.0%}")),
    ("speed-up", _number("speedup", "{:.2f}")),
    *_MEMORY,
)
OPTIONS: Columns = (
    ("tried", lambda row: row["option"] or f"turns of {row['positions'] or 'the usual'} positions"),
    *(*_MODEL, *_CASE, *_TIMES, _MEMORY[0]),
)
CHECKS: Columns = (("check", _text("name")), ("outcome", _text("outcome")), ("", _text("detail")))
PARTS: Columns = (
    ("ms", _number("ms", "{:.3f}")),
    ("operations", _text("operations")),
    ("name", lambda row: f"`{row['name']}`"),
)
STAGES: Columns = (
    ("stage", _text("stage")),
    ("outcome", _text("status")),
    ("s", _number("seconds", "{:.1f}")),
    ("", _text("error")),
)


def markdown(document: Mapping[str, Any]) -> str:
    """All results so far."""
    return "\n\n".join(filter(None, _sections(document))) + "\n"


def _sections(document: Mapping[str, Any]) -> Iterator[str]:
    yield _head(document)
    tried = [row for row in document["rows"] if row["group"] == "options"]
    yield table(with_speedups([row for row in document["rows"] if row not in tried]), ROWS)
    yield table(tried, OPTIONS)
    yield table(document["checks"], CHECKS)
    for step in document["profiles"]:
        yield _step(step)
    yield table(document["memory"], (*_MODEL, *_CASE, *_MEMORY))
    yield table(document["stages"], STAGES)


def _head(document: Mapping[str, Any]) -> str:
    lines = [f"Commit {document['commit'] or 'unknown'}, `{document['command']}`."]
    for device in document["device"]:
        flops, byte_rate = device["ceilings"]["flops"], device["ceilings"]["bytes"]
        lines.append(
            f"{device['device']}, jax {device['jax']}, Python {device['python']}; at best "
            f"{flops / 1e12:.3g} TFLOP/s in bfloat16 and {byte_rate / 1e12:.3g} TB/s."
        )
    for row in document["rows"][:1]:
        lines.append(f"{row['prompt_length']} + {row['gen_length']} positions, {row['dtype']}.")
    return " ".join(lines)


def _step(step: Row) -> str:
    """A traced step, by what its operations were made from and by what ran."""
    head = (
        f"A {step['step']} step of {step['model']}, {step['layers']} layers, `{step['cache']}`, "
        f"batch 1: {step['operations']} operations in {step['ms']:.2f} ms, busy for "
        f"{step['ms_busy']:.2f} ms; the limit is {step['ms_limit']:.2f} ms."
    )
    return "\n\n".join([head, *(table(step[by][:TOP], PARTS) for by in ("parts", "kernels"))])


def with_speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their speed-up over `none` of the same network and batch, where that ran."""

    def place(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("model", "layers", "batch"))

    slowest = {place(row): row["tokens_per_s"] for row in rows if row["cache"] == "none"}
    return [
        dict(row, speedup=row["tokens_per_s"] / slowest[place(row)])
        if place(row) in slowest
        else dict(row, speedup=None)
        for row in rows
    ]


def table(rows: Sequence[Row], columns: Columns) -> str:
    """The rows under their headings, without columns that are empty; nothing if there are none."""
    cells = [[show(row) for _, show in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[columns[i][0] for i in kept], ["---"] * len(kept)]
    lines += [[line[i] for i in kept] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
