"""The parts of COCO's JSON that its panoptic and instance forms share: checked images, categories and flags.

Every entry is checked as it is read: an id that is missing, doubled or unknown is a problem with its file and id, and
the entry is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.picture_decoding import MAX_PICTURE_PIXELS
from .archives import Location, location_name
from .data_folder import FileList, find_named
from .json_files import read_json
from .problems import ProblemList


@dataclass
class CocoFile:
    """A COCO JSON file, its parts checked.

    Attributes:
        name: of the file, for errors.
        images: entries by image id, in the file's order.
        pictures: where the picture of each image id is.
        categories: entries by category id, ascending.
        annotations: as in the file.
    """

    name: str
    images: dict[Any, dict[str, Any]]
    pictures: dict[Any, Location]
    categories: dict[int, dict[str, Any]]
    annotations: list[Any]


def read_coco_file(location: Location, pictures: FileList, problems: ProblemList) -> CocoFile:
    """Read a COCO JSON file and find the pictures that it names.

    Args:
        location: of the file.
        pictures: files by the names that the JSON uses.
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
    for place, image in enumerate(content["images"]):
        item = f"image {image.get('id')!r}" if isinstance(image, dict) else f"images[{place}]"
        if not isinstance(image, dict) or not is_id(image.get("id")):
            problems.error(name, item, "the entry has no id; give each image a number or a text of its own")
        elif image["id"] in images:
            problems.error(name, item, "two images have this id; number them differently, and their annotations")
        elif not is_size(image.get("height"), image.get("width")):
            problems.error(name, item, "height and width must be whole numbers above 0, and those of a picture")
        else:
            try:
                found[image["id"]] = find_named(pictures, image.get("file_name"), f"{name}: {item}")
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
    """Whether two values can be the height and width of a picture."""
    return (
        type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= MAX_PICTURE_PIXELS
    )


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
