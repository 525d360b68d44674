"""YOLO segmentation: data.yaml, images and text files of outlines.

For the instance or semantic task. A line is `class x1 y1 x2 y2 ...`, with x and y as shares of the upright image's
width and height. The label file of `images/train/NAME.jpg` is `labels/train/NAME.txt`; an image without one has no
objects. `train:`, `val:` and `test:` of data.yaml are read relative to the data set's folder.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..archives import MAX_TEXT_BYTES, Location, location_name, read_location
from ..decoding import PaintedPolygons, PolygonMasks, upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder, safe_name
from ..mask_files import polygon_fault
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "YOLO segmentation labels and data.yaml"
TASKS = ("instance", "semantic")
LAYOUT = "data.yaml with names, train and val; images/train/*.jpg and labels/train/*.txt"

_FILES = ("data.yaml", "dataset.yaml", "data.yml")
_SPLITS = ("train", "val", "test")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that data.yaml names."""
    settings, _ = _settings(DataFolder(path))
    return [name for name in (*_SPLITS, *wanted) if settings.get(name)]


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read the split "train", "val" or "test" of a folder or of a zip archive of it."""
    folder = DataFolder(path)
    settings, name = _settings(folder)
    names = _names(settings.get("names"), name)
    subfolders = settings[split] if isinstance(settings[split], list) else [settings[split]]
    rows: list[dict[str, Any]] = []
    for text in subfolders:
        subfolder = _subfolder(text, name)
        images = folder.files(subfolder, suffixes=IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"{name}: {split} is {text!r}, but there are no images in {folder.path / subfolder}")
        # As YOLO's loader does: the last `images` of the path becomes `labels`.
        head, _, tail = f"/{subfolder}/".rpartition("/images/")
        labels = folder.files(f"{head}/labels/{tail}".strip("/"), suffixes=(".txt",))
        for file, image in images.items():
            stem = posixpath.splitext(file)[0]
            try:
                size = upright_size(image)
            except ValueError as error:
                problems.error(location_name(image), stem, str(error).removeprefix(f"{location_name(image)}: "))
                continue
            segments = _segments(labels.get(f"{stem}.txt"), size, len(names), problems)
            rows.append({"image": image, "image_id": stem, "segment_map": [], "segments": segments})
    reader = PolygonMasks() if task == "instance" else PaintedPolygons()
    return Reading(reader, names, [], rows, outlines=True)


def _settings(folder: DataFolder) -> tuple[Mapping[str, Any], str]:
    location = folder.file(*_FILES)
    if location is None:
        raise ValueError(f"{folder.path}: there is no data.yaml; expected {LAYOUT}")
    name = location_name(location)
    try:
        settings = yaml.safe_load(read_location(location, 2**20))
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: no valid YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: holds no settings; expected names, train and val")
    return settings, name


def _names(names: Any, file: str) -> list[str]:
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
        raise ValueError(f"{file}: names is {names!r}; it must list every class once, in order or numbered from 0")
    return [str(name) for name in names]


def _subfolder(text: Any, name: str) -> str:
    subfolder = str(text).replace("\\", "/")
    # Exporters write paths relative to a `path:` on their author's machine, which is ignored, so `../` means nothing.
    while subfolder.startswith(("../", "./")):
        subfolder = subfolder.split("/", 1)[1]
    return safe_name(subfolder, name)


def _segments(
    location: Location | None, size: tuple[int, int], num_classes: int, problems: ProblemList
) -> list[dict[str, Any]]:
    if location is None:
        return []
    name, rows = location_name(location), []
    try:
        text = read_location(location, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.error(name, "", "no UTF-8 text; export the labels again")
        return []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        item = f"line {number}"
        try:
            label, *shares = (float(word) for word in line.split())
        except ValueError:
            problems.error(name, item, f"{line[:60]!r} is not a class and numbers")
            continue
        if not (abs(label) < 2**31 and label.is_integer()):  # also true for NaN, for which `int` would fail
            problems.error(name, item, f"the class is {line.split()[0]!r}; it must be a whole number")
        elif not 0 <= label < num_classes:
            problems.error(name, item, f"class {int(label)} is not in data.yaml, whose last is {num_classes - 1}")
        elif len(shares) == 4:
            problems.error(name, item, "a box, not an outline; these are detection labels, which cannot train masks")
        else:
            # `size` is (height, width), but x comes first.
            polygon = [share * size[1 - index % 2] for index, share in enumerate(shares)]
            if fault := polygon_fault(polygon, size):
                problems.error(name, item, f"{fault}; coordinates are shares of width and height, in [0, 1]")
                continue
            row = {"id": number, "label_id": int(label), "is_crowd": False, "polygons": [polygon]}
            rows.append({**row, "rle": {"size": list(size), "counts": None}})
    return rows
