"""Any data set in COCO's instance or panoptic format, with its own classes.

Label ids number the categories by ascending id, without gaps; a category with id 0 is a class like any other. The JSON
file of a split may have any name in `_json_names`; images are in `train`, `images/train` or `images`, and panoptic PNGs
in a folder named like the JSON file.
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
    """Splits that have a JSON file."""
    folder = DataFolder(path)
    return [name for name in (*_NAMES, *wanted) if any(folder.file(*_json_names(name, task)) for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split of a folder or a zip archive; `split` is part of the file names."""
    folder, candidates = DataFolder(path), _json_names(split, task)
    location = folder.file(*candidates)
    if location is None:
        expected = ", ".join(candidates)
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected one of {expected}")
    images = _images(folder, split)
    file = read_coco_file(location, images, problems)
    label_ids = {category_id: label for label, category_id in enumerate(file.categories)}
    names = [entry["name"] for entry in file.categories.values()]
    if task == "instance":
        return Reading(PolygonMasks(), names, [], instance_rows(file, label_ids, problems), outlines=True)
    subfolder = posixpath.splitext(posixpath.basename(location["member"].replace("\\", "/")))[0]
    maps = folder.files(f"annotations/{subfolder}", subfolder, suffixes=(".png",))
    if not maps:
        raise ValueError(f"{location_name(location)}: there is no folder {subfolder} with panoptic PNGs beside it")
    unknown = [entry["name"] for entry in file.categories.values() if entry.get("isthing") not in (0, 1)]
    if unknown:
        raise ValueError(f"{file.name}: category {unknown[0]!r} needs `isthing`, 1 for things and 0 for stuff")
    stuff = [label_ids[category_id] for category_id, entry in file.categories.items() if not entry["isthing"]]
    return Reading(PanopticMasks(), names, stuff, panoptic_rows(file, maps, label_ids, problems))


def _json_names(split: str, task: str) -> tuple[str, ...]:
    if task == "panoptic":
        return f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"
    return (
        f"annotations/instances_{split}.json",
        f"annotations/{split}.json",
        f"instances_{split}.json",
        f"{split}.json",
        f"{split}/_annotations.coco.json",  # as Roboflow exports it
    )


def _images(folder: DataFolder, split: str) -> FileList:
    for subfolder in (split, f"images/{split}", "images"):
        if images := folder.files(subfolder, suffixes=IMAGE_SUFFIXES):
            # Under both names: exporters write `file_name` relative to the folder of images or to the root.
            return FileList({**{f"{subfolder}/{name}": location for name, location in images.items()}, **images})
    raise ValueError(f"{folder.path}: no images of split {split!r}; expected them in {split}, images/{split} or images")
