"""Recognise the format of a folder or a zip archive, as annotation tools export it: `auto:PATH`.

`recognise` looks at the names of files and at what JSON, XML and YAML files begin with, and returns the format's name
and the reason. reading.py replaces `auto:PATH` by it, so that tasks, options and messages are those of the format.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..archives import Location, location_name, open_archive, read_location
from ..bravo_files import BRAVO_FOLDERS
from ..class_lists import CLASS_FILES
from ..folders import IMAGE_SUFFIXES, DataFolder
from ..problems import ProblemList
from ..reading import Reading
from ..shapes import wrapper

DESCRIPTION = "recognises the format of a tool's export"
TASKS = ("instance", "semantic", "panoptic")
LAYOUT = "a folder or zip archive as CVAT, Label Studio, labelme, Roboflow, Supervisely, VIA and others export it"

_HEAD = 2**16  # bytes of a file that are looked at
_MOST_JSON = 40  # JSON files that are looked at
_LARGEST_WHOLE = 2**26  # bytes of a JSON file whose end is looked at, too
_MASK_FOLDERS = ("annotations", "masks", "labels")
_VIA_COLUMNS = re.compile(rb"region_shape_attributes|temporal_coordinates")
# `0 0.5 0.5 0.2 0.2` of YOLO, and `car,5,5,20,10,a.jpg,60,40` of makesense.ai.
_BOX_LINES = {".txt": re.compile(rb"\d+( [\d.]+){4}\s*"), ".csv": re.compile(rb"[^,\n]+(,\d+){4},[^,\n]+,\d+,\d+\s*")}
# Masks of NN_STREET_NNNNNN_NNNNNN, in Fishyscapes with a number before it.
_LOST_AND_FOUND = re.compile(r"gtCoarse/\w+/\d\d_[^/]+/\d\d_[^/]+_gtCoarse_labelIds\.png$")
_ROAD_ANOMALY = re.compile(r"\.labels/labels_semantic\.png$")
_FISHYSCAPES = re.compile(r"(^|/)\d{4}_[^/]+_labels\.png$")
_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The splits that the recognised format finds."""
    module, path = _module(path)
    return list(module.splits(path, wanted=wanted))


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split as the recognised format does."""
    module, path = _module(path)
    reading: Reading = module.read(path, split=split, task=task, problems=problems)
    return reading


def _module(path: str) -> tuple[Any, str]:
    name, path, _ = recognise(path)
    return importlib.import_module(f"{__package__}.{name}"), path


def recognise(path: str) -> tuple[str, str, str]:
    """Format, path (of the archive in a folder that holds one alone), and what it was recognised by.

    Raises:
        ValueError: nothing is at the path, no format fits, or several do; the message lists them, or what is there.
    """
    folder = DataFolder(path)
    files = folder.files("")
    reasons = _reasons(files)
    if not reasons and len(archives := [name for name in files if name.lower().endswith(".zip")]) == 1:
        inner = files[archives[0]]
        if inner["archive"] is None:
            # As downloaded into a folder of its own.
            path, files = inner["member"], DataFolder(inner["member"]).files("")
            reasons = _reasons(files)
    if len(reasons) == 1:
        name, reason = next(iter(reasons.items()))
        # The other readers look into a folder around the export themselves.
        if name in ("yolo", "mask_folder") and Path(path).is_dir():
            path = str(Path(path) / wrapper(files))
        return name, path, reason
    if reasons:
        listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        first = next(iter(reasons))
        raise ValueError(f"{path}: several formats fit: {listed}; name the one that is meant, as in {first}:{path}")
    if any(name.lower().endswith(".xml") and b"<bndbox>" in _head(files[name]) for name in list(files)[:50]):
        raise ValueError(f"{path}: Pascal VOC's XML files of boxes, which cannot train masks; export masks or outlines")
    if text := next((name for name in list(files)[:50] if _has_boxes(files[name])), None):
        raise ValueError(
            f"{path}: {text} lists boxes, as YOLO's and makesense.ai's exports of rectangles do, which cannot train "
            "masks; export polygons, in makesense.ai as VGG JSON or COCO JSON"
        )
    raise ValueError(
        f"{path}: no format is recognised; there {_seen(list(files))}. `hf-segvit check-data --help` describes the "
        "formats; name one, as in mask_folder:PATH"
    )


def _has_boxes(location: Location) -> bool:
    """Whether a text begins with a line that is a box."""
    line = _BOX_LINES.get(posixpath.splitext(location["member"])[1].lower())
    return line is not None and line.match(_head(location)) is not None


def _seen(names: Sequence[str]) -> str:
    """What is there, in words."""
    if not names:
        return "are no files"
    counts = Counter(posixpath.splitext(name)[1].lower() or "no ending" for name in names)
    kinds = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(6))
    return f"are files ({kinds}), such as {', '.join(names[:3])}"


def _reasons(files: dict[str, Location]) -> dict[str, str]:
    """Formats that fit, with the reason, from the surest kinds of evidence that find any."""
    for evidence in (_by_names, _by_content, _by_folders):
        if found := evidence(files):
            return found
    return {}


def _by_names(files: dict[str, Location]) -> dict[str, str]:
    """Formats whose files have names that no other format uses."""
    found: dict[str, str] = {}
    parts = {part for name in files for part in name.split("/")[:-1]}
    bare = {posixpath.basename(name) for name in files}
    if folders := {"SegmentationClass", "SegmentationClassPNG"} & parts:
        lists = "".join(f" and {name}" for name in ("labelmap.txt", "class_names.txt") if name in bare)
        found["voc"] = f"there is a folder {min(folders)}{lists}"
    if "_classes.csv" in bare and any(name.lower().endswith("_mask.png") for name in bare):
        found["roboflow_masks"] = "there are _classes.csv and masks NAME_mask.png"
    if bravo := {part for part in parts if part in BRAVO_FOLDERS}:
        found["bravo"] = f"there is a folder {min(bravo)}"
    elif name := next(filter(_LOST_AND_FOUND.search, files), None):
        found["lost_and_found"] = f"{name} is named like Lost and Found's"
    elif name := next(filter(_ROAD_ANOMALY.search, files), None):
        found["road_anomaly"] = f"{name} is named like RoadAnomaly's"
    elif any(name.endswith("_labels_semantic.png") for name in files):
        found["smiyc"] = "there are masks NAME_labels_semantic.png, as of SegmentMeIfYouCan"
    elif name := next(filter(_FISHYSCAPES.search, files), None):
        found["fishyscapes"] = f"{name} is named like Fishyscapes'"
    elif {"images", "labels_masks"} <= parts:
        found["anomaly"] = "there are folders images and labels_masks"
    elif "leftImg8bit" in parts:
        kind = "cityscapes" if "gtFine" in parts or "gtCoarse" not in parts else "cityscapes_coarse"
        found[kind] = "there is a folder leftImg8bit"
    is_ade = {"images/training", "annotations/training"} <= {name.rpartition("/")[0] for name in files}
    if (
        "ADEChallengeData2016" in parts
        or (is_ade and not bare & set(CLASS_FILES))
        or {"objectInfo150.txt", "sceneCategories.txt"} <= bare
    ):
        found["ade20k"] = "the folder or the lists are those of ADE20K's scene parsing challenge"
    if {"dataset_info.json", "state.json"} <= bare or "dataset_dict.json" in bare:
        found["hub"] = "there are files of `save_to_disk` (dataset_info.json, state.json)"
    if "meta.json" in bare and any(f"/{name}".rpartition("/")[0].endswith("/ann") for name in files):
        found["supervisely"] = "there are meta.json and a folder ann"
    years = [name for name in bare if re.fullmatch(r"(instances|panoptic)_(train|val)(2014|2017)\.json(\.zip)?", name)]
    if years:
        found["coco"] = f"{years[0]} is named like COCO's own"
    elif "stuffthingmaps" in parts or any(name.startswith("stuffthingmaps") for name in bare):
        found["coco_stuff"] = "there are COCO-Stuff's maps (stuffthingmaps)"
    return found


def _by_content(files: dict[str, Location]) -> dict[str, str]:
    """Formats by what JSON, XML, CSV and YAML files hold."""
    found: dict[str, str] = {}
    count = 0
    # The first file of each folder tells as much as all, and large data sets have a file for each image.
    for name in sorted(files, key=lambda name: (name.count("/"), name)):
        suffix = posixpath.splitext(name)[1].lower()
        base = posixpath.basename(name).lower()
        if suffix == ".json" and count < _MOST_JSON:
            count += 1
            kind, reason = _json_kind(files[name])
        elif suffix == ".xml" and b"<annotations" in _head(files[name])[:2000].replace(b"\0", b""):
            kind, reason = "cvat", "begins with <annotations>, as CVAT's XML does"
        elif suffix == ".csv" and _VIA_COLUMNS.search(_head(files[name]).replace(b"\0", b"")):
            kind, reason = "via", "has VIA's columns"
        elif base in _YAML and re.search(rb"^\s*[\"']?names[\"']?\s*:", _head(files[name]), re.MULTILINE):
            kind, reason = "yolo", "lists names, as YOLO's does"
        elif base == "obj.data":
            kind, reason = "yolo", "is YOLO's (Darknet's) list of files"
        else:
            continue
        if kind:
            found.setdefault(kind, f"{name} {reason}")
    return found


def _head(location: Location, length: int = _HEAD) -> bytes:
    if location["archive"]:
        archive = open_archive(location["archive"])
        return archive.read(location["member"], 2 * 2**30)[:length]
    try:
        with open(location["member"], "rb") as file:
            return file.read(length)
    except OSError as error:
        raise ValueError(
            f"{location_name(location)}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def _json_kind(location: Location) -> tuple[str, str]:
    """The format that a JSON file belongs to, and what says so; "" if none is recognised."""
    try:
        head = _head(location)
        # Keys may follow after megabytes of others: COCO's files often end with the categories.
        content = read_location(location, _LARGEST_WHOLE) if len(head) == _HEAD else head
    except ValueError:
        content = head = _head(location)
    text = content.replace(b"\0", b"")  # UTF-16 without its zeros
    begin = text.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1]
    keys = {match[1].decode("ascii") for match in re.finditer(rb'"(\w+)"\s*:', text)}
    if begin == b"{":
        if {"project", "metadata", "view", "xy"} <= keys or {"vid_list", "fid_list"} <= keys:
            return "via", "has project, view and metadata, as VIA 3's does"
        if "_via_img_metadata" in keys:
            return "via", "has _via_img_metadata, as VIA's does"
        if {"regions", "filename", "shape_attributes"} <= keys:
            return "via", "has files with regions, as VIA's and makesense.ai's do"
        if {"shapes", "imagePath"} <= keys:
            return "labelme", "has shapes and imagePath, as labelme's files do"
        if {"samples", "dataset"} <= keys:
            return "segments_ai", "has a data set with samples, as segments.ai's releases do"
        if {"items", "categories", "label"} <= keys:
            return "datumaro", "has categories and items, as Datumaro's does"
        if {"images", "annotations", "categories"} <= keys or {"images", "annotations", "file_name"} <= keys:
            return "coco_folder", "has images, annotations and categories, as COCO's do"
    elif begin == b"[" and keys & {"annotations", "completions"} and {"data", "result"} & keys and "data" in keys:
        return "label_studio", "lists tasks with data and annotations, as Label Studio's does"
    elif begin == b"[" and re.search(rb'"(polygon|brush|rectangle|ellipse)labels"', text):
        return "label_studio", "lists regions with labels, as Label Studio's JSON-MIN does"
    return "", ""


def _by_folders(files: dict[str, Location]) -> dict[str, str]:
    """Formats that are recognised by folders of images beside folders of masks or label texts."""
    folders: dict[str, Counter[str]] = {}
    for name in files:
        for part in name.split("/")[:-1]:
            folders.setdefault(part.lower(), Counter())[posixpath.splitext(name)[1].lower()] += 1
    found = {}
    texts = [name for name in files if name.lower().endswith(".txt")]
    lists = [name for name in texts if posixpath.basename(name).lower() in ("classes.txt", "obj.names")]
    if folders.get("labels", Counter())[".txt"] or (lists and len(texts) > len(lists)):
        found["yolo"] = f"there are label texts, such as {next(name for name in texts if name not in lists)}"
    for name in _MASK_FOLDERS if "images" in folders else ():
        count = sum(folders.get(name, Counter())[suffix] for suffix in IMAGE_SUFFIXES)
        if count:
            found["mask_folder"] = f"there are folders images and {name}, with {count} masks"
            break
    if pngs := [name for name in files if re.match(r"task-\d+-annotation-\d+-by-", posixpath.basename(name))]:
        found["label_studio"] = f"{pngs[0]} is named like Label Studio's brush PNGs"
    return found
