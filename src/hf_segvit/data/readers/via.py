"""VGG Image Annotator (VIA) and makesense.ai: a JSON or CSV file of regions: instance, semantic or panoptic.

`via_region_data.json` (VIA 1 and 2, saved as a project or exported), the CSV export or a project of VIA 3, beside the
images, in the folder or in `train` and `val`. makesense.ai's "VGG JSON" has the same form. Polygons, rectangles,
circles and ellipses are read. The class of a region is its attribute `label`, `class` and so on, or the one named by
`attribute=`; if regions have none, they all are "object".
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

import numpy as np

from ..archives import MAX_TEXT_BYTES, Location, location_name, read_json, read_location, read_text
from ..decoding import upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import (
    Shape,
    ShapedImage,
    add_problem,
    class_file,
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
_PROJECT_3 = {"project", "attribute", "file", "metadata", "view"}  # parts of a project of VIA 3
# Numbers of shapes in VIA 3, with names and keys as in VIA 2 where they have an area.
_SHAPES_3: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("point", ()),
    2: ("rect", ("x", "y", "width", "height")),
    3: ("circle", ("cx", "cy", "r")),
    4: ("ellipse", ("cx", "cy", "rx", "ry")),
    5: ("line", ()),
    6: ("polyline", ()),
    7: ("polygon", ()),
    8: ("extreme_rect", ()),
    9: ("extreme_circle", ()),
}


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
        raise ValueError(f"{path}: no file of VIA is there; expected {LAYOUT}; check the path")
    # All splits choose one attribute and number classes alike.
    regions = [region for content in contents.values() for _, rows in content for region in rows]
    attribute = attribute or _class_attribute(regions, path)
    used = {label for region in regions if _has_area(region) and (label := _label(region, attribute))}
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
    source = class_file(folder, classes)
    options = {"background": background, "void": void, "drop": drop, "stuff": stuff}
    return shape_reading(images, None, task, problems, source=path, used=used, classes=source, **options)


def _files(folder: DataFolder) -> dict[str, list[tuple[Any, list[Any]]]]:
    """(file name, regions) of all images, by name of the JSON or CSV file."""
    found = {}
    for name, location in unwrapped_files(folder, (".json", ".csv")).items():
        rows = _csv(location) if name.lower().endswith(".csv") else _json(location)
        if rows:
            found[name] = rows
    return found


def is_via(content: Any) -> bool:
    """Whether the content of a JSON file is VIA's, or makesense.ai's."""
    if not isinstance(content, dict):
        return False
    if set(content) >= _PROJECT_3:
        return True
    entries = content.get("_via_img_metadata", content)
    return isinstance(entries, dict) and any(
        isinstance(entry, dict) and "filename" in entry and "regions" in entry for entry in entries.values()
    )


def _json(location: Location) -> list[tuple[Any, list[Any]]]:
    content = read_json(location)
    if isinstance(content, dict) and set(content) >= _PROJECT_3:
        return _project_3(content, location_name(location))
    if not is_via(content):
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


def _project_3(content: Mapping[str, Any], name: str) -> list[tuple[Any, list[Any]]]:
    """Images of a project of VIA 3, with regions in the form of VIA 2."""
    for key in ("attribute", "file", "metadata", "view"):
        if not isinstance(content[key], dict) or not all(isinstance(row, dict) for row in content[key].values()):
            raise ValueError(f"{name}: {key!r} must be objects by number; save the project of VIA 3 again")
    files, names = content["file"], dict[str, str]()
    for view, row in content["view"].items():
        members = row.get("fid_list")
        # A view of several files compares them: its regions belong to none of them.
        if isinstance(members, list) and len(members) == 1 and str(members[0]) in files:
            file = files[str(members[0])]
            if file.get("type", 2) != 2:
                raise ValueError(f"{name}: {file.get('fname')!r} is no image; extract frames and annotate those")
            # A file of another server has its address as `src`, and its name nowhere else.
            names[view] = str(file.get("fname") or file.get("src") or "")
    images: dict[str, list[Any]] = {view: [] for view in names}
    for key, row in content["metadata"].items():
        shape, values = row.get("xy"), row.get("av")
        if row.get("z") or not shape:  # a part of a video, or a label of the whole image
            continue
        if str(row.get("vid")) not in names:
            raise ValueError(f"{name}: metadata {key!r} is in the view {row.get('vid')!r}, which has no single image")
        attributes = _attributes_3(values if isinstance(values, dict) else {}, content["attribute"])
        images[str(row["vid"])].append({"shape_attributes": _shape_3(shape), "region_attributes": attributes})
    return [(names[view], rows) for view, rows in images.items()]


def _attributes_3(values: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of a region's attributes, whose file holds numbers of both."""
    named: dict[str, Any] = {}
    for number, value in values.items():
        attribute = attributes.get(number, {})
        options = attribute.get("options")
        if isinstance(options, dict) and options:
            # Check boxes hold several numbers with commas.
            chosen = [str(options.get(part, "")).strip() for part in str(value).split(",")]
            value = dict.fromkeys(chosen, True) if len(chosen) > 1 else chosen[0]
        named[str(attribute.get("aname", number))] = value
    return named


def _shape_3(numbers: Any) -> dict[str, Any]:
    """A shape of VIA 3, the number of its kind and coordinates, in the form of VIA 2."""
    kind, values = (numbers[0], numbers[1:]) if isinstance(numbers, list) else (0, [])
    name, keys = _SHAPES_3.get(kind, (f"number {kind!r}", ()))
    if name == "polygon":
        return {"name": name, "all_points_x": values[::2], "all_points_y": values[1::2]}
    if name in ("extreme_rect", "extreme_circle"):
        try:
            points = np.array(values, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            points = np.zeros((0, 2))
        name, keys = _SHAPES_3[2 if name == "extreme_rect" else 3]
        if len(points) == 4:  # one on each side
            values = [*points.min(0), *np.ptp(points, axis=0)]
        elif len(points) == 3 and keys == _SHAPES_3[3][1]:
            values = _circle_through(points)
        else:
            values = []
    return {"name": name, **dict(zip(keys, values, strict=False))}


def _circle_through(points: np.ndarray) -> list[float]:
    """Centre and radius of the circle through three points (3, 2); nothing if they are on a line."""
    # The centre is as far from the first point as from the others.
    differences = points[1:] - points[0]
    if abs(np.linalg.det(differences)) < 1e-9:
        return []
    center = np.linalg.solve(2 * differences, (differences**2).sum(1))
    return [*(center + points[0]), float(np.hypot(*center))]


def _csv(location: Location) -> list[tuple[Any, list[Any]]]:
    name = location_name(location)
    content = read_location(location, MAX_TEXT_BYTES)
    # Other CSV files may have any encoding; without the zeros of UTF-16 the header shows.
    head = content[:10_000].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe").decode("utf-8", errors="replace")
    if head.startswith("#") and "temporal_coordinates" in head:
        raise ValueError(f"{name}: the CSV of VIA 3, whose labels are numbers; save the project instead (JSON)")
    header = next(csv.reader(head.lstrip("#").splitlines()[:1]), [])
    if not set(_CSV_COLUMNS) <= {column.strip() for column in header}:
        return []
    lines = read_text(location).lstrip("#").splitlines()
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


def _has_area(region: Any) -> bool:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    return isinstance(shape, dict) and shape.get("name") in ("polygon", "rect", "circle", "ellipse")


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
