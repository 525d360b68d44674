"""Check a whole data set for whatever would hurt training.

`check_dataset` reads it once and returns a `DataReport` of counts, problems and samples; `report_text` formats it;
`sample_sheet` draws the samples with their masks, as read and augmented. Besides what the readers refuse, the check
looks for duplicate images, above all across splits; segments without pixels; masks that are all void; binary masks
saved as 0 and 255; images that viewers turn, that are nearly black, or that nothing names; classes that occur only as
crowd, in one split or in one image; and misspelt class names. Where an option would mend it, the message names it.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ..drawing.segments import contact_sheet, draw_segments
from ..models.image_bands import is_tiff
from ..models.image_decoding import IMAGE_FORMATS, few_values, image_size, tiff_pages_of
from ..models.mask_encoding import decode_mask
from .archives import location_name, read_location
from .augmentation import AugmentedSample, augmentation, sample_generator
from .class_lists import VOID, similar_names
from .decoding import PolygonMasks, orientation
from .folders import IMAGE_SUFFIXES, DataFolder
from .label_tables import LABEL_TABLES, label_table
from .problems import Problem, ProblemList, printable, some_of
from .readers import FORMATS
from .reading import (
    available_splits,
    decoder_of,
    describe,
    image_settings_of,
    load_segmentation_dataset,
    metadata,
)

_SMALL_SIDE = 16  # pixels; less is smaller than one patch
_LONG_RATIO = 20  # long side to short side; beyond it, most likely no photograph
_DARK_SHARE = 16  # of the range of values: 12 bits stored in 16 fill a sixteenth
_MOST_VOID = 0.5  # of all pixels; more is hardly meant, and the background was
_FEW_IMAGES = 3  # in fewer, every class is rare


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
        split: by default all, which also finds images that are in two splits.
        num_samples: samples to keep for a contact sheet, evenly spaced.
        progress: wraps the rows of a split, given its name; for a progress bar.
        options: of the format.

    Raises:
        ValueError: nothing can be read at all.
    """
    report = DataReport(spec)
    splits = [split] if split else available_splits(spec, **options)
    seen: dict[bytes, str] = {}  # across splits: images in both training and validation are the worst duplicates
    used: set[tuple[str | None, str]] = set()
    failures: dict[str, ValueError] = {}
    for name in splits:
        try:
            dataset = load_segmentation_dataset(spec, split=name, task=task, problems=report.problems, **options)
        except ValueError as error:
            failures[name] = error
            continue
        report.splits.append(_check_split(dataset, report, seen, used, math.ceil(num_samples / len(splits)), progress))
    if len(failures) == len(splits):  # format, path or an option is wrong
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        # Roboflow names a test split also where it exports none.
        add = report.problems.warn if name == "test" else report.problems.error
        add(spec, f"split {name!r}", f"cannot be read: {failure}")
    if not split:
        _check_unread_images(describe(dataset).path, used, report.problems)
    _check_across_splits(report, describe(dataset).format)
    # What concerns the whole folder is found again in each of its splits.
    report.problems[:] = dict.fromkeys(report.problems)
    return report


def _check_split(
    dataset: Any,
    report: DataReport,
    seen: dict[bytes, str],
    used: set[tuple[str | None, str]],
    num_samples: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> SplitReport:
    description = describe(dataset)
    decode = decoder_of(dataset).decode
    classes = [ClassCounts(name) for name in description.id2label.values()]
    split = SplitReport(description.split, description.task, classes=classes, remarks=list(description.remarks))
    sizes: Counter[tuple[int, int]] = Counter()
    void = 0
    range_is_known = image_settings_of(dataset).value_range is not None
    samples = set(np.linspace(0, max(0, len(dataset) - 1), num_samples).astype(int).tolist())
    for index, row in enumerate(progress(metadata(dataset), split.split)):
        image = row["image"]
        name = location_name(image) if "member" in image else str(image.get("path") or "row")
        item = f"image {row['image_id']!r}"
        used.update((file.get("archive"), file["member"]) for file in _files_of(row))
        try:
            _check_file(image, name, item, split.split, seen, report, range_is_known)
            sample = decode(row)
        except ValueError as error:
            report.problems.error(name, item, str(error).removeprefix(f"{name}: "))
            continue
        size = image_size(sample["image"])
        sizes[size] += 1
        counted = _count(sample, split)
        void += size[0] * size[1] - counted
        _check_sample(row, sample, counted, name, item, report.problems)
        _check_values(sample["image"], name, item, report.problems)
        if index in samples:
            report.samples.append((sample, description.id2label))
    if sizes:
        split.sizes = sizes.most_common(10)
        split.smallest = min(sizes, key=math.prod)
        split.largest = max(sizes, key=math.prod)
        split.void_share = void / sum(math.prod(size) * count for size, count in sizes.items())
    has_outlines = "polygons" in dataset.features["segments"].feature
    _check_classes(split, description.path, report, description.format if has_outlines else None)
    return split


def _files_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Locations of an image and its masks; none for a column that holds the files themselves."""
    return [file for file in (row["image"], *(row["segment_map"] or ())) if isinstance(file, dict) and "member" in file]


def _check_file(
    image: dict[str, Any],
    name: str,
    item: str,
    split: str,
    seen: dict[bytes, str],
    report: DataReport,
    range_is_known: bool,
) -> None:
    """Find what decoded pixels no longer show: duplicates, EXIF rotation, several pages, few of 65536 values."""
    problems = report.problems
    if image.get("bytes"):  # a column of the Hub holds the file itself
        content = image["bytes"]
    elif image.get("member", "").startswith("generated:"):
        return  # drawn on demand: there is no file
    else:
        path = image.get("member") or image["path"]
        content = read_location({"archive": image.get("archive"), "member": path})
    digest = hashlib.sha256(content).digest()
    where = f"split {split}, {item}"
    if digest in seen:
        message = f"the same image is in {seen[digest]}"
        if seen[digest].split(",")[0] != f"split {split}":
            problems.error(name, item, f"{message}; scores on it are meaningless: remove it from one split")
        else:
            problems.warn(name, item, message)
    seen.setdefault(digest, where)
    if not range_is_known and (note := few_values(content)):
        problems.warn(name, item, note)
    if is_tiff(content):
        if (pages := len(tiff_pages_of(content))) > 1:
            problems.warn(name, item, f"it has {pages} pages; the first one is used")
        return
    try:
        with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as opened:
            if orientation(opened) != 1:
                problems.warn(
                    name,
                    item,
                    "its EXIF block turns it; check the mask on the contact sheet, or save the image turned",
                )
            if getattr(opened, "n_frames", 1) > 1:
                problems.warn(name, item, "it has several frames; the first one is used")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # the decoder, which is next, reports the reason


def _count(sample: dict[str, Any], split: SplitReport) -> int:
    """Add a sample to the counts; returns how many of its pixels have a segment."""
    if sample["segment_map"] is None:
        masks = [decode_mask(row["rle"]) for row in sample["segments"]]
        areas = {row["id"]: int(mask.sum()) for row, mask in zip(sample["segments"], masks, strict=True)}
        counted = int(np.logical_or.reduce(masks).sum())  # not the sum of areas, as masks may overlap
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
        split.classes[row["label_id"]].crowds += row["is_crowd"]
    for label in {row["label_id"] for row in rows if not row["is_crowd"]}:
        split.classes[label].images += 1
    return counted


def _check_sample(
    row: dict[str, Any], sample: dict[str, Any], counted: int, name: str, item: str, problems: ProblemList
) -> None:
    height, width = image_size(sample["image"])
    if min(height, width) < _SMALL_SIDE or max(height, width) > _LONG_RATIO * min(height, width):
        problems.warn(name, item, f"{height} x {width} pixels; too small or too long to learn from")
    if row["segment_map"] and not counted:
        problems.warn(name, item, "its mask is all void; nothing can be learnt from it")
    if not row["segments"]:
        return
    if "polygons" in row["segments"][0]:
        # The annotations themselves, as a map no longer shows them: its ids are those of classes, and later ones cover
        # earlier ones.
        for segment in PolygonMasks()([], row["segments"], name)[1]:
            if not decode_mask(segment["rle"]).any():
                problems.warn(name, f"{item}, annotation {segment['id']}", "its mask has no pixel")
        return
    present = {segment["id"] for segment in sample["segments"]}
    for segment in row["segments"]:
        if segment["id"] not in present:
            problems.warn(name, f"{item}, segment {segment['id']}", "listed, but has no pixel; it is left out")


def _check_values(image: Any, name: str, item: str, problems: ProblemList) -> None:
    largest = int(np.asarray(image).max(initial=0))
    already = any(problem.file == name and "nearly black" in problem.message for problem in problems[-8:])
    if largest < 256 // _DARK_SHARE and not already:
        problems.warn(
            name,
            item,
            f"its largest value is {largest} of 255, so that it is nearly black; save it with its full range, or if "
            "the file has more than 8 bits, give the range of its values as in range=0-4095",
        )


def _check_classes(split: SplitReport, path: str, report: DataReport, outline_format: str | None) -> None:
    """Look for classes that cannot be learnt; `outline_format` is the format if it stores outlines."""
    item, problems = f"split {split.split!r}", report.problems
    present = [row for row in split.classes if row.segments]
    if split.images and not present:
        problems.error(path, item, "no image has a segment of any class; all is void or crowd")
    elif split.task != "semantic" or not split.void_share:
        return
    elif outline_format:
        remedy = "annotate the rest"
        if "background" in _options(outline_format):
            remedy = f"if they are background, give {with_option(report.data, 'background=background')}"
        if len(present) == 1:
            message = f"all pixels are {present[0].name!r} or void, so that nothing can be learnt"
            problems.error(path, item, f"{message}; {remedy}")
        elif split.void_share > _MOST_VOID:
            message = (
                f"{split.void_share:.1%} of all pixels have no annotation and are void, neither trained nor scored"
            )
            problems.warn(path, item, f"{message}; {remedy}")
    elif len(present) == 1:
        # 255 is void unless it is listed, so the foreground of a binary mask disappears without an error.
        problems.error(
            path,
            item,
            f"all pixels are {present[0].name!r} or void, so that nothing can be learnt; if masks are binary, saved as "
            "0 and 255, list 255 as a class",
        )


def _check_across_splits(report: DataReport, format_name: str) -> None:
    """Compare the classes of all splits, and look for misspelt names."""
    problems, splits = report.problems, [split for split in report.splits if split.images]
    lists = {split.split: [row.name for row in split.classes] for split in splits}
    for name, names in list(lists.items())[1:]:
        first = next(iter(lists))
        if names != lists[first]:
            extra = [label for label in names if label not in lists[first]]
            absent = [label for label in lists[first] if label not in names]
            parts = [
                f"only {where} lists {some_of(labels)}" for where, labels in ((name, extra), (first, absent)) if labels
            ]
            message = "; ".join(parts) or "the order differs"
            problems.error(
                report.data,
                f"split {name!r}",
                f"its classes are not those of {first}: {message}; list the same classes",
            )
    counts: dict[str, dict[str, ClassCounts]] = defaultdict(dict)
    for split in splits:
        for row in split.classes:
            counts[row.name][split.split] = row
    crowds, rare, lonely = [], [], defaultdict[str, list[str]](list)
    for label, rows in counts.items():
        having = [name for name, row in rows.items() if row.segments]
        if not having and any(row.crowds for row in rows.values()):
            crowds.append(label)
        elif len(having) == 1 and len(splits) > 1:
            lonely[having[0]].append(label)
        elif sum(row.images for row in rows.values()) == 1 and sum(split.images for split in splits) >= _FEW_IMAGES:
            rare.append(label)
    # COCO's reader has said so already, with the file that says it.
    if crowds and not any("only as crowd" in problem.message for problem in problems):
        remedy = "mark them as objects"
        if "crowd" in _options(format_name):
            remedy = f"{with_option(report.data, 'crowd=objects')} reads them as objects"
        noun = "class occurs" if len(crowds) == 1 else "classes occur"
        problems.warn(
            report.data,
            "",
            f"{len(crowds)} {noun} only as crowd, which trains nothing: {some_of(crowds)}; CVAT marks masks drawn with "
            f"a brush so; {remedy}",
        )
    for name, labels in lonely.items():
        effect = (
            "they cannot be scored"
            if name == splits[0].split
            else f"{splits[0].split} has none, so they are not learnt"
        )
        problems.warn(
            report.data, f"split {name!r}", f"classes that occur in this split alone: {some_of(labels)}; {effect}"
        )
    if rare:
        problems.warn(report.data, "", f"classes that occur in one image alone: {some_of(rare)}; add images of them")
    published = {row.name for table in LABEL_TABLES for row in label_table(table).classes}
    for first, second in similar_names(list(counts)):
        if {first, second} <= published:  # such as towel and tower
            continue
        problems.warn(
            report.data,
            "",
            f"the classes {first!r} and {second!r} are spelt nearly alike; if they are one class, rename one of them",
        )


def _check_unread_images(path: str, used: set[tuple[str | None, str]], problems: ProblemList) -> None:
    """Name images that nothing refers to, in folders of which others are used or with annotations beside them."""
    try:
        files = DataFolder(path).files("")
    except ValueError:  # no folder: generated, or on the Hub
        return
    named = {problem.file for problem in problems}
    folders = {(archive, posixpath.dirname(member.replace("\\", "/"))) for archive, member in used}
    unread: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for name, location in files.items():
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        is_annotated = f"{stem}.json" in files or f"{stem}.xml" in files
        folder = (location["archive"], posixpath.dirname(location["member"].replace("\\", "/")))
        is_new = (location["archive"], location["member"]) not in used and location_name(location) not in named
        if is_new and (folder in folders or is_annotated):
            unread[folder].append(posixpath.basename(location["member"]))
    missing = any(
        "there is no file" in problem.message or "there is no image" in problem.message for problem in problems
    )
    hint = "while annotations name files that are not there: do the names differ?" if missing else ""
    for (archive, parent), names in unread.items():
        reason = "that no annotation names" if (archive, parent) in folders else "with annotations, but in no split"
        message = f"{_number(len(names), 'image')} {reason}, not read: {some_of(names)}"
        problems.warn(f"{archive}/{parent}" if archive else parent, "", f"{message}{hint and f', {hint}'}")


def with_option(spec: str, option: str) -> str:
    """A spec with an option added, as it can be copied to a command line."""
    return f"'{spec}{'&' if '?' in spec else '?'}{option}'"


def _options(format_name: str) -> tuple[str, ...]:
    return FORMATS[format_name].options if format_name in FORMATS else ()


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
            f"\nsplit {split.split}, {split.task}: {_number(split.images, 'image')}, "
            f"{_number(split.segments, 'segment')}, {_number(split.crowds, 'crowd')}, "
            f"{_number(split.empty_images, 'image')} without segments, {split.void_share:.1%} of all pixels {uncovered}"
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


def _number(count: int, noun: str) -> str:
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
        return contact_sheet(rows, row_titles=captions, panel_size=_PANEL)
    augment = augmentation(recipe, size)
    rows, captions = [], []
    for index, (sample, names) in enumerate(samples):
        augmented = [augment(sample, sample_generator(0, epoch, index)) for epoch in range(_COLUMNS - 1)]
        rows.append([_drawn(sample, names), *(_drawn_augmented(version, names) for version in augmented)])
        captions.append(str(sample["image_id"]))
    return contact_sheet(rows, ["as read", *[recipe] * (_COLUMNS - 1)], row_titles=captions, panel_size=_PANEL)


def _drawn(sample: Mapping[str, Any], id2label: Mapping[int, str]) -> Image.Image:
    segment_map, rows = sample["segment_map"], sample["segments"]
    if segment_map is None:
        segment_map = _flattened(np.stack([decode_mask(row["rle"]) for row in rows]), [row["id"] for row in rows])
    image = sample["image"]
    # Small images are enlarged before labels are written, which would cover them otherwise.
    scale = max(1, math.ceil(min(_PANEL[0] / image.width, _PANEL[1] / image.height)))
    crowds = {row["label_id"] for row in rows if row["is_crowd"]}
    # Crowds get labels of their own, to be named as such: they are no training targets.
    names = {**id2label, **{label + len(id2label): f"{id2label[label]} (crowd)" for label in crowds}}
    marked = [{**row, "label_id": row["label_id"] + len(id2label) * row["is_crowd"]} for row in rows]
    return draw_segments(image, segment_map, marked, names, scale=min(scale, _MOST_ENLARGED))


def _drawn_augmented(sample: AugmentedSample, id2label: Mapping[int, str]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(sample.pixels.permute(1, 2, 0).numpy()))
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
