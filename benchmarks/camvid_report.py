"""Report of the CamVid runs: result files, a Markdown table and curves.

`result_file` names the result of a run, `markdown_table` and `draw_curves` show all results of a
folder beside the floors.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from camvid_data import SPLITS
from matplotlib.figure import Figure

from hf_segvit.atomic_files import replacing

FLOORS = "floors.json"


def result_file(output: Path, split: str, model: str, seed: int) -> Path:
    return output / f"{split}-{model}-seed{seed}.json"


def read_results(output: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All results of a folder by (split, model), the seeds in order.

    Raises:
        ValueError: there are none.
    """
    found = defaultdict(list)
    for path in sorted(output.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        found[result["split"], result["model"]].append(result)
    if not found:
        raise ValueError(f"{output} holds no results; run `camvid.py train MODEL --output {output}` first")
    return found


def markdown_table(results: dict[tuple[str, str], list[dict[str, Any]]], floors: dict[str, dict[str, float]]) -> str:
    """One row for each model, one column of mIoU for each split; mean and range where there are several seeds."""
    models = list(dict.fromkeys(model for _, model in results))
    rows = [
        ["", *(f"mIoU, split `{split}`" for split in SPLITS), "seeds", "parameters", "steps", "batch", "crops seen"]
    ]
    for model in models:
        runs = [run for (_, name), found in results.items() if name == model for run in found]
        scores = [_range([100 * run["mean_iou"] for run in results.get((split, model), [])]) for split in SPLITS]
        seeds = max(len(results.get((split, model), [])) for split in SPLITS)
        steps, crops = (f"{statistics.mean(run[key] for run in runs):.0f}" for key in ("steps", "crops"))
        size = f"{runs[0]['parameters'] / 1e6:.1f} M"
        rows.append([model, *scores, str(seeds), size, steps, str(runs[0]["batch_size"]), crops])
    for name in next(iter(floors.values()), {}):
        scores = [f"{100 * floors[split][name]:.1f}" if split in floors else "" for split in SPLITS]
        rows.append([f"floor: {name}", *scores, "", "", "", "", ""])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def draw_curves(results: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Two panels for each split: the loss relative to its start, and mIoU on every fourth frame, over the budget."""
    splits = [split for split in SPLITS if any(split == found for found, _ in results)]
    figure = Figure(figsize=(9.5, 3.2 * len(splits)), dpi=150, layout="constrained")
    axes = figure.subplots(len(splits), 2, squeeze=False)
    colors = {model: f"C{place}" for place, model in enumerate(dict.fromkeys(model for _, model in results))}
    for (split, model), runs in results.items():
        for place, run in enumerate(runs):
            row, line = axes[splits.index(split)], {"color": colors[model], "label": model if place == 0 else None}
            seconds, losses = zip(*run["losses"], strict=True)
            row[0].plot(seconds, [loss / losses[0] for loss in losses], **line)
            seconds, scores = zip(*run["scores"], strict=True)
            row[1].plot(seconds, [100 * score for score in scores], marker="o", markersize=3, **line)
    for split, row in zip(splits, axes, strict=True):
        row[0].set_title(f"split {split}: loss, relative to the start", fontsize=10)
        row[1].set_title(f"split {split}: mIoU of every fourth frame", fontsize=10)
        for panel in row:
            panel.set_xlabel("seconds of training")
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial)


def _range(scores: list[float]) -> str:
    if not scores:
        return ""
    if len(scores) == 1:
        return f"{scores[0]:.1f}"
    return f"{statistics.mean(scores):.1f} [{min(scores):.1f}, {max(scores):.1f}]"
