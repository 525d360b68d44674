"""Cityscapes with fine or coarse labels: semantic, panoptic or instance.

19 classes, 8 of them things. `leftImg8bit/train/CITY/NAME_leftImg8bit.png` and `gtFine/train/CITY/NAME_gtFine_*.png`,
in folders or the official archives. Semantic maps come from labelIds (not labelTrainIds); panoptic and instance data
from instanceIds, whose values become the segment ids. Label ids are train ids, and classes without one are void.
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

_ARCHIVES = ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip", "gtFine_trainvaltest.zip", "gtCoarse.zip")
_LAST_LABEL = 33
# In instanceIds, 1000 * class + n is object n, and a bare class id a region of that class: for a thing a group, which
# counts as a crowd. The official panoptic converter reads them the same way.
_FIRST_OBJECT = 1000
_REMEDY = (
    "labelIds hold 0 to 33; 255 means that these are labelTrainIds under a wrong name: get the official labelIds files"
)


def splits(path: str, wanted: Sequence[str] = (), annotations: str = "gtFine") -> list[str]:
    """Splits that have labels."""
    folder = DataFolder(path, _ARCHIVES)
    return [name for name in ("train", "train_extra", "val", *wanted) if folder.files(f"{annotations}/{name}")]


def read(path: str, split: str, task: str, problems: ProblemList, annotations: str = "gtFine") -> Reading:
    """Read the split "train", "val" or, with `annotations="gtCoarse"`, "train_extra"."""
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
    """Masks of instanceIds."""

    labels: Mapping[int, int]  # label ids by Cityscapes class id; classes that are absent are void
    things: frozenset[int]  # label ids

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
                is_crowd = value < _FIRST_OBJECT and label in self.things
                rows.append({"id": value, "label_id": label, "is_crowd": is_crowd})
        table = np.arange(int(ids.max(initial=0)) + 1, dtype=np.int32)
        table[void] = VOID
        return table[ids], rows


def _named(files: Mapping[str, Location], ending: str) -> dict[str, Location]:
    """Locations by CITY/NAME."""
    return {name.removesuffix(ending): location for name, location in files.items() if name.endswith(ending)}
