"""Shapes that annotation tools draw, as rows of a reader's table.

A reader of a tool's export fills `ShapedImage`s with `Shape`s, whose outlines come from `points_of`, `rectangle`,
`ellipse`, `with_holes` and `placed_mask`; `shape_reading` applies the rule for labels (class_lists.py) and returns the
`Reading`. `find_image` finds an image by the name in an export. Coordinates are in pixels, x before y.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..models.mask_encoding import decode_mask, encode_mask
from .archives import Location, read_json
from .class_lists import CLASS_FILES, VOID, label_rule, listed_names, stuff_labels_of
from .decoding import MaskReader, PaintedPanoptic, PaintedPolygons, PolygonMasks
from .folders import DataFolder, FileList
from .mask_files import draw_polygons, merge_masks, polygon_fault
from .problems import ProblemList
from .reading import Reading

WHOLE = "all"  # the split of a data set without splits

# Names of folders that mean something, so that one which is alone is not just a wrapper.
_OWN_FOLDERS = ("train", "training", "val", "valid", "validation", "test", "testing", "images", "annotations", "labels")
_CURVE_POINTS = 64  # corners of the polygon drawn for an ellipse: 0.2 % less area


@dataclass
class Shape:
    """One drawn shape: polygons, or a mask of the image's size."""

    item: str  # for error messages
    label: str
    polygons: list[list[float]] | None  # x, y, x, y, ...
    rle: dict[str, Any] | None = None  # instead of polygons
    group: Any = None  # shapes of one group and label are one object; `None`: an object of its own
    is_crowd: bool = False
    layer: float = 0  # higher ones cover lower ones in semantic maps


@dataclass
class ShapedImage:
    """An image with its shapes."""

    image: Location
    image_id: str
    size: tuple[int, int]  # H, W
    where: str  # the annotation file
    shapes: list[Shape] = field(default_factory=list)


def shape_reading(
    images: Sequence[ShapedImage],
    listed: Sequence[str] | None,
    task: str,
    problems: ProblemList,
    *,
    source: str,
    used: Iterable[str] = (),
    classes: Any = None,
    stuff: Any = (),
    **rule_options: Any,
) -> Reading:
    """The table of images with shapes.

    Args:
        listed: the export's list of classes; `None` for the labels in `used`, in alphabetical order.
        source: what lists the classes, for error messages.
        used: labels of all splits' shapes.
        classes: the user's list, for `read_classes`, instead of the export's.
        stuff: names of the classes that are merged in the panoptic task; the others are things.
        rule_options: of `label_rule`.

    Raises:
        ValueError: there is no class, or the rule for labels refuses the list or an option.
    """
    found = {label.strip() for label in used}
    if classes is not None:
        listed, source = listed_names(classes), str(classes)
    # The background first, as its label id is 0 wherever it is added.
    names = sorted(found, key=lambda name: (name.lower().strip("_") != "background", name))
    if listed is not None:
        names = list(listed)
    if not names:
        raise ValueError(f"{source}: no shape has a label and an area, so there are no classes; annotate some images")
    rule = label_rule(names, task, used=found, source=source, **rule_options)
    stuff_labels, remarks = stuff_labels_of(rule, task, stuff, classes, source)
    rows = []
    for image in _without_repetitions(images, problems):
        segments: list[dict[str, Any]] = []
        groups: dict[Any, dict[str, Any]] = {}
        # Sorting is stable: within a layer the order of drawing stays.
        for number, shape in enumerate(sorted(image.shapes, key=lambda shape: shape.layer)):
            try:
                label = rule.label_of(shape.label)
            except ValueError as error:
                problems.error(image.where, shape.item, str(error))
                continue
            # A void object cannot be told from no object where masks are not painted.
            if label is None or (label == VOID and task == "instance"):
                problems.warn(image.where, shape.item, f"a shape labelled {shape.label!r} is left out")
                continue
            if fault := next(filter(None, (polygon_fault(p, image.size) for p in shape.polygons or [])), ""):
                problems.error(image.where, shape.item, f"{fault}; correct or remove the shape")
                continue
            rle = shape.rle or {"size": list(image.size), "counts": None}
            is_crowd = shape.is_crowd and not rule.crowds_are_objects
            row = {"id": number, "label_id": label, "is_crowd": is_crowd, "polygons": shape.polygons, "rle": rle}
            # In a semantic map objects do not matter, but the order of shapes does.
            is_grouped = shape.group is not None and task != "semantic"
            if is_grouped and (group := groups.setdefault((shape.group, label), row)) is not row:
                _merge(group, row)
            else:
                segments.append(row)
        rows.append({"image": image.image, "image_id": image.image_id, "segment_map": [], "segments": segments})
    ground = VOID if rule.background is None else rule.background
    reader: MaskReader = PolygonMasks() if task == "instance" else PaintedPolygons(ground)
    if task == "panoptic":
        reader = PaintedPanoptic(frozenset(stuff_labels), ground)
    return Reading(reader, list(rule.names), stuff_labels, rows, outlines=True, remarks=[*rule.decisions, *remarks])


def _without_repetitions(images: Sequence[ShapedImage], problems: ProblemList) -> list[ShapedImage]:
    """Each image once, although a folder may hold several exports of one project."""
    first: dict[tuple[str | None, str], ShapedImage] = {}
    for image in images:
        known = first.setdefault((image.image["archive"], image.image["member"]), image)
        if known is image:
            continue
        item, where = f"image {image.image_id!r}", "this file" if known.where == image.where else known.where
        alike = [[(shape.label, shape.polygons, shape.rle) for shape in each.shapes] for each in (known, image)]
        if alike[0] == alike[1]:
            problems.warn(image.where, item, f"listed in {where}, too, with the same shapes; read once")
        else:
            message = f"listed in {where}, too, with other shapes; keep one of the two"
            problems.error(image.where, item, message)
    return list(first.values())


def _rle(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return draw_polygons(row["polygons"], tuple(row["rle"]["size"])) if row["polygons"] else row["rle"]


def _merge(row: dict[str, Any], other: Mapping[str, Any]) -> None:
    if row["polygons"] and other["polygons"]:
        row["polygons"] = row["polygons"] + other["polygons"]
    else:
        row["rle"], row["polygons"] = merge_masks([_rle(row), _rle(other)]), None


def points_of(points: Any) -> list[float]:
    """Numbers x, y, x, y, ... from a list of pairs, or `ValueError`."""
    try:
        flat = np.array(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("points must be pairs of numbers") from error
    if flat.ndim not in (1, 2) or (flat.ndim == 2 and flat.shape[1] != 2):
        raise ValueError("points must be pairs of numbers")
    return flat.reshape(-1).tolist()


def rectangle(left: float, top: float, right: float, bottom: float, degrees: float = 0) -> list[float]:
    """A rectangle, turned clockwise about its centre."""
    center, half = ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    return _turned(corners, degrees, center)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> list[float]:
    """A polygon for an ellipse about (x, y), turned clockwise."""
    angles = np.linspace(0, 2 * math.pi, _CURVE_POINTS, endpoint=False)
    return _turned(np.stack([np.cos(angles) * radius_x, np.sin(angles) * radius_y], axis=1), degrees, (x, y))


def _turned(points: np.ndarray, degrees: float, center: tuple[float, float]) -> list[float]:
    # y points down, so this turns clockwise as people see it.
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return (points @ np.array([[cosine, sine], [-sine, cosine]]) + center).reshape(-1).tolist()


def with_holes(exterior: list[float], interiors: Sequence[list[float]], size: tuple[int, int]) -> dict[str, Any]:
    """`polygons` and `rle` of a polygon with holes; `ValueError` if one of them cannot be drawn."""
    for polygon in (exterior, *interiors):
        if fault := polygon_fault(polygon, size):
            raise ValueError(fault)
    if not interiors:
        return {"polygons": [exterior], "rle": None}
    holes = decode_mask(draw_polygons(interiors, size))
    return {"polygons": None, "rle": encode_mask(decode_mask(draw_polygons([exterior], size)) & ~holes)}


def placed_mask(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """`polygons` and `rle` of a mask (h, w) whose upper left pixel is at (left, top); `ValueError` if it overhangs."""
    height, width = part.shape
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"the mask of {height} x {width} pixels at ({left}, {top}) does not fit into the image of {size[0]} x "
            f"{size[1]} (height x width)"
        )
    return {"polygons": None, "rle": encode_mask(part, size, top, left)}


def wrapper(names: Iterable[str]) -> str:
    """`NAME/`, or several, if all files are inside folders that an export is wrapped in; otherwise ""."""
    names, cut = list(names), 0
    while names:
        tops = {name[cut:].partition("/")[0] for name in names}
        top = next(iter(tops))
        if len(tops) > 1 or top.lower() in _OWN_FOLDERS or any("/" not in name[cut:] for name in names):
            break
        cut += len(top) + 1
    return names[0][:cut] if names else ""


def unwrapped_files(folder: DataFolder, suffixes: Sequence[str] = ()) -> FileList:
    """All files, without the folder that an export is wrapped in, by relative path."""
    files = folder.files("")
    cut = len(wrapper(files))
    return FileList(
        (name[cut:], location)
        for name, location in files.items()
        if not suffixes or posixpath.splitext(name)[1].lower() in suffixes
    )


def json_files(folder: DataFolder, is_kind: Callable[[Any], bool]) -> dict[str, tuple[Location, Any]]:
    """Location and content of the JSON files of one kind, by relative path."""
    contents = {name: (file, read_json(file)) for name, file in unwrapped_files(folder, (".json",)).items()}
    return {name: pair for name, pair in contents.items() if is_kind(pair[1])}


def class_file(folder: DataFolder, classes: Any) -> Any:
    """The user's list of classes, or else the file beside the annotations, or `None`."""
    files = unwrapped_files(folder)
    return classes if classes is not None else next((files[name] for name in CLASS_FILES if name in files), None)


def find_image(images: FileList, text: Any, where: str) -> Location:
    """The image that an export names: by its path, or by its end where only one image has it.

    Raises:
        ValueError: there is no such image, or several.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the image's name is {text!r}; it must be a file name")
    # Exports hold paths of the machine or storage on which the images were annotated.
    name = posixpath.normpath(text.replace("\\", "/")).lstrip("/")
    parts = [part for part in name.split("/") if part != ".."]
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if end in images:
            return images[end]
        alike = [other for other in images if other.endswith(f"/{end}")]
        if len(alike) == 1:
            return images[alike[0]]
        if alike:
            raise ValueError(f"{where}: {text!r} may be any of {', '.join(alike[:3])}; give each image its own name")
    ends = (name.casefold(), f"/{name.casefold()}")
    case = next(
        (other for folded, other in images.folded_names.items() if folded == ends[0] or folded.endswith(ends[1])), ""
    )
    hint = f"there is {case!r}, which differs in case: rename one" if case else "export with images, or copy it there"
    raise ValueError(f"{where}: there is no image {text!r}; {hint}")


def add_problem(problems: ProblemList, where: str, item: str, error: ValueError, remedy: str = "") -> None:
    """Add an error about an item of a file without saying the file twice."""
    text = str(error).removeprefix(f"{where}: ").removeprefix(f"{item}: ")
    problems.error(where, item, f"{text}; {remedy}" if remedy else text)


def split_names(found: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Splits by the names that an export has, and wanted ones that differ from those in case alone, or are "all"."""
    names = list(dict.fromkeys(found))
    folded = {name.casefold() for name in names}
    return names + [
        name for name in wanted if name not in names and names and (name.casefold() in folded or name == WHOLE)
    ]


def is_in_split(name: str, split: str) -> bool:
    """Whether what belongs to the split `name` is part of the split that the user chose."""
    return split == WHOLE or name.casefold() == split.casefold()


def training_first(names: Iterable[str]) -> list[str]:
    """Annotation files with those of training first, whose order of classes counts."""
    return sorted(names, key=lambda name: not name.casefold().startswith("train"))


def file_split(name: str) -> str:
    """The split of an annotation file: the folder that it is in, or "all"."""
    return name.split("/")[0] if "/" in name else WHOLE
