"""COCO in its official layout: panoptic (133 classes) and instance (80). For other classes see coco_folder.py.

`train2017/*.jpg`, `annotations/panoptic_train2017.json`, `annotations/panoptic_train2017/*.png` and
`annotations/instances_train2017.json`, in folders or in the official archives, which are read in place. Label ids
follow the published order. A split may be named `train` or `train2017`.

- `read_coco_file` checks what both forms share: images, categories and flags. An id that is missing, doubled or unknown
  is a problem with its file and id, and the entry is left out.
- `instance_rows`: polygons or run-length masks, which may overlap. Outlines are checked when the file is read, so that
  training does not stop at one in its third hour; masks are drawn when an image is asked for. Images without
  annotations are kept: they teach what is no object. An annotation's `area` is kept, as COCO's evaluator takes it, not
  the mask's, to tell small from large.
- `panoptic_rows` and `PanopticMasks`: a JSON file with `segments_info`, and PNGs of ids in colours. Segment ids stay
  those of the files. Regions of a PNG that the JSON does not list are an error when the image is read; segments that
  the JSON lists but the PNG lacks are dropped then, and told by the data check.
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
_NAMES = ("train", "val")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The splits whose annotations are there."""
    return [name for name in (*_NAMES, *wanted) if any(_annotation_file(path, name, task)[1] for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split.

    Args:
        path: of the folder.
        split: "train", "val", or with the year.
        task: one of `TASKS`.
        problems: gets what is wrong.

    Raises:
        ValueError: files are missing, or the categories are not COCO's.
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
    labels = list(table.id2label.values())
    if task == "instance":
        rows = instance_rows(file, table.source_id_to_label, problems)
        return Reading(PolygonMasks(), labels, [], rows, outlines=True)
    maps = folder.files(f"annotations/panoptic_{name}", f"panoptic_{name}", suffixes=(".png",))
    rows = panoptic_rows(file, maps, table.source_id_to_label, problems)
    return Reading(PanopticMasks(), labels, table.stuff_classes, rows)


def _annotation_file(path: str, split: str, task: str) -> tuple[DataFolder, Location | None, str]:
    """Folder, JSON file, and the split's name with its year."""
    for year in [split[-4:]] if split[-4:].isdigit() else _YEARS:
        name = split if split.endswith(year) else f"{split}{year}"
        folder = DataFolder(
            path,
            (
                f"{name}.zip",
                f"annotations/panoptic_{name}.zip",
                f"panoptic_annotations_trainval{year}.zip",
                f"panoptic_annotations_trainval{year}.zip::annotations/panoptic_{name}.zip",
                f"annotations_trainval{year}.zip",
            ),
        )
        kind = "panoptic" if task == "panoptic" else "instances"
        if location := folder.file(f"annotations/{kind}_{name}.json"):
            return folder, location, name
    return folder, None, split


def _check_categories(file: CocoFile, table: LabelTable) -> None:
    known = {label.source_id: label.name for label in table.classes}
    wrong = {number: entry["name"] for number, entry in file.categories.items() if known.get(number) != entry["name"]}
    if wrong:
        number, name = next(iter(wrong.items()))
        raise ValueError(
            f"{file.name}: category {number} is {name!r}, but in {table.title} it is {known.get(number)!r}; read "
            "a data set with classes of its own as coco_folder"
        )


@dataclass
class CocoFile:
    """A COCO JSON file, its parts checked.

    Attributes:
        name: of the file, for errors.
        images: entries by image id, in the file's order.
        locations: where the file of each image id is.
        categories: entries by category id, ascending.
        annotations: as in the file.
    """

    name: str
    images: dict[Any, dict[str, Any]]
    locations: dict[Any, Location]
    categories: dict[int, dict[str, Any]]
    annotations: list[Any]


def read_coco_file(location: Location, files: FileList, problems: ProblemList) -> CocoFile:
    """Read a COCO JSON file and find the images that it names.

    Args:
        location: of the file.
        files: files by the names that the JSON uses.
        problems: gets what is wrong with entries.

    Raises:
        ValueError: the file is no COCO JSON at all.
    """
    name = location_name(location)
    content = read_json(location)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{name}: there is no list {key!r}; COCO files have images, annotations and categories")
    images, found = dict[Any, dict[str, Any]](), dict[Any, Location]()
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
                found[image["id"]] = find_named(files, image.get("file_name"), f"{name}: {item}")
                images[image["id"]] = image
            except ValueError as error:
                problems.error(name, item, str(error).removeprefix(f"{name}: {item}: "))
    return CocoFile(name, images, found, _categories(content["categories"], name), content["annotations"])


def crowd_flag(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> bool:
    """`iscrowd` of an annotation; absent means False, and "0" and "1" are read as numbers."""
    flag = entry.get("iscrowd", 0)
    if flag in (0, 1):
        return bool(flag)
    if isinstance(flag, str) and flag.strip() in ("0", "1"):
        problems.warn(name, item, f"iscrowd is the text {flag!r}; read as a number")
        return flag.strip() == "1"
    problems.error(name, item, f"iscrowd is {flag!r}; it must be 0 or 1 (read as 0)")
    return False


def is_id(value: Any) -> bool:
    """Whether a value can be an id: a text, or a whole number of 64 bits."""
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
    if doubled := sorted({text for text in names if names.count(text) > 1}):
        raise ValueError(f"{name}: several categories are called {doubled[0]!r}; name them differently")
    return dict(sorted(categories.items()))


def instance_rows(file: CocoFile, labels: Mapping[int, int], problems: ProblemList) -> list[dict[str, Any]]:
    """Rows of all images, in the order of `images`.

    Args:
        file: the JSON file.
        labels: label id by category id.
        problems: gets what is wrong with entries.
    """
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
            outline = _outline(entry, (image["height"], image["width"]), file.name, item, problems)
            if outline is not None:
                segments[entry["image_id"]].append(
                    {
                        "id": annotation_id,
                        "label_id": labels[entry["category_id"]],
                        "is_crowd": crowd_flag(entry, file.name, item, problems),
                        **outline,
                    }
                )
        if isinstance(annotation_id, int):
            seen.add(annotation_id)
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
    # Boxes are not used; wrong ones still tell that an export went wrong.
    box = entry.get("bbox")
    if box is not None:
        plain = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
        if not plain or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            problems.warn(name, item, f"bbox {box!r} is no box; it is not used")


def _stated_area(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> float | None:
    """The annotation's `area` in pixels, which average precision sorts objects by size with; `None`: the mask's own."""
    area = entry.get("area")
    if area is None or (isinstance(area, int | float) and 0 < area <= MAX_IMAGE_PIXELS):
        return None if area is None else float(area)
    problems.warn(name, item, f"area is {area!r}; the mask's own is used")
    return None


_LARGEST_ID = 2**24 - 1


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
        if strangers := sorted(present - {row["id"] for row in rows}):
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {strangers[:5]}, which segments_info does not list; "
                "PNG and JSON are of different versions: get both from one source"
            )
        return ids, [row for row in rows if row["id"] in present]


def panoptic_rows(
    file: CocoFile, maps: FileList, labels: Mapping[int, int], problems: ProblemList
) -> list[dict[str, Any]]:
    """Rows of the images that have a panoptic annotation, in the order of `images`.

    Args:
        file: the JSON file.
        maps: PNG files by the names that the JSON uses.
        labels: label id by category id.
        problems: gets what is wrong with entries.
    """
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
    missing = [image_id for image_id in file.images if image_id not in annotated]
    for image_id in missing:
        problems.warn(file.name, f"image {image_id!r}", "the image has no panoptic annotation; it is left out")
    return [
        {"image": file.locations[image_id], "image_id": image_id, **annotated[image_id]}
        for image_id in file.images
        if image_id in annotated
    ]


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
