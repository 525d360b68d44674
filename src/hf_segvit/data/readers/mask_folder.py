"""Any folder of images and mask PNGs: semantic, or panoptic with instance PNGs.

`images/train/NAME.jpg` and `annotations/train/NAME.png` (or `masks` or `labels`); without splits, files are directly in
`images` and `annotations`. `classes.json` or `classes.txt` names the values in the masks, see ../class_lists.py; where
colours stand for classes, `classes.json` or CVAT's `labelmap.txt` gives them, see `classes_with_colors`.
Panoptic data also has `instances/train/NAME.png` (16 bits), which numbers the objects of each thing class from 1; thing
pixels numbered 0 are a crowd. Segment ids are label ids for stuff and crowds, and number * classes + label id for
objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import Location, location_name
from ..class_lists import CLASS_FILES, VOID, ClassList, option_names, read_classes
from ..decoding import Segments
from ..folders import IMAGE_SUFFIXES, DataFolder, by_stem
from ..label_maps import LABEL_MAP, ColorTable, LabelMaps, classes_with_colors, numbered_segments, pair_rows
from ..mask_files import present_values, read_index_map
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


def read(path: str, split: str, task: str, problems: ProblemList, classes: Any = None, void: Any = ()) -> Reading:
    """Read one split of a folder or of a zip archive.

    Args:
        classes: for `read_classes`, by default the file in the folder.
        void: further void classes, or values of masks.
    """
    folder = DataFolder(path)
    ending = "" if split == WHOLE else f"/{split}"
    images = by_stem(folder.files(f"images{ending}", suffixes=IMAGE_SUFFIXES))
    maps = by_stem(folder.files(*(f"{name}{ending}" for name in _MAPS), suffixes=IMAGE_SUFFIXES))
    source = classes if classes is not None else folder.file(*CLASS_FILES, LABEL_MAP)
    if source is None and not maps:
        raise ValueError(f"{path}: there are no masks of split {split!r}; expected {LAYOUT}; check the path")
    if source is None:
        # Twenty masks are read within a second and show the values that the user has to name.
        values = [present_values(read_index_map(location)) for location in list(maps.values())[:20]]
        seen = sorted({value for present in values for value in present})
        raise ValueError(
            f"{path}: no file says what the values in the masks mean; write classes.json with the names by value, such "
            f'as {{"0": "road", "1": "car", "255": "void"}} (the first masks hold {seen[:40]}), or give classes='
        )
    class_list, colors = _classes(folder, source, void)
    # Where colours stand for classes, the values are our own numbers.
    remarks = [] if colors is not None and colors.by_palette else class_list.remarks
    known = sorted(value for value, label in class_list.labels.items() if label != VOID)
    remedy = (
        f"the classes have the values {known[:300]}; list the value as a class, or as void (ADE20K's maps number "
        "classes from 1, with 0 for void)"
    )
    if task == "semantic":
        rows = pair_rows(images, [maps], problems)
        read_masks = LabelMaps(class_list.labels, remedy, colors)
        return Reading(read_masks, list(class_list.names), class_list.stuff_classes, rows, remarks=remarks)
    if not class_list.things:
        raise ValueError(f"{path}: no class is a thing; say so in classes.json with is_thing, or read it as semantic")
    objects = by_stem(folder.files(f"instances{ending}", suffixes=IMAGE_SUFFIXES))
    rows = pair_rows(images, [maps, objects], problems)
    read_numbered = NumberedMaps(class_list, remedy, colors)
    return Reading(read_numbered, list(class_list.names), class_list.stuff_classes, rows, remarks=remarks)


def _classes(folder: DataFolder, source: Any, void: Any) -> tuple[ClassList, ColorTable | None]:
    """The classes, and the colours that stand for them, from the class file or the label map beside it."""
    location: Any = Location(archive=None, member=str(source)) if isinstance(source, str | Path) else source
    if not isinstance(location, Mapping) or set(location) != {"archive", "member"}:
        return read_classes(source, void=void), None
    location = Location(archive=location["archive"], member=location["member"])
    content, colors = classes_with_colors(location)
    if content is None:
        class_list, beside = read_classes(source), folder.file(LABEL_MAP)
        chosen = read_classes(source, void=void)
        if beside is None:
            return chosen, None
        # The class file decides names and order, the label map beside it the colours.
        content, colors = classes_with_colors(beside)
        assert colors is not None  # a label map is a list of colours
        values = {row["name"].strip(): row["value"] for row in content["classes"]}
        numbers = {label: value for value, label in class_list.labels.items() if label != VOID}
        known = {name: numbers[label] for label, name in enumerate(class_list.names)}
        differing = set(known) ^ set(read_classes(content).names)
        if differing:
            raise ValueError(
                f"{location_name(beside)} and {location_name(location)}: {min(differing)!r} is a class in one of them "
                "only; name the classes alike in both files, or remove one of them"
            )
        # Whatever is left is void in the label map, and need not be in the class file: -1 is no class there.
        rest = next((value for value, label in class_list.labels.items() if label == VOID), -1)
        names = {value: name for name, value in values.items()}
        table = {color: known.get(names[value], rest) for color, value in colors.values.items()}
        return replace(chosen, labels={rest: VOID, **chosen.labels}), ColorTable(table, by_palette=False)
    stated = {str(row["name"]).strip() for row in content["classes"]}
    voids = [text for text in option_names(void) if text.removeprefix("-").isdecimal() and text not in stated]
    if voids and colors is not None and colors.by_palette:  # they would mean numbers of our own
        raise ValueError(f"{location_name(location)}: void={voids[0]}: colours stand for classes; give a name")
    try:
        return read_classes(content, void=void), colors
    except ValueError as error:
        # The error is about the content, which is no longer known by the name of its file.
        raise ValueError(str(error).replace("classes:", f"{location_name(location)}:", 1)) from error


@dataclass(frozen=True)
class NumberedMaps:
    """Masks of a semantic PNG and a PNG that numbers objects."""

    classes: ClassList
    remedy: str  # ends the error about an unknown value in the semantic PNG
    colors: ColorTable | None = None

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        file = location_name(maps[0])
        labels = LabelMaps(self.classes.labels, self.remedy, self.colors).label_map(maps[0])
        numbers = read_index_map(maps[1])
        if numbers.shape != labels.shape:
            raise ValueError(f"{location_name(maps[1])}: {numbers.shape} pixels, but {file} has {labels.shape}")
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        # An id is a number of an object times the number of classes, and ids have 32 bits.
        most = (2**31 - 1) // len(self.classes.names) - 1
        if low < 0 or high > most:
            raise ValueError(
                f"{location_name(maps[1])}: the mask holds the object number {low if low < 0 else high}; number the "
                f"objects of an image from 1 on, up to {most}"
            )
        return numbered_segments(labels, numbers.astype(np.int32), self.classes)
