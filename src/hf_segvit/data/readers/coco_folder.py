"""Any data set in COCO's instance or panoptic format, with its own classes, as the usual tools export it.

Annotations are `annotations/instances_SPLIT.json`, `annotations/SPLIT.json` or the same without the folder,
`SPLIT/_annotations.coco.json` or `SPLIT/annotations/instances.json`; a file without a split's name in its own
(`result.json`) is the split "all". Images are in `SPLIT`, `images/SPLIT`, `images` or below them, and panoptic PNGs in
a folder named like the JSON file. Case does not matter in the names of splits.

Classes are the categories of all splits by name, those of the training split first, by ascending id; ../class_lists.py
says what the options do. Outlines also give semantic maps, and panoptic ones if `stuff` names the classes that are.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ...lookup import suggestion
from ..annotation_values import whole_number
from ..archives import MAX_TEXT_BYTES, Location, location_name, read_json, read_location
from ..class_lists import CLASS_FILES, VOID, LabelRule, label_rule, listed_names, option_names, union_of_splits
from ..coco_files import CocoFile, checked_categories, read_coco_file
from ..coco_outlines import instance_rows
from ..coco_panoptic import PanopticMasks, panoptic_rows
from ..decoding import PaintedPanoptic, PaintedPolygons, PolygonMasks
from ..folders import IMAGE_SUFFIXES, DataFolder, FileList
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "any data set in COCO's instance or panoptic format"
TASKS = ("instance", "panoptic", "semantic")
LAYOUT = (
    "annotations/instances_train.json (or train/_annotations.coco.json, or result.json) and the images in train or "
    "images; panoptic annotations/panoptic_train.json and the PNGs in annotations/panoptic_train"
)
WHOLE = "all"  # the split of a file that names none

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "default")
_YEARS = tuple(f"{name}{year}" for name in ("train", "val", "test") for year in (2014, 2017))
_AFFIX = re.compile(r"^(instances?|_?annotations?|coco|labels|result|dataset|data)(?=[_.\-]|$)[_.\-]*", re.IGNORECASE)
_ENDING = re.compile(r"[_.\-]+(instances?|annotations?|coco|labels|dataset)$", re.IGNORECASE)
# Files of COCO's other tasks, which lie beside those that are read.
_OTHER_TASKS = re.compile(r"(captions|person_keypoints|keypoints|image_info|stuff)(_|$)", re.IGNORECASE)
_MOST_PEEKED = 20  # more JSON files in a folder are annotations of single images, as of labelme
_MOST_LISTS = 8  # lists called "categories" that are looked at: other tools nest some
_LARGEST_MAP_ID = 2**31 - 1


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits that have a JSON file, in lower case if they have a usual name, and those of `wanted` in any case."""
    folder, _, files = _find_files(path, wanted)
    if not files and (names := _all_json(folder)):
        listed = ", ".join(names[:8]) + " ..." * (len(names) > 8)
        raise ValueError(
            f"{path}: no split of a coco_folder data set is there; the JSON files are {listed}; expected {LAYOUT}; "
            "check the path"
        )
    names = list(files)
    return names + [name for name in wanted if name not in names and _key(name, files) in files]


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    background: Any = None,
    void: Any = (),
    crowd: Any = "ignore",
    drop: Any = (),
    stuff: Any = None,
) -> Reading:
    """Read one split of a folder or a zip archive; for most options see `label_rule`.

    Args:
        classes: names of the classes in order, for `read_classes`; by default the categories of all splits.
        stuff: names of the classes that are stuff, "none" if all are things; by default `isthing` of the categories.
    """
    folder, prefix, files = _find_files(path, (split,))
    split_key = _key(split, files)
    kinds = files.get(split_key, {})
    kind = "outlines" if task == "instance" or "panoptic" not in kinds else "panoptic"
    if kind not in kinds:
        listed = ", ".join(_all_json(folder)[:8]) or "none"
        raise ValueError(
            f"{path}: no {task} annotations of split {split!r}; the JSON files are {listed}; expected {LAYOUT}; check "
            "the path"
        )
    location = kinds[kind]
    file = read_coco_file(location, _images(folder, prefix, split_key, location), problems)
    by_name = {entry["name"]: entry for entry in file.categories.values()}
    if classes is not None:
        listed_classes = list(listed_names(classes))
        _tell_unlisted(file, listed_classes, problems)
    else:
        of_splits = {split_key: list(by_name)}
        for other, locations in files.items():
            if other != split_key and kind in locations:
                of_splits[other] = _category_names(locations[kind])
        listed_classes, remarks = union_of_splits(
            {name: of_splits[name] for name in sorted(of_splits, key=_training_first) if of_splits[name]}
        )
        for remark in remarks:
            # Told by the splits that lack the class, so that a check of all splits does not tell it of each.
            if split_key in remark.rpartition("but not in ")[2].split(", "):
                problems.warn(
                    file.name, "categories", f"{remark}; it is a class of all splits, drop=NAME leaves it out"
                )
    used = None
    if drop == "unused":
        used = {name for locations in files.values() if kind in locations for name in _used_names(locations[kind])}
    rule = label_rule(
        listed_classes, task, background=background, void=void, crowd=crowd, drop=drop, used=used, source=file.name
    )
    labels = {category_id: rule.labels.get(entry["name"]) for category_id, entry in file.categories.items()}
    if task == "instance":
        labels = {category_id: None if label == VOID else label for category_id, label in labels.items()}
    _tell_empty_parents(file, rule, problems)
    stuff_classes = _stuff(stuff, by_name, rule, file, task, kind)
    ground = VOID if rule.background is None else rule.background
    names = list(rule.names)
    if kind == "panoptic":
        subfolder = posixpath.splitext(posixpath.basename(location["member"].replace("\\", "/")))[0]
        maps = folder.files(f"{prefix}annotations/{subfolder}", f"{prefix}{subfolder}", suffixes=(".png",))
        if not maps:
            raise ValueError(
                f"{location_name(location)}: there is no folder {subfolder} with panoptic PNGs beside it; add it"
            )
        rows = panoptic_rows(file, maps, labels, problems, rule.crowds_are_objects)
        reader = PanopticMasks(task == "semantic", ground, any(label in (None, VOID) for label in labels.values()))
        _tell_crowds(file, rows, names, task, problems)
        return Reading(reader, names, stuff_classes, rows, remarks=list(rule.decisions))
    rows = instance_rows(file, labels, problems, rule.crowds_are_objects)
    _tell_crowds(file, rows, names, task, problems)
    painted: Any = PaintedPolygons(ground) if task == "semantic" else PolygonMasks()
    if task == "panoptic":
        _number_for_maps(rows)
        painted = PaintedPanoptic(frozenset(stuff_classes))
    return Reading(painted, names, stuff_classes, rows, remarks=list(rule.decisions), outlines=True)


def _find_files(path: str, wanted: Sequence[str] = ()) -> tuple[DataFolder, str, dict[str, dict[str, Location]]]:
    """The folder, the prefix of everything in it, and JSON files by split and kind ("outlines" or "panoptic")."""
    folder = DataFolder(path)
    prefix = _wrapper(folder)
    files = _annotation_files(folder, prefix, wanted)
    if not files and folder.path.is_dir() and (archives := folder.names("", ".zip")):
        # An export as it was downloaded, or annotations and images in an archive each.
        folder = DataFolder(folder.path / archives[0]) if len(archives) == 1 else DataFolder(path, archives)
        prefix = _wrapper(folder)
        files = _annotation_files(folder, prefix, wanted)
    return folder, prefix, files


def _wrapper(folder: DataFolder) -> str:
    """`NAME/` if everything is inside one folder, as after unpacking an archive into its own folder; otherwise ""."""
    inner = folder.folders()
    if len(inner) != 1 or folder.names(suffix=".json") or inner[0].lower() in (*_SPLITS, *_YEARS, "annotations"):
        return ""
    return f"{inner[0]}/"


def _annotation_files(folder: DataFolder, prefix: str, wanted: Sequence[str]) -> dict[str, dict[str, Location]]:
    found: dict[str, dict[str, Location]] = {}
    unknown: list[str] = []
    for subfolder in ("annotations", ""):
        names = folder.names(_joined(prefix, subfolder), ".json")
        # Files that say what they are come first.
        for name in sorted(names, key=lambda name: not name.lower().startswith(("instances_", "panoptic_"))):
            stem = name[:-5]
            kind, split = _kind_and_split(stem, wanted)
            if split is None:
                # Datumaro's `labels_train.json` has whole images' classes; makesense calls its only file like this.
                is_of_images = subfolder and stem.lower().startswith("labels_")
                if kind and name not in CLASS_FILES and not is_of_images:
                    unknown.append(_joined(prefix, subfolder, name))
                continue
            _add(found, folder, split or WHOLE, kind, _joined(prefix, subfolder, name))
    for top in folder.folders(prefix.rstrip("/")):
        if top.lower() in ("annotations", "images"):
            continue
        for subfolder in (top, f"{top}/annotations"):
            names = folder.names(_joined(prefix, subfolder), ".json")
            for name in names:
                kind, split = _kind_and_split(name[:-5], wanted)
                file = _joined(prefix, subfolder, name)
                is_of_top = (
                    not split if split is not None else (bool(kind) and len(names) == 1 and _is_coco(folder, file))
                )
                if is_of_top or (split or "").casefold() == top.casefold():
                    _add(found, folder, _usual(top), kind, file)
    if len(unknown) <= _MOST_PEEKED:
        of_own_names = [name for name in unknown if _is_coco(folder, name)]
        for name in of_own_names:
            is_only = len(of_own_names) == 1 and not found and "annotations/" not in name
            _add(found, folder, WHOLE if is_only else posixpath.basename(name)[:-5], "outlines", name)
    return found


def _kind_and_split(stem: str, wanted: Sequence[str]) -> tuple[str, str | None]:
    """Kind and split of a JSON file; the split is "" if the name tells none, and `None` if it tells too little.

    The kind is "" for files of other tasks.
    """
    if match := re.match(r"(instances|panoptic)_(.+)", stem, re.IGNORECASE):
        kind = "panoptic" if match[1].lower() == "panoptic" else "outlines"
        return kind, _usual(match[2])
    if stem.lower() == "panoptic":
        return "panoptic", ""
    if stem in wanted:
        return "outlines", stem
    rest = _ENDING.sub("", _AFFIX.sub("", stem))
    rest = _AFFIX.sub("", rest)
    if not rest or rest.lower() in (*_SPLITS, *_YEARS):
        return "outlines", _usual(rest)
    return ("" if _OTHER_TASKS.match(stem) else "outlines"), None


def _usual(split: str) -> str:
    """A split's name in lower case if it is a usual one: "Train" is sorted and found like "train"."""
    return split.lower() if split.lower() in (*_SPLITS, *_YEARS) else split


def _key(split: str, files: Mapping[str, Any]) -> str:
    """The name of a split as in `files`, whatever its case."""
    if split in files:
        return split
    return next((name for name in files if name.casefold() == split.casefold()), split)


def _training_first(split: str) -> tuple[int, str]:
    name = split.lower()
    return (0 if name.startswith("train") else 1 if name.startswith("val") else 2), split


def _add(found: dict[str, dict[str, Location]], folder: DataFolder, split: str, kind: str, name: str) -> None:
    location = folder.file(name)
    if location is not None:
        found.setdefault(_key(split, found), {}).setdefault(kind, location)


def _joined(*parts: str) -> str:
    return "/".join(part.strip("/") for part in parts if part)


def _all_json(folder: DataFolder) -> list[str]:
    return list(folder.files("", suffixes=(".json",)))


def _is_coco(folder: DataFolder, name: str) -> bool:
    location = folder.file(name)
    try:
        return location is not None and bool(_listed_categories(location))
    except ValueError:
        return False


def _listed_categories(location: Location) -> list[Any]:
    """The list of categories of a COCO file; empty if it has none."""
    content = read_location(location, MAX_TEXT_BYTES)
    # Only this list is parsed: all of a large file takes many seconds, for each split once more.
    decoder = json.JSONDecoder()
    for match in islice(re.finditer(rb'"categories"\s*:\s*(?=\[)', content), _MOST_LISTS):
        length = 2**16
        while True:
            try:
                entries, _ = decoder.raw_decode(content[match.end() : match.end() + length].decode("utf-8", "ignore"))
            except (ValueError, RecursionError):
                if match.end() + length >= len(content):
                    break
                length *= 8
                continue
            if entries and all(isinstance(entry, dict) and "name" in entry for entry in entries):
                return list(entries)
            break
    if b'"categories"' in content:
        return []
    whole = read_json(location)  # in another encoding
    entries = whole.get("categories") if isinstance(whole, dict) else None
    return entries if isinstance(entries, list) else []


def _category_names(location: Location) -> list[str]:
    """Names of another split's categories by ascending id; none if it is faulty, as reading that split reports."""
    try:
        return [entry["name"] for entry in checked_categories(_listed_categories(location), "").values()]
    except ValueError:
        return []


def _used_names(location: Location) -> list[str]:
    """Names of the categories that a file has annotations of."""
    content = read_json(location)
    categories = checked_categories(_listed_categories(location), location_name(location))
    annotations = content.get("annotations") if isinstance(content, dict) else None
    used = _used_ids(annotations if isinstance(annotations, list) else [])
    return [entry["name"] for category_id, entry in categories.items() if category_id in used]


def _used_ids(annotations: Sequence[Any]) -> set[int | None]:
    infos = [
        entry["segments_info"] if isinstance(entry.get("segments_info"), list) else [entry]
        for entry in annotations
        if isinstance(entry, dict)
    ]
    return {whole_number(info.get("category_id")) for rows in infos for info in rows if isinstance(info, dict)}


def _images(folder: DataFolder, prefix: str, split: str, location: Location) -> FileList:
    tops = {name.casefold(): name for name in folder.folders(prefix.rstrip("/"))}
    inner = {name.casefold(): name for name in folder.folders(_joined(prefix, "images"))}
    own, below = tops.get(split.casefold(), split), inner.get(split.casefold(), split)
    # `img` is Supervisely's folder, `data` FiftyOne's.
    candidates = [f"{own}/images", f"{own}/img", f"{own}/data", own, f"images/{below}", "images", "img", "data", ""]
    if folder.path.is_dir() and not folder.archives and (archives := folder.names("", ".zip")):
        searched = [folder, DataFolder(folder.path, archives)]
    else:
        searched = [folder]
    for place in searched:
        for candidate in candidates:
            subfolder = _joined(prefix, candidate)
            if images := place.files(subfolder, suffixes=IMAGE_SUFFIXES):
                # Under both names: exporters write `file_name` relative to the folder of images or to the root.
                both = {f"{candidate}/{name}": location for name, location in images.items()} if candidate else {}
                if "/" in candidate:
                    inside = candidate.partition("/")[2]
                    both |= {f"{inside}/{name}": location for name, location in images.items()}
                return FileList({**both, **images})
    raise ValueError(
        f"{folder.path}: no images of split {split!r}; put them into {split}, images/{split} or images, beside "
        f"{location_name(location)}"
    )


def _stuff(
    stuff: Any, by_name: Mapping[str, Mapping[str, Any]], rule: LabelRule, file: CocoFile, task: str, kind: str
) -> list[int]:
    """Label ids of the classes that are stuff."""
    if stuff is not None:
        if task == "instance":
            raise ValueError(f"stuff={stuff} is for the tasks panoptic and semantic; leave it out")
        chosen = [name for name in option_names(stuff) if name]
        if [name.lower() for name in chosen] == ["none"] and "none" not in rule.labels:
            return []
        if unknown := [name for name in chosen if name not in rule.labels]:
            raise ValueError(
                f"{file.name}: stuff={unknown[0]} is no class; {suggestion(unknown[0], list(rule.labels))}"
            )
        labels = [rule.label_of(name) for name in chosen]
        return sorted({label for label in labels if label is not None and label != VOID})
    things = {name: whole_number(entry.get("isthing")) for name, entry in by_name.items()}
    unknown = [
        name for name, label in rule.labels.items() if things.get(name) not in (0, 1) and label not in (None, -1)
    ]
    if task == "panoptic" and (kind == "panoptic" or len(unknown) == len(rule.names)):
        unknown = [name for name in unknown if name in by_name or kind == "outlines"]
        if unknown and kind == "panoptic":
            raise ValueError(f"{file.name}: category {unknown[0]!r} needs `isthing`, 1 for things and 0 for stuff")
        if unknown:
            raise ValueError(
                f"{file.name}: outlines do not say which classes are stuff, which a panoptic data set needs; name them "
                f"with stuff=NAME,NAME, or give stuff=none (the classes are {', '.join(rule.names[:20])})"
            )
    if task == "instance" or not things:
        return []
    labels = [rule.labels.get(name) for name, is_thing in things.items() if is_thing == 0]
    return sorted({label for label in labels if label is not None and label != VOID})


def _number_for_maps(rows: list[dict[str, Any]]) -> None:
    """Number segments anew in images whose annotation ids do not fit into a map of 32 bits."""
    for row in rows:
        if any(not 0 <= segment["id"] <= _LARGEST_MAP_ID for segment in row["segments"]):
            for number, segment in enumerate(row["segments"], start=1):
                segment["id"] = number


def _tell_unlisted(file: CocoFile, listed: Sequence[str], problems: ProblemList) -> None:
    if unlisted := {key: entry["name"] for key, entry in file.categories.items() if entry["name"] not in listed}:
        used = _used_ids(file.annotations)
        for category_id, name in unlisted.items():
            if category_id in used:
                problems.error(
                    file.name, f"category {name!r}", "it is not in the list of classes; add it there, or drop it"
                )


def _tell_empty_parents(file: CocoFile, rule: LabelRule, problems: ProblemList) -> None:
    """Warn of categories that only group others, as Roboflow adds one to each data set."""
    children: dict[str, list[str]] = {}
    for entry in file.categories.values():
        parent = entry.get("supercategory")
        if isinstance(parent, str) and parent.strip() != entry["name"]:
            children.setdefault(parent.strip(), []).append(entry["name"])
    parents = {key: entry["name"] for key, entry in file.categories.items() if entry["name"] in children}
    parents = {key: name for key, name in parents.items() if rule.labels.get(name) not in (None, VOID)}
    if not parents:
        return
    used = _used_ids(file.annotations)
    for category_id, name in parents.items():
        if category_id not in used:
            problems.warn(
                file.name,
                f"category {name!r}",
                f"it has no object and is the supercategory of {children[name][0]!r}, so nothing can be of this class; "
                f"drop={name} leaves it out",
            )


def _tell_crowds(
    file: CocoFile, rows: Sequence[Mapping[str, Any]], names: Sequence[str], task: str, problems: ProblemList
) -> None:
    """Warn of classes whose objects are crowds, which train nothing."""
    if task == "semantic":  # crowds are painted like any segment
        return
    crowds = Counter(segment["label_id"] for row in rows for segment in row["segments"] if segment["is_crowd"])
    if not crowds:
        return
    totals = Counter(segment["label_id"] for row in rows for segment in row["segments"])
    for label, count in sorted(crowds.items()):
        if label == VOID or count <= totals[label] / 2:
            continue
        share = "it occurs only as crowd" if count == totals[label] else f"{count} of {totals[label]} are crowds"
        problems.warn(
            file.name,
            f"class {names[label]!r}",
            f"{share} (iscrowd 1), and crowds train nothing; CVAT marks all brush masks so: crowd=objects reads them "
            "as objects",
        )
