"""Pascal VOC with its colour map, CVAT's "segmentation mask" export and labelme2voc: semantic or instance.

`JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png`, for instances `SegmentationObject/NAME.png`, and lists of names in
`ImageSets/Segmentation/train.txt`; labelme2voc may call the folders `SegmentationClassPNG` and `SegmentationObjectPNG`.
Masks hold colours or, as palette images, numbers. CVAT's `labelmap.txt` says which colour is which class; labelme2voc's
`class_names.txt`, or `classes.txt`, lists the classes in the order of VOC's colour map; without any of them they are
VOC's 20 classes and background. The colour (224, 224, 192), or number 255, around objects is void.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.image_files import open_image_file
from ..archives import Location, location_name, read_location, read_text
from ..class_lists import CLASS_FILES, VOID, label_rule, listed_names
from ..decoding import Segments, semantic_segments
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList, by_stem
from ..label_maps import pair_rows
from ..mask_files import present_values
from ..problems import ProblemList, some_of
from ..reading import Reading
from ..shapes import WHOLE, split_names

DESCRIPTION = "Pascal VOC with its colour map, CVAT's segmentation masks and labelme2voc's output"
TASKS = ("semantic", "instance")
LAYOUT = (
    "JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/train.txt; instance also "
    "SegmentationObject/*.png; classes of your own in labelmap.txt or class_names.txt"
)

# fmt: off
_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
_BACKGROUND = "background"
_CLASS_MAPS = ("SegmentationClass", "SegmentationClassPNG")
_OBJECT_MAPS = ("SegmentationObject", "SegmentationObjectPNG")
_NAME_FILES = ("class_names.txt", *CLASS_FILES)
_VOID_COLOR = (224, 224, 192)
_UNKNOWN = -2
_ASSUMED = "Pascal VOC"  # source of classes that no file lists


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Lists in `ImageSets/Segmentation` of images with masks, or "all" without lists."""
    folder = DataFolder(path)
    top = _top(folder)
    maps = {posixpath.splitext(name)[0] for name in _maps(folder, top, _CLASS_MAPS)}
    lists = _lists(folder, top)
    names = [name for name, stems in lists.items() if name in wanted or maps & set(stems)]
    # The union of two others, which would count every image twice.
    if "train" in names and "val" in names:
        names = [name for name in names if name != "trainval" or name in wanted]
    return split_names(names or ([WHOLE] if maps else []), wanted)


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    background: Any = None,
    void: Any = (),
    drop: Any = (),
) -> Reading:
    """Read one split; `classes` names colours in the order of VOC's colour map, the rest is for the rule for labels."""
    folder = DataFolder(path)
    top = _top(folder)
    names, colors, source = _classes(folder, top, classes)
    plain = next((name for name in names if name.lower().strip("_") == _BACKGROUND), None)
    maps = _maps(folder, top, _CLASS_MAPS)
    if not maps:
        raise ValueError(f"{path}: there are no masks in {top}SegmentationClass; expected {LAYOUT}; check the path")
    options: dict[str, Any] = {"background": background, "void": void, "drop": drop}
    listed = [name for name in names if name != plain]
    if task == "semantic" and plain and background is None:
        options["background"] = plain
    rule = label_rule(listed, task, source=source, **options)
    labels = {}
    for name, color in zip(names, colors, strict=True):
        label = rule.background if name == plain else rule.label_of(name)
        labels[color] = VOID if label is None else label
    labels = {_color_id(_VOID_COLOR): VOID, **labels}
    images = _images(folder, top)
    lists = _lists(folder, top)
    stems = (
        None
        if split == WHOLE
        else next((stems for name, stems in lists.items() if name.casefold() == split.casefold()), None)
    )
    files = [by_stem(maps)]
    if task == "instance":
        objects = _maps(folder, top, _OBJECT_MAPS)
        if not objects:
            raise ValueError(
                f"{path}: there is no folder SegmentationObject, without which objects of a class cannot be told "
                "apart; read it with the task semantic"
            )
        files.append(by_stem(objects))
    if stems is not None:
        chosen = set(stems)
        if absent := [stem for stem in stems if stem not in images]:
            where = f"{path}/{top}ImageSets/Segmentation/{split}.txt"
            problems.warn(where, "", f"{len(absent)} of its names have no image: {some_of(absent)}")
        images = {stem: location for stem, location in images.items() if stem in chosen}
        files = [{stem: location for stem, location in kind.items() if stem in chosen} for kind in files]
    else:
        # Without lists, images without a mask are those of other tasks, as in VOC itself.
        images = {stem: location for stem, location in images.items() if stem in files[0]}
    if not images:
        raise ValueError(
            f"{path}: no image belongs to the masks of split {split!r}; export it with images, or copy "
            f"them to {top}JPEGImages"
        )
    rows = pair_rows(images, files, problems)
    reader: Any = ColorMaps(labels, tuple(colors), source, is_numbered=not source.endswith("labelmap.txt"))
    remarks = list(rule.decisions)
    if source == _ASSUMED:
        remarks.append(
            "no labelmap.txt or class_names.txt lists classes: taken to be Pascal VOC's; classes=FILE names others"
        )
    return Reading(reader if task == "semantic" else ObjectMaps(reader), list(rule.names), [], rows, remarks=remarks)


def _top(folder: DataFolder) -> str:
    """`FOLDER/` that holds SegmentationClass, such as VOCdevkit/VOC2012/."""
    tops = {
        f"/{name}".rpartition(f"/{kind}/")[0]
        for name in folder.files("")
        for kind in _CLASS_MAPS
        if f"/{kind}/" in f"/{name}"
    }
    if len(tops) > 1:
        raise ValueError(f"{folder.path}: several folders hold SegmentationClass: {', '.join(sorted(tops))}; name one")
    if not tops:
        raise ValueError(f"{folder.path}: there is no folder SegmentationClass; expected {LAYOUT}; check the path")
    top = tops.pop().strip("/")
    return f"{top}/" if top else ""


def _maps(folder: DataFolder, top: str, kinds: Sequence[str]) -> FileList:
    """Masks of one kind by path; `.npy` files beside them hold the same and are left alone."""
    return folder.files(*(f"{top}{kind}" for kind in kinds), suffixes=IMAGE_SUFFIXES)


def _lists(folder: DataFolder, top: str) -> dict[str, list[str]]:
    """Names of images by list."""
    lists = {}
    for name, location in folder.files(f"{top}ImageSets/Segmentation", suffixes=(".txt",)).items():
        stems = []
        for line in read_text(location).splitlines():
            # Names have no suffix in VOC; CVAT writes them as it has them. Names may hold blanks.
            stem, suffix = posixpath.splitext(line.strip().strip('"'))
            if line.strip():
                stems.append(stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix)
        lists[posixpath.splitext(name)[0]] = stems
    return lists


def _images(folder: DataFolder, top: str) -> dict[str, Location]:
    named = folder.files(f"{top}JPEGImages", suffixes=IMAGE_SUFFIXES)
    if not named:
        # Exports without images: people copy them anywhere.
        everything = folder.files("", suffixes=IMAGE_SUFFIXES)
        masks = ("SegmentationClass", "SegmentationObject")  # also labelme2voc's folders of drawings
        named = FileList(
            {
                posixpath.basename(name): location
                for name, location in everything.items()
                if not any(part.startswith(masks) for part in name.split("/")[:-1])
            }
        )
    return by_stem(named)


def _classes(folder: DataFolder, top: str, classes: Any) -> tuple[list[str], list[int], str]:
    """Names, their colours as numbers, and what says so."""
    if classes is not None:
        names = list(listed_names(classes))
        return names, [_color_id(voc_color(index)) for index in range(len(names))], str(classes)
    location = folder.file(f"{top}labelmap.txt", "labelmap.txt")
    if location is None:
        listed = folder.file(*(f"{start}{name}" for name in _NAME_FILES for start in (top, "")))
        names = list(_NAMES) if listed is None else list(listed_names(listed))
        # labelme's `labels.txt` begins with the void of its masks, which is -1 there and 255 in the files.
        names = names[1:] if names[0] == "__ignore__" else names
        source = _ASSUMED if listed is None else location_name(listed)
        return names, [_color_id(voc_color(index)) for index in range(len(names))], source
    names, colors, where = [], [], location_name(location)
    for number, line in enumerate(read_text(location).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        # `name:red,green,blue:parts:actions`; the name may hold a colon itself.
        name, *rest = line.rsplit(":", 3)
        try:
            red, green, blue = (int(value) for value in rest[0].split(","))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{where}: line {number}: {line!r} is not name:red,green,blue:parts:actions") from error
        if _color_id((red, green, blue)) in colors:
            raise ValueError(f"{where}: line {number}: {name!r} has the colour of another class; export it again")
        names.append(name.strip())
        colors.append(_color_id((red, green, blue)))
    return names, colors, where


def voc_color(index: int) -> tuple[int, int, int]:
    """The colour of a number in Pascal VOC's colour map: its bits are dealt to red, green and blue in turn."""
    red = green = blue = 0
    for bit in range(8):
        red |= ((index >> 3 * bit) & 1) << (7 - bit)
        green |= ((index >> (3 * bit + 1)) & 1) << (7 - bit)
        blue |= ((index >> (3 * bit + 2)) & 1) << (7 - bit)
    return red, green, blue


def _color_id(color: Sequence[int]) -> int:
    return int(color[0]) + 256 * int(color[1]) + 65536 * int(color[2])


def _color_ids(location: Location, colors: Sequence[int], by_number: bool = False) -> np.ndarray:
    """Colours (H, W) int32 of a mask; numbers, also of a palette if `by_number`, get the colour of their class."""
    name = location_name(location)
    image = open_image_file(read_location(location), name)
    if image.format in ("JPEG", "GIF"):
        raise ValueError(f"{name}: a {image.format} file as mask, whose compression changes colours; save it as PNG")
    if image.mode in ("L", "1") or image.mode.startswith("I") or (by_number and image.mode == "P"):
        numbers = np.asarray(image).astype(np.int32)
        if len(numbers) and (numbers.min() < 0 or numbers.max() > 255):
            raise ValueError(f"{name}: holds the number {numbers.max()}, but VOC's colour map ends at 255")
        table = [colors[n] if n < len(colors) else _color_id(voc_color(n)) for n in range(256)]
        table[255] = _color_id(_VOID_COLOR)
        return np.array(table, dtype=np.int32)[numbers]
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]


@dataclass(frozen=True)
class ColorMaps:
    """Semantic maps whose colours stand for classes."""

    labels: Mapping[int, int]  # label id by colour
    colors: tuple[int, ...]  # by position in the list of classes
    source: str
    is_numbered: bool = False  # classes have numbers, and the colours are VOC's for them

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; a segment's id is its label id."""
        segment_map = self.label_map(maps[0])
        return segment_map, semantic_segments(segment_map)

    def label_map(self, location: Location) -> np.ndarray:
        """Label ids (H, W) int32 of a mask of colours."""
        for by_number in (False, True)[: 1 + self.is_numbered]:
            ids = _color_ids(location, self.colors, by_number)
            # Few colours are there, and a table of all 16 million would be slow.
            present = np.array(present_values(ids), dtype=np.int32)
            known = [self.labels.get(int(value), _UNKNOWN) for value in present]
            # Tools write palettes of their own colours, whose numbers are the classes all the same.
            if _UNKNOWN not in known:
                break
        if _UNKNOWN in known:
            color = int(present[known.index(_UNKNOWN)])
            raise ValueError(
                f"{location_name(location)}: the colour {(color & 255, color >> 8 & 255, color >> 16)} stands for no "
                f"class of {self.source}; add it to labelmap.txt in a line `name:red,green,blue::`"
            )
        return np.array(known, dtype=np.int32)[np.searchsorted(present, ids)]


@dataclass(frozen=True)
class ObjectMaps:
    """Instances: each colour of the second map is one object, of the class that most of its pixels have."""

    classes: ColorMaps

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        labels = self.classes.label_map(maps[0])
        colors = _color_ids(maps[1], ())
        if labels.shape != colors.shape:
            raise ValueError(f"{location_name(maps[1])}: {colors.shape} pixels, but the classes have {labels.shape}")
        ids = np.full(labels.shape, VOID, dtype=np.int32)
        rows: Segments = []
        for color in present_values(colors):
            if color in (0, _color_id(_VOID_COLOR)):
                continue
            mask = colors == color
            inside = labels[mask]
            inside = inside[inside != VOID]
            if not len(inside):  # objects of void or of classes that are left out
                continue
            number = len(rows) + 1
            ids[mask] = number
            rows.append({"id": number, "label_id": int(np.bincount(inside).argmax()), "is_crowd": False})
        return ids, rows
