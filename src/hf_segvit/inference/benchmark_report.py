"""The rows of a benchmark as a table, as Markdown, as JSON content, and as a drawing of speed over size."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..atomic_files import replacing
from .benchmarking import Row
from .measuring import describe_machine

_COLUMNS = (
    *("model", "variant", "weights", "batch", "forward, ms", "images/s", "ratio"),
    *("images to segments, ms", "ratio", "peak MiB", "difference", "attention", "compiled"),
)


def text_table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns."""
    table = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(cells[index]) for cells in table) for index in range(len(_COLUMNS))]
    lines = []
    for cells in table:
        # Names to the left, numbers to the right.
        padded = [
            f"{cell:<{w}}" if i in (0, 1, 2, 11, 12) else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *_failures(rows)])


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """A page with the table, how it was measured, and the drawing."""
    lines = [f"# Benchmark of {', '.join(dict.fromkeys(row.model for row in rows))}", "", f"{facts['date']}. ", ""]
    lines[2] += describe_machine(facts["machine"]) + f"; device {facts['device']}."
    lines += ["```", facts["command"], "```", "", *explanation(rows, facts), ""]
    lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    lines += ["", *_failures(rows), "![Images a second over parameters](benchmark.png)", ""]
    return "\n".join(lines)


def explanation(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    """How to read the table."""
    lines = [
        f"Medians [lowest, highest] of {facts['repeats']} passes that take turns, {facts['clock']} time, input "
        f"{facts['input']}. Ratios are to {' or '.join(dict.fromkeys(repr(row.baseline) for row in rows))} of the same "
        "type and batch size. Difference: largest of the logits to the model's in float32."
    ]
    if facts.get("random"):
        lines.append(
            f"Random weights: {', '.join(facts['random'])}; the threshold is one that 15 % of the queries pass."
        )
    return lines


def json_content(rows: Sequence[Row], facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that was measured, and where."""
    return {**facts, "rows": [{**asdict(row), "images_per_second": row.images_per_second} for row in rows]}


def plot_speed(path: Path, rows: Sequence[Row], title: str = "") -> None:
    """Draw images a second of the forward pass over parameters, a line for each variant and type of weights."""
    # Imported here, as it takes a second. Not pyplot, which keeps every figure in memory.
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    measured = [row for row in rows if row.images_per_second is not None and row.parameters]
    smallest = min(row.batch_size for row in measured)
    lines: dict[str, list[Row]] = {}
    for row in measured:
        if row.batch_size == smallest:
            lines.setdefault(f"{row.variant}, {row.dtype}", []).append(row)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        points = sorted(points, key=lambda row: row.parameters)
        speeds = [row.images_per_second or 0.0 for row in points]
        axes.plot([row.parameters / 1e6 for row in points], speeds, marker="o", linewidth=1.5, label=name)
    fastest: dict[tuple[str, int], float] = {}
    for row in (row for points in lines.values() for row in points):
        key = (row.model, row.parameters)
        fastest[key] = max(fastest.get(key, 0.0), row.images_per_second or 0.0)
    for (model, parameters), speed in fastest.items():
        offset: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(Path(model).name, (parameters / 1e6, speed), **offset)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel(f"images a second, batch {smallest}")
    axes.set_ylim(0, 1.15 * max(fastest.values()))
    largest = max(row.parameters for row in measured) / 1e6
    axes.set_xlim(0, 1.15 * largest)
    for axis in (axes.xaxis, axes.yaxis):
        formatter = ScalarFormatter(useOffset=False)  # no "+1e3" and no powers above an axis
        formatter.set_scientific(False)
        axis.set_major_formatter(formatter)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.variant,
        row.dtype,
        str(row.batch_size),
        _milliseconds(row.forward),
        _number(row.images_per_second, ".3g"),
        _number(row.forward_ratio, ".3f"),
        _milliseconds(row.whole),
        _number(row.whole_ratio, ".3f"),
        _number(row.peak_mebibytes, ".0f"),
        _number(row.difference, ".1e"),
        row.facts.get("attention") or "-",
        row.facts.get("compiled") or "-",
    )


def _milliseconds(seconds: Sequence[float] | None) -> str:
    if not seconds:
        return "-"
    return f"{1e3 * statistics.median(seconds):.4g} [{1e3 * min(seconds):.4g}, {1e3 * max(seconds):.4g}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.variant}, batch {row.batch_size}: not measured: {row.failure}" for row in rows if row.failure]
