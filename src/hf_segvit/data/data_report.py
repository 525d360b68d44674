"""The report of a data check: counts and problems as text, and samples drawn on a sheet.

`DataReport` holds what checking.py found; `report_text` formats it; `sample_sheet` draws the samples with their masks,
as read and augmented.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..drawing.colors import Color
from ..drawing.segments import class_legend, contact_sheet, draw_segments
from ..lookup import printable
from ..models.image_decoding import shown_rgb
from ..models.mask_encoding import decode_mask
from .augmentation import AugmentedSample, augmentation, sample_generator
from .class_lists import VOID
from .mask_files import mask_area
from .problems import Problem, ProblemList


@dataclass
class ClassCounts:
    """How often a class occurs; `segments` and `images` leave out crowds, `pixels` includes them."""

    name: str
    segments: int = 0
    images: int = 0
    pixels: int = 0
    crowds: int = 0


@dataclass
class SplitReport:
    """Counts of one split; sizes are (height, width)."""

    split: str
    task: str
    images: int = 0  # those that could be read
    segments: int = 0  # including crowds
    crowds: int = 0
    empty_images: int = 0  # without segments
    void_share: float = 0.0  # of all pixels
    sizes: list[tuple[tuple[int, int], int]] = field(default_factory=list)  # the most frequent, with counts
    smallest: tuple[int, int] = (0, 0)  # fewest pixels
    largest: tuple[int, int] = (0, 0)  # most pixels
    classes: list[ClassCounts] = field(default_factory=list)  # by label id
    remarks: list[str] = field(default_factory=list)  # what the reader decided about labels


@dataclass
class DataReport:
    """The result of a check of `data` ("FORMAT:PATH"); `samples` are decoded entries with their class names."""

    data: str
    splits: list[SplitReport] = field(default_factory=list)
    problems: ProblemList = field(default_factory=ProblemList)
    samples: list[tuple[dict[str, Any], dict[int, str]]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""
        return {
            "data": self.data,
            "splits": [asdict(split) for split in self.splits],
            "problems": [asdict(problem) for problem in self.problems],
        }


_LISTED = 3  # up to this many problems of one kind are all listed
# The details in which problems of one kind differ: quoted names, paths, numbers and lists of them.
_DETAILS = re.compile(r"'[^']*'|\S*[/\\]\S*|\d+(\.\d+)?(, \d+(\.\d+)?)*")


def report_text(report: DataReport, most_lines: int = 20) -> str:
    """Format a report, with at most `most_lines` lines of problems."""
    lines = [report.data, *(f"labels: {remark}" for remark in _shared_remarks(report))]
    for split in report.splits:
        low, high = split.smallest, split.largest
        uncovered = "in no object" if split.task == "instance" else "void"
        lines.append(
            f"\nsplit {split.split}, {split.task}: {numbered(split.images, 'image')}, "
            f"{numbered(split.segments, 'segment')}, {numbered(split.crowds, 'crowd')}, "
            f"{numbered(split.empty_images, 'image')} without segments, "
            f"{split.void_share:.1%} of all pixels {uncovered}"
        )
        if not split.images:
            continue
        lines += [
            f"sizes (height x width): {low[0]} x {low[1]} to {high[0]} x {high[1]}, most often "
            + ", ".join(f"{size[0]} x {size[1]} ({count})" for size, count in split.sizes[:3]),
            f"{'class':<28}{'segments':>10}{'images':>10}{'pixels':>9}",
        ]
        total = sum(row.pixels for row in split.classes) or 1
        for row in sorted(split.classes, key=lambda row: -row.pixels):
            if row.segments:
                lines.append(f"{row.name[:27]:<28}{row.segments:>10}{row.images:>10}{row.pixels / total:>9.2%}")
        if absent := [row.name for row in split.classes if not row.segments]:
            verb = "classes do" if len(absent) > 1 else "class does"
            lines.append(f"{len(absent)} {verb} not occur: {', '.join(absent[:12])}{' ...' * (len(absent) > 12)}")
    errors = len(report.problems.errors)
    warnings = len(report.problems) - errors
    lines.append(f"\n{numbered(errors, 'problem')} that would hurt training, {numbered(warnings, 'warning')}")
    # Names come from files, and a line of the report must stay one line.
    return "\n".join(_printable_line(line) for line in lines + _problem_lines(report.problems, most_lines))


def _printable_line(line: str) -> str:
    start = len(line) - len(line.lstrip("\n"))
    return line[:start] + printable(line[start:])


def _shared_remarks(report: DataReport) -> list[str]:
    """Remarks of all splits, with the split only where they differ."""
    splits: dict[str, list[str]] = defaultdict(list)
    for split in report.splits:
        for remark in split.remarks:
            splits[remark].append(split.split)
    return [
        remark if len(names) == len(report.splits) else f"{remark} (split {', '.join(names)})"
        for remark, names in splits.items()
    ]


def _problem_lines(problems: ProblemList, most: int) -> list[str]:
    """Errors, then warnings; a kind with many problems is shown by its first and a count."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    # "error" sorts before "warning", and sorting keeps the order within each.
    for problem in sorted(problems, key=lambda problem: problem.severity):
        kinds.setdefault((problem.severity, _DETAILS.sub("*", problem.message)), []).append(problem)
    lines, num_listed, num_covered = list[str](), 0, 0
    for (severity, _), members in kinds.items():
        listed = members if len(members) <= _LISTED else members[:1]
        if num_listed + len(listed) > most:
            break
        num_listed += len(listed)
        num_covered += len(members)
        rest = f" (... and {len(members) - len(listed)} more of this kind)" if len(members) > len(listed) else ""
        lines += [f"{severity}: {problem}{rest}" for problem in listed]
    if num_covered < len(problems):
        lines.append(f"... and {len(problems) - num_covered} more of other kinds")
    if num_listed < len(problems):
        lines.append("--json lists all")
    return lines


def numbered(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


_COLUMNS = 4
_PANEL = (480, 360)  # width, height
_MOST_ENLARGED = 8


def sample_sheet(
    samples: Sequence[tuple[dict[str, Any], Mapping[int, str]]], recipe: str | None = None, size: int = 640
) -> Image.Image:
    """Draw samples of a reader on one sheet.

    Args:
        samples: `DataReport.samples`.
        recipe: also draw each sample augmented by this recipe, see `augmentation`, at `size` x `size` pixels.

    Raises:
        ValueError: there is no sample, or no such recipe.
    """
    if recipe is None:
        panels = [_drawn(sample, names) for sample, names in samples]
        titles = [str(sample["image_id"]) for sample, _ in samples]
        rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
        captions = ["   |   ".join(titles[start : start + _COLUMNS]) for start in range(0, len(titles), _COLUMNS)]
        return contact_sheet(rows, row_titles=captions, panel_size=_PANEL, entries=_legend(samples))
    augment = augmentation(recipe, size)
    rows, captions = [], []
    for index, (sample, names) in enumerate(samples):
        augmented = [augment(sample, sample_generator(0, epoch, index)) for epoch in range(_COLUMNS - 1)]
        rows.append([_drawn(sample, names), *(_drawn_augmented(version, names) for version in augmented)])
        captions.append(str(sample["image_id"]))
    titles = ["as read", *[recipe] * (_COLUMNS - 1)]
    return contact_sheet(rows, titles, row_titles=captions, panel_size=_PANEL, entries=_legend(samples))


def _legend(samples: Sequence[tuple[dict[str, Any], Mapping[int, str]]]) -> dict[str, Color]:
    marked = [_with_crowds(sample["segments"], names) for sample, names in samples]
    return {name: color for rows, names in marked for name, color in class_legend([rows], names).items()}


def _with_crowds(
    rows: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows and names where crowds have labels of their own, to be named as such: they are no training targets."""
    crowds = {row["label_id"] for row in rows if row["is_crowd"]}
    names = {**id2label, **{label + len(id2label): f"{id2label[label]} (crowd)" for label in crowds}}
    return [{**row, "label_id": row["label_id"] + len(id2label) * row["is_crowd"]} for row in rows], names


def _drawn(sample: Mapping[str, Any], id2label: Mapping[int, str]) -> Image.Image:
    segment_map, rows = sample["segment_map"], sample["segments"]
    if segment_map is None:
        segment_map = np.full(rows[0]["rle"]["size"], VOID, dtype=np.int64)
        # Largest first, so that small objects stay visible; one by one, as many of a large image fill the memory.
        for row in sorted(rows, key=lambda row: -mask_area(row["rle"])):
            segment_map[decode_mask(row["rle"])] = row["id"]
    image = shown_rgb(sample["image"])
    # Small images are enlarged before labels are written, which would cover them otherwise.
    scale = max(1, math.ceil(min(_PANEL[0] / image.width, _PANEL[1] / image.height)))
    marked, names = _with_crowds(rows, id2label)
    return draw_segments(image, segment_map, marked, names, scale=min(scale, _MOST_ENLARGED))


def _drawn_augmented(sample: AugmentedSample, id2label: Mapping[int, str]) -> Image.Image:
    image = shown_rgb(sample.pixels.permute(1, 2, 0).numpy())
    labels = sample.labels.tolist()
    rows = [{"id": index, "label_id": label} for index, label in enumerate(labels)]
    segment_map = sample.segment_map.numpy().astype(np.int64)
    if sample.masks is not None:
        segment_map = _flattened(sample.masks.numpy(), range(len(labels)))
    return draw_segments(image, segment_map, rows, id2label)


def _flattened(masks: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """One map (H, W) of masks (n, H, W) that may overlap."""
    segment_map = np.full(masks.shape[1:], VOID, dtype=np.int64)
    # Largest first, so that small objects stay visible.
    for index in np.argsort(-masks.sum((1, 2)), kind="stable"):
        segment_map[masks[index]] = ids[index]
    return segment_map
