"""Cityscapes: semantic (19 classes), panoptic and instance (8 things), with fine or coarse labels.

`leftImg8bit/train/CITY/NAME_leftImg8bit.png` and `gtFine/train/CITY/NAME_gtFine_labelIds.png` / `..._instanceIds.png`,
in folders or the official archives. Semantic maps come from labelIds (not from labelTrainIds), numbered by train id;
ids without a train id are void. In instanceIds a bare id below 1000 is a region of that class - a group, that is a
crowd, if the class is a thing - and 1000 * class + n is object n, as the official panoptic converter reads them.
Segment ids are those of instanceIds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..archives import Location, location_name
from ..class_lists import VOID
from ..decoding import Segments
from ..folders import DataFolder
from ..label_maps import LabelMaps, pair_rows
from ..label_tables import label_table
from ..mask_files import present_values, read_index_map
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "Cityscapes with gtFine: semantic, panoptic or instance"
TASKS = ("semantic", "panoptic", "instance")
LAYOUT = (
    "leftImg8bit/train/CITY/*_leftImg8bit.png and gtFine/train/CITY/*_gtFine_labelIds.png (coarse: gtCoarse for "
    "gtFine), or the official zip files"
)
VARIANTS = {"cityscapes_coarse": ("Cityscapes with gtCoarse", {"annotations": "gtCoarse"})}

_ARCHIVES = (
    "leftImg8bit_trainvaltest.zip",
    "leftImg8bit_trainextra.zip",
    "gtFine_trainvaltest.zip",
    "gtCoarse.zip",
)
_LAST_LABEL = 33
_FIRST_OBJECT = 1000
_REMEDY = (
    "labelIds hold 0 to 33; 255 means that these are labelTrainIds under a wrong name: get the official labelIds files"
)


def splits(path: str, wanted: Sequence[str] = (), annotations: str = "gtFine") -> list[str]:
    """The splits that have labels."""
    folder = DataFolder(path, _ARCHIVES)
    return [name for name in ("train", "train_extra", "val", *wanted) if folder.files(f"{annotations}/{name}")]


def read(path: str, split: str, task: str, problems: ProblemList, annotations: str = "gtFine") -> Reading:
    """Read one split.

    Args:
        path: of the folder.
        split: "train", "val", or with coarse labels "train_extra".
        task: one of `TASKS`.
        problems: gets what is wrong.
        annotations: "gtFine" or "gtCoarse".

    Raises:
        ValueError: there are no such annotations.
    """
    if annotations not in ("gtFine", "gtCoarse"):
        raise ValueError(f"annotations is {annotations!r}; choose gtFine or gtCoarse")
    folder, table = DataFolder(path, _ARCHIVES), label_table("cityscapes")
    kind = "labelIds" if task == "semantic" else "instanceIds"
    maps = _named(folder.files(f"{annotations}/{split}"), f"_{annotations}_{kind}.png")
    images = _named(folder.files(f"leftImg8bit/{split}"), "_leftImg8bit.png")
    rows = pair_rows(images, [maps], problems)
    names = list(table.id2label.values())
    if task == "semantic":
        labels = {value: table.source_id_to_label.get(value, VOID) for value in range(_LAST_LABEL + 1)}
        return Reading(LabelMaps(labels, _REMEDY), names, table.stuff_classes, rows)
    things = [label for label in range(len(names)) if label not in table.stuff_classes]
    if task == "panoptic":
        return Reading(RegionMaps(table.source_id_to_label, frozenset(things)), names, table.stuff_classes, rows)
    numbers = {table.classes[label].source_id: index for index, label in enumerate(things)}
    reader = RegionMaps(numbers, frozenset(numbers.values()))
    return Reading(reader, [names[label] for label in things], [], rows)


@dataclass(frozen=True)
class RegionMaps:
    """Masks of instanceIds.

    Attributes:
        labels: label id by Cityscapes class id; classes that are absent are void.
        things: label ids of things.
    """

    labels: Mapping[int, int]
    things: frozenset[int]

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_index_map(maps[0]).astype(np.int32)
        rows, void = [], []
        for value in present_values(ids):
            class_id = value if value < _FIRST_OBJECT else value // _FIRST_OBJECT
            if not 0 <= class_id <= _LAST_LABEL:
                raise ValueError(
                    f"{location_name(maps[0])}: the mask holds the id {value}; instanceIds hold class ids 0 to "
                    f"{_LAST_LABEL}, and 1000 * class id + number (16 bits): get the official file"
                )
            label = self.labels.get(class_id)
            if label is None:
                void.append(value)
            else:
                rows.append(
                    {
                        "id": value,
                        "label_id": label,
                        "is_crowd": value < _FIRST_OBJECT and label in self.things,
                    }
                )
        table = np.arange(int(ids.max(initial=0)) + 1, dtype=np.int32)
        table[void] = VOID
        return table[ids], rows


def _named(files: Mapping[str, Location], ending: str) -> dict[str, Location]:
    """Locations by CITY/NAME."""
    return {name.removesuffix(ending): location for name, location in files.items() if name.endswith(ending)}
