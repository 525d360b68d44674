"""Any folder of images and mask PNGs: semantic, or panoptic with instance PNGs.

`images/train/NAME.jpg` and `annotations/train/NAME.png` (or `masks` or `labels`); without splits, files are directly in
`images` and `annotations`. `classes.json` or `classes.txt` names the values in the masks, see ../class_lists.py.
Panoptic data also has `instances/train/NAME.png` (16 bits), which numbers the objects of each thing class from 1; thing
pixels numbered 0 are a crowd. Segment ids are label ids for stuff and crowds, and number * classes + label id for
objects.
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
    """Folders in `images`; also, if there are none or it is wanted, "all" for images that are directly in it."""
    folder = DataFolder(path)
    names = folder.folders("images") + [name for name in wanted if folder.files(f"images/{name}")]
    if (WHOLE in wanted or not names) and folder.files("images", suffixes=IMAGE_SUFFIXES):
        names.append(WHOLE)
    return names


def read(path: str, split: str, task: str, problems: ProblemList, classes: Any = None) -> Reading:
    """Read one split of a folder or of a zip archive; `classes` is for `read_classes`, by default the file in it."""
    folder = DataFolder(path)
    ending = "" if split == WHOLE else f"/{split}"
    images = by_stem(folder.files(f"images{ending}", suffixes=IMAGE_SUFFIXES))
    maps = by_stem(folder.files(*(f"{name}{ending}" for name in _MAPS), suffixes=IMAGE_SUFFIXES))
    source = classes if classes is not None else folder.file(*CLASS_FILES)
    if source is None and not maps:
        raise ValueError(f"{path}: there are no masks of split {split!r}; expected {LAYOUT}")
    if source is None:
        # Twenty masks are read within a second and show the values that the user has to name.
        values = [present_values(read_index_map(location)) for location in list(maps.values())[:20]]
        seen = sorted({value for present in values for value in present})
        raise ValueError(
            f"{path}: no file says what the values in the masks mean; write classes.json with the names by value, such "
            f'as {{"0": "road", "1": "car", "255": "void"}} (the first masks hold {seen[:40]}), or give classes='
        )
    class_list = read_classes(source)
    known = sorted(value for value, label in class_list.labels.items() if label != VOID)
    remedy = (
        f"the classes have the values {known[:300]}; list the value as a class, or as void (ADE20K's maps number "
        "classes from 1, with 0 for void)"
    )
    if task == "semantic":
        rows = pair_rows(images, [maps], problems)
        return Reading(LabelMaps(class_list.labels, remedy), list(class_list.names), class_list.stuff_classes, rows)
    if not class_list.things:
        raise ValueError(f"{path}: no class is a thing; say so in classes.json with is_thing, or read it as semantic")
    objects = by_stem(folder.files(f"instances{ending}", suffixes=IMAGE_SUFFIXES))
    rows = pair_rows(images, [maps, objects], problems)
    return Reading(NumberedMaps(class_list, remedy), list(class_list.names), class_list.stuff_classes, rows)


@dataclass(frozen=True)
class NumberedMaps:
    """Masks of a semantic PNG and a PNG that numbers objects."""

    classes: ClassList
    remedy: str  # ends the error about an unknown value in the semantic PNG

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        file = location_name(maps[0])
        labels = relabel(read_index_map(maps[0]), self.classes.labels, file, self.remedy)
        numbers = read_index_map(maps[1]).astype(np.int32)
        if numbers.shape != labels.shape:
            raise ValueError(f"{location_name(maps[1])}: {numbers.shape} pixels, but {file} has {labels.shape}")
        return numbered_segments(labels, numbers, self.classes)
