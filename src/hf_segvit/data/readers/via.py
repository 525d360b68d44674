"""VGG Image Annotator (VIA) and makesense.ai: a JSON or CSV file of regions: instance, semantic or panoptic.

`via_region_data.json` (VIA 1 and 2, saved as a project or exported) or the CSV export, beside the images, in the folder
or in `train` and `val`. makesense.ai's "VGG JSON" has the same form. Polygons, rectangles, circles and ellipses are
read. The class of a region is its attribute `label`, `class` and so on, or the one named by `attribute=`; if regions
have none, they all are "object".
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..archives import MAX_TEXT_BYTES, Location, location_name, read_json, read_location
from ..class_lists import CLASS_FILES
from ..decoding import upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import (
    Shape,
    ShapedImage,
    add_problem,
    ellipse,
    file_split,
    find_image,
    is_in_split,
    points_of,
    rectangle,
    shape_reading,
    split_names,
    unwrapped_files,
)

DESCRIPTION = "VGG Image Annotator's JSON or CSV, and makesense.ai's VGG JSON"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "a JSON or CSV file of VIA beside the images, in the folder or in train and val"

_CLASS_ATTRIBUTES = ("label", "class", "name", "category", "type", "object")
_NO_CLASS = "object"  # class of regions without attributes
_CSV_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with a file of VIA, or "all" for one in the data set's own folder."""
    return split_names((file_split(name) for name in _files(DataFolder(path))), wanted)


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    attribute: str = "",
    background: Any = None,
    void: Any = (),
    drop: Any = (),
    stuff: Any = (),
) -> Reading:
    """Read one split; `attribute` is the region attribute that holds the class, the rest is for the rule for labels."""
    folder = DataFolder(path)
    files = unwrapped_files(folder, IMAGE_SUFFIXES)
    contents = _files(folder)
    if not contents:
        raise ValueError(f"{path}: no file of VIA is there; expected {LAYOUT}")
    # All splits choose one attribute and number classes alike.
    regions = [region for content in contents.values() for _, rows in content for region in rows]
    attribute = attribute or _class_attribute(regions, path)
    used = {label for region in regions if (label := _label(region, attribute))}
    images = []
    for name, content in contents.items():
        if not is_in_split(file_split(name), split):
            continue
        where = location_name(unwrapped_files(folder)[name])
        for filename, rows in content:
            item = f"image {filename!r}"
            try:
                # The same name may occur in each split.
                near = posixpath.join(posixpath.dirname(name), str(filename))
                location = files[near] if near in files else find_image(files, filename, where)
                size = upright_size(location)
            except ValueError as error:
                add_problem(problems, where, item, error)
                continue
            image = ShapedImage(location, posixpath.splitext(str(filename))[0], size, where)
            for index, region in enumerate(rows):
                _add(region, f"{item}, region {index}", attribute, image, problems)
            images.append(image)
    source = classes if classes is not None else folder.file(*CLASS_FILES)
    return shape_reading(
        images,
        None,
        task,
        problems,
        source=path,
        used=used,
        classes=source,
        background=background,
        void=void,
        drop=drop,
        stuff=stuff,
    )


def _files(folder: DataFolder) -> dict[str, list[tuple[Any, list[Any]]]]:
    """(file name, regions) of all images, by name of the JSON or CSV file."""
    found = {}
    for name, location in unwrapped_files(folder, (".json", ".csv")).items():
        rows = _csv(location) if name.lower().endswith(".csv") else _json(location)
        if rows:
            found[name] = rows
    return found


def is_via(content: Any) -> bool:
    """Whether the content of a JSON file is VIA's, version 1 or 2, or makesense.ai's."""
    if not isinstance(content, dict):
        return False
    entries = content.get("_via_img_metadata", content)
    return isinstance(entries, dict) and any(
        isinstance(entry, dict) and "filename" in entry and "regions" in entry for entry in entries.values()
    )


def _json(location: Location) -> list[tuple[Any, list[Any]]]:
    content = read_json(location)
    if not is_via(content):
        if isinstance(content, dict) and {"project", "metadata", "view", "file"} <= set(content):
            raise ValueError(
                f"{location_name(location)}: a project of VIA 3, whose regions can be anything in time and space; "
                "export it as COCO there and read it as coco_folder"
            )
        return []
    entries = content.get("_via_img_metadata", content)
    images = []
    for entry in entries.values():
        if isinstance(entry, dict) and "filename" in entry:
            regions = entry.get("regions") or []
            # VIA 1 numbers regions by keys, VIA 2 lists them.
            rows = list(regions.values()) if isinstance(regions, dict) else regions
            if not isinstance(rows, list):
                raise ValueError(
                    f"{location_name(location)}: regions of {entry['filename']!r} are no list; export again"
                )
            images.append((entry["filename"], rows))
    return images


def _csv(location: Location) -> list[tuple[Any, list[Any]]]:
    name = location_name(location)
    try:
        text = read_location(location, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no UTF-8 text ({error.reason}); save it as UTF-8") from error
    lines = text.lstrip("#").splitlines()
    header = next(csv.reader(lines[:1]), [])
    if not set(_CSV_COLUMNS) <= {column.strip() for column in header}:
        return []
    images: dict[str, list[Any]] = {}
    csv.field_size_limit(MAX_TEXT_BYTES // 2)  # an outline of many points exceeds the usual 128 KB
    for number, row in enumerate(csv.DictReader(io.StringIO("\n".join(lines)), skipinitialspace=True), start=2):
        rows = images.setdefault(str(row.get("filename")), [])
        try:
            shape = json.loads(row.get("region_shape_attributes") or "{}")
            attributes = json.loads(row.get("region_attributes") or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: line {number}: no JSON in a column ({error.msg}); export it again") from error
        if shape:  # an image without regions has a line with empty ones
            rows.append({"shape_attributes": shape, "region_attributes": attributes})
    return list(images.items())


def _class_attribute(regions: Sequence[Any], path: str) -> str:
    names = Counter(key for region in regions for key in _attributes(region))
    for name in sorted(names, key=lambda name: -names[name]):
        if name.strip().lower() in _CLASS_ATTRIBUTES:
            return name
    if len(names) > 1:
        raise ValueError(
            f"{path}: regions have the attributes {', '.join(sorted(names))}, and none is called label or class; name "
            "the one that holds the class with attribute="
        )
    return next(iter(names), "")


def _attributes(region: Any) -> Mapping[str, Any]:
    attributes = region.get("region_attributes") if isinstance(region, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def _label(region: Any, attribute: str) -> str:
    if not attribute:
        return _NO_CLASS
    value = _attributes(region).get(attribute)
    if isinstance(value, dict):  # check boxes: {"cat": true}
        chosen = [str(key) for key, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else ""
    return str(value if value is not None else "").strip()


def _add(region: Any, item: str, attribute: str, image: ShapedImage, problems: ProblemList) -> None:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    if not isinstance(shape, dict):
        problems.error(image.where, item, "the region has no shape_attributes; draw it again")
        return
    label = _label(region, attribute)
    if not label:
        problems.error(image.where, item, f"the region has no single {attribute!r}; choose one in VIA")
        return
    try:
        polygon = _outline(shape)
    except ValueError as error:
        add_problem(problems, image.where, item, error, "correct or remove the region")
        return
    if polygon is None:
        problems.warn(image.where, item, f"a region of shape {shape.get('name')!r} has no area and is left out")
        return
    image.shapes.append(Shape(item, label, [polygon]))


def _outline(shape: Mapping[str, Any]) -> list[float] | None:
    """The region's polygon, or `None` if it has no area."""
    kind = shape.get("name")
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise ValueError("all_points_x and all_points_y must be lists of the same length")
        return points_of(list(zip(xs, ys, strict=True)))
    if kind == "rect":
        x, y, width, height = _numbers(shape, "x", "y", "width", "height")
        return rectangle(x, y, x + width, y + height)
    if kind == "circle":
        x, y, radius = _numbers(shape, "cx", "cy", "r")
        return ellipse(x, y, radius, radius)
    if kind == "ellipse":
        x, y, radius_x, radius_y = _numbers(shape, "cx", "cy", "rx", "ry")
        (angle,) = _numbers({"theta": 0, **shape}, "theta")
        return ellipse(x, y, radius_x, radius_y, math.degrees(angle))
    return None


def _numbers(shape: Mapping[str, Any], *keys: str) -> Iterator[float]:
    try:
        return iter([float(shape[key]) for key in keys])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a {shape.get('name')} needs numbers {', '.join(keys)}") from error
