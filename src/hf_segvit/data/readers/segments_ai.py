"""segments.ai: the release file and the images with their label PNGs; panoptic, instance or semantic.

The release's JSON file lists classes and samples. `NAME.jpg` has the label PNG `NAME_label_ground-truth.png`, as the
X
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..archives import Location, location_name
from ..class_lists import VOID, LabelRule, label_rule, listed_names, option_names
from ..decoding import Segments, semantic_segments, upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..mask_files import present_values, read_color_ids
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import (
    Shape,
    ShapedImage,
    add_problem,
    file_split,
    find_image,
    is_in_split,
    json_files,
    points_of,
    shape_reading,
    split_names,
    unwrapped_files,
)

DESCRIPTION = "segments.ai's release file with its label PNGs"
TASKS = ("panoptic", "instance", "semantic")
LAYOUT = "the release's JSON file, NAME.jpg and NAME_label_ground-truth.png"


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with a release file, or "all" for one in the data set's own folder."""
    return split_names((file_split(name) for name in json_files(DataFolder(path), is_release)), wanted)


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    background: Any = None,
    void: Any = (),
    drop: Any = (),
    stuff: Any = (),
    labelset: str = "ground-truth",
) -> Reading:
    """Read one split of the labels `labelset`; the other options are for the rule for labels."""
    folder = DataFolder(path)
    files = unwrapped_files(folder, IMAGE_SUFFIXES)
    images = FileList((name, location) for name, location in files.items() if "_label_" not in name)
    releases = json_files(folder, is_release)
    if not releases:
        raise ValueError(f"{path}: there is no release file of segments.ai; expected {LAYOUT}; check the path")
    categories: dict[int, tuple[str, bool]] = {}
    for location, content in releases.values():
        categories |= _categories(content, location_name(location))
    names = [name for name, _ in categories.values()]
    listed = list(listed_names(classes)) if classes is not None else names
    options: dict[str, Any] = {"background": background, "void": void, "drop": drop}
    bitmaps: list[dict[str, Any]] = []
    shaped: list[ShapedImage] = []
    used: set[str] = set()
    for file, (location, content) in releases.items():
        where = location_name(location)
        is_own = is_in_split(file_split(file), split)
        for index, sample in enumerate(content["dataset"]["samples"]):
            item = f"sample {sample.get('name')!r}" if isinstance(sample, dict) else f"samples[{index}]"
            annotations = _annotations(sample, labelset)
            used |= {categories[row["category_id"]][0] for row in annotations or [] if _is_known(row, categories)}
            if not is_own:
                continue
            if annotations is None:
                problems.warn(where, item, f"there are no labels {labelset!r}; the image is left out")
                continue
            try:
                image = find_image(images, sample.get("name"), where)
                stem = posixpath.splitext(str(sample["name"]))[0]
                if any("points" in row for row in annotations if isinstance(row, dict)):
                    shaped.append(ShapedImage(image, stem, upright_size(image), where))
                    _add_shapes(annotations, item, categories, shaped[-1], problems)
                else:
                    png = find_image(files, f"{stem}_label_{labelset}.png", where)
                    rows = _rows(annotations, item, categories, where, problems)
                    bitmaps.append({"image": image, "image_id": stem, "segment_map": [png], "segments": rows})
            except ValueError as error:
                add_problem(problems, where, item, error)
    if shaped:
        # Where the release says what has instances, the rest is stuff.
        own = [name for name, is_thing in categories.values() if not is_thing and name in listed]
        stuff = stuff or (own if len(own) < len(listed) else ())
        return shape_reading(shaped, listed, task, problems, source=path, used=used, stuff=stuff, **options)
    rule = label_rule(listed, task, used=used, source=path, **options)
    chosen = option_names(stuff)
    things = {name for name, is_thing in categories.values() if (name not in chosen if any(chosen) else is_thing)}
    return _bitmap_reading(bitmaps, rule, things, task, list(categories.values()))


def is_release(content: Any) -> bool:
    """Whether the content of a JSON file is a release of segments.ai."""
    dataset = content.get("dataset") if isinstance(content, dict) else None
    return isinstance(dataset, dict) and isinstance(dataset.get("samples"), list)


def _categories(content: Mapping[str, Any], where: str) -> dict[int, tuple[str, bool]]:
    """Name, and whether it is a thing, by category id."""
    dataset = content["dataset"]
    attributes = dataset.get("task_attributes") or dataset.get("attributes")
    entries = attributes.get("categories") if isinstance(attributes, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: lists no categories (dataset.task_attributes.categories); download it again")
    categories = {}
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise ValueError(f"{where}: category {entry!r} needs a whole number `id` and a `name`")
        categories[entry["id"]] = (entry["name"].strip(), bool(entry.get("has_instances")))
    return dict(sorted(categories.items()))


def _annotations(sample: Any, labelset: str) -> list[Any] | None:
    labels = sample.get("labels") if isinstance(sample, dict) else None
    label = labels.get(labelset) if isinstance(labels, dict) else None
    # An image that nobody labelled is no image without objects.
    if not isinstance(label, dict) or label.get("label_status") in ("UNLABELED", "SKIPPED"):
        return None
    attributes = label.get("attributes")
    rows = attributes.get("annotations") if isinstance(attributes, dict) else None
    return rows if isinstance(rows, list) else None


def _is_known(row: Any, categories: Mapping[int, Any]) -> bool:
    return isinstance(row, dict) and type(row.get("category_id")) is int and row["category_id"] in categories


def _rows(
    annotations: Sequence[Any],
    item: str,
    categories: Mapping[int, tuple[str, bool]],
    where: str,
    problems: ProblemList,
) -> Segments:
    rows: Segments = []
    for row in annotations:
        segment_id = row.get("id") if isinstance(row, dict) else None
        if type(segment_id) is not int or segment_id < 1 or any(other["id"] == segment_id for other in rows):
            problems.error(where, item, f"the segment {segment_id!r} needs a whole number above 0 of its own as id")
        elif not _is_known(row, categories):
            problems.error(where, f"{item}, segment {segment_id}", f"category {row.get('category_id')!r} is unknown")
        else:
            rows.append({"id": segment_id, "name": categories[row["category_id"]][0], "is_crowd": False})
    return rows


def _add_shapes(
    annotations: Sequence[Any],
    item: str,
    categories: Mapping[int, tuple[str, bool]],
    image: ShapedImage,
    problems: ProblemList,
) -> None:
    for index, row in enumerate(annotations):
        name = f"{item}, annotation {index}"
        if not _is_known(row, categories):
            problems.error(image.where, name, "its category is unknown; download the release again")
        elif row.get("type") != "polygon":
            problems.warn(image.where, name, f"an annotation of type {row.get('type')!r} is left out")
        else:
            try:
                polygon = points_of(row.get("points"))
                image.shapes.append(Shape(name, categories[row["category_id"]][0], [polygon]))
            except ValueError as error:
                add_problem(problems, image.where, name, error, "correct or remove the annotation")


def _bitmap_reading(
    rows: list[dict[str, Any]], rule: LabelRule, things: set[str], task: str, categories: list[tuple[str, bool]]
) -> Reading:
    names = list(rule.names)
    # Where no class has instances, the instance task would have none: all of them are objects then.
    is_object = {name: (task != "panoptic" and not things) or name in things for name, _ in categories}
    left_out: dict[str, list[int]] = {}
    for row in rows:
        kept = []
        for segment in row["segments"]:
            label = rule.label_of(segment["name"])
            if label is None or label == VOID or (task == "instance" and not is_object[segment["name"]]):
                left_out.setdefault(row["segment_map"][0]["member"], []).append(segment["id"])
            else:
                kept.append({"id": segment["id"], "label_id": label, "is_crowd": False})
        row["segments"] = kept
    stuff = [label for label, name in enumerate(names) if name not in things] if task == "panoptic" else []
    background = VOID if rule.background is None else rule.background
    reader = BitmapMasks(task == "semantic", background, left_out)
    return Reading(reader, names, stuff, rows, remarks=list(rule.decisions))


@dataclass(frozen=True)
class BitmapMasks:
    """Masks of label PNGs, in whose colours red + 256 green + 65536 blue is a segment's id; 0 is unlabelled."""

    is_semantic: bool
    background: int  # label id of unlabelled pixels in semantic maps
    void_ids: Mapping[str, Sequence[int]]  # listed segments that are void, by the PNG's member

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_color_ids(maps[0])
        present = np.array(present_values(ids), dtype=np.int32)
        rows = segments or []
        labels = {row["id"]: row["label_id"] if self.is_semantic else row["id"] for row in rows}
        labels[0] = self.background if self.is_semantic else VOID
        labels |= dict.fromkeys(self.void_ids.get(maps[0]["member"], ()), VOID)
        if unlisted := [int(value) for value in present if int(value) not in labels]:
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {unlisted[:5]}, which the release file does not "
                "list; PNG and JSON are of different releases: get both from one"
            )
        table = np.array([labels[int(value)] for value in present], dtype=np.int32)
        segment_map = table[np.searchsorted(present, ids)]
        if self.is_semantic:
            return segment_map, semantic_segments(segment_map)
        return segment_map, [row for row in rows if row["id"] in set(present.tolist())]
