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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.image_decoding import MAX_IMAGE_PIXELS
from ..archives import Location, location_name, read_json
from ..class_lists import VOID
from ..decoding import PolygonMasks, Segments
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList, find_named
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
_LARGEST_ID = 2**24 - 1  # segment ids of panoptic PNGs are stored in three channels of 8 bits


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have annotations."""
    names = ("train", "val", *wanted)
    return [name for name in names if any(_annotation_file(path, name, task)[1] for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read the split "train" or "val", with or without the year; the categories must be COCO's."""
    folder, location, name = _annotation_file(path, split, task)
    if location is None:
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected {LAYOUT}")
    images = folder.files(name, f"images/{name}", suffixes=IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{path}: no images of split {split!r}; expected the folder {name}, or {name}.zip")
    file = read_coco_file(location, images, problems)
    table = label_table("coco_panoptic" if task == "panoptic" else "coco_instance")
    _check_categories(file, table)
    labels = list(table.id2label.values())
    if task == "instance":
        rows = instance_rows(file, table.source_id_to_label, problems)
        return Reading(PolygonMasks(), labels, [], rows, outlines=True)
    maps = folder.files(f"annotations/panoptic_{name}", f"panoptic_{name}", suffixes=(".png",))
    rows = panoptic_rows(file, maps, table.source_id_to_label, problems)
    return Reading(PanopticMasks(), labels, table.stuff_classes, rows)


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


def read_coco_file(location: Location, files: FileList, problems: ProblemList) -> CocoFile:
    """Read a COCO JSON file and find the images that it names among `files`."""
    name = location_name(location)
    content = read_json(location)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{name}: there is no list {key!r}; COCO files have images, annotations and categories")
    images, locations = dict[Any, dict[str, Any]](), dict[Any, Location]()
    for index, image in enumerate(content["images"]):
        item = f"image {image.get('id')!r}" if isinstance(image, dict) else f"images[{index}]"
        if not isinstance(image, dict) or not is_id(image.get("id")):
            problems.error(name, item, "the entry has no id; give each image a number or a text of its own")
        elif image["id"] in images:
            problems.error(name, item, "two images have this id; number them differently, and their annotations")
        elif not is_size(image.get("height"), image.get("width")):
            problems.error(name, item, "height and width must be whole numbers above 0, and those of an image")
        else:
            try:
                locations[image["id"]] = find_named(files, image.get("file_name"), f"{name}: {item}")
                images[image["id"]] = image
            except ValueError as error:
                problems.error(name, item, str(error).removeprefix(f"{name}: {item}: "))
    return CocoFile(name, images, locations, _categories(content["categories"], name), content["annotations"])


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
    return isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63)


def is_size(height: Any, width: Any) -> bool:
    """Whether two values can be the height and width of an image."""
    return type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= MAX_IMAGE_PIXELS


def known_category(entry: Mapping[str, Any], labels: Mapping[int, int]) -> bool:
    """Whether an annotation's category is one of the file's."""
    category_id = entry.get("category_id")
    return isinstance(category_id, int) and category_id in labels


def _categories(entries: list[Any], name: str) -> dict[int, dict[str, Any]]:
    categories: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise ValueError(f"{name}: category {entry!r} needs a whole number `id` and a `name`")
        if entry["id"] in categories:
            raise ValueError(f"{name}: two categories have the id {entry['id']}; number them differently")
        categories[entry["id"]] = entry
    names = [entry["name"] for entry in categories.values()]
    if not names:
        raise ValueError(f"{name}: the list of categories is empty; without it no annotation has a class")
    if duplicates := sorted({text for text in names if names.count(text) > 1}):
        raise ValueError(f"{name}: several categories are called {duplicates[0]!r}; name them differently")
    return dict(sorted(categories.items()))


def instance_rows(file: CocoFile, labels: Mapping[int, int], problems: ProblemList) -> list[dict[str, Any]]:
    """One row for each image, in the file's order; `labels` are label ids by category id."""
    segments: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in file.images}
    seen: set[Any] = set()
    for index, entry in enumerate(file.annotations):
        annotation_id = entry.get("id") if isinstance(entry, dict) else None
        item = f"annotation {annotation_id!r}" if annotation_id is not None else f"annotations[{index}]"
        if not isinstance(entry, dict) or type(annotation_id) is not int or not is_id(annotation_id):
            problems.error(file.name, item, "the annotation has no whole number as id")
        elif annotation_id in seen:
            problems.error(file.name, item, "two annotations have this id; number them differently")
        elif not is_id(entry.get("image_id")) or entry["image_id"] not in segments:
            problems.error(
                file.name, item, f"it is for image {entry.get('image_id')!r}, which `images` lacks, or left out above"
            )
        elif not known_category(entry, labels):
            problems.error(file.name, item, f"category {entry.get('category_id')!r} is not in the list of categories")
        else:
            image = file.images[entry["image_id"]]
            # Checked here, so that training does not stop at a faulty outline after hours; masks are drawn on demand.
            outline = _outline(entry, (image["height"], image["width"]), file.name, item, problems)
            if outline is not None:
                is_crowd = crowd_flag(entry, file.name, item, problems)
                row = {"id": annotation_id, "label_id": labels[entry["category_id"]], "is_crowd": is_crowd, **outline}
                segments[entry["image_id"]].append(row)
        if isinstance(annotation_id, int):
            seen.add(annotation_id)
    # Images without annotations are kept: they teach the model what is not an object.
    return [
        {"image": file.locations[image_id], "image_id": image_id, "segment_map": [], "segments": segments[image_id]}
        for image_id in file.images
    ]


def _outline(
    entry: Mapping[str, Any], size: tuple[int, int], name: str, item: str, problems: ProblemList
) -> dict[str, Any] | None:
    """`polygons`, `rle` and `area` of an annotation, or `None` if it cannot be drawn."""
    _check_box(entry, name, item, problems)
    area = _stated_area(entry, name, item, problems)
    outline = entry.get("segmentation")
    if isinstance(outline, list) and outline:
        if isinstance(outline[0], int | float):
            problems.warn(name, item, "segmentation is one flat polygon; read as a list of one")
            outline = [outline]
        for polygon in outline:
            if fault := polygon_fault(polygon, size):
                problems.error(name, item, f"{fault}; correct or remove the annotation")
                return None
        return {"polygons": outline, "rle": {"size": list(size), "counts": None}, "area": area}
    if isinstance(outline, dict):
        if fault := rle_fault(outline, size):
            problems.error(name, item, f"{fault}; correct or remove the annotation")
            return None
        rle = {"size": list(size), "counts": compressed_counts(outline["counts"])}
        return {"polygons": None, "rle": rle, "area": area}
    problems.error(name, item, "it has no segmentation (polygons or RLE); boxes alone cannot train masks")
    return None


def _check_box(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> None:
    # Boxes are not used, but a wrong one is a sign that the export went wrong.
    box = entry.get("bbox")
    if box is not None:
        has_four_numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        if not has_four_numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            problems.warn(name, item, f"bbox {box!r} is no box; it is not used")


def _stated_area(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> float | None:
    """The annotation's `area` in pixels, or None to use that of its mask."""
    # COCO's evaluator tells small from large objects by this field, not by the mask.
    area = entry.get("area")
    if area is None or (isinstance(area, int | float) and 0 < area <= MAX_IMAGE_PIXELS):
        return None if area is None else float(area)
    problems.warn(name, item, f"area is {area!r}; the mask's own is used")
    return None


@dataclass(frozen=True)
class PanopticMasks:
    """Masks of panoptic PNGs."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_color_ids(maps[0])
        present = set(present_values(ids))
        if 0 in present:
            ids[ids == 0] = VOID
            present.remove(0)
        rows = segments or []
        if unlisted := sorted(present - {row["id"] for row in rows}):
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {unlisted[:5]}, which segments_info does not list; "
                "PNG and JSON are of different versions: get both from one source"
            )
        # Segments without pixels only matter to the data check, which reports them.
        return ids, [row for row in rows if row["id"] in present]


def panoptic_rows(
    file: CocoFile, maps: FileList, labels: Mapping[int, int], problems: ProblemList
) -> list[dict[str, Any]]:
    """One row for each image with a panoptic annotation, in the file's order; `maps` are the PNGs that it names."""
    annotated: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(file.annotations):
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        item = f"image {image_id!r}" if isinstance(entry, dict) else f"annotations[{index}]"
        if not is_id(image_id) or image_id not in file.images:
            problems.error(
                file.name, item, f"annotations[{index}] is for an image that `images` lacks, or left out above"
            )
        elif image_id in annotated:
            problems.error(file.name, item, "the image has two panoptic annotations; keep one")
        else:
            try:
                location = find_named(maps, entry.get("file_name"), f"{file.name}: {item}")
            except ValueError as error:
                problems.error(file.name, item, str(error).removeprefix(f"{file.name}: {item}: "))
                continue
            segments = _segments(entry, file.name, item, labels, problems)
            annotated[image_id] = {"segment_map": [location], "segments": segments}
    rows = []
    for image_id in file.images:
        if image_id in annotated:
            rows.append({"image": file.locations[image_id], "image_id": image_id, **annotated[image_id]})
        else:
            problems.warn(file.name, f"image {image_id!r}", "the image has no panoptic annotation; it is left out")
    return rows


def _segments(
    entry: Mapping[str, Any], name: str, item: str, labels: Mapping[int, int], problems: ProblemList
) -> Segments:
    rows: Segments = []
    seen: set[int] = set()
    infos = entry.get("segments_info")
    if not isinstance(infos, list):
        problems.error(name, item, "the annotation has no list segments_info; is this an instance file?")
        return rows
    for info in infos:
        segment_id = info.get("id") if isinstance(info, dict) else None
        where = f"{item}, segment {segment_id!r}"
        if type(segment_id) is not int or not 0 < segment_id <= _LARGEST_ID:
            problems.error(name, where, f"a segment's id is a whole number from 1 to {_LARGEST_ID}, as 0 is void")
        elif segment_id in seen:
            problems.error(name, where, "two segments of the image have this id")
        elif not known_category(info, labels):
            problems.error(name, where, f"category {info.get('category_id')!r} is not in the list of categories")
        else:
            label_id = labels[info["category_id"]]
            rows.append({"id": segment_id, "label_id": label_id, "is_crowd": crowd_flag(info, name, where, problems)})
        if isinstance(segment_id, int):
            seen.add(segment_id)
    return rows
