"""labelme: a JSON file of shapes beside each image; all three tasks.

`train/*.json` or, without splits, `*.json`. Shapes with an area are read, also the rotated and four-cornered ones of
X-AnyLabeling; points and lines have none and are left out with a warning. Shapes with the same label and `group_id` are
one object. In semantic maps later shapes cover earlier ones. Classes are the labels that occur, in alphabetical order,
or those of `classes.json` or `labels.txt`; ../class_lists.py decides which are void or background.
"""

from __future__ import annotations

import base64
import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.mask_encoding import encode_mask
from ..annotation_values import is_size, name_fault, shown
from ..archives import Location, location_name, read_json
from ..class_lists import (
    CLASS_FILES,
    VOID,
    LabelRule,
    label_rule,
    listed_names,
    stuff_labels_of,
)
from ..decoding import MaskReader, PaintedPanoptic, PaintedPolygons, PolygonMasks
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..mask_files import (
    covers_nothing,
    draw_polygons,
    index_map,
    merge_masks,
    outline_length,
    outlines_fault,
    polygon_fault,
)
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import wrapper

DESCRIPTION = "labelme's JSON files beside images"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "labelme's *.json beside the images, in the folder or in train and val"
WHOLE = "all"  # the split of a folder without splits

_POLYGONS = ("polygon", "rotation", "quadrilateral", "oriented_rectangle")  # `points` are the corners
_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_WITH_AREA = (*_POLYGONS, "rectangle", "circle", "ellipse", "mask")
_CIRCLE_POINTS = 64  # corners of the polygon drawn for a circle: 0.2 % less area


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with JSON files; also, if there are none or it is wanted, "all" for the folder itself."""
    folder = DataFolder(path)
    prefix = _wrapper(folder)
    inner = folder.folders(prefix.rstrip("/"))
    names = [name for name in (*inner, *wanted) if folder.files(f"{prefix}{name}", suffixes=(".json",))]
    if (WHOLE in wanted or not names) and folder.files("", suffixes=(".json",)):
        names.append(WHOLE)
    return names


def _wrapper(folder: DataFolder) -> str:
    """`NAME/` of the folders that all annotations are wrapped in, as in most archives; otherwise ""."""
    files = folder.files("", suffixes=(".json",))
    return wrapper(name for name in files if posixpath.basename(name) not in CLASS_FILES)


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
) -> Reading:
    """Read one split.

    Args:
        path: folder or zip archive.
        split: a folder in it, or "all".
        task: one of `TASKS`.
        problems: collects faulty files and shapes.
        classes: for `read_classes`, by default the file in the folder, or else all labels.
        background: see `label_rule`, as also for `void` and `drop`.
        void: names of void classes.
        drop: names of classes to leave out, or "unused".
        stuff: names of the classes that are merged in the panoptic task; the others are things.
    """
    folder = DataFolder(path)
    top = _wrapper(folder)
    prefix = top if split == WHOLE else f"{top}{split}/"
    images = folder.files("", suffixes=IMAGE_SUFFIXES)
    files = folder.files("", suffixes=(".json",))
    source = (
        classes if classes is not None else folder.file(*(f"{start}{n}" for start in ("", top) for n in CLASS_FILES))
    )
    contents, labels, unreadable = dict[str, dict[str, Any]](), set[str](), list[str]()
    for name, location in files.items():
        is_own = name.startswith(prefix)
        # Without a list of classes, labels are collected from all splits, so that all splits number them alike.
        if posixpath.basename(name) in CLASS_FILES or not (is_own or source is None or drop == "unused"):
            continue
        try:
            content = _checked(read_json(location), location_name(location))
        except ValueError as error:
            unreadable.append(str(error))
            if is_own:  # problems of other splits are reported when those are read
                problems.error(location_name(location), "", str(error).removeprefix(f"{location_name(location)}: "))
            continue
        labels |= _labels(content)
        if is_own:
            contents[name] = content
    if source is None and not labels:
        if unreadable:
            raise ValueError(f"{path}: {len(unreadable)} of {len(files)} JSON files cannot be read: {unreadable[0]}")
        raise ValueError(
            f"{path}: no JSON file has a shape with a label and an area; expected {LAYOUT}; check the path"
        )
    # The background first, as its label id is 0 wherever it is added.
    names = sorted(labels, key=lambda label: (label.lower().strip("_") != "background", label))
    if source is not None:
        names = list(listed_names(source))
    rule = label_rule(names, task, background=background, void=void, drop=drop, used=labels, source=path)
    stuff_classes, remarks = stuff_labels_of(rule, task, stuff, source, path)
    rows = list[dict[str, Any]]()
    for name, content in contents.items():
        where = location_name(files[name])
        try:
            image = _image(content.get("imagePath"), name, images, where, problems)
        except ValueError as error:
            problems.error(where, "", str(error).removeprefix(f"{where}: "))
            continue
        segments = _segments(content, where, rule, task, problems)
        rows.append(
            {
                "image": image,
                "image_id": posixpath.splitext(name)[0][len(top) :],
                "segment_map": [],
                "segments": segments,
            }
        )
    ground = VOID if rule.background is None else rule.background
    reader: MaskReader = PolygonMasks() if task == "instance" else PaintedPolygons(ground)
    if task == "panoptic":
        reader = PaintedPanoptic(frozenset(stuff_classes), ground)
    return Reading(reader, list(rule.names), stuff_classes, rows, outlines=True, remarks=[*rule.decisions, *remarks])


def _checked(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{name}: no list `shapes`, as labelme's files have; remove it, or save it again")
    if not is_size(content.get("imageHeight"), content.get("imageWidth")):
        raise ValueError(f"{name}: imageHeight and imageWidth must be whole numbers; save it with labelme again")
    return content


def _labels(content: Mapping[str, Any]) -> set[str]:
    labels = [
        shape.get("label") for shape in content["shapes"] if isinstance(shape, dict) and _kind(shape) in _WITH_AREA
    ]
    return {str(label).strip() for label in labels if not name_fault(label)}


def _image(text: Any, name: str, images: Mapping[str, Location], where: str, problems: ProblemList) -> Location:
    folder, stem = posixpath.dirname(name), posixpath.splitext(name)[0]
    path = str(text or "").replace("\\", "/")
    wanted = posixpath.normpath(posixpath.join(folder, path))
    leaves = path.startswith("/") or path[1:2] == ":" or wanted.split("/")[0] == ".."
    if leaves:
        # Written on another computer or in another folder: only the name can be right.
        wanted = posixpath.join(folder, posixpath.basename(path))
    for other in (wanted, *(stem + suffix for suffix in IMAGE_SUFFIXES)):
        if other in images:
            if leaves:
                problems.warn(
                    where,
                    "",
                    f"imagePath {shown(text)} is absolute or leaves the data set; read {other} beside the file",
                )
            return images[other]
    if leaves:
        raise ValueError(
            f"{where}: imagePath {shown(text)} is absolute or leaves the data set, and no image of that name is beside "
            "the file; copy it there"
        )
    raise ValueError(f"{where}: there is no image {shown(text)}, nor one named like the JSON file; copy it there")


def _segments(
    content: Mapping[str, Any], where: str, rule: LabelRule, task: str, problems: ProblemList
) -> list[dict[str, Any]]:
    size, length = (content["imageHeight"], content["imageWidth"]), 0
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[Any, int], dict[str, Any]] = {}
    for index, shape in enumerate(content["shapes"]):
        item = f"shapes[{index}]"
        name = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(name, str) or not name.strip():
            problems.error(where, item, "the shape has no label")
            continue
        if fault := name_fault(name):
            problems.error(where, item, f"the label {shown(name)}: {fault}")
            continue
        if _kind(shape) not in _WITH_AREA:
            reason = "has no area" if _kind(shape) in _WITHOUT_AREA else "is not read (save it as a polygon)"
            problems.warn(where, item, f"a shape of type {shown(_kind(shape))} {reason} and is left out")
            continue
        try:
            label = rule.label_of(name)
        except ValueError as error:
            problems.error(where, item, str(error))
            continue
        # A void object cannot be told from no object where masks are not painted.
        if label is None or (label == VOID and task == "instance"):
            problems.warn(where, item, f"a shape labelled {name!r} is left out")
            continue
        try:
            outline = _outline(shape, size)
        except ValueError as error:
            problems.error(where, item, f"{error}; correct or remove the shape")
            continue
        length += sum(map(outline_length, outline["polygons"] or ()))
        if fault := outlines_fault(length):
            problems.error(where, item, f"{fault}; this shape and those after it are left out")
            break
        if covers_nothing(outline["polygons"], outline["rle"], size):
            problems.warn(where, item, f"a {_kind(shape)} that covers no pixel of the image is left out")
            continue
        group_id = shape.get("group_id")
        row = {"id": index, "label_id": label, "is_crowd": False, **outline}
        # In a semantic map objects do not matter, but the order of shapes does.
        is_grouped = isinstance(group_id, int | float | str) and task != "semantic"
        if is_grouped and (group := groups.setdefault((group_id, label), row)) is not row:
            _join(group, outline, size)
        else:
            rows.append(row)
    return rows


def _join(row: dict[str, Any], outline: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Add an outline to the row of its group."""
    if row["polygons"] and outline["polygons"]:
        row["polygons"] = row["polygons"] + outline["polygons"]
        return
    row.update(polygons=None, rle=merge_masks([_rle(row, size), _rle(outline, size)]))


def _rle(outline: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
    return draw_polygons(outline["polygons"], size) if outline["polygons"] else outline["rle"]


def _kind(shape: Mapping[str, Any]) -> str:
    kind = shape.get("shape_type") or "polygon"
    return kind.strip().lower() if isinstance(kind, str) else str(kind)


_NO_PAIRS = "points must be a list of pairs of numbers"


def _outline(shape: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """`polygons` and `rle` of a shape with an area, or `ValueError` if it cannot be drawn."""
    kind = _kind(shape)
    try:
        points = np.array(shape.get("points"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(_NO_PAIRS) from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(_NO_PAIRS)
    if kind not in _POLYGONS and len(points) < 2:
        raise ValueError(f"a {kind} needs two points")
    if kind == "mask":
        return {"polygons": None, "rle": _mask(shape, points, size)}
    if kind not in _POLYGONS:
        turns = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
        circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        # Two opposite corners, or all four: versions of the tools differ.
        low, high = points.min(0), points.max(0)
        if kind == "rectangle":
            points = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
        elif kind == "ellipse":
            points = (low + high) / 2 + circle * (high - low) / 2
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # an infinite radius is reported below
                points = points[0] + circle * np.hypot(*(points[1] - points[0]))
    polygon = points.reshape(-1).tolist()
    if fault := polygon_fault(polygon, size):
        raise ValueError(fault)
    return {"polygons": [polygon], "rle": {"size": list(size), "counts": None}}


def _mask(shape: Mapping[str, Any], points: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """RLE of a shape stored as a PNG in base64, which covers only the shape's box."""
    try:
        content = base64.b64decode(shape.get("mask") or "", validate=True)
    except (TypeError, ValueError) as error:  # also text that is not ASCII
        raise ValueError("the mask is no base64 text of a PNG") from error
    part = index_map(content, "mask") > 0
    if not np.isfinite(points).all():
        raise ValueError("the mask's box has a coordinate that is NaN or infinite")
    left, top = (int(value) for value in points[0])
    height, width = part.shape
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"the mask of {height} x {width} pixels at ({left}, {top}) does not fit into the image")
    return encode_mask(part, size, top, left)
