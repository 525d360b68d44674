"""Any folder of images and mask PNGs: semantic, or panoptic with instance PNGs.

`images/train/NAME.jpg` and `annotations/train/NAME.png` (the folder may be called `masks` or `labels` too; without
splits, files lie directly in it), found by the same name. A mask's values are classes: `classes.json` or `classes.txt`
in the folder says which, see class_lists.py. Panoptic data has also `instances/train/NAME.png`, whose values number the
objects of a thing class from 1 (16 bits); thing pixels numbered 0 are a crowd. A segment's id is then the label id for
stuff and crowds, and number * classes + label id for objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..archives import Location, location_name
from ..class_lists import CLASS_FILES, VOID, ClassList, read_classes
from ..decoding import Segments
from ..folders import IMAGE_SUFFIXES, DataFolder, by_stem
from ..label_maps import LabelMaps, numbered_segments, pair_rows
from ..mask_files import present_values, read_index_map, relabel
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "images and mask PNGs: semantic, or panoptic with instance PNGs"
TASKS = ("semantic", "panoptic")
LAYOUT = (
    "images/train/NAME.jpg, annotations/train/NAME.png and classes.json; panoptic also instances/train/NAME.png; "
    "without splits, files lie directly in images, annotations and instances"
)
WHOLE = "all"  # the split of a folder without splits

_MAPS = ("annotations", "masks", "labels")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The folders in `images`, or one split if images lie in it directly; that is there with folders if wanted."""
    folder = DataFolder(path)
    names = folder.folders("images") + [name for name in wanted if folder.files(f"images/{name}")]
    whole = WHOLE in wanted or not names
    return names + [WHOLE] * (whole and bool(folder.files("images", suffixes=IMAGE_SUFFIXES)))


def read(path: str, split: str, task: str, problems: ProblemList, classes: Any = None) -> Reading:
    """Read one split.

    Args:
        path: of the folder, or of a zip archive of it.
        split: the name of the folder in `images`.
        task: one of `TASKS`.
        problems: gets what is wrong.
        classes: file or value for `read_classes`; by default the file in the folder.

    Raises:
        ValueError: there are no classes.
    """
    folder = DataFolder(path)
    ending = "" if split == WHOLE else f"/{split}"
    images = by_stem(folder.files(f"images{ending}", suffixes=IMAGE_SUFFIXES))
    maps = by_stem(folder.files(*(f"{name}{ending}" for name in _MAPS), suffixes=IMAGE_SUFFIXES))
    source = classes if classes is not None else folder.file(*CLASS_FILES)
    if source is None and not maps:
        raise ValueError(f"{path}: there are no masks of split {split!r}; expected {LAYOUT}")
    if source is None:
        values = [present_values(read_index_map(location)) for location in list(maps.values())[:20]]
        seen = sorted({value for present in values for value in present})
        raise ValueError(
            f"{path}: no file says what the values in the masks mean; write classes.json with the names by value, such "
            f'as {{"0": "road", "1": "car", "255": "void"}} (the first masks hold {seen[:40]}), or give classes='
        )
    found = read_classes(source)
    remedy = (
        f"the classes have the values {sorted(value for value, label in found.labels.items() if label != VOID)[:300]}; "
        "list the value as a class, or as void (ADE20K's maps number classes from 1, with 0 for void)"
    )
    if task == "semantic":
        rows = pair_rows(images, [maps], problems)
        return Reading(LabelMaps(found.labels, remedy), list(found.names), found.stuff_classes, rows)
    if not found.things:
        raise ValueError(f"{path}: no class is a thing; say so in classes.json with is_thing, or read it as semantic")
    objects = by_stem(folder.files(f"instances{ending}", suffixes=IMAGE_SUFFIXES))
    rows = pair_rows(images, [maps, objects], problems)
    return Reading(NumberedMaps(found, remedy), list(found.names), found.stuff_classes, rows)


@dataclass(frozen=True)
class NumberedMaps:
    """Masks of a semantic PNG and a PNG that numbers objects.

    Attributes:
        classes: of the data set.
        remedy: what to do about other values in the semantic PNG.
    """

    classes: ClassList
    remedy: str

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        file = location_name(maps[0])
        labels = relabel(read_index_map(maps[0]), self.classes.labels, file, self.remedy)
        numbers = read_index_map(maps[1]).astype(np.int32)
        if numbers.shape != labels.shape:
            raise ValueError(f"{location_name(maps[1])}: {numbers.shape} pixels, but {file} has {labels.shape}")
        return numbered_segments(labels, numbers, self.classes)
