"""COCO in its official layout: panoptic (133 classes) or instance (80).

`train2017/*.jpg`, `annotations/panoptic_train2017.json`, `annotations/panoptic_train2017/*.png` and
`annotations/instances_train2017.json`, in folders or in the official archives, which are read in place. Label ids
follow the published order. For other classes see coco_folder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..archives import Location
from ..class_lists import VOID, label_rule
from ..coco_files import CocoFile, read_coco_file
from ..coco_outlines import instance_rows
from ..coco_panoptic import PanopticMasks, panoptic_rows
from ..decoding import PolygonMasks
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..label_tables import LabelTable, label_table
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "COCO in its official layout: panoptic or instance"
TASKS = ("panoptic", "instance")
LAYOUT = (
    "train2017/*.jpg and annotations/panoptic_train2017.json or instances_train2017.json, or the official "
    "zip files; classes of your own need the format coco_folder"
)

_YEARS = ("2017", "2014", "")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have annotations."""
    names = ("train", "val", *wanted)
    return [name for name in names if any(_annotation_file(path, name, task)[1] for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList, void: Any = (), crowd: Any = "ignore") -> Reading:
    """Read the split "train" or "val", with or without the year; the categories must be COCO's.

    The options are those of `label_rule`; classes that are void are not among the classes, as in other formats.
    """
    folder, location, name = _annotation_file(path, split, task)
    if location is None:
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected {LAYOUT}; check the path")
    images = folder.files(name, f"images/{name}", suffixes=IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{path}: no images of split {split!r}; add the folder {name}, or {name}.zip")
    file = read_coco_file(location, images, problems)
    table = label_table("coco_panoptic" if task == "panoptic" else "coco_instance")
    _check_categories(file, table)
    rule = label_rule(list(table.id2label.values()), task, void=void, crowd=crowd, source=table.title)
    names, remarks = list(rule.names), list(rule.decisions)
    labels = {label.source_id: rule.labels[label.name] for label in table.classes}
    if task == "instance":
        # A void object cannot be told from no object where masks are not painted.
        labels = {source_id: None if label == VOID else label for source_id, label in labels.items()}
        rows = instance_rows(file, labels, problems, rule.crowds_are_objects)
        return Reading(PolygonMasks(), names, [], rows, outlines=True, remarks=remarks)
    maps = folder.files(f"annotations/panoptic_{name}", f"panoptic_{name}", suffixes=(".png",))
    rows = panoptic_rows(file, maps, labels, problems, rule.crowds_are_objects)
    stuff = [names.index(label.name) for label in table.classes if not label.is_thing and label.name in names]
    return Reading(PanopticMasks(some_are_void=VOID in labels.values()), names, stuff, rows, remarks=remarks)


def _annotation_file(path: str, split: str, task: str) -> tuple[DataFolder, Location | None, str]:
    """Folder, JSON file, and the split's name with its year."""
    kind = "panoptic" if task == "panoptic" else "instances"
    for year in [split[-4:]] if split[-4:].isdigit() else _YEARS:
        name = split if split.endswith(year) else f"{split}{year}"
        archives = (
            f"{name}.zip",
            f"annotations/panoptic_{name}.zip",
            f"panoptic_annotations_trainval{year}.zip",
            # The official panoptic archive holds the PNGs as archives within it.
            f"panoptic_annotations_trainval{year}.zip::annotations/panoptic_{name}.zip",
            f"annotations_trainval{year}.zip",
        )
        folder = DataFolder(path, archives)
        if location := folder.file(f"annotations/{kind}_{name}.json"):
            return folder, location, name
    return folder, None, split


def _check_categories(file: CocoFile, table: LabelTable) -> None:
    known = {label.source_id: label.name for label in table.classes}
    for category_id, entry in file.categories.items():
        if known.get(category_id) != entry["name"]:
            raise ValueError(
                f"{file.name}: category {category_id} is {entry['name']!r}, but in {table.title} it is "
                f"{known.get(category_id)!r}; read a data set with classes of its own as coco_folder"
            )
