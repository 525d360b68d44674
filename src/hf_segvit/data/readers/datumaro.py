"""Datumaro, as CVAT exports it: annotations/SPLIT.json and images/SPLIT: instance, semantic or panoptic.

The JSON file has the list of classes and, for each image, polygons, masks, boxes and ellipses. Shapes of one `group`
and class are one object; `z_order` says what covers what in semantic maps. Points, lines and captions have no area and
are left out with a warning.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from ..annotation_values import is_size
from ..archives import location_name, read_json
from ..decoding import upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..mask_files import compressed_counts, rle_fault
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import (
    Shape,
    ShapedImage,
    add_problem,
    ellipse,
    find_image,
    is_in_split,
    points_of,
    rectangle,
    shape_reading,
    split_names,
    training_first,
    unwrapped_files,
)

DESCRIPTION = "Datumaro's own format, as CVAT exports it"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "annotations/train.json in Datumaro's format, and the images in images/train"


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Names of the JSON files in `annotations`."""
    return split_names((posixpath.splitext(name)[0] for name in _files(DataFolder(path))), wanted)


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
    crowd: Any = "ignore",
) -> Reading:
    """Read one split; the options are for the rule for labels."""
    folder = DataFolder(path)
    files = unwrapped_files(folder, IMAGE_SUFFIXES)
    images, names, used, source = [], dict[str, None](), set[str](), path
    for file, location in _files(folder).items():
        where = location_name(location)
        content = read_json(location)
        labels = _labels(content, where)
        # Each split lists the classes; the order is that of the split for training.
        names.update(dict.fromkeys(labels))
        is_own = is_in_split(posixpath.splitext(file)[0], split)
        source = where if is_own else source
        for index, entry in enumerate(content["items"]):
            item = f"image {entry.get('id')!r}" if isinstance(entry, dict) else f"items[{index}]"
            annotations = entry.get("annotations") if isinstance(entry, dict) else None
            if not isinstance(annotations, list):
                if is_own:
                    problems.error(where, item, "the entry has no list of annotations; export it again")
                continue
            used |= {labels[number] for row in annotations if (number := _label(row, labels)) is not None}
            if not is_own:
                continue
            try:
                image = _image(entry, posixpath.splitext(file)[0], files, where)
            except ValueError as error:
                add_problem(problems, where, item, error)
                continue
            for position, row in enumerate(annotations):
                _add(row, f"{item}, annotation {position}", labels, image, problems)
            images.append(image)
    options = {"background": background, "void": void, "drop": drop, "stuff": stuff, "crowd": crowd}
    return shape_reading(images, list(names), task, problems, source=source, used=used, classes=classes, **options)


def is_datumaro(content: Any) -> bool:
    """Whether the content of a JSON file is Datumaro's."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("items"), list)
        and isinstance(content.get("categories"), dict)
    )


def _files(folder: DataFolder) -> FileList:
    files = unwrapped_files(folder, (".json",))
    names = training_first(name[12:] for name in files if name.startswith("annotations/"))
    return FileList((name, files[f"annotations/{name}"]) for name in names)


def _labels(content: Any, where: str) -> list[str]:
    if not is_datumaro(content):
        raise ValueError(f"{where}: needs `categories` and a list `items`; is this Datumaro's format?")
    label = content["categories"].get("label")
    entries = label.get("labels") if isinstance(label, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    ):
        raise ValueError(f"{where}: categories.label.labels must list the classes, each with a name; export it again")
    return [entry["name"].strip() for entry in entries]


def _label(row: Any, labels: Sequence[str]) -> int | None:
    number = row.get("label_id") if isinstance(row, dict) else None
    return number if type(number) is int and 0 <= number < len(labels) else None


def _image(entry: Mapping[str, Any], split: str, files: FileList, where: str) -> ShapedImage:
    stated: Mapping[str, Any] = next((entry[key] for key in ("image", "media") if isinstance(entry.get(key), dict)), {})
    image_id, path = str(entry.get("id")), stated.get("path")
    # The path is relative to the folder of the split; without images, it is empty and the id is the name.
    candidates = [path] if path else [image_id + suffix for suffix in IMAGE_SUFFIXES]
    near = [f"{start}{name}" for start in (f"images/{split}/", "images/", "") for name in candidates]
    location = next((files[name] for name in near if name in files), None)
    location = location or find_image(files, candidates[0], where)
    size = stated.get("size")
    if isinstance(size, list) and len(size) == 2 and is_size(*size):
        return ShapedImage(location, image_id, (size[0], size[1]), where)
    return ShapedImage(location, image_id, upright_size(location), where)


def _add(row: Any, item: str, labels: Sequence[str], image: ShapedImage, problems: ProblemList) -> None:
    label = _label(row, labels)
    kind = row.get("type") if isinstance(row, dict) else None
    if kind not in ("polygon", "mask", "bbox", "ellipse"):
        problems.warn(image.where, item, f"an annotation of type {kind!r} has no area and is left out")
        return
    if label is None:
        problems.error(image.where, item, f"label_id {row.get('label_id')!r} is not in the list of classes")
        return
    try:
        polygons, rle = _outline(row, kind, image.size)
    except ValueError as error:
        add_problem(problems, image.where, item, error, "correct or remove the annotation")
        return
    attributes = row.get("attributes")
    is_crowd = isinstance(attributes, dict) and bool(attributes.get("is_crowd"))
    layer, group = row.get("z_order"), row.get("group")
    image.shapes.append(
        Shape(
            item,
            labels[label],
            polygons,
            rle,
            group=group if isinstance(group, int) and group else None,  # 0 is no group
            is_crowd=is_crowd,
            layer=layer if isinstance(layer, int) else 0,
        )
    )


def _outline(
    row: Mapping[str, Any], kind: str, size: tuple[int, int]
) -> tuple[list[list[float]] | None, dict[str, Any] | None]:
    if kind == "mask":
        rle = row.get("rle")
        if fault := rle_fault(rle, size):
            raise ValueError(fault)
        assert isinstance(rle, dict)
        return None, {"size": list(size), "counts": compressed_counts(rle["counts"])}
    if kind == "polygon":
        return [points_of(row.get("points"))], None
    numbers = points_of(row.get("bbox") if kind == "bbox" else row.get("points"))
    if len(numbers) != 4:
        raise ValueError(f"a {kind} needs four numbers")
    if kind == "bbox":  # x, y, width, height
        return [rectangle(numbers[0], numbers[1], numbers[0] + numbers[2], numbers[1] + numbers[3])], None
    left, top, right, bottom = numbers
    return [ellipse((left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2)], None
