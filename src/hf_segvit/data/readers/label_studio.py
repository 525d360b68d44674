"""Label Studio's JSON, JSON-MIN and brush PNG exports: instance, semantic or panoptic.

The JSON file lists tasks with their regions: polygons, brushes, rectangles and ellipses. Brush PNGs
(`task-1-annotation-2-by-3-tag-cat-0.png`) hold one region each; as their names do not say which image they belong to,
the JSON export lies beside them. An image's annotation is its ground truth, or else the first that was not cancelled.
Label Studio's COCO and YOLO exports are read as coco_folder and yolo.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ...models.image_claims import MAX_IMAGE_PIXELS
from ..annotation_values import is_size
from ..archives import Location, location_name
from ..decoding import upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..mask_files import read_index_map
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
    json_files,
    placed_mask,
    points_of,
    shape_reading,
    split_names,
    unwrapped_files,
)

DESCRIPTION = "Label Studio's JSON export, also with brush PNGs"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "the JSON or JSON-MIN export, the images, and perhaps brush PNGs (task-1-annotation-2-by-3-tag-cat-0.png)"

BRUSH_NAME = re.compile(r"task-(\d+)-annotation-(\d+)-by-(.*)-(\d+)\.png")
_SHAPES = re.compile(r"(polygon|brush|rectangle|ellipse)(labels)?$")  # types of regions with an area
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{6,8}-")  # Label Studio puts it before the names of uploaded files


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with a JSON export, or "all" for one in the data set's own folder."""
    folder = DataFolder(path)
    files = json_files(folder, is_label_studio)
    if not files and any(BRUSH_NAME.fullmatch(posixpath.basename(name)) for name in unwrapped_files(folder)):
        raise ValueError(
            f"{path}: brush PNGs without the JSON export, and their names do not say which image they belong to; "
            "export the project as JSON, too, and put that file and the images beside them"
        )
    return split_names((file_split(name) for name in files), wanted)


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
    """Read one split; the options are for the rule for labels."""
    folder = DataFolder(path)
    pngs = [name for name in unwrapped_files(folder) if BRUSH_NAME.fullmatch(posixpath.basename(name))]
    files = FileList(
        (name, location) for name, location in unwrapped_files(folder, IMAGE_SUFFIXES).items() if name not in pngs
    )
    brushes: dict[tuple[str, str], list[str]] = {}  # by task and annotation
    for name in pngs:
        match = BRUSH_NAME.fullmatch(posixpath.basename(name))
        assert match is not None
        brushes.setdefault((match[1], match[2]), []).append(name)
    images, used = [], set[str]()
    for file, (location, tasks) in json_files(folder, is_label_studio).items():
        where, is_own = location_name(location), is_in_split(file_split(file), split)
        for index, entry in enumerate(tasks):
            item = f"task {entry.get('id', index)!r}"
            annotation_id, regions = _regions(entry)
            labels = {label for region in regions for label in _labels(region)}
            used |= labels
            if not is_own:
                continue
            if isinstance(entry.get("data"), dict) and not _annotations(entry):
                # As an image without objects it would teach that there are none.
                problems.warn(where, item, "the task has no annotation, or was skipped; its image is left out")
                continue
            if len(_annotations(entry)) > 1:
                problems.warn(where, item, f"the image has several annotations; {annotation_id} is read")
            try:
                image = _image(entry, regions, files, where)
            except ValueError as error:
                add_problem(problems, where, item, error)
                continue
            painted = brushes.pop((str(entry.get("id")), str(annotation_id)), [])
            for number, region in enumerate(regions):
                if not (painted and "rle" in _value(region)):  # the PNGs hold the same brushes
                    _add(region, f"{item}, region {number}", image, problems)
            for name in painted:
                _add_brush(unwrapped_files(folder)[name], labels, image, problems)
            images.append(image)
    source = class_file(folder, classes)
    options = {"background": background, "void": void, "drop": drop, "stuff": stuff}
    reading = shape_reading(images, None, task, problems, source=path, used=used, classes=source, **options)
    if split == "all":
        for names in brushes.values():
            where = location_name(unwrapped_files(folder)[names[0]])
            problems.warn(where, "", "the JSON export has no such task and annotation; the brush is not used")
    return reading


def is_label_studio(content: Any) -> bool:
    """Whether the content of a JSON file is Label Studio's JSON or JSON-MIN."""
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        return False
    first = content[0]
    if isinstance(first.get("data"), dict):
        return any(key in first for key in ("annotations", "completions"))
    return any(_value_labels(row) for entry in content for row in _minimal(entry))


def _annotations(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = entry.get("annotations", entry.get("completions"))
    rows = rows if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict) and not row.get("was_cancelled")]


def _minimal(entry: Mapping[str, Any]) -> list[Any]:
    """Regions of a task in JSON-MIN, which has a list for each tool."""
    return [row for value in entry.values() if isinstance(value, list) for row in value if isinstance(row, dict)]


def _regions(entry: Mapping[str, Any]) -> tuple[Any, list[Mapping[str, Any]]]:
    """Id of the annotation that counts, and its regions."""
    if not isinstance(entry.get("data"), dict):
        return entry.get("annotation_id"), [row for row in _minimal(entry) if _value_labels(row)]
    rows = sorted(_annotations(entry), key=lambda row: not row.get("ground_truth"))
    if not rows:
        return None, []
    result = rows[0].get("result")
    drawn = [row for row in result if isinstance(row, dict)] if isinstance(result, list) else []
    # Choices and texts are about the image, and relations about regions. A region may have its label in another row.
    labelled = {str(row.get("id")) for row in drawn if _labels(row)}
    regions: list[Mapping[str, Any]] = [
        row
        for row in drawn
        if _labels(row) or (_SHAPES.match(str(row.get("type"))) and str(row.get("id")) not in labelled)
    ]
    return rows[0].get("id"), regions


def _value(region: Mapping[str, Any]) -> Mapping[str, Any]:
    value = region.get("value", region)
    return value if isinstance(value, dict) else {}


def _labels(region: Mapping[str, Any]) -> list[str]:
    return _value_labels(_value(region))


def _value_labels(value: Mapping[str, Any]) -> list[str]:
    for key, labels in value.items():
        if str(key).endswith("labels") and isinstance(labels, list):
            return [str(label).strip() for label in labels if str(label).strip()]
    return []


def _image(entry: Mapping[str, Any], regions: Sequence[Mapping[str, Any]], files: FileList, where: str) -> ShapedImage:
    data = entry["data"] if isinstance(entry.get("data"), dict) else entry
    texts = [value for value in data.values() if isinstance(value, str)]
    texts = sorted(texts, key=lambda text: posixpath.splitext(urlsplit(text).path)[1].lower() not in IMAGE_SUFFIXES)
    text = data["image"] if isinstance(data.get("image"), str) else next(iter(texts), "")
    names = list(_image_names(text))
    for name in names[:-1]:
        try:
            location = find_image(files, name, where)
            break
        except ValueError:
            continue
    else:
        location = find_image(files, names[-1], where)
    image_id = posixpath.splitext(posixpath.basename(location["member"].replace("\\", "/")))[0]
    for region in regions:
        height: Any = region.get("original_height")
        width: Any = region.get("original_width")
        if is_size(height, width):
            return ShapedImage(location, image_id, (height, width), where)
    return ShapedImage(location, image_id, upright_size(location), where)


def _image_names(text: str) -> Iterator[str]:
    """File names that a task's address of an image may stand for, the likeliest last, as errors name that one."""
    parts = urlsplit(text.replace("\\", "/"))
    name = unquote((parse_qs(parts.query).get("d") or [parts.path])[0])  # local storage: `/data/local-files/?d=a.jpg`
    folder, base = posixpath.split(name)
    if match := _UPLOAD_PREFIX.match(base):
        yield name
        yield posixpath.join(folder, base[match.end() :])
    yield name


def _add(region: Mapping[str, Any], item: str, image: ShapedImage, problems: ProblemList) -> None:
    try:
        outline = _outline(_value(region), image.size)
    except ValueError as error:
        add_problem(problems, image.where, item, error, "correct or remove the region")
        return
    if outline is None:
        problems.warn(image.where, item, f"a region of type {region.get('type')!r} has no area and is left out")
        return
    if not _labels(region):
        problems.error(image.where, item, "the region has no label; choose one in Label Studio, or delete it")
    for label in _labels(region):
        image.shapes.append(Shape(item, label, outline["polygons"], outline["rle"]))


def _outline(value: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """The region's outline, or `None` if it has no area; coordinates in the file are percent of width and height."""
    height, width = size
    if "rle" in value:
        return placed_mask(brush_mask(value["rle"], size), 0, 0, size)
    if "points" in value:
        points = np.array(points_of(value["points"])).reshape(-1, 2) * (width / 100, height / 100)
        return {"polygons": [points.reshape(-1).tolist()], "rle": None}
    try:
        numbers = {key: float(number) for key, number in value.items() if isinstance(number, int | float)}
        left, top, angle = numbers["x"] * width / 100, numbers["y"] * height / 100, numbers.get("rotation", 0.0)
        if "radiusX" in numbers:
            radii = numbers["radiusX"] * width / 100, numbers["radiusY"] * height / 100
            return {"polygons": [ellipse(left, top, *radii, degrees=angle)], "rle": None}
        if "height" not in numbers:
            return None
        wide, high = numbers["width"] * width / 100, numbers["height"] * height / 100
    except KeyError as error:
        raise ValueError(f"the region lacks the number {error}") from error
    # Turned about the upper left corner, unlike in other tools.
    sine, cosine = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    corners = np.array([(0, 0), (wide, 0), (wide, high), (0, high)]) @ [[cosine, sine], [-sine, cosine]]
    return {"polygons": [(corners + np.array([left, top])).reshape(-1).tolist()], "rle": None}


def brush_mask(counts: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of a brush: bytes that pack the pixels' four channels as runs, of which alpha is the mask.

    Raises:
        ValueError: they are no such bytes, or not of this size.
    """
    if not isinstance(counts, list) or not all(type(value) is int and 0 <= value < 256 for value in counts):
        raise ValueError("the brush's rle must be a list of bytes")
    bits = np.unpackbits(np.array(counts, dtype=np.uint8))
    position = 0

    def take(length: int) -> int:
        nonlocal position
        if position + length > len(bits):
            raise ValueError("the brush's rle ends too early")
        value = 0
        for bit in bits[position : position + length]:
            value = 2 * value + int(bit)
        position += length
        return value

    total, word = take(32), take(5) + 1
    # Four channels; compared before anything of this size is made.
    if total != 4 * size[0] * size[1] or total > 4 * MAX_IMAGE_PIXELS:
        raise ValueError(f"the brush has {total} values, but the image of {size[0]} x {size[1]} pixels takes 4 each")
    lengths = [take(4) + 1 for _ in range(4)]
    values, done = np.zeros(total, dtype=np.uint8), 0
    while done < total:
        is_run = take(1)
        end = done + 1 + take(lengths[take(2)])
        if end > total:
            raise ValueError("the brush's runs exceed the image")
        if is_run:
            values[done:end] = take(word) & 255
        else:
            for index in range(done, end):
                values[index] = take(word) & 255
        done = end
    return values.reshape(*size, 4)[..., 3] > 127


def _add_brush(location: Location, labels: set[str], image: ShapedImage, problems: ProblemList) -> None:
    name = location_name(location)
    match = BRUSH_NAME.fullmatch(posixpath.basename(name.replace("\\", "/")))
    assert match is not None
    # `USER-TOOL-LABEL`, each of which may hold a hyphen: the longest label of the task's that it ends in.
    endings = [label for label in labels if match[3].endswith(f"-{label}")]
    if not endings:
        problems.error(name, "", f"the name ends in none of the task's labels ({', '.join(sorted(labels))})")
        return
    try:
        values = read_index_map(location)
        if values.shape != image.size:
            raise ValueError(f"{name}: {values.shape} pixels, but the image has {image.size} (height, width)")
    except ValueError as error:
        add_problem(problems, name, "", error, "export it again")
        return
    # Brushes have soft edges: pixels that are covered by half count. Other tools write 0 and 1.
    mask = values > values.max(initial=0) // 2
    outline = placed_mask(mask, 0, 0, image.size)
    image.shapes.append(Shape(posixpath.basename(name), max(endings, key=len), None, outline["rle"]))
