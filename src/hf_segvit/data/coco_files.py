"""COCO JSON files: images, categories and crowd flags, checked.

What coco and coco_folder have in common. An entry with a missing, duplicate or unknown id is reported with its file
and id, and left out. The annotations themselves are read by coco_outlines.py and coco_panoptic.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .annotation_values import MOST_CLASSES, is_id, is_size, name_fault, shown, whole_number
from .archives import Location, location_name, read_json
from .folders import FileList, find_elsewhere, find_named
from .problems import ProblemList

_MOST_LISTED = 3  # up to this many images that cannot be found are reported one by one


@dataclass
class CocoFile:
    """A COCO JSON file whose images and categories are checked."""

    name: str  # of the file, for errors
    images: dict[Any, dict[str, Any]]  # entries by image id, in the file's order
    locations: dict[Any, Location]  # image files by image id
    categories: dict[int, dict[str, Any]]  # entries by category id, ascending
    annotations: list[Any]  # as in the file, not yet checked
    left_out: set[Any]  # ids of images that were reported and are not in `images`


def read_coco_file(location: Location, files: FileList, problems: ProblemList) -> CocoFile:
    """Read a COCO JSON file and find the images that it names among `files`."""
    name = location_name(location)
    content = read_json(location)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{name}: there is no list {key!r}; COCO files have images, annotations and categories; export it again"
            )
    images, locations = dict[Any, dict[str, Any]](), dict[Any, Location]()
    left_out, not_found = set[Any](), dict[Any, str]()
    for index, image in enumerate(content["images"]):
        item = f"image {shown(image.get('id'))}" if isinstance(image, dict) else f"images[{index}]"
        if not isinstance(image, dict) or not is_id(image.get("id")):
            problems.error(name, item, "the entry has no id; give each image a number or a text of its own")
            continue
        if image["id"] in images or image["id"] in left_out:
            problems.error(name, item, "two images have this id; number them differently, and their annotations")
            continue
        if not is_size(image.get("height"), image.get("width")):
            size = {key: whole_number(image.get(key)) for key in ("height", "width")}
            if not is_size(*size.values()):
                problems.error(name, item, "height and width must be whole numbers above 0, and those of an image")
                left_out.add(image["id"])
                continue
            image = {**image, **size}
        images[image["id"]] = image
        try:
            locations[image["id"]] = find_named(files, image.get("file_name"), f"{name}: {item}")
        except ValueError as error:
            not_found[image["id"]] = str(error).removeprefix(f"{name}: {item}: ")
    if not_found:
        _find_elsewhere(name, images, locations, not_found, files, problems)
    for image_id in not_found:
        del images[image_id]
        left_out.add(image_id)
    # In the file's order, though some images were found later than others.
    locations = {image_id: locations[image_id] for image_id in images}
    categories = checked_categories(content["categories"], name)
    return CocoFile(name, images, locations, categories, content["annotations"], left_out)


def _find_elsewhere(
    name: str,
    images: Mapping[Any, Mapping[str, Any]],
    locations: dict[Any, Location],
    not_found: dict[Any, str],
    files: FileList,
    problems: ProblemList,
) -> None:
    """Find images by their bare file names; adds to `locations`, and removes from `not_found` what was found.

    Args:
        not_found: what is wrong with the file name, by image id.
    """
    taken = {_file(location) for location in locations.values()}
    found: dict[tuple[str | None, str], list[Any]] = {}
    for image_id in not_found:
        if location := find_elsewhere(files, images[image_id].get("file_name")):
            found.setdefault(_file(location), []).append(image_id)
    moved = []
    for (archive, member), image_ids in found.items():
        # Two images that would be one file have names that are not unique: a guess would mix up their annotations.
        if len(image_ids) == 1 and (archive, member) not in taken:
            locations[image_ids[0]] = Location(archive=archive, member=member)
            del not_found[image_ids[0]]
            moved.append(f"{images[image_ids[0]]['file_name']!r} as {location_name(locations[image_ids[0]])}")
    if moved:
        problems.warn(
            name,
            "",
            f"{len(moved)} of {len(images)} images are not where the file says, and were found by their bare file "
            f"names: {moved[0]}",
        )
    taken |= {_file(location) for location in locations.values()}
    others = [name for names in files.by_bare_name.values() for name in names if _file(files[name]) not in taken]
    hint = f"; {len(others)} images of the folder are not listed, such as {others[0]!r}" if others else ""
    report_missing(name, not_found, len(images), f"images cannot be found, and are left out{hint}", problems)


def _file(location: Location) -> tuple[str | None, str]:
    return location["archive"], location["member"]


def report_missing(name: str, messages: Mapping[Any, str], total: int, summary: str, problems: ProblemList) -> None:
    """Report what was not found, by image id; as one problem if it is more than a few."""
    if len(messages) > _MOST_LISTED:
        # Thousands of lines about one folder that was not copied would hide everything else.
        first = [f"image {shown(image_id)}: {message}" for image_id, message in list(messages.items())[:2]]
        problems.error(name, "", f"{len(messages)} of {total} {summary}: {'; '.join(first)}; ...")
    else:
        for image_id, message in messages.items():
            problems.error(name, f"image {shown(image_id)}", message)


def known_image_id(entry: Mapping[str, Any], images: Mapping[Any, Any], left_out: set[Any]) -> Any:
    """The id of an annotation's image as `images` has it, or `None` if it is not there."""
    image_id = entry.get("image_id")
    if is_id(image_id) and (image_id in images or image_id in left_out):
        return image_id
    # VGG Image Annotator writes the number of an image as text here only.
    for other in (whole_number(image_id), str(image_id)):
        if other in images or other in left_out:
            return other
    return None


def crowd_flag(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> bool:
    """`iscrowd` of an annotation; False if it is absent."""
    flag = entry.get("iscrowd", 0)
    if flag in (0, 1):
        return bool(flag)
    if isinstance(flag, str) and flag.strip() in ("0", "1"):  # some exporters write all values as text
        problems.warn(name, item, f"iscrowd is the text {shown(flag)}; read as a number")
        return flag.strip() == "1"
    problems.error(name, item, f"iscrowd is {shown(flag)}; it must be 0 or 1 (read as 0)")
    return False


def category_label(entry: Mapping[str, Any], labels: Mapping[int, int | None]) -> int | None:
    """Label id of an annotation's category, `VOID`, or `None` for no class in this task.

    Raises:
        KeyError: the category is not one of the file's.
    """
    category_id = entry.get("category_id")
    if type(category_id) is not int:
        category_id = whole_number(category_id)
    return labels[category_id]  # type: ignore[index]  # None is no key


def checked_categories(entries: list[Any], name: str) -> dict[int, dict[str, Any]]:
    """Entries of the list of categories by ascending id, with names stripped of blanks; `name` is the file's.

    Raises:
        ValueError: an entry has no id or name, two have the same, there is none, or there are too many.
    """
    if len(entries) > MOST_CLASSES:
        raise ValueError(f"{name}: {len(entries):,} categories, more than the limit of {MOST_CLASSES:,}")
    categories: dict[int, dict[str, Any]] = {}
    names = set[str]()
    for entry in entries:
        category_id = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        text: Any = entry.get("name") if isinstance(entry, dict) else None
        if category_id is None or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: category {shown(entry)} needs a whole number `id` and a `name`")
        if fault := name_fault(text):
            raise ValueError(f"{name}: category {category_id}: the name {shown(text)}: {fault}")
        if category_id in categories:
            raise ValueError(f"{name}: two categories have the id {category_id}; number them differently")
        text = text.strip()
        if text in names:
            raise ValueError(f"{name}: several categories are called {text!r}; name them differently")
        names.add(text)
        categories[category_id] = {**entry, "id": category_id, "name": text}
    if not names:
        raise ValueError(f"{name}: the list of categories is empty; without it no annotation has a class")
    return dict(sorted(categories.items()))
