"""Supervisely: meta.json, and a folder of images and one of JSON files in each dataset: instance, semantic or panoptic.

`meta.json` lists the classes; `DATASET/img/NAME.jpg` and `DATASET/ann/NAME.jpg.json` are images and objects. Splits are
the project's datasets. Polygons (with holes), bitmaps and rectangles are read; points and lines have no area and are
left out with a warning. In semantic maps later objects cover earlier ones.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.image_files import open_image_file
from ..annotation_values import is_size
from ..archives import MAX_IMAGE_BYTES, Location, location_name, read_json
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import (
    Shape,
    ShapedImage,
    add_problem,
    is_in_split,
    placed_mask,
    points_of,
    rectangle,
    shape_reading,
    split_names,
    unwrapped_files,
    with_holes,
)

DESCRIPTION = "Supervisely's projects"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "meta.json, and img/*.jpg and ann/*.jpg.json in a folder for each dataset"

_WITHOUT_AREA = ("point", "line", "polyline", "graph", "cuboid", "any")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The project's datasets."""
    return split_names(_datasets(DataFolder(path)), wanted)


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
    """Read one dataset of a project, or "all"; the options are for the rule for labels."""
    folder = DataFolder(path)
    files_of_images = unwrapped_files(folder, IMAGE_SUFFIXES)
    meta, source = _class_names(folder)
    images, used = [], set[str]()
    for dataset, files in _datasets(folder).items():
        is_own = is_in_split(dataset, split)
        if not is_own and drop != "unused":
            continue
        for name, location in files.items():
            where = location_name(location)
            try:
                content = read_json(location)
                size, objects = _checked(content)
                used |= {str(entry.get("classTitle")) for entry in objects if isinstance(entry, dict)}
                if not is_own:
                    continue
                image = ShapedImage(_image(files_of_images, name), _stem(name), size, where)
            except ValueError as error:
                if is_own:  # problems of other datasets are reported when those are read
                    add_problem(problems, where, "", error)
                continue
            for index, entry in enumerate(objects):
                _add(entry, f"objects[{index}]", image, problems)
            images.append(image)
    options = {"background": background, "void": void, "drop": drop, "stuff": stuff}
    return shape_reading(images, meta, task, problems, source=source, used=used, classes=classes, **options)


def _datasets(folder: DataFolder) -> dict[str, dict[str, Location]]:
    """Annotation files by dataset."""
    datasets: dict[str, dict[str, Location]] = {}
    for name, location in unwrapped_files(folder, (".json",)).items():
        head, _, tail = name.rpartition("/ann/")
        if head or name.startswith("ann/"):
            # Datasets may be nested: `a/datasets/b` is "b" in "a".
            dataset = head.replace("/datasets/", "/").rpartition("/")[2] if tail else ""
            datasets.setdefault(dataset or "all", {})[name] = location
    return datasets


def _class_names(folder: DataFolder) -> tuple[list[str], str]:
    files = unwrapped_files(folder, (".json",))
    location = next((files[name] for name in files if posixpath.basename(name) == "meta.json"), None)
    if location is None:
        raise ValueError(f"{folder.path}: there is no meta.json; expected {LAYOUT}; check the path")
    content, name = read_json(location), location_name(location)
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("title"), str) for entry in entries
    ):
        raise ValueError(f"{name}: needs a list `classes` with a `title` each; export the project again")
    return [entry["title"] for entry in entries if entry.get("shape") not in _WITHOUT_AREA[:-1]], name


def _checked(content: Any) -> tuple[tuple[int, int], list[Any]]:
    size = content.get("size") if isinstance(content, dict) else None
    if not isinstance(size, dict) or not is_size(size.get("height"), size.get("width")):
        raise ValueError("`size` needs height and width as whole numbers; export the project again")
    if not isinstance(content.get("objects"), list):
        raise ValueError("there is no list `objects`; export the project again")
    return (size["height"], size["width"]), content["objects"]


def _stem(name: str) -> str:
    """The image's name without the folder and endings: `a/ann/b.jpg.json` is a/b."""
    text = f"/{name}".replace("/ann/", "/").strip("/").removesuffix(".json")
    stem, suffix = posixpath.splitext(text)
    return stem if suffix.lower() in IMAGE_SUFFIXES else text


def _image(images: FileList, name: str) -> Location:
    head, _, tail = f"/{name}".rpartition("/ann/")
    wanted = f"{head}/img/{tail.removesuffix('.json')}".strip("/")
    # Older exports leave the image's ending out.
    for path in (wanted, *(wanted + suffix for suffix in IMAGE_SUFFIXES)):
        if path in images:
            return images[path]
    raise ValueError(f"there is no image {wanted!r}; export the project with images, or copy it there")


def _add(entry: Any, item: str, image: ShapedImage, problems: ProblemList) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("classTitle"), str):
        problems.error(image.where, item, "the object has no classTitle; export the project again")
        return
    kind = entry.get("geometryType") or ("bitmap" if entry.get("bitmap") else "polygon")
    if kind in _WITHOUT_AREA:
        problems.warn(image.where, item, f"an object of type {kind!r} has no area and is left out")
        return
    try:
        outline = _outline(entry, kind, image.size)
    except ValueError as error:
        add_problem(problems, image.where, item, error, "correct or remove the object")
        return
    image.shapes.append(Shape(item, entry["classTitle"], outline["polygons"], outline["rle"]))


def _outline(entry: Mapping[str, Any], kind: str, size: tuple[int, int]) -> dict[str, Any]:
    if kind in ("bitmap", "alpha_mask"):
        return _bitmap(entry.get("bitmap"), size)
    points = entry.get("points")
    if not isinstance(points, dict):
        raise ValueError("`points` needs exterior and interior")
    exterior = points_of(points.get("exterior"))
    if kind == "rectangle":
        if len(exterior) != 4:
            raise ValueError("a rectangle needs two points")
        xs, ys = sorted(exterior[::2]), sorted(exterior[1::2])
        return with_holes(rectangle(xs[0], ys[0], xs[1], ys[1]), [], size)
    if kind != "polygon":
        raise ValueError(f"objects of type {kind!r} are unknown")
    holes = points.get("interior") or []
    if not isinstance(holes, list):
        raise ValueError("`interior` must be a list of outlines")
    return with_holes(exterior, [points_of(hole) for hole in holes], size)


def _bitmap(bitmap: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A mask stored as a PNG, packed by zlib and in base64, which covers the object's box alone."""
    try:
        origin = [int(value) for value in bitmap["origin"]]
        packed = base64.b64decode(bitmap["data"], validate=True)
        unpacker = zlib.decompressobj()
        # Limited, as a few bytes can unpack to gigabytes.
        content = unpacker.decompress(packed, MAX_IMAGE_BYTES)
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error, zlib.error) as error:
        raise ValueError(f"the bitmap needs `origin` and packed `data` ({error})") from error
    if len(origin) != 2 or unpacker.unconsumed_tail:
        raise ValueError("the bitmap needs an origin x, y, and data of an image")
    png = open_image_file(content, "the bitmap")
    # The mask is the alpha channel; an image of one channel is the mask itself.
    if png.mode in ("RGBA", "LA") or "transparency" in png.info:
        part = np.asarray(png.convert("RGBA"))[..., 3] > 0
    else:
        values = np.asarray(png)
        part = (values if values.ndim == 2 else values.max(axis=2)) > 0
    return placed_mask(part, origin[0], origin[1], size)
