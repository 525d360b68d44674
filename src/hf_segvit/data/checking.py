"""Check a whole data set for whatever would hurt training.

`check_dataset` reads it once and returns a `DataReport` (data_report.py) of counts, problems and samples. Besides what
the readers refuse, the check looks for duplicate images, above all across splits; segments without pixels; masks that
are all void; images that viewers turn, that are nearly black, or that nothing names. What it finds about classes is in
class_checks.py. Where an option would mend a fault, the message names it.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..models.image_decoding import few_values, image_size
from ..models.image_files import count_pages, stored_frame
from ..models.image_tiff import is_tiff
from ..models.image_values import few_values_unsaid
from .archives import location_name, read_location
from .class_checks import check_across_splits, check_classes
from .data_report import ClassCounts, DataReport, SplitReport, numbered
from .decoding import PolygonMasks, segment_areas
from .folders import IMAGE_SUFFIXES, DataFolder
from .mask_files import mask_area
from .problems import ProblemList, some_of
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
        with few_values_unsaid():
            split_report = _check_split(dataset, report, seen, used, math.ceil(num_samples / len(splits)), progress)
        report.splits.append(split_report)
    if len(failures) == len(splits):  # format, path or an option is wrong
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        # Roboflow names a test split also where it exports none.
        add = report.problems.warn if name == "test" else report.problems.error
        add(spec, f"split {name!r}", f"cannot be read: {failure}")
    if not split:
        _check_unread_images(describe(dataset).path, used, report.problems)
    check_across_splits(report, describe(dataset).format)
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
        _check_sample(row, sample, split.task, counted, name, item, report.problems)
        _check_values(sample["image"], name, item, report.problems)
        if index in samples:
            report.samples.append((sample, description.id2label))
    if sizes:
        split.sizes = sizes.most_common(10)
        split.smallest = min(sizes, key=math.prod)
        split.largest = max(sizes, key=math.prod)
        split.void_share = void / sum(math.prod(size) * count for size, count in sizes.items())
    has_outlines = "polygons" in dataset.features["segments"].feature
    check_classes(split, description.path, report, description.format if has_outlines else None)
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
    if (pages := count_pages(content)) > 1:
        problems.warn(name, item, f"it has {pages} pages; the first one is used")
    if is_tiff(content):
        return
    try:
        if stored_frame(content, name)[2] != 1:
            problems.warn(
                name, item, "its EXIF block turns it; check the mask on the contact sheet, or save the image turned"
            )
    except ValueError:
        return  # the decoder, which is next, reports the reason


def _count(sample: dict[str, Any], split: SplitReport) -> int:
    """Add a sample to the counts; returns how many of its pixels have a segment."""
    areas, counted = segment_areas(sample)
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
    row: dict[str, Any], sample: dict[str, Any], task: str, counted: int, name: str, item: str, problems: ProblemList
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
            if not mask_area(segment["rle"]):
                problems.warn(name, f"{item}, annotation {segment['id']}", "its mask has no pixel")
        return
    key = "label_id" if task == "semantic" else "id"  # semantic maps merge the segments of a class
    present = {segment[key] for segment in sample["segments"]}
    for segment in row["segments"]:
        if segment[key] not in present:
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
        message = f"{numbered(len(names), 'image')} {reason}, not read: {some_of(names)}"
        problems.warn(f"{archive}/{parent}" if archive else parent, "", f"{message}{hint and f', {hint}'}")
