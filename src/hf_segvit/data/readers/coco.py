"""COCO in its official layout: panoptic (133 classes) or instance (80).

`train2017/*.jpg`, `annotations/panoptic_train2017.json`, `annotations/panoptic_train2017/*.png` and
`annotations/instances_train2017.json`, in folders or in the official archives, which are read in place. Label ids
follow the published order. For other classes see coco_folder.py, which shares most of this module:

- `read_coco_file` checks what both formats have in common. An entry with a missing, duplicate or unknown id is reported
  with its file and id, and left out.
- `instance_rows`: polygons or run-length masks, which may overlap.
- `panoptic_rows` and `PanopticMasks`: a JSON file with `segments_info`, and PNGs that encode segment ids as colours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.image_decoding import max_image_pixels
from ..archives import Location, location_name, read_json
from ..class_lists import VOID, label_rule
from ..decoding import PolygonMasks, Segments, semantic_segments
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList, find_elsewhere, find_named
from ..label_tables import LabelTable, label_table
from ..mask_files import compressed_counts, polygon_fault, present_values, read_color_ids, rle_fault
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "COCO in its official layout: panoptic or instance"
TASKS = ("panoptic", "instance")
LAYOUT = (
    "train2017/*.jpg and annotations/panoptic_train2017.json or instances_train2017.json, or the official "
    "zip files; classes of your own need the format coco_folder"
)

_YEARS = ("2017", "2014", "")
_MOST_LISTED = 3  # up to this many images that cannot be found are reported one by one
_PLAIN_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_LARGEST_ID = 2**24 - 1  # segment ids of panoptic PNGs are stored in three channels of 8 bits


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have annotations."""
    names = ("train", "val", *wanted)
    return [name for name in names if any(_annotation_file(path, name, task)[1] for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList, void: Any = (), crowd: Any = "ignore") -> Reading:
    """Read the split "train" or "val", with or without the year; the categories must be COCO's.

    The options are those of `label_rule`; classes that are void are not among the classes, as in other formats.
    """
    folder, location, name = _annotation_file(path, split, task)
    if location is None:
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected {LAYOUT}")
    images = folder.files(name, f"images/{name}", suffixes=IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{path}: no images of split {split!r}; expected the folder {name}, or {name}.zip")
    file = read_coco_file(location, images, problems)
    table = label_table("coco_panoptic" if task == "panoptic" else "coco_instance")
    _check_categories(file, table)
    rule = label_rule(list(table.id2label.values()), task, void=void, crowd=crowd, source=table.title)
    names, remarks = list(rule.names), list(rule.decisions)
    labels = {label.source_id: rule.labels[label.name] for label in table.classes}
    if task == "instance":
        # A void object cannot be told from no object where masks are not painted.
        labels = {source_id: None if label == VOID else label for source_id, label in labels.items()}
        rows = instance_rows(file, labels, problems, rule.crowds_are_objects)
        return Reading(PolygonMasks(), names, [], rows, outlines=True, remarks=remarks)
    maps = folder.files(f"annotations/panoptic_{name}", f"panoptic_{name}", suffixes=(".png",))
    rows = panoptic_rows(file, maps, labels, problems, rule.crowds_are_objects)
    stuff = [names.index(label.name) for label in table.classes if not label.is_thing and label.name in names]
    return Reading(PanopticMasks(some_are_void=VOID in labels.values()), names, stuff, rows, remarks=remarks)


def _annotation_file(path: str, split: str, task: str) -> tuple[DataFolder, Location | None, str]:
    """Folder, JSON file, and the split's name with its year."""
    kind = "panoptic" if task == "panoptic" else "instances"
    for year in [split[-4:]] if split[-4:].isdigit() else _YEARS:
        name = split if split.endswith(year) else f"{split}{year}"
        archives = (
            f"{name}.zip",
            f"annotations/panoptic_{name}.zip",
            f"panoptic_annotations_trainval{year}.zip",
            # The official panoptic archive holds the PNGs as archives within it.
            f"panoptic_annotations_trainval{year}.zip::annotations/panoptic_{name}.zip",
            f"annotations_trainval{year}.zip",
        )
        folder = DataFolder(path, archives)
        if location := folder.file(f"annotations/{kind}_{name}.json"):
            return folder, location, name
    return folder, None, split


def _check_categories(file: CocoFile, table: LabelTable) -> None:
    known = {label.source_id: label.name for label in table.classes}
    for category_id, entry in file.categories.items():
        if known.get(category_id) != entry["name"]:
            raise ValueError(
                f"{file.name}: category {category_id} is {entry['name']!r}, but in {table.title} it is "
                f"{known.get(category_id)!r}; read a data set with classes of its own as coco_folder"
            )


@dataclass
class CocoFile:
    """A COCO JSON file whose images and categories are checked."""

    name: str  # of the file, for errors
    images: dict[Any, dict[str, Any]]  # entries by image id, in the file's order
    locations: dict[Any, Location]  # image files by image id
    categories: dict[int, dict[str, Any]]  # entries by category id, ascending
    annotations: list[Any]  # as in the file, not yet checked
    left_out: set[Any]  # ids of images that were reported and are not in `images`


def read_coco_file(location: Location, files: FileList, problems: ProblemList) -> CocoFile:
    """Read a COCO JSON file and find the images that it names among `files`."""
    name = location_name(location)
    content = read_json(location)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{name}: there is no list {key!r}; COCO files have images, annotations and categories")
    images, locations = dict[Any, dict[str, Any]](), dict[Any, Location]()
    left_out, not_found = set[Any](), dict[Any, str]()
    for index, image in enumerate(content["images"]):
        item = f"image {image.get('id')!r}" if isinstance(image, dict) else f"images[{index}]"
        if not isinstance(image, dict) or not is_id(image.get("id")):
            problems.error(name, item, "the entry has no id; give each image a number or a text of its own")
            continue
        if image["id"] in images or image["id"] in left_out:
            problems.error(name, item, "two images have this id; number them differently, and their annotations")
            continue
        if not is_size(image.get("height"), image.get("width")):
            size = {key: whole_number(image.get(key)) for key in ("height", "width")}
            if not is_size(*size.values()):
                problems.error(name, item, "height and width must be whole numbers above 0, and those of an image")
                left_out.add(image["id"])
                continue
            image = {**image, **size}
        images[image["id"]] = image
        try:
            locations[image["id"]] = find_named(files, image.get("file_name"), f"{name}: {item}")
        except ValueError as error:
            not_found[image["id"]] = str(error).removeprefix(f"{name}: {item}: ")
    if not_found:
        _find_elsewhere(name, images, locations, not_found, files, problems)
    for image_id in not_found:
        del images[image_id]
        left_out.add(image_id)
    # In the file's order, though some images were found later than others.
    locations = {image_id: locations[image_id] for image_id in images}
    categories = checked_categories(content["categories"], name)
    return CocoFile(name, images, locations, categories, content["annotations"], left_out)


def _find_elsewhere(
    name: str,
    images: Mapping[Any, Mapping[str, Any]],
    locations: dict[Any, Location],
    not_found: dict[Any, str],
    files: FileList,
    problems: ProblemList,
) -> None:
    """Find images by their bare file names; adds to `locations`, and removes from `not_found` what was found.

    Args:
        not_found: what is wrong with the file name, by image id.
    """
    taken = {_file(location) for location in locations.values()}
    found: dict[tuple[str | None, str], list[Any]] = {}
    for image_id in not_found:
        if location := find_elsewhere(files, images[image_id].get("file_name")):
            found.setdefault(_file(location), []).append(image_id)
    moved = []
    for (archive, member), image_ids in found.items():
        # Two images that would be one file have names that are not unique: a guess would mix up their annotations.
        if len(image_ids) == 1 and (archive, member) not in taken:
            locations[image_ids[0]] = Location(archive=archive, member=member)
            del not_found[image_ids[0]]
            moved.append(f"{images[image_ids[0]]['file_name']!r} as {location_name(locations[image_ids[0]])}")
    if moved:
        problems.warn(
            name,
            "",
            f"{len(moved)} of {len(images)} images are not where the file says, and were found by their bare file "
            f"names: {moved[0]}",
        )
    taken |= {_file(location) for location in locations.values()}
    others = [name for names in files.by_bare_name.values() for name in names if _file(files[name]) not in taken]
    hint = f"; {len(others)} images of the folder are not listed, such as {others[0]!r}" if others else ""
    _report_missing(name, not_found, len(images), f"images cannot be found, and are left out{hint}", problems)


def _file(location: Location) -> tuple[str | None, str]:
    return location["archive"], location["member"]


def _report_missing(name: str, messages: Mapping[Any, str], total: int, summary: str, problems: ProblemList) -> None:
    """Report what was not found, by image id; as one problem if it is more than a few."""
    if len(messages) > _MOST_LISTED:
        # Thousands of lines about one folder that was not copied would hide everything else.
        first = [f"image {image_id!r}: {message}" for image_id, message in list(messages.items())[:2]]
        problems.error(name, "", f"{len(messages)} of {total} {summary}: {'; '.join(first)}; ...")
    else:
        for image_id, message in messages.items():
            problems.error(name, f"image {image_id!r}", message)


def crowd_flag(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> bool:
    """`iscrowd` of an annotation; False if it is absent."""
    flag = entry.get("iscrowd", 0)
    if flag in (0, 1):
        return bool(flag)
    if isinstance(flag, str) and flag.strip() in ("0", "1"):  # some exporters write all values as text
        problems.warn(name, item, f"iscrowd is the text {flag!r}; read as a number")
        return flag.strip() == "1"
    problems.error(name, item, f"iscrowd is {flag!r}; it must be 0 or 1 (read as 0)")
    return False


def is_id(value: Any) -> bool:
    """Whether a value can be an id: text, or a whole number of 64 bits."""
    # `type`, as True and False are instances of int. Arrow tables hold no larger numbers.
    return _is_text(value) or (type(value) is int and -(2**63) <= value < 2**63)


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be stored: JSON can hold halves of characters (surrogates)."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def is_size(height: Any, width: Any) -> bool:
    """Whether two values can be the height and width of an image."""
    return (
        type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= max_image_pixels()
    )


def plain_number(value: Any) -> float | None:
    """A number, or the number that a text holds; `None` for anything else."""
    if type(value) in (int, float):
        return value
    # Not `float` alone, which also takes "nan", "1_000" and digits of other scripts.
    if not isinstance(value, str) or not _PLAIN_NUMBER.fullmatch(value):
        return None
    return int(value) if value.strip().lstrip("+-").isdigit() and len(value) < 20 else float(value)


def whole_number(value: Any) -> int | None:
    """A whole number, also as text or with a fraction of 0; `None` for anything else."""
    number = plain_number(value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


def _plain_numbers(values: Any) -> Any:
    """A list in which texts that are numbers became numbers; unchanged if it is no list or holds anything else."""
    if not isinstance(values, list):
        return values
    numbers = [plain_number(value) for value in values]
    return values if None in numbers else numbers


def category_label(entry: Mapping[str, Any], labels: Mapping[int, int | None]) -> int | None:
    """Label id of an annotation's category, `VOID`, or `None` for no class in this task.

    Raises:
        KeyError: the category is not one of the file's.
    """
    category_id = entry.get("category_id")
    if type(category_id) is not int:
        category_id = whole_number(category_id)
    return labels[category_id]  # type: ignore[index]  # None is no key


def checked_categories(entries: list[Any], name: str) -> dict[int, dict[str, Any]]:
    """Entries of the list of categories by ascending id, with names stripped of blanks; `name` is the file's.

    Raises:
        ValueError: an entry has no id or name, two have the same, or there is none.
    """
    categories: dict[int, dict[str, Any]] = {}
    for entry in entries:
        category_id = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        text: Any = entry.get("name") if isinstance(entry, dict) else None
        if category_id is None or not _is_text(text) or not text.strip():
            raise ValueError(f"{name}: category {entry!r} needs a whole number `id` and a `name`")
        if category_id in categories:
            raise ValueError(f"{name}: two categories have the id {category_id}; number them differently")
        categories[category_id] = {**entry, "id": category_id, "name": text.strip()}
    names = [entry["name"] for entry in categories.values()]
    if not names:
        raise ValueError(f"{name}: the list of categories is empty; without it no annotation has a class")
    if duplicates := sorted({text for text in names if names.count(text) > 1}):
        raise ValueError(f"{name}: several categories are called {duplicates[0]!r}; name them differently")
    return dict(sorted(categories.items()))


def instance_rows(
    file: CocoFile, labels: Mapping[int, int | None], problems: ProblemList, crowds_are_objects: bool = False
) -> list[dict[str, Any]]:
    """One row for each image, in the file's order.

    Args:
        labels: label ids by category id, `VOID` for void; annotations of a category with `None` are left out.
    """
    segments: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in file.images}
    seen: set[Any] = set()
    as_text: list[str] = []  # annotations with numbers stored as text
    for index, entry in enumerate(file.annotations):
        annotation_id = entry.get("id") if isinstance(entry, dict) else None
        item = f"annotation {annotation_id!r}" if annotation_id is not None else f"annotations[{index}]"
        if type(annotation_id) is not int:
            annotation_id = whole_number(annotation_id)
        if not isinstance(entry, dict) or annotation_id is None or not is_id(annotation_id):
            problems.error(file.name, item, "the annotation has no whole number as id")
            continue
        if annotation_id in seen:
            problems.error(file.name, item, "two annotations have this id; number them differently")
            continue
        seen.add(annotation_id)
        image_id = entry.get("image_id")
        if not is_id(image_id) or image_id not in segments:
            image_id = _image_id(entry, segments, file.left_out)
        if image_id in file.left_out:
            continue  # its image was reported
        if image_id is None:
            problems.error(
                file.name, item, f"it is for image {entry.get('image_id')!r}, which `images` lacks; remove it"
            )
            continue
        try:
            label_id = category_label(entry, labels)
        except KeyError:
            problems.error(file.name, item, f"category {entry.get('category_id')!r} is not in the list of categories")
            continue
        if label_id is None:
            continue
        image = file.images[image_id]
        # Checked here, so that training does not stop at a faulty outline after hours; masks are drawn on demand.
        outline = _outline(entry, (image["height"], image["width"]), file.name, item, problems, as_text)
        if outline is not None:
            is_crowd = crowd_flag(entry, file.name, item, problems) and not crowds_are_objects
            segments[image_id].append({"id": annotation_id, "label_id": label_id, "is_crowd": is_crowd, **outline})
    if as_text:
        message = "numbers are stored as text, and were read as numbers"
        rest = f" (and in {len(as_text) - 1} more annotations)" if len(as_text) > 1 else ""
        problems.warn(file.name, as_text[0], message + rest)
    # Images without annotations are kept: they teach the model what is not an object.
    return [
        {"image": file.locations[image_id], "image_id": image_id, "segment_map": [], "segments": segments[image_id]}
        for image_id in file.images
    ]


def _image_id(entry: Mapping[str, Any], images: Mapping[Any, Any], left_out: set[Any]) -> Any:
    """The id of an annotation's image as `images` has it, or `None` if it is not there."""
    image_id = entry.get("image_id")
    if is_id(image_id) and (image_id in images or image_id in left_out):
        return image_id
    # VGG Image Annotator writes the number of an image as text here only.
    for other in (whole_number(image_id), str(image_id)):
        if other in images or other in left_out:
            return other
    return None


def _outline(
    entry: Mapping[str, Any],
    size: tuple[int, int],
    name: str,
    item: str,
    problems: ProblemList,
    as_text: list[str],
) -> dict[str, Any] | None:
    """`polygons`, `rle` and `area` of an annotation, or `None` if it cannot be drawn."""
    has_text = _check_box(entry, name, item, problems)
    area = entry.get("area")
    if isinstance(area, str):
        has_text, area = True, plain_number(area)
    area = _stated_area(entry if area is None else {"area": area}, name, item, problems)
    outline = entry.get("segmentation")
    if isinstance(outline, str):
        try:
            has_text, outline = True, json.loads(outline)
        except ValueError:
            problems.error(name, item, "its segmentation is a text; it must be polygons (lists of numbers) or RLE")
            return None
    polygons: list[Any] | None = None
    rle: dict[str, Any] = {"size": list(size), "counts": None}
    if isinstance(outline, list) and outline:
        if isinstance(outline[0], int | float | str):
            problems.warn(name, item, "segmentation is one flat polygon; read as a list of one")
            outline = [outline]
        polygons = []
        for polygon in outline:
            numbers = polygon
            try:
                sum(polygon)  # the fastest way to see that a list holds numbers alone
            except TypeError:
                numbers = _plain_numbers(polygon)
                if numbers is polygon:
                    problems.error(name, item, f"{_no_number(polygon)}; correct or remove the annotation")
                    return None
                has_text = True
            if fault := polygon_fault(numbers, size):
                problems.error(name, item, f"{fault}; correct or remove the annotation")
                return None
            polygons.append(numbers)
    elif isinstance(outline, dict):
        counts = outline.get("counts")
        if isinstance(counts, list) and str in map(type, counts):
            has_text, outline = True, {**outline, "counts": _plain_numbers(counts)}
        if isinstance(outline.get("size"), list) and str in map(type, outline["size"]):
            has_text, outline = True, {**outline, "size": _plain_numbers(outline["size"])}
        if fault := rle_fault(outline, size):
            problems.error(name, item, f"{fault}; correct or remove the annotation")
            return None
        rle["counts"] = compressed_counts(outline["counts"])
    else:
        problems.error(name, item, "it has no segmentation (polygons or RLE); boxes alone cannot train masks")
        return None
    if has_text:
        as_text.append(item)
    return {"polygons": polygons, "rle": rle, "area": area}


def _no_number(polygon: Any) -> str:
    """What in a polygon is no number."""
    if isinstance(polygon, list):
        for value in polygon:
            if plain_number(value) is None and not isinstance(value, list | dict):
                return f"a polygon with {value!r}, which is no number"
    return "a polygon is a flat list of numbers x, y, x, y, ..."


def _check_box(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> bool:
    """Warn of a box that is none; returns whether its numbers are stored as text."""
    # Boxes are not used, but a wrong one is a sign that the export went wrong.
    box = entry.get("bbox")
    if box is None:
        return False
    if _is_box(box):
        return False
    numbers = _plain_numbers(box)
    if numbers is not box and _is_box(numbers):
        return True
    problems.warn(name, item, f"bbox {box!r} is no box; it is not used")
    return False


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    try:
        # A sum is finite only if all its numbers are, and fails on anything else: one call for each of a million boxes.
        return math.isfinite(sum(box)) and box[2] >= 0 and box[3] >= 0
    except (TypeError, OverflowError):
        return False


def _stated_area(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> float | None:
    """The annotation's `area` in pixels, or None to use that of its mask."""
    # COCO's evaluator tells small from large objects by this field, not by the mask.
    area = entry.get("area")
    if area is None or (isinstance(area, int | float) and 0 < area <= max_image_pixels()):
        return None if area is None else float(area)
    problems.warn(name, item, f"area is {area!r}; the mask's own is used")
    return None


@dataclass(frozen=True)
class PanopticMasks:
    """Masks of panoptic PNGs; of each class one segment if `semantic`."""

    semantic: bool = False
    background: int = VOID  # label id of pixels without a segment in semantic maps
    some_are_void: bool = False  # ids that are not listed are void, since some categories are

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_color_ids(maps[0])
        present = set(present_values(ids))
        if 0 in present:
            ids[ids == 0] = VOID
            present.remove(0)
        rows = segments or []
        unlisted = sorted(present - {row["id"] for row in rows})
        if unlisted and not self.some_are_void:
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {unlisted[:5]}, which segments_info does not list; "
                "PNG and JSON are of different versions: get both from one source"
            )
        if self.semantic:
            label_map = np.where(ids == VOID, np.int32(self.background), np.int32(VOID))
            for row in rows:
                label_map[ids == row["id"]] = row["label_id"]
            return label_map, semantic_segments(label_map)
        for segment_id in unlisted:
            ids[ids == segment_id] = VOID
        # Segments without pixels only matter to the data check, which reports them.
        return ids, [row for row in rows if row["id"] in present]


def panoptic_rows(
    file: CocoFile,
    maps: FileList,
    labels: Mapping[int, int | None],
    problems: ProblemList,
    crowds_are_objects: bool = False,
) -> list[dict[str, Any]]:
    """One row for each image with a panoptic annotation, in the file's order; `maps` are the PNGs that it names."""
    annotated: dict[Any, dict[str, Any]] = {}
    missing: dict[Any, str] = {}
    for index, entry in enumerate(file.annotations):
        image_id = _image_id(entry, file.images, file.left_out) if isinstance(entry, dict) else None
        if image_id in file.left_out:
            continue  # its image was reported
        item = f"image {entry.get('image_id')!r}" if isinstance(entry, dict) else f"annotations[{index}]"
        if image_id is None:
            problems.error(file.name, item, f"annotations[{index}] is for an image that `images` lacks; remove it")
        elif image_id in annotated:
            problems.error(file.name, item, "the image has two panoptic annotations; keep one")
        else:
            try:
                location = find_named(maps, entry.get("file_name"), f"{file.name}: {item}")
            except ValueError as error:
                missing[image_id] = str(error).removeprefix(f"{file.name}: {item}: ")
                continue
            segments = _segments(entry, file.name, item, labels, problems, crowds_are_objects)
            annotated[image_id] = {"segment_map": [location], "segments": segments}
    _report_missing(file.name, missing, len(file.images), "panoptic PNGs cannot be found", problems)
    rows = []
    for image_id in file.images:
        if image_id in annotated:
            rows.append({"image": file.locations[image_id], "image_id": image_id, **annotated[image_id]})
        elif image_id not in missing:
            problems.warn(file.name, f"image {image_id!r}", "the image has no panoptic annotation; it is left out")
    return rows


def _segments(
    entry: Mapping[str, Any],
    name: str,
    item: str,
    labels: Mapping[int, int | None],
    problems: ProblemList,
    crowds_are_objects: bool,
) -> Segments:
    rows: Segments = []
    seen: set[int] = set()
    infos = entry.get("segments_info")
    if not isinstance(infos, list):
        problems.error(name, item, "the annotation has no list segments_info; is this an instance file?")
        return rows
    for info in infos:
        segment_id = info.get("id") if isinstance(info, dict) else None
        if type(segment_id) is not int:
            segment_id = whole_number(segment_id) or segment_id
        where = f"{item}, segment {segment_id!r}"
        if type(segment_id) is not int or not 0 < segment_id <= _LARGEST_ID:
            problems.error(name, where, f"a segment's id is a whole number from 1 to {_LARGEST_ID}, as 0 is void")
        elif segment_id in seen:
            problems.error(name, where, "two segments of the image have this id")
        else:
            try:
                label_id = category_label(info, labels)
            except KeyError:
                message = f"category {info.get('category_id')!r} is not in the list of categories"
                problems.error(name, where, message)
            else:
                is_crowd = crowd_flag(info, name, where, problems) and not crowds_are_objects
                if label_id is not None and label_id != VOID:
                    rows.append({"id": segment_id, "label_id": label_id, "is_crowd": is_crowd})
        if isinstance(segment_id, int):
            seen.add(segment_id)
    return rows
