"""COCO in its official layout: panoptic (133 classes) and instance (80).

`train2017/*.jpg`, `annotations/panoptic_train2017.json`, `annotations/panoptic_train2017/*.png` and
`annotations/instances_train2017.json`, in folders or in the official archives, which are read in place. Label ids
follow the published order. A split may be named `train` or `train2017`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..archives import Location
from ..coco_annotations import CocoFile, read_coco_file
from ..coco_instances import instance_rows
from ..coco_panoptic import PanopticMasks, panoptic_rows
from ..data_folder import PICTURE_SUFFIXES, DataFolder
from ..decoding import PolygonMasks
from ..label_tables import LabelTable, label_table
from ..problems import ProblemList
from ..reading import Reading

TASKS = ("panoptic", "instance")
LAYOUT = (
    "train2017/*.jpg and annotations/panoptic_train2017.json or instances_train2017.json, or the official "
    "zip files; classes of your own need the format coco_folder"
)

_YEARS = ("2017", "2014", "")
_NAMES = ("train", "val")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The splits whose annotations are there."""
    return [name for name in (*_NAMES, *wanted) if any(_annotation_file(path, name, task)[1] for task in TASKS)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split.

    Args:
        path: of the folder.
        split: "train", "val", or with the year.
        task: one of `TASKS`.
        problems: gets what is wrong.

    Raises:
        ValueError: files are missing, or the categories are not COCO's.
    """
    folder, location, name = _annotation_file(path, split, task)
    if location is None:
        raise ValueError(f"{path}: no {task} annotations of split {split!r}; expected {LAYOUT}")
    pictures = folder.files(name, f"images/{name}", suffixes=PICTURE_SUFFIXES)
    if not pictures:
        raise ValueError(f"{path}: no pictures of split {split!r}; expected the folder {name}, or {name}.zip")
    file = read_coco_file(location, pictures, problems)
    table = label_table("coco_panoptic" if task == "panoptic" else "coco_instance")
    _check_categories(file, table)
    labels = list(table.id2label.values())
    if task == "instance":
        rows = instance_rows(file, table.source_id_to_label, problems)
        return Reading(PolygonMasks(), labels, [], rows, outlines=True)
    maps = folder.files(f"annotations/panoptic_{name}", f"panoptic_{name}", suffixes=(".png",))
    rows = panoptic_rows(file, maps, table.source_id_to_label, problems)
    return Reading(PanopticMasks(), labels, table.stuff_classes, rows)


def _annotation_file(path: str, split: str, task: str) -> tuple[DataFolder, Location | None, str]:
    """Folder, JSON file, and the split's name with its year."""
    for year in [split[-4:]] if split[-4:].isdigit() else _YEARS:
        name = split if split.endswith(year) else f"{split}{year}"
        folder = DataFolder(
            path,
            (
                f"{name}.zip",
                f"annotations/panoptic_{name}.zip",
                f"panoptic_annotations_trainval{year}.zip",
                f"panoptic_annotations_trainval{year}.zip::annotations/panoptic_{name}.zip",
                f"annotations_trainval{year}.zip",
            ),
        )
        kind = "panoptic" if task == "panoptic" else "instances"
        if location := folder.file(f"annotations/{kind}_{name}.json"):
            return folder, location, name
    return folder, None, split


def _check_categories(file: CocoFile, table: LabelTable) -> None:
    known = {label.source_id: label.name for label in table.classes}
    wrong = {number: entry["name"] for number, entry in file.categories.items() if known.get(number) != entry["name"]}
    if wrong:
        number, name = next(iter(wrong.items()))
        raise ValueError(
            f"{file.name}: category {number} is {name!r}, but in {table.title} it is {known.get(number)!r}; read "
            "a data set with classes of its own as coco_folder"
        )
