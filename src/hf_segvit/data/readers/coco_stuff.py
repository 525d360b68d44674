"""COCO-Stuff-164K: semantic maps of 171 classes for COCO's images.

`stuffthingmaps/train2017/*.png` (or `annotations/train2017`, or `stuffthingmaps_trainval2017.zip`), and images as in
COCO.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..archives import Location
from ..class_lists import VOID
from ..folders import IMAGE_SUFFIXES, DataFolder, by_stem
from ..label_maps import LabelMaps, pair_rows
from ..label_tables import label_table
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "COCO-Stuff-164K: semantic"
TASKS = ("semantic",)
LAYOUT = "train2017/*.jpg and stuffthingmaps/train2017/*.png, or train2017.zip and stuffthingmaps_trainval2017.zip"


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have maps."""
    return [name for name in ("train", "val", *wanted) if _maps(path, _with_year(name))]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read the split "train" or "val", with or without the year."""
    name = _with_year(split)
    folder = DataFolder(path, (f"{name}.zip",))
    images = by_stem(folder.files(name, f"images/{name}", suffixes=IMAGE_SUFFIXES))
    table = label_table("coco_stuff")
    # The PNGs hold the class id less one, and 255 for void; eleven ids were never used.
    labels = {class_id - 1: label for class_id, label in table.source_id_to_label.items()}
    reader = LabelMaps(labels | {255: VOID}, "values are COCO-Stuff's ids less one, and 255")
    rows = pair_rows(images, [by_stem(_maps(path, name))], problems)
    return Reading(reader, list(table.id2label.values()), table.stuff_classes, rows)


def _with_year(split: str) -> str:
    return f"{split.removesuffix('2017')}2017"


def _maps(path: str, name: str) -> dict[str, Location]:
    folder = DataFolder(path)
    maps = folder.files(f"stuffthingmaps/{name}", f"annotations/{name}", suffixes=(".png",))
    archive = folder.path / "stuffthingmaps_trainval2017.zip"
    # Folders in this archive have the names of COCO's image folders, so it must not be merged with the others.
    return maps or (DataFolder(archive).files(name, suffixes=(".png",)) if archive.is_file() else {})
