"""labelme: a JSON file of shapes beside each image; instance or semantic.

`train/*.json` or, without splits, `*.json`. Polygons, rectangles, circles and masks are read; points and lines have no
area and are left out with a warning, and so are the labels `__ignore__` and `_background_`. Shapes with the same label
and `group_id` are one object. In semantic maps later shapes cover earlier ones. Classes are the labels that occur, in
alphabetical order, or those of `classes.json` or `labels.txt`, see ../class_lists.py.
"""

from __future__ import annotations

import base64
import binascii
import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.mask_encoding import encode_mask
from ..archives import Location, location_name, read_json
from ..class_lists import CLASS_FILES, read_classes
from ..decoding import PaintedPolygons, PolygonMasks
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..mask_files import index_map, polygon_fault
from ..problems import ProblemList
from ..reading import Reading
from .coco import is_size

DESCRIPTION = "labelme's JSON files beside images"
TASKS = ("instance", "semantic")
LAYOUT = "labelme's *.json beside the images, in the folder or in train and val"
WHOLE = "all"  # the split of a folder without splits

_NO_CLASS = ("__ignore__", "_background_")
_WITH_AREA = ("polygon", "rectangle", "circle", "mask")
_CIRCLE_POINTS = 64  # corners of the polygon drawn for a circle: 0.2 % less area


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with JSON files; also, if there are none or it is wanted, "all" for the folder itself."""
    folder = DataFolder(path)
    names = [name for name in (*folder.folders(), *wanted) if folder.files(name, suffixes=(".json",))]
    if (WHOLE in wanted or not names) and folder.files("", suffixes=(".json",)):
        names.append(WHOLE)
    return names


def read(path: str, split: str, task: str, problems: ProblemList, classes: Any = None) -> Reading:
    """Read one split; `classes` is for `read_classes`, by default the file in the folder, or else all labels."""
    folder = DataFolder(path)
    prefix = "" if split == WHOLE else f"{split}/"
    images = folder.files("", suffixes=IMAGE_SUFFIXES)
    files = folder.files("", suffixes=(".json",))
    source = classes if classes is not None else folder.file(*CLASS_FILES)
    contents, labels = dict[str, dict[str, Any]](), set[str]()
    for name, location in files.items():
        is_own = name.startswith(prefix)
        # Without a list of classes, labels are collected from all splits, so that all splits number them alike.
        if posixpath.basename(name) in CLASS_FILES or not (is_own or source is None):
            continue
        try:
            content = _checked(read_json(location), location_name(location))
        except ValueError as error:
            if is_own:  # problems of other splits are reported when those are read
                problems.error(location_name(location), "", str(error).removeprefix(f"{location_name(location)}: "))
            continue
        labels |= _labels(content)
        if is_own:
            contents[name] = content
    if source is None:
        source = sorted(labels)
        if not source:
            raise ValueError(f"{path}: no JSON file has a shape with a label and an area; expected {LAYOUT}")
    names = read_classes(source).names
    numbers = {name: label for label, name in enumerate(names)}
    rows = []
    for name, content in contents.items():
        where = location_name(files[name])
        try:
            image = _image(content.get("imagePath"), name, images, where)
        except ValueError as error:
            problems.error(where, "", str(error).removeprefix(f"{where}: "))
            continue
        segments = _segments(content, where, numbers, problems)
        rows.append({"image": image, "image_id": posixpath.splitext(name)[0], "segment_map": [], "segments": segments})
    reader = PolygonMasks() if task == "instance" else PaintedPolygons()
    return Reading(reader, list(names), [], rows, outlines=True)


def _checked(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{name}: no list `shapes`; is this a file of labelme?")
    if not is_size(content.get("imageHeight"), content.get("imageWidth")):
        raise ValueError(f"{name}: imageHeight and imageWidth must be whole numbers; save it with labelme again")
    return content


def _labels(content: Mapping[str, Any]) -> set[str]:
    labels = [
        shape.get("label") for shape in content["shapes"] if isinstance(shape, dict) and _kind(shape) in _WITH_AREA
    ]
    return {label for label in labels if isinstance(label, str) and label.strip() and label not in _NO_CLASS}


def _image(text: Any, name: str, images: Mapping[str, Location], where: str) -> Location:
    stem = posixpath.splitext(name)[0]
    path = str(text or "").replace("\\", "/")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    if path.startswith("/") or path[1:2] == ":" or wanted.split("/")[0] == "..":
        raise ValueError(f"{where}: imagePath {text!r} is absolute or leaves the data set; make it relative")
    for other in (wanted, *(stem + suffix for suffix in IMAGE_SUFFIXES)):
        if other in images:
            return images[other]
    raise ValueError(f"{where}: there is no image {text!r}, nor one named like the JSON file; copy it there")


def _segments(
    content: Mapping[str, Any], where: str, numbers: Mapping[str, int], problems: ProblemList
) -> list[dict[str, Any]]:
    size = (content["imageHeight"], content["imageWidth"])
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[Any, str], dict[str, Any]] = {}
    for index, shape in enumerate(content["shapes"]):
        item = f"shapes[{index}]"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            problems.error(where, item, "the shape has no label")
            continue
        if label in _NO_CLASS:
            problems.warn(where, item, f"a shape labelled {label!r} is left out")
            continue
        if _kind(shape) not in _WITH_AREA:
            problems.warn(where, item, f"a shape of type {_kind(shape)!r} has no area and is left out")
            continue
        if label not in numbers:
            problems.error(where, item, f"the label {label!r} is not in the list of classes; add it there")
            continue
        try:
            outline = _outline(shape, size)
        except ValueError as error:
            problems.error(where, item, f"{error}; correct or remove the shape")
            continue
        group_id = shape.get("group_id")
        group = (group_id if isinstance(group_id, int | str) else None, label)
        # Polygons of a group merge into one row; a mask, which has none, stays a row of its own.
        if group[0] is not None and group in groups and outline["polygons"] and groups[group]["polygons"]:
            groups[group]["polygons"] += outline["polygons"]
            continue
        row = {"id": index, "label_id": numbers[label], "is_crowd": False, **outline}
        groups.setdefault(group, row)
        rows.append(row)
    return rows


def _kind(shape: Mapping[str, Any]) -> Any:
    return shape.get("shape_type") or "polygon"


def _outline(shape: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """`polygons` and `rle` of a shape with an area, or `ValueError` if it cannot be drawn."""
    kind = _kind(shape)
    try:
        points = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError("points must be a list of pairs of numbers") from error
    if kind in ("rectangle", "circle", "mask") and len(points) < 2:
        raise ValueError(f"a {kind} needs two points")
    if kind == "mask":
        return {"polygons": None, "rle": _mask(shape, points, size)}
    if kind == "rectangle":
        (left, top), (right, bottom) = points[:2]
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind == "circle":
        turns = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
        radius = np.hypot(*(points[1] - points[0]))
        points = points[0] + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    polygon = points.reshape(-1).tolist()
    if fault := polygon_fault(polygon, size):
        raise ValueError(fault)
    return {"polygons": [polygon], "rle": {"size": list(size), "counts": None}}


def _mask(shape: Mapping[str, Any], points: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """RLE of a shape stored as a PNG in base64, which covers only the shape's box."""
    try:
        content = base64.b64decode(shape.get("mask") or "", validate=True)
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"the mask is no base64 text ({error})") from error
    part = index_map(content, "mask") > 0
    if not np.isfinite(points).all():
        raise ValueError("the mask's box has a coordinate that is NaN or infinite")
    left, top = (int(value) for value in points[0])
    height, width = part.shape
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"the mask of {height} x {width} pixels at ({left}, {top}) does not fit into the image")
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = part
    return encode_mask(mask)
