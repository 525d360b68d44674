"""The result of an evaluation as a table, as JSON content, and as drawings of the worst images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic_files import writing
from ..drawing.segments import class_legend, contact_sheet, draw_segments
from ..inference.segmenter import Segmenter
from ..models.image_decoding import image_size, shown_rgb, to_pixels
from ..models.image_values import AS_STORED
from ..models.label_spaces import match_labels
from .calibration import calibration_lines
from .evaluate import EvaluationResult, ImageScore
from .tasks import evaluation_task

_ORACLE = "oracle_"


def result_text(result: EvaluationResult, max_rows: int = 20) -> str:
    """The metrics with the oracle's beside them, and the costliest classes; scores in percent."""
    scores = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
    oracle = {name.removeprefix(_ORACLE): value for name, value in scores.items() if name.startswith(_ORACLE)}
    metrics = {name: value for name, value in scores.items() if not name.startswith(_ORACLE)}
    lines = [f"{result.task}, {result.num_images} images"]
    if oracle:
        lines.append("  in brackets: the same masks with perfect labels")
    lines += [f"  note: {note}" for note in result.notes]
    width = max(map(len, metrics))
    for name, value in metrics.items():
        bound = f"  ({_cell(oracle[name])})" if name in oracle else ""
        lines.append(f"  {name:{width}}  {_cell(value)}{bound}")
    if "absent" in result.metrics:
        treatment = {"exclude": "left out of the means", "zero": "counted as zero"}[result.metrics["absent"]]
        lines.append(f"  classes that occur nowhere are {treatment}; the mean is over {result.metrics['num_classes']}")
    if result.calibration is not None:
        lines += ["", *calibration_lines(result.calibration)]
    shown = result.classes[:max_rows]
    if shown:
        lines += ["", "What costs most:"]
        columns = [name for name in shown[0] if name != "label_id"]
        table = [columns, *[[_cell(row[name]) for name in columns] for row in shown]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = ["<" if name in ("label", "mostly taken for") else ">" for name in columns]
        for line in table:
            cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        if len(result.classes) > len(shown):
            lines.append(f"  and {len(result.classes) - len(shown)} more classes")
    return "\n".join(lines)


def result_content(result: EvaluationResult) -> dict[str, Any]:
    """All of a result, for JSON."""
    return {
        "task": result.task,
        "num_images": result.num_images,
        "notes": result.notes,
        "metrics": result.metrics,
        "classes": result.classes,
        **({} if result.calibration is None else {"calibration": vars(result.calibration)}),
        # The key's name is part of the file format.
        "pictures": [vars(image) for image in result.images],
    }


def draw_worst(
    path: Path,
    segmenter: Segmenter,
    dataset: Any,
    id2label: Mapping[int, str],
    scores: Sequence[ImageScore],
) -> None:
    """Draw images, their truth and the model's answer side by side."""
    task = evaluation_task(segmenter.task, len(id2label))
    table = match_labels(segmenter.id2label, id2label).table
    # Answers are not kept during an evaluation, which would fill the memory, so the model runs again on these few.
    panels, drawn = [], []
    for score in scores:
        entry = dataset[score.index]
        image = to_pixels(entry["image"], settings=AS_STORED)
        (answer,) = segmenter.answers([image])
        answer = answer if table is None else task.relabel(answer, table)
        size = image_size(image)
        sides = [task.segments(side, size) for side in (task.reference(entry), answer)]
        drawings = [draw_segments(image, *side, id2label) for side in sides]
        drawn += [rows for _, rows in sides]
        panels.append([shown_rgb(image), *drawings])
    titles = [f"{score.image_id}: {_cell(score.score)}" for score in scores]
    sheet = contact_sheet(
        panels,
        ("image", "truth", "answer"),
        row_titles=titles,
        panel_size=(480, 360),
        entries=class_legend(drawn, id2label),
    )
    with writing(path) as partial:
        sheet.save(partial)


# Floats up to 1 are scores, shown in percent; larger whole numbers are counts.
def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not value.is_integer():
        return "-" if math.isnan(value) else f"{100 * value:.2f}"
    return f"{100 * value:.2f}" if isinstance(value, float) and abs(value) <= 1 else f"{value:.0f}"
