"""Report of the runs of vit_p_scenes.py: Markdown tables and the curves of the losses."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_segvit.data.generated_scenes import SCENE_LABELS
from hf_segvit.drawing.segments import plot_curves

ORDER = (
    "linear baseline",
    "EoMT",
    "joint",
    "isolated",
    "few fine",
    "boxes, then few fine",
    "boxes, then few fine gently",
    "few fine + boxes",
    "few fine + box prompts",
    "boxes alone",
    "box prompts alone",
    "few fine + coarse",
    "coarse alone",
    "EoMT's encoder",
)
RARE_SHARE = 0.5  # a class is rare where test scenes have less than this share of the mean number of segments


def read_results(output: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any] | None]:
    """Results by cell, the seeds in order; and the timing, if there is one."""
    found = defaultdict(list)
    for path in sorted(output.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        found[result["cell"]].append(result)
    timing = output / "timing.json"
    return found, json.loads(timing.read_text()) if timing.exists() else None


def markdown_table(results: dict[str, list[dict[str, Any]]], timing: dict[str, Any] | None) -> str:
    """Accuracy by cell, mean and range over the seeds, in percent; and times in milliseconds."""
    parts = []
    if results:
        rows = [
            [
                "",
                "random points: top-1",
                "top-5",
                "calibration error",
                "innermost points: top-1",
                "class-balanced",
                "rare classes",
                "boxes: top-1",
                "seeds",
                "steps",
                "CPU min",
            ]
        ]
        for cell in sorted(results, key=ORDER.index):
            runs = results[cell]
            random, interior = ([run["scores"][kind] for run in runs] for kind in ("random", "interior"))
            columns = [
                *([scores[name] for scores in random] for name in ("top_1", "top_5", "expected_calibration_error")),
                *([scores[name] for scores in interior] for name in ("top_1", "class_balanced")),
                [rare_accuracy(scores) for scores in interior],
                [run["scores"].get("boxes", {}).get("top_1") for run in runs],
            ]
            minutes = [run["seconds"] / 60 for run in runs if "seconds" in run]
            steps = str(runs[0]["steps"]) if minutes else ""
            cost = f"{statistics.mean(minutes):.1f}" if minutes else ""
            rows.append([cell, *map(_range, columns), str(len(runs)), steps, cost])
        parts.append(_table(rows))
    if timing:
        for model, ways in timing["milliseconds"].items():
            numbers = list(next(iter(ways.values())))
            rows = [[f"ms, {model}", *(f"{number} points" for number in numbers)]]
            rows += [[way, *(f"{row[number]:.1f}" for number in numbers)] for way, row in ways.items()]
            parts.append(_table(rows))
    return "\n\n".join(parts)


def rare_accuracy(scores: dict[str, Any]) -> float:
    """Mean top-1 of the rarest classes, as defined above."""
    rows = scores["per_class"].values()
    mean = statistics.mean(row["points"] for row in rows)
    rare = [row["top_1"] for row in rows if row["points"] < RARE_SHARE * mean]
    return statistics.mean(rare) if rare else float("nan")


def draw_curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The training loss of every cell, and its top-1 by class at the innermost points."""
    history = {
        f"training loss/{cell}": results[cell][0]["history"]
        for cell in sorted(results, key=ORDER.index)
        if results[cell][0].get("history")
    }
    for cell in sorted(results, key=ORDER.index):
        classes = results[cell][0]["scores"]["interior"]["per_class"]
        history[f"top-1 by label id/{cell}"] = [(int(label), row["top_1"]) for label, row in classes.items()]
    last = max(int(label) for runs in results.values() for label in runs[0]["scores"]["interior"]["per_class"])
    names = ", ".join(f"{label} {name}" for label, name in SCENE_LABELS.items() if label <= last)
    plot_curves(history, path, title=f"ViT-P on generated scenes ({names})")


def _range(values: list[float | None]) -> str:
    """Mean, and half the range where there are several; in percent."""
    known = [100 * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    spread = f" ± {(max(known) - min(known)) / 2:.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
