"""CVAT's own XML, "CVAT for images": annotations.xml and images: instance, semantic or panoptic.

The XML lists the classes and, for each image, polygons, masks, boxes and ellipses. Shapes of one `group_id` and class
are one object; `z_order` says what covers what in semantic maps. Points, polylines and skeletons have no area and are
left out with a warning. Splits are the subsets of a project, or folders that each have an annotations.xml.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ...models.image_claims import MAX_IMAGE_PIXELS
from ..annotation_values import is_size
from ..archives import MAX_TEXT_BYTES, Location, location_name, read_location
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
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
    placed_mask,
    points_of,
    rectangle,
    shape_reading,
    split_names,
    training_first,
    unwrapped_files,
)

DESCRIPTION = "CVAT's own XML, exported as 'CVAT for images'"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "annotations.xml of 'CVAT for images', and the images in images or beside it"

_WITH_AREA = ("polygon", "mask", "box", "ellipse")
_WITHOUT_AREA = ("points", "polyline", "skeleton", "cuboid")
_CLASSES_WITHOUT_AREA = ("points", "polyline", "skeleton", "cuboid", "tag")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Subsets that the XML names, or folders with an XML file of their own, or "all"."""
    files = _files(DataFolder(path))
    return split_names((_subset(image, name) for name, root in files.items() for image in root.iter("image")), wanted)


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
    files = unwrapped_files(folder, IMAGE_SUFFIXES)
    images, names, used, source = [], dict[str, None](), set[str](), path
    for file, root in _files(folder).items():
        source = where = f"{path}/{file}"
        names.update(dict.fromkeys(_class_names(root)))
        for entry in root.iter("image"):
            used |= {str(shape.get("label")) for shape in entry if shape.tag in _WITH_AREA}
            if not is_in_split(_subset(entry, file), split):
                continue
            item = f"image {entry.get('name')!r}"
            try:
                image = _image(entry, file, files, where)
            except ValueError as error:
                add_problem(problems, where, item, error)
                continue
            for index, shape in enumerate(entry):
                _add(shape, f"{item}, {shape.tag} {index}", image, problems)
            images.append(image)
    options = {"classes": classes, "background": background, "void": void, "drop": drop, "stuff": stuff}
    return shape_reading(images, list(names) or None, task, problems, source=source, used=used, **options)


def read_xml(location: Location) -> ElementTree.Element:
    """Parse an XML file without entities.

    Raises:
        ValueError: it cannot be read, is too large, declares a document type, or is not XML.
    """
    name = location_name(location)
    content = read_location(location, MAX_TEXT_BYTES)
    # Entities of a document type can unpack to gigabytes or name other files; without the zeros of UTF-16 and UTF-32
    # the declaration shows.
    if re.search(rb"<!\s*(DOCTYPE|ENTITY)", content.replace(b"\0", b"")):
        raise ValueError(f"{name}: declares a document type, which can be an attack; annotation tools write none")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{name}: no valid XML ({error}); export it again") from error


def _files(folder: DataFolder) -> dict[str, ElementTree.Element]:
    """Roots of CVAT's XML files by name."""
    roots = {}
    for name, location in unwrapped_files(folder, (".xml",)).items():
        # Other tools' XML files, such as those of Pascal VOC, have another root.
        if b"<annotations" in read_location(location, MAX_TEXT_BYTES)[:2000].replace(b"\0", b""):
            root = read_xml(location)
            if root.tag == "annotations":
                if root.find("image") is None and root.find("track") is not None:
                    raise ValueError(
                        f"{location_name(location)}: exported as 'CVAT for video'; export it as 'CVAT for images'"
                    )
                roots[name] = root
    if not roots:
        raise ValueError(f"{folder.path}: there is no XML file of CVAT; expected {LAYOUT}; check the path")
    return {name: roots[name] for name in training_first(roots)}


def _subset(image: ElementTree.Element, file: str) -> str:
    return image.get("subset") or file_split(file)


def _class_names(root: ElementTree.Element) -> list[str]:
    meta = root.find("meta")
    labels = [] if meta is None else list(meta.iter("label"))
    names = [(label.findtext("name") or "").strip() for label in labels if label.findtext("parent") in (None, "")]
    kinds = [label.findtext("type") for label in labels if label.findtext("parent") in (None, "")]
    return [name for name, kind in zip(names, kinds, strict=True) if name and kind not in _CLASSES_WITHOUT_AREA]


def _image(entry: ElementTree.Element, file: str, files: FileList, where: str) -> ShapedImage:
    name, subset, folder = entry.get("name"), entry.get("subset"), posixpath.dirname(file)
    if not name:
        raise ValueError("the image has no name; export it again")
    size = (_whole(entry, "height"), _whole(entry, "width"))
    if not is_size(*size):
        raise ValueError("width and height must be whole numbers above 0; export it again")
    # The same name may occur in each subset.
    near = [
        posixpath.join(folder, part, name) for part in (f"images/{subset}", "images", "") if subset or part != "None"
    ]
    location = next((files[path] for path in near if path in files), None) or find_image(files, name, where)
    return ShapedImage(location, posixpath.splitext(name)[0], size, where)


def _add(shape: ElementTree.Element, item: str, image: ShapedImage, problems: ProblemList) -> None:
    if shape.tag in _WITHOUT_AREA:
        problems.warn(image.where, item, "the shape has no area and is left out")
        return
    if shape.tag not in _WITH_AREA:  # tags are about the whole image
        return
    label = (shape.get("label") or "").strip()
    if not label:
        problems.error(image.where, item, "the shape has no label; choose one in CVAT")
        return
    try:
        outline = _outline(shape, image.size)
        layer = _number(shape, "z_order", 0)
    except ValueError as error:
        add_problem(problems, image.where, item, error, "correct or remove the shape")
        return
    group = shape.get("group_id")
    group = None if group in (None, "", "0") else group
    image.shapes.append(Shape(item, label, outline["polygons"], outline["rle"], group=group, layer=layer))


def _outline(shape: ElementTree.Element, size: tuple[int, int]) -> Mapping[str, Any]:
    if shape.tag == "mask":
        return _mask(shape, size)
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";") if pair.strip()]
        polygon = points_of(pairs)
    elif shape.tag == "box":
        left, top, right, bottom = (_number(shape, key) for key in ("xtl", "ytl", "xbr", "ybr"))
        polygon = rectangle(left, top, right, bottom, _number(shape, "rotation", 0))
    else:
        x, y, radius_x, radius_y = (_number(shape, key) for key in ("cx", "cy", "rx", "ry"))
        polygon = ellipse(x, y, radius_x, radius_y, _number(shape, "rotation", 0))
    return {"polygons": [polygon], "rle": None}


def _mask(shape: ElementTree.Element, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as runs along the rows of its box, beginning with pixels outside of it."""
    left, top, width, height = (_whole(shape, key) for key in ("left", "top", "width", "height"))
    try:
        runs = [int(run) for run in (shape.get("rle") or "").replace(";", ",").split(",")]
    except ValueError as error:
        raise ValueError("the mask's runs must be whole numbers with commas between") from error
    # Before anything of that size is made.
    if min(width, height) < 1 or width * height > MAX_IMAGE_PIXELS or min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(f"the mask's runs do not add up to the {width} x {height} pixels of its box")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return placed_mask(flat.reshape(height, width), left, top, size)


def _number(element: ElementTree.Element, key: str, default: float | None = None) -> float:
    text = element.get(key)
    try:
        return default if text is None and default is not None else float(text or "")
    except ValueError as error:
        raise ValueError(f"{key} is {text!r}; it must be a number") from error


def _whole(element: ElementTree.Element, key: str) -> int:
    value = _number(element, key)
    if not value.is_integer():  # also true for NaN and infinity
        raise ValueError(f"{key} is {element.get(key)!r}; it must be a whole number")
    return int(value)
