"""YOLO segmentation: images, text files of outlines, and data.yaml or a list of class names.

A line is `class x1 y1 x2 y2 ...`, with x and y as shares of the upright image's width and height. As in Ultralytics,
the label file of `images/train/NAME.jpg` is `labels/train/NAME.txt`, and that of an image in no folder `images` lies
beside it; an image without one has no objects. `train:`, `val:` and `test:` of data.yaml name folders, or text files
with one image on each line. Without data.yaml, as in Label Studio's exports, `classes.txt`, `notes.json` or
`obj.names` names the classes.
"""

from __future__ import annotations

import posixpath
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...lookup import parse_yaml
from ..archives import MAX_TEXT_BYTES, Location, location_name, read_json, read_location
from ..class_lists import VOID, LabelRule, label_rule, listed_names, read_classes, stuff_labels_of
from ..decoding import MaskReader, PaintedPanoptic, PaintedPolygons, PolygonMasks, upright_size
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList, safe_name
from ..mask_files import covers_nothing, outline_length, outlines_fault, polygon_fault
from ..problems import ProblemList, some_of
from ..reading import Reading

DESCRIPTION = "YOLO segmentation labels and data.yaml"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "data.yaml with names, train and val (or classes.txt); images/train/*.jpg and labels/train/*.txt"
_LONGEST_PATH = 4096  # characters
WHOLE = "all"  # the split of a folder without splits

_FILES = ("data.yaml", "dataset.yaml", "data.yml")
_SPLITS = ("train", "val", "test")
_OTHER_SPLITS = ("training", "valid", "validation", "testing")  # names of folders, without data.yaml
_NAME_FILES = ("classes.txt", "labels.txt", "notes.json", "obj.names")
_NO_VALUE = ("", "~", "null", "Null", "NULL", "[]")
_LABEL_LINE = re.compile(r"\s*-?\d+(\.\d*)?(\s+[-+]?[\d.]+(e[-+]?\d+)?){4,}\s*", re.IGNORECASE)


@dataclass
class _Layout:
    """The files of a data set, and what its settings say about them."""

    files: FileList  # all, by path relative to the folder of the settings
    source: str  # what lists the classes, for messages
    names: list[str]
    splits: dict[str, list[str]]  # folders and lists of images, by split
    root: str = ""  # `path:` of data.yaml
    remark: str = ""  # what data.yaml contradicts itself in
    lists: set[str] = field(default_factory=set)  # the lists of images among `files`

    @cached_property
    def folders(self) -> set[str]:
        """Folders that hold a file, at any depth."""
        return {name[:end] for name in self.files for end, character in enumerate(name) if character == "/"} | {""}

    def images(self, split: str) -> dict[str, str]:
        """Id within the split, by path of the image.

        Raises:
            ValueError: a folder or image that the settings name is not there.
        """
        ids: dict[str, str] = {}
        for text in self.splits[split]:
            where = f"{self.source}: {split}"
            name = self._found(text, where, {*self.folders, *self.files})
            if name in self.files and not _is_image(name):
                self.lists.add(name)
                list_name = location_name(self.files[name])
                for number, line in enumerate(_text(self.files[name]).splitlines(), start=1):
                    if line.strip():
                        item = f"{list_name}: line {number}"
                        image = self._found(line.strip(), item, self.files, posixpath.dirname(name))
                        ids[image] = _stem(image)
                if not ids:
                    raise ValueError(f"{where} is {text!r}, but there are no images in it")
                continue
            prefix = f"{name}/" if name else ""
            found = [image for image in self.files if image.startswith(prefix) and _is_image(image)]
            if not found:
                raise ValueError(f"{where} is {text!r}, but there are no images in {name or 'the folder'}")
            ids |= {image: _stem(image[len(prefix) :]) for image in found}
        # Two folders of a split may hold images of one name, and images may differ only in their endings.
        for longer in (_stem, str):
            count = Counter(ids.values())
            ids = {image: longer(image) if count[stem] > 1 else stem for image, stem in ids.items()}
        return ids

    def _found(self, text: str, where: str, known: Collection[str], folder: str = "") -> str:
        """The file or folder that a path means, which was perhaps written on another machine."""
        if len(text) > _LONGEST_PATH:
            raise ValueError(f"{where}: a path of {len(text):,} characters; no system has such files")
        path = text.replace("\\", "/")
        parts = [part for part in re.sub(r"^[A-Za-z]:", "", path).split("/") if part not in ("", ".")]
        # Exporters write paths relative to a `path:` on their author's machine, so leading `../` means nothing.
        while parts[:1] == [".."]:
            parts = parts[1:]
        own = "/".join(parts)
        if ".." in parts:
            safe_name(path, where)  # raises
        if (beside := f"{folder}/{own}") in known:
            return beside
        stated = "/".join(part for part in self.root.replace("\\", "/").split("/") if part not in ("", ".", ".."))
        if own in known:
            return own
        # Whatever end of the path exists here: CVAT writes `data/images/...`, others `/home/someone/...`.
        for whole in ([stated] if stated else []) + parts, parts:
            for start in range(len(whole)):
                if (end := "/".join(whole[start:])) in known:
                    return end
        # Such a path may be meant to leave the folder, which nothing in a data set may do.
        if path.startswith("/") or re.match("[A-Za-z]:", path):
            raise ValueError(f"{where}: {text!r} is absolute or leaves its folder; give it relative to data.yaml")
        raise ValueError(
            f"{where} is {text!r}, which is not there, so that there are no images in it; correct it, or copy it there"
        )


def splits(path: str, wanted: Sequence[str] = (), classes: Any = None) -> list[str]:
    """Splits that data.yaml or, without it, the folders name; "all" if there are none."""
    known = (*_SPLITS, *_OTHER_SPLITS, WHOLE, *wanted)
    return [name for name in _layout(path, classes).splits if name in known]


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    background: Any = None,
    void: Any = (),
    drop: Any = (),
    stuff: Any = (),
) -> Reading:
    """Read a split of a folder or of a zip archive of it; options are those of `label_rule`, and two more.

    Args:
        classes: for `read_classes`, instead of the names that the data set lists.
        stuff: names of the classes that are merged in the panoptic task; the others are things.
    """
    layout = _layout(path, classes)
    used = _used_names(layout) if drop == "unused" else None
    rule = label_rule(layout.names, task, background=background, void=void, drop=drop, used=used, source=layout.source)
    images = layout.images(split)
    rows: list[dict[str, Any]] = []
    for image, image_id in images.items():
        location = layout.files[image]
        try:
            size = upright_size(location)
        except ValueError as error:
            problems.error(location_name(location), image_id, str(error).removeprefix(f"{location_name(location)}: "))
            continue
        segments = _segments(layout.files.get(_label_file(image)), size, layout, rule, task, problems)
        rows.append({"image": location, "image_id": image_id, "segment_map": [], "segments": segments})
    _note_unread_files(layout, split, images, problems)
    _note_oriented_boxes(rows, layout.source, split, problems)
    background = VOID if rule.background is None else rule.background
    # The user's list alone says what things are: data.yaml cannot.
    stuff_classes, remarks = stuff_labels_of(rule, task, stuff, classes, layout.source)
    remarks = [*filter(None, [layout.remark]), *rule.decisions, *remarks]
    reader: MaskReader = PolygonMasks() if task == "instance" else PaintedPolygons(background)
    if task == "panoptic":
        reader = PaintedPanoptic(frozenset(stuff_classes), background)
    return Reading(reader, list(rule.names), stuff_classes, rows, outlines=True, remarks=remarks)


def _layout(path: str, classes: Any) -> _Layout:
    folder = DataFolder(path)
    location = folder.file(*_FILES)
    files = folder.files("")
    if location is None:
        # Ultralytics takes settings of any name.
        others = [name for name in files if "/" not in name and name.lower().endswith((".yaml", ".yml"))]
        location = files[others[0]] if len(others) == 1 else folder.file(*_NAME_FILES)
    if location is None and classes is None:
        raise ValueError(f"{folder.path}: there is no data.yaml and no classes.txt; expected {LAYOUT}; check the path")
    if location is not None:
        # Zip tools put everything into one folder; paths are relative to that of the settings.
        own = next(name for name, known in files.items() if known == location)
        prefix = own[: len(own) - len(posixpath.basename(own))]
        files = FileList((name[len(prefix) :], files[name]) for name in files if name.startswith(prefix))
    source = str(folder.path) if location is None else location_name(location)
    if location is None or not source.lower().endswith((".yaml", ".yml")):
        names = _listed(classes if location is None or classes is not None else location, source)
        return _Layout(files, source, names, _shown_splits(files))
    settings = parse_yaml(_text(location, 2**20), source, as_text=True)
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: holds no settings; add names, train and val")
    if "kpt_shape" in settings:
        raise ValueError(
            f"{source}: kpt_shape says that these are labels of poses, boxes and keypoints, which cannot train masks; "
            "export outlines (segmentation) instead"
        )
    chosen: dict[str, list[str]] = {}
    for split, value in settings.items():
        texts = value if isinstance(value, list) else [value]
        if split == "names" or not texts or not all(isinstance(text, str) and text not in _NO_VALUE for text in texts):
            if split in _SPLITS and texts and texts[0] not in _NO_VALUE:
                raise ValueError(
                    f"{source}: {split} is {reprlib.repr(value)}; give a folder, a list of images, or several of them"
                )
            continue
        chosen[split] = texts
    names = _settings_names(settings.get("names"), source) if classes is None else _listed(classes, source)
    root, count, remark = settings.get("path"), settings.get("nc"), ""
    if classes is None and isinstance(count, str) and count not in _NO_VALUE and count != str(len(names)):
        # Labels are numbered by the names alone, so nc is no reason to stop.
        known = f"nc is {count[:20]}, but names lists {len(names)}"
        remark = f"{source}: {known}; the names are used, so check that none is missing"
    root = root if isinstance(root, str) and root not in _NO_VALUE else ""
    return _Layout(files, source, names, chosen, root, remark=remark)


def _shown_splits(files: FileList) -> dict[str, list[str]]:
    """Splits by folders or lists, for data sets without data.yaml."""
    known = (*_SPLITS, *_OTHER_SPLITS)
    images = [name for name in files if _is_image(name)]
    for prefix, suffix in (("images/", "/"), ("", "/images/"), ("", "/")):
        found = {
            name: [f"{prefix}{name}{suffix}"]
            for name in known
            if any(image.startswith(f"{prefix}{name}{suffix}") for image in images)
        }
        if found:
            return found
    # CVAT's older export lists the images.
    listed = {name: [f"{name}.txt"] for name in known if f"{name}.txt" in files}
    whole = "images" if any(image.startswith("images/") for image in images) else "."
    return listed or ({WHOLE: [whole]} if images else {})


def _listed(source: Any, where: str) -> list[str]:
    """All class names by number, of a file or of the option `classes`."""
    if isinstance(source, Mapping) and str(source.get("member", "")).endswith("notes.json"):
        content = read_json(Location(archive=source["archive"], member=source["member"]))
        try:
            source = {row["id"]: row["name"] for row in content["categories"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: no categories with id and name; export the labels again") from error
    names = list(listed_names(source))
    labels = read_classes(source).labels
    missing = [number for number in range(len(names)) if number not in labels]
    # A list that starts with `__ignore__` is labelme's, whose numbers start at -1.
    if missing and names[0] != "__ignore__":
        raise ValueError(f"{where}: no class has the number {missing[0]}; YOLO numbers classes from 0 without gaps")
    return names


def _settings_names(names: Any, source: str) -> list[str]:
    if isinstance(names, dict) and all(re.fullmatch(r"\d{1,9}", number) for number in names):
        numbered = {int(number): name for number, name in names.items()}
        names = [numbered[number] for number in sorted(numbered)] if sorted(numbered) == [*range(len(names))] else names
    if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
        names = [name.strip() for name in names]
        if len(set(names)) == len(names):
            return names
    stated = None if names in _NO_VALUE else names  # `reprlib`, as anchors can make a short file endless
    raise ValueError(
        f"{source}: names is {reprlib.repr(stated)}; it must list every class once, in "
        "order or numbered from 0: correct the list"
    )


def _text(location: Location, max_bytes: int = MAX_TEXT_BYTES) -> str:
    content = read_location(location, max_bytes)
    try:
        # Windows' shell redirects text as UTF-16.
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location_name(location)}: no UTF-8 text; save it as UTF-8, or export it again") from error


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _label_file(image: str) -> str:
    # As YOLO's loader does: the last `images` of the path becomes `labels`, and without one the labels lie beside.
    head, folder, tail = f"/{_stem(image)}.txt".rpartition("/images/")
    return (f"{head}/labels/{tail}" if folder else tail).strip("/")


def _used_names(layout: _Layout) -> set[str]:
    """Names of classes that an outline of any split has."""
    numbers: set[str] = set()
    for split in layout.splits:
        for label_file in {_label_file(image) for image in layout.images(split)} & set(layout.files):
            numbers |= {line.split()[0] for line in _text(layout.files[label_file]).splitlines() if line.strip()}
    return {name for number, name in enumerate(layout.names) if numbers & {str(number), f"{number}.0"}}


def _segments(
    location: Location | None,
    size: tuple[int, int],
    layout: _Layout,
    rule: LabelRule,
    task: str,
    problems: ProblemList,
) -> list[dict[str, Any]]:
    if location is None:
        return []
    file, rows, seen, length = location_name(location), [], dict[tuple[str, ...], int](), 0
    try:
        text = _text(location)
    except ValueError as error:
        problems.error(file, "", str(error).removeprefix(f"{file}: "))
        return []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        item, words = f"line {number}", tuple(line.split())
        try:
            label, *shares = (float(word) for word in words)
        except ValueError:
            problems.error(file, item, f"{line[:60]!r} is not a class and numbers; correct it, or export again")
            continue
        if not (abs(label) < 2**31 and label.is_integer()):  # also true for NaN, for which `int` would fail
            problems.error(file, item, f"the class is {words[0]!r}; it must be a whole number")
        elif not 0 <= label < len(layout.names):
            listed, last = posixpath.basename(layout.source), len(layout.names) - 1
            problems.error(file, item, f"class {int(label)} is not in {listed}, whose last is {last}; add it there")
        elif fault := _kind_fault(shares):
            problems.error(file, item, fault)
        elif words in seen:
            problems.warn(file, item, f"the same as line {seen[words]}; it is left out")
        elif (label_id := rule.label_of(layout.names[int(label)])) is not None:
            seen[words] = number
            # `size` is (height, width), but x comes first.
            polygon = [share * size[1 - index % 2] for index, share in enumerate(shares)]
            if fault := polygon_fault(polygon, size):
                problems.error(file, item, f"{fault}; give coordinates as shares of width and height, in [0, 1]")
            elif fault := outlines_fault(length := length + outline_length(polygon)):
                problems.error(file, item, f"{fault}; this line and those after it are left out")
                break
            elif covers_nothing([polygon], {}, size):
                problems.warn(file, item, "an outline that covers no pixel of the image; it is left out")
            elif label_id != VOID or task != "instance":  # only maps can be void in parts
                row = {"id": number, "label_id": label_id, "is_crowd": False, "polygons": [polygon]}
                rows.append({**row, "rle": {"size": list(size), "counts": None}})
    return rows


def _kind_fault(shares: Sequence[float]) -> str:
    """What tells that a line is no outline but another kind of YOLO label; "" if nothing does."""
    if len(shares) == 4:
        return "a box, not an outline; these are labels for detection, which cannot train masks: export outlines"
    # x, y and a visibility of 0, 1 or 2 for each keypoint: as coordinates of an outline these are most unlikely.
    if len(shares) > 10 and len(shares) % 3 == 1 and all(value in (0, 1, 2) for value in shares[6::3]):
        return "a box and keypoints, not an outline; these are labels of poses, which cannot train masks"
    if len(shares) > 6 and len(shares) % 2:
        return (
            f"{len(shares)} numbers after the class, but an outline has pairs of x and y; predictions end with a "
            "confidence (save_conf) or a track: remove it"
        )
    return ""


def _note_oriented_boxes(rows: Sequence[Mapping[str, Any]], source: str, split: str, problems: ProblemList) -> None:
    """Warn if all outlines are rectangles and some are turned: an oriented box is written like an outline."""
    outlines = [segment["polygons"][0] for row in rows for segment in row["segments"]]
    if not outlines or any(len(outline) != 8 for outline in outlines):
        return
    points = np.array(outlines).reshape(-1, 4, 2)
    sides = np.roll(points, -1, axis=1) - points
    lengths = np.linalg.norm(sides, axis=2)
    # Half a pixel: coordinates are rounded, sometimes to three digits.
    slack = 0.5 * lengths.max(axis=1) + 1e-6
    square = (np.abs((sides * np.roll(sides, -1, axis=1)).sum(2)) <= slack[:, None] * 2).all(axis=1)
    turned = (np.abs(sides).min(axis=2) > 1).any(axis=1)
    if square.all() and turned.any():
        message = (
            "all outlines are rectangles, some of them turned; if these are oriented boxes (OBB), so are the masks"
        )
        problems.warn(source, f"split {split!r}", message)


def _note_unread_files(layout: _Layout, split: str, images: Collection[str], problems: ProblemList) -> None:
    """Name label files that belong to no image of any split, and say where they would be read."""
    if not any(_label_file(image) in layout.files for image in images):
        first = next(iter(images))
        message = f"none of its images has a label file; that of {first} would be {_label_file(first)}: move it there"
        problems.warn(layout.source, f"split {split!r}", message)
    everywhere = dict.fromkeys(images)
    for other in layout.splits:
        try:
            everywhere |= dict.fromkeys(layout.images(other))
        except ValueError:  # it is reported when that split is read
            continue
    read_files = {_label_file(image) for image in everywhere}
    unread: dict[tuple[str, bool], list[str]] = defaultdict(list)
    stems = {_stem(name): name for name in layout.files if _is_image(name)}
    for name, location in layout.files.items():
        if not name.lower().endswith(".txt") or name in read_files | layout.lists or name in _NAME_FILES:
            continue
        if _is_label_file(location):
            unread[posixpath.dirname(name), _stem(name) in stems].append(name)
    for (folder, is_beside), names in unread.items():
        where = posixpath.dirname(location_name(layout.files[names[0]]))
        files = some_of([posixpath.basename(name) for name in names])
        lost = sum(_stem(name) in stems and _label_file(stems[_stem(name)]) not in layout.files for name in names)
        if is_beside:
            wanted = posixpath.dirname(_label_file(stems[_stem(names[0])])) or "the folder itself"
            reason = f"labels of the images beside them are read from {wanted}: move them there" * (wanted != folder)
            reason = reason or "their images are in no split: add them to data.yaml"
            reason += f"; {lost} of these images count as without objects" * (lost > 0 and wanted != folder)
        else:
            absent = [image for image in everywhere if _label_file(image) not in layout.files]
            lonely = [image for image in absent if posixpath.dirname(_label_file(image)) == folder]
            reason = "no image of a split has such a name"
            if lonely:
                reason += f", while images of that folder have no label file ({some_of(lonely)}): rename one or other"
        problems.warn(where, "", f"label files that are not read: {files}; {reason}")


def _is_label_file(location: Location) -> bool:
    try:
        lines = _text(location).splitlines()
    except ValueError:
        return False
    return _LABEL_LINE.fullmatch(next((line for line in lines if line.strip()), "")) is not None
