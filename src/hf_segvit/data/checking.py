"""The data check: reads a data set once, all of it, and tells what would hurt training.

`check_dataset` makes a `DataReport` of counts, problems and samples; `report_text` prints it, problems of one kind
once; `sample_sheet` draws the samples with their masks, as they are and augmented. Beside what the readers refuse, the
check looks for images that occur twice, above all in two splits; classes without a pixel; masks that are all void;
binary masks saved as 0 and 255; and images of which a viewer shows another orientation than was annotated.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ..drawing.segments import contact_sheet, draw_segments
from ..models.image_decoding import IMAGE_FORMATS
from ..models.mask_encoding import decode_mask
from .archives import location_name, read_location
from .augmentation import AugmentedSample, augmentation, sample_generator
from .class_lists import VOID
from .decoding import orientation
from .problems import Problem, ProblemList
from .reading import available_splits, decoder_of, describe, load_segmentation_dataset, metadata

_SMALL_SIDE = 16  # pixels; less than one patch
_LONG_RATIO = 20


@dataclass
class ClassCounts:
    """How often a class occurs.

    Attributes:
        name: of the class.
        segments: number of segments that are no crowds.
        images: number of images with at least one.
        pixels: of all its segments.
    """

    name: str
    segments: int = 0
    images: int = 0
    pixels: int = 0


@dataclass
class SplitReport:
    """What a split holds.

    Attributes:
        split: its name.
        task: "semantic", "instance" or "panoptic".
        images: number of images that could be read.
        segments: number of segments, crowds included.
        crowds: number of crowds.
        empty_images: number of images without segments.
        void_share: share of all pixels in no segment.
        sizes: the most frequent (height, width), with counts.
        smallest: size of the image with the fewest pixels.
        largest: size of the image with the most pixels.
        classes: by label id.
    """

    split: str
    task: str
    images: int = 0
    segments: int = 0
    crowds: int = 0
    empty_images: int = 0
    void_share: float = 0.0
    sizes: list[tuple[tuple[int, int], int]] = field(default_factory=list)
    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    classes: list[ClassCounts] = field(default_factory=list)


@dataclass
class DataReport:
    """What a data set holds, and what is wrong with it.

    Attributes:
        data: "FORMAT:PATH".
        splits: one report each.
        problems: in the order in which they were found.
        samples: decoded samples for a contact sheet, with their class names.
    """

    data: str
    splits: list[SplitReport] = field(default_factory=list)
    problems: ProblemList = field(default_factory=ProblemList)
    samples: list[tuple[dict[str, Any], dict[int, str]]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All but the samples, ready for JSON."""
        return {
            "data": self.data,
            "splits": [asdict(split) for split in self.splits],
            "problems": [asdict(problem) for problem in self.problems],
        }


def check_dataset(
    spec: str,
    *,
    split: str | None = None,
    task: str | None = None,
    num_samples: int = 12,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda rows, name: rows,
    **options: Any,
) -> DataReport:
    """Read a data set and look for problems.

    Args:
        spec: "FORMAT:PATH".
        split: the one to read; by default all, which finds images that are in two.
        task: as for `load_segmentation_dataset`.
        num_samples: how many samples to keep for a contact sheet, spread evenly.
        progress: wraps the rows of a split, given its name; for a progress bar.
        options: of the format.

    Raises:
        ValueError: nothing can be read at all.
    """
    report = DataReport(spec)
    splits = [split] if split else available_splits(spec, **options)
    seen: dict[bytes, str] = {}
    for name in splits:
        dataset = load_segmentation_dataset(spec, split=name, task=task, problems=report.problems, **options)
        report.splits.append(_check_split(dataset, report, seen, math.ceil(num_samples / len(splits)), progress))
    return report


def _check_split(
    dataset: Any,
    report: DataReport,
    seen: dict[bytes, str],
    num_samples: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> SplitReport:
    facts = describe(dataset)
    decode = decoder_of(dataset).decode
    split = SplitReport(facts.split, facts.task, classes=[ClassCounts(name) for name in facts.id2label.values()])
    sizes: Counter[tuple[int, int]] = Counter()
    void = 0
    samples = set(np.linspace(0, max(0, len(dataset) - 1), num_samples).astype(int).tolist())
    for index, row in enumerate(progress(metadata(dataset), facts.split)):
        name, item = _row_name(row)
        try:
            _check_file(row, name, item, facts.split, seen, report.problems)
            sample = decode(row)
        except ValueError as error:
            report.problems.error(name, item, str(error).removeprefix(f"{name}: "))
            continue
        size = (sample["image"].height, sample["image"].width)
        sizes[size] += 1
        counted = _count(sample, split)
        void += size[0] * size[1] - counted
        _check_sample(row, sample, counted, name, item, report.problems)
        if index in samples:
            report.samples.append((sample, facts.id2label))
    _summarise(split, sizes, void)
    _check_classes(split, dataset, facts, report)
    return split


def _row_name(row: dict[str, Any]) -> tuple[str, str]:
    image = row["image"]
    name = location_name(image) if "member" in image else str(image.get("path") or "row")
    return name, f"image {row['image_id']!r}"


def _check_file(
    row: dict[str, Any], name: str, item: str, split: str, seen: dict[bytes, str], problems: ProblemList
) -> None:
    """What only the file tells: the same image twice, a rotation, several frames."""
    image = row["image"]
    if image.get("bytes"):
        content = image["bytes"]
    elif image.get("member", "").startswith("generated:"):
        return
    else:
        path = image.get("member") or image["path"]
        content = read_location({"archive": image.get("archive"), "member": path})
    digest = hashlib.sha256(content).digest()
    where = f"split {split}, {item}"
    if digest in seen:
        message = f"the same image is in {seen[digest]}"
        if seen[digest].split(",")[0] != f"split {split}":
            problems.error(name, item, f"{message}; scores on it would say nothing: remove it from one split")
        else:
            problems.warn(name, item, message)
    seen.setdefault(digest, where)
    try:
        with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as opened:
            if orientation(opened) != 1:
                problems.warn(
                    name,
                    item,
                    "its EXIF block turns it; see on the contact sheet whether the mask lies right, or save it turned",
                )
            if getattr(opened, "n_frames", 1) > 1:
                problems.warn(name, item, "it has several frames; the first one is used")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # the decoder says why


def _count(sample: dict[str, Any], split: SplitReport) -> int:
    """Add a sample to the counts; returns its pixels in segments."""
    if sample["segment_map"] is None:
        masks = [decode_mask(row["rle"]) for row in sample["segments"]]
        areas = {row["id"]: int(mask.sum()) for row, mask in zip(sample["segments"], masks, strict=True)}
        counted = int(np.logical_or.reduce(masks).sum())
    else:
        values, pixels = np.unique(sample["segment_map"], return_counts=True)
        areas = {int(value): int(count) for value, count in zip(values, pixels, strict=True) if value != VOID}
        counted = sum(areas.values())
    rows = sample["segments"]
    split.images += 1
    split.segments += len(rows)
    split.crowds += sum(row["is_crowd"] for row in rows)
    split.empty_images += not rows
    for row in rows:
        split.classes[row["label_id"]].pixels += areas.get(row["id"], 0)
        split.classes[row["label_id"]].segments += not row["is_crowd"]
    for label in {row["label_id"] for row in rows if not row["is_crowd"]}:
        split.classes[label].images += 1
    return counted


def _check_sample(
    row: dict[str, Any], sample: dict[str, Any], counted: int, name: str, item: str, problems: ProblemList
) -> None:
    height, width = sample["image"].height, sample["image"].width
    if min(height, width) < _SMALL_SIDE or max(height, width) > _LONG_RATIO * min(height, width):
        problems.warn(name, item, f"{height} x {width} pixels; too small or too long to learn from")
    if row["segment_map"] and not counted:
        problems.warn(name, item, "its mask is all void; nothing can be learnt from it")
    if row["segments"]:
        present = {segment["id"] for segment in sample["segments"]}
        for segment in row["segments"]:
            if segment["id"] not in present:
                problems.warn(name, f"{item}, segment {segment['id']}", "listed, but has no pixel; it is left out")
        if sample["segment_map"] is None:
            for segment in sample["segments"]:
                if not decode_mask(segment["rle"]).any():
                    problems.warn(name, f"{item}, annotation {segment['id']}", "its mask has no pixel")


def _summarise(split: SplitReport, sizes: Counter[tuple[int, int]], void: int) -> None:
    if sizes:
        split.sizes = sizes.most_common(10)
        split.smallest = min(sizes, key=lambda size: size[0] * size[1])
        split.largest = max(sizes, key=lambda size: size[0] * size[1])
        split.void_share = void / sum(size[0] * size[1] * count for size, count in sizes.items())


def _check_classes(split: SplitReport, dataset: Any, facts: Any, report: DataReport) -> None:
    present = [row for row in split.classes if row.segments]
    if split.images and not present:
        report.problems.error(
            facts.path, f"split {split.split!r}", "no image has a segment of any class; all is void or crowd"
        )
    elif facts.task == "semantic" and len(split.classes) > 1 and len(present) == 1 and split.void_share > 0:
        report.problems.error(
            facts.path,
            f"split {split.split!r}",
            f"all pixels are {present[0].name!r} or void; if masks are binary, saved as 0 and 255, list 255 as a class",
        )


_LISTED = 3  # so many problems of one kind are all listed
# What differs between problems of one kind: quoted names, paths, numbers and lists of them.
_PARTICULAR = re.compile(r"'[^']*'|\S*[/\\]\S*|\d+(\.\d+)?(, \d+(\.\d+)?)*")


def report_text(report: DataReport, most_lines: int = 20) -> str:
    """The report as text.

    Args:
        report: of the check.
        most_lines: for problems.
    """
    lines = [report.data]
    for split in report.splits:
        low, high = split.smallest, split.largest
        lines.append(
            f"\nsplit {split.split}, {split.task}: {_number(split.images, 'image')}, "
            f"{_number(split.segments, 'segment')}, {_number(split.crowds, 'crowd')}, "
            f"{_number(split.empty_images, 'image')} without segments, {split.void_share:.1%} of all pixels void"
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
    lines.append(f"\n{_number(errors, 'problem')} that would hurt training, {_number(warnings, 'warning')}")
    return "\n".join(lines + _problem_lines(report.problems, most_lines))


def _problem_lines(problems: ProblemList, most: int) -> list[str]:
    """Errors, then warnings; of a kind with many problems the first alone, and how many more there are."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: problem.severity):
        kinds.setdefault((problem.severity, _PARTICULAR.sub("*", problem.message)), []).append(problem)
    lines, told = list[str](), 0
    for (severity, _), members in kinds.items():
        shown = members if len(members) <= _LISTED else members[:1]
        if len(lines) + len(shown) > most:
            break
        told += len(members)
        more = f" (... and {len(members) - len(shown)} more of this kind)" if len(members) > len(shown) else ""
        lines += [f"{severity}: {problem}{more}" for problem in shown]
    if told < len(problems):
        lines.append(f"... and {len(problems) - told} more of other kinds")
    if len(problems) > sum(line.startswith(("error: ", "warning: ")) for line in lines):
        lines.append("--json lists all")
    return lines


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


_COLUMNS = 4
_PANEL = (480, 360)  # width, height
_MOST_ENLARGED = 8


def sample_sheet(
    samples: Sequence[tuple[dict[str, Any], Mapping[int, str]]], recipe: str | None = None, size: int = 640
) -> Image.Image:
    """Draw samples on one sheet.

    Args:
        samples: decoded samples of a reader, with their class names.
        recipe: draw each sample augmented by it as well, see `augmentation`.
        size: of the augmented images.

    Raises:
        ValueError: there is no sample, or no such recipe.
    """
    if recipe is None:
        panels = [_drawn(sample, names) for sample, names in samples]
        titles = [str(sample["image_id"]) for sample, _ in samples]
        rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
        captions = ["   |   ".join(titles[start : start + _COLUMNS]) for start in range(0, len(titles), _COLUMNS)]
        return contact_sheet(rows, row_titles=captions, panel_size=_PANEL)
    augment = augmentation(recipe, size)
    rows, captions = [], []
    for number, (sample, names) in enumerate(samples):
        changed = [augment(sample, sample_generator(0, epoch, number)) for epoch in range(_COLUMNS - 1)]
        rows.append([_drawn(sample, names), *(_drawn_augmented(one, names) for one in changed)])
        captions.append(str(sample["image_id"]))
    return contact_sheet(rows, ["as read", *[recipe] * (_COLUMNS - 1)], row_titles=captions, panel_size=_PANEL)


def _drawn(sample: Mapping[str, Any], id2label: Mapping[int, str]) -> Image.Image:
    segment_map, rows = sample["segment_map"], sample["segments"]
    if segment_map is None:
        # Largest first, so that small objects stay visible.
        masks = sorted(((decode_mask(row["rle"]), row) for row in rows), key=lambda pair: -int(pair[0].sum()))
        segment_map = np.full(masks[0][0].shape, VOID, dtype=np.int64)
        for mask, row in masks:
            segment_map[mask] = row["id"]
    image = sample["image"]
    # Small images are enlarged before labels are written on them, so that these do not cover all.
    scale = max(1, math.ceil(min(_PANEL[0] / image.width, _PANEL[1] / image.height)))
    crowds = {row["label_id"] for row in rows if row["is_crowd"]}
    # Crowds are named as such: they are no training targets.
    names = {**id2label, **{label + len(id2label): f"{id2label[label]} (crowd)" for label in crowds}}
    marked = [{**row, "label_id": row["label_id"] + len(id2label) * row["is_crowd"]} for row in rows]
    return draw_segments(image, segment_map, marked, names, scale=min(scale, _MOST_ENLARGED))


def _drawn_augmented(sample: AugmentedSample, id2label: Mapping[int, str]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(sample.pixels.permute(1, 2, 0).numpy()))
    labels = sample.labels.tolist()
    rows = [{"id": index, "label_id": label} for index, label in enumerate(labels)]
    segment_map = sample.segment_map.numpy().astype(np.int64)
    if sample.masks is not None:
        segment_map = np.full(segment_map.shape, VOID, dtype=np.int64)
        for index, mask in sorted(enumerate(sample.masks.numpy()), key=lambda pair: -int(pair[1].sum())):
            segment_map[mask] = index
    segment_map[segment_map < 0] = VOID
    return draw_segments(image, segment_map, rows, id2label)
