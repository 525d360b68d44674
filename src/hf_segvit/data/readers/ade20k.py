"""ADE20K scene parsing: semantic, panoptic or instance.

150 classes: 100 things and 50 stuff. `images/training/*.jpg`, `annotations/training/*.png` and, for objects,
`annotations_instance/training/*.png`, in the folder ADEChallengeData2016 or in the official zip files. A semantic PNG
holds class numbers 1 to 150, and 0 ("other") for void; an instance PNG holds thing numbers 1 to 100 in red and object
numbers in green. There are no crowds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..archives import Location, location_name
from ..class_lists import VOID
from ..decoding import Segments
from ..folders import IMAGE_SUFFIXES, DataFolder, by_stem
from ..label_maps import LabelMaps, pair_rows
from ..label_tables import label_table
from ..mask_files import present_values, read_color_ids, read_index_map, relabel
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "ADE20K scene parsing: semantic, panoptic or instance"
TASKS = ("semantic", "panoptic", "instance")
LAYOUT = (
    "images/training and annotations/training (for objects, annotations_instance/training), or the official zip files"
)

_ARCHIVES = ("ADEChallengeData2016.zip", "annotations_instance.zip")
_FOLDERS = {"train": "training", "val": "validation", "training": "training", "validation": "validation"}
_REMEDY = (
    "ADE20K's maps hold 0 (other) to 150; values from 151 on are those of the full ADE20K, which is another data set"
)
_OBJECTS = 256  # object n of label l has the segment id 256 * (l + 1) + n; stuff has its label id


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have images."""
    folder = DataFolder(path, _ARCHIVES)
    names = ("train", "val", *(name for name in wanted if name in _FOLDERS))
    return [name for name in names if _files(folder, "images", name, IMAGE_SUFFIXES)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read the split "train" or "val", also by its official name "training" or "validation"."""
    folder, table = DataFolder(path, _ARCHIVES), label_table("ade20k")
    images = by_stem(_files(folder, "images", split, IMAGE_SUFFIXES))
    maps = by_stem(_files(folder, "annotations", split, (".png",)))
    objects = by_stem(_files(folder, "annotations_instance", split, (".png",)))
    names = list(table.id2label.values())
    things = [label for label in range(len(names)) if label not in table.stuff_classes]
    if task == "semantic":
        reader = LabelMaps(table.source_id_to_label | {0: VOID}, _REMEDY)
        return Reading(reader, names, table.stuff_classes, pair_rows(images, [maps], problems))
    if task == "panoptic":
        stuff = {table.classes[label].source_id: label for label in table.stuff_classes}
        stuff_or_void = {value: stuff.get(value, VOID) for value in range(151)}
        rows = pair_rows(images, [maps, objects], problems)
        return Reading(ObjectMaps(stuff_or_void, tuple(things)), names, table.stuff_classes, rows)
    rows = pair_rows(images, [objects], problems)
    return Reading(ObjectMaps(None, tuple(range(len(things)))), [names[label] for label in things], [], rows)


@dataclass(frozen=True)
class ObjectMaps:
    """Masks of instance PNGs, over the stuff of semantic PNGs for the panoptic task."""

    stuff: Mapping[int, int] | None  # label id or void by value of the semantic PNG; None: objects only
    things: tuple[int, ...]  # label ids by thing number, starting with number 1

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        colors = read_color_ids(maps[-1])
        numbers, objects = colors % 256, colors // 256 % 256
        file = location_name(maps[-1])
        labels = relabel(
            numbers.astype(np.uint8),
            dict(enumerate(self.things, start=1)) | {0: VOID},
            file,
            f"red holds the number of a thing, 1 to {len(self.things)}",
        )
        ids = np.where(labels == VOID, np.int32(VOID), _OBJECTS * (labels + 1) + objects)
        if self.stuff is not None:
            stuff = relabel(read_index_map(maps[0]), self.stuff, location_name(maps[0]), _REMEDY)
            if stuff.shape != ids.shape:
                raise ValueError(f"{file}: {ids.shape} pixels, but the semantic map {stuff.shape}; get both again")
            # Objects cover stuff, as in the official EoMT code; thing pixels without an object stay void.
            ids = np.where(ids == VOID, stuff, ids)
        rows = [
            {"id": value, "label_id": value if value < _OBJECTS else value // _OBJECTS - 1, "is_crowd": False}
            for value in present_values(ids)
            if value != VOID
        ]
        return ids, rows


def _files(folder: DataFolder, kind: str, split: str, suffixes: Sequence[str]) -> dict[str, Location]:
    path = f"{kind}/{_FOLDERS[split]}"
    return folder.files(path, f"ADEChallengeData2016/{path}", suffixes=suffixes)
