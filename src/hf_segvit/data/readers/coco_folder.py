"""Any data set in COCO's instance or panoptic form, with classes of its own.

Categories are numbered by ascending id, whatever gaps there are; id 0 is a category like others. Looked for, for split
`train`: the JSON files `annotations/instances_train.json`, `annotations/train.json`, `train.json`,
`train/_annotations.coco.json`, or the panoptic `annotations/panoptic_train.json` and `panoptic_train.json`, each also
with a year; images in `train`, `images/train` or `images`; panoptic PNGs in the folder named like the JSON file.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from ..archives import location_name
from ..decoding import PolygonMasks
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..problems import ProblemList
from ..reading import Reading
from .coco import PanopticMasks, instance_rows, panoptic_rows, read_coco_file

DESCRIPTION = "any data set in COCO's instance or panoptic format"
TASKS = ("instance", "panoptic")
LAYOUT = (
    "annotations/instances_train.json (or train/_annotations.coco.json) and the images in train or images; panoptic "
    "annotations/panoptic_train.json and the PNGs in annotations/panoptic_train"
)

_NAMES = ("train", "val", "valid", "test", "train2017", "val2017", "train2014", "val2014")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The splits that have a JSON file."""
    folder = DataFolder(path)
    return [name for name in (*_NAMES, *wanted) if any(folder.file(*_json_names(name, task)) for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split.

    Args:
        path: of the folder, or of a zip archive of it.
        split: part of the file names, see the module.
        task: one of `TASKS`.
        problems: gets what is wrong.

    Raises:
        ValueError: files are missing.
    """
    folder = DataFolder(path)
    location = folder.file(*_json_names(split, task))
    if location is None:
        expected = ", ".join(_json_names(split, task))
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected one of {expected}")
    images = _images(folder, split)
    file = read_coco_file(location, images, problems)
    numbers = {number: label for label, number in enumerate(file.categories)}
    names = [entry["name"] for entry in file.categories.values()]
    if task == "instance":
        return Reading(PolygonMasks(), names, [], instance_rows(file, numbers, problems), outlines=True)
    stem = posixpath.splitext(location["member"].replace("\\", "/"))[0]
    subfolder = posixpath.basename(stem)
    maps = folder.files(f"annotations/{subfolder}", subfolder, suffixes=(".png",))
    if not maps:
        raise ValueError(f"{location_name(location)}: there is no folder {subfolder} with panoptic PNGs beside it")
    unknown = [entry["name"] for entry in file.categories.values() if entry.get("isthing") not in (0, 1)]
    if unknown:
        raise ValueError(f"{file.name}: category {unknown[0]!r} needs `isthing`, 1 for things and 0 for stuff")
    stuff = [numbers[number] for number, entry in file.categories.items() if not entry["isthing"]]
    return Reading(PanopticMasks(), names, stuff, panoptic_rows(file, maps, numbers, problems))


def _json_names(split: str, task: str) -> tuple[str, ...]:
    if task == "panoptic":
        return f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"
    return (
        f"annotations/instances_{split}.json",
        f"annotations/{split}.json",
        f"instances_{split}.json",
        f"{split}.json",
        f"{split}/_annotations.coco.json",
    )


def _images(folder: DataFolder, split: str) -> FileList:
    """Images by name relative to the split's folder of images, and relative to the root."""
    for subfolder in (split, f"images/{split}", "images"):
        if found := folder.files(subfolder, suffixes=IMAGE_SUFFIXES):
            return FileList({**{f"{subfolder}/{name}": location for name, location in found.items()}, **found})
    raise ValueError(f"{folder.path}: no images of split {split!r}; expected them in {split}, images/{split} or images")
