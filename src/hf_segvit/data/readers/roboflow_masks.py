"""Roboflow's "semantic segmentation masks": NAME.jpg, NAME_mask.png and _classes.csv in a folder for each split.

`_classes.csv` has a line `value, name` for each class, with the columns "Pixel Value" and "Class".
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Sequence
from typing import Any

from ..archives import Location, location_name, read_text
from ..class_lists import VOID, read_classes
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList, by_stem
from ..label_maps import LabelMaps, pair_rows
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import file_split, is_in_split, split_names, unwrapped_files

DESCRIPTION = "Roboflow's semantic segmentation masks"
TASKS = ("semantic",)
LAYOUT = "train/_classes.csv, train/NAME.jpg and train/NAME_mask.png"

CLASSES_NAME = "_classes.csv"
_MASK = "_mask"  # ends the stems of masks


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Folders with a `_classes.csv`, or "all" for one in the data set's own folder."""
    return split_names((file_split(name) for name in _class_files(DataFolder(path))), wanted)


def read(path: str, split: str, task: str, problems: ProblemList, classes: Any = None, void: Any = ()) -> Reading:
    """Read one split.

    Args:
        classes: for `read_classes`, instead of the files of the export.
        void: further void classes, or values of masks.
    """
    folder = DataFolder(path)
    files = _class_files(folder)
    listed = {name: _classes(location) for name, location in files.items()}
    source = path
    if classes is None:
        classes = {}
        for name, values in listed.items():
            source = location_name(files[name])
            for value, text in values.items():
                if classes.setdefault(value, text) != text:
                    raise ValueError(
                        f"{source}: the value {value} is {text!r}, but {classes[value]!r} in another split; export all "
                        "splits at once, or name the values with classes=FILE"
                    )
    try:
        class_list = read_classes(classes, void=void)
    except ValueError as error:
        raise ValueError(str(error).replace("classes:", f"{source}:", 1)) from error
    images, masks = FileList(), FileList()
    for name, location in unwrapped_files(folder, IMAGE_SUFFIXES).items():
        own = posixpath.dirname(name)
        # An image may be called a_mask.jpg itself; masks are always PNGs.
        stem, suffix = posixpath.splitext(name)
        if not is_in_split(file_split(name), split) or f"{own}/{CLASSES_NAME}".lstrip("/") not in files:
            continue
        if stem.endswith(_MASK) and suffix.lower() == ".png":
            masks[stem.removesuffix(_MASK) + suffix] = location
        else:
            images[name] = location
    known = sorted(value for value, label in class_list.labels.items() if label != VOID)
    remedy = f"the classes have the values {known[:300]}; list the value in {CLASSES_NAME}, or as void"
    rows = pair_rows(by_stem(images), [by_stem(masks)], problems)
    read_masks = LabelMaps(class_list.labels, remedy)
    return Reading(read_masks, list(class_list.names), class_list.stuff_classes, rows, remarks=class_list.remarks)


def _class_files(folder: DataFolder) -> dict[str, Location]:
    """The class files by name."""
    files = unwrapped_files(folder, (".csv",))
    return {name: location for name, location in files.items() if posixpath.basename(name) == CLASSES_NAME}


def _classes(location: Location) -> dict[int, str]:
    """Names by value."""
    name = location_name(location)
    lines = read_text(location).splitlines()
    classes: dict[int, str] = {}
    for number, row in enumerate(csv.reader(lines[1:], skipinitialspace=True), start=2):
        if not row:
            continue
        try:
            value, text = int(row[0]), row[1].strip()
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{name}: line {number}: {','.join(row)!r} is not `value, name`; export it again"
            ) from error
        if value in classes:
            raise ValueError(f"{name}: line {number}: the value {value} is listed twice; export it again")
        classes[value] = text
    return classes
