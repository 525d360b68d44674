"""COCO panoptic annotations: `segments_info`, and PNGs that encode segment ids as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .annotation_values import shown, whole_number
from .archives import Location, location_name
from .class_lists import VOID
from .coco_files import CocoFile, category_label, crowd_flag, known_image_id, report_missing
from .decoding import Segments, semantic_segments
from .folders import FileList, find_named
from .mask_files import present_values, read_color_ids, replace_values
from .problems import ProblemList

_LARGEST_ID = 2**24 - 1  # segment ids of panoptic PNGs are stored in three channels of 8 bits


@dataclass(frozen=True)
class PanopticMasks:
    """Masks of panoptic PNGs; of each class one segment if `semantic`."""

    semantic: bool = False
    background: int = VOID  # label id of pixels without a segment in semantic maps
    some_are_void: bool = False  # ids that are not listed are void, since some categories are

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_color_ids(maps[0])
        present = set(present_values(ids))
        if 0 in present:
            ids[ids == 0] = VOID
            present.remove(0)
        rows = segments or []
        unlisted = sorted(present - {row["id"] for row in rows})
        if unlisted and not self.some_are_void:
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {unlisted[:5]}, which segments_info does not list; "
                "PNG and JSON are of different versions: get both from one source"
            )
        if self.semantic:
            label_map = replace_values(ids, {row["id"]: row["label_id"] for row in rows}, VOID)
            label_map[ids == VOID] = self.background
            return label_map, semantic_segments(label_map)
        if unlisted:
            ids = replace_values(ids, {row["id"]: row["id"] for row in rows}, VOID)
        # Segments without pixels only matter to the data check, which reports them.
        return ids, [row for row in rows if row["id"] in present]


def panoptic_rows(
    file: CocoFile,
    maps: FileList,
    labels: Mapping[int, int | None],
    problems: ProblemList,
    crowds_are_objects: bool = False,
) -> list[dict[str, Any]]:
    """One row for each image with a panoptic annotation, in the file's order; `maps` are the PNGs that it names."""
    annotated: dict[Any, dict[str, Any]] = {}
    missing: dict[Any, str] = {}
    for index, entry in enumerate(file.annotations):
        image_id = known_image_id(entry, file.images, file.left_out) if isinstance(entry, dict) else None
        if image_id in file.left_out:
            continue  # its image was reported
        item = f"image {shown(entry.get('image_id'))}" if isinstance(entry, dict) else f"annotations[{index}]"
        if image_id is None:
            problems.error(file.name, item, f"annotations[{index}] is for an image that `images` lacks; remove it")
        elif image_id in annotated:
            problems.error(file.name, item, "the image has two panoptic annotations; keep one")
        else:
            try:
                location = find_named(maps, entry.get("file_name"), f"{file.name}: {item}")
            except ValueError as error:
                missing[image_id] = str(error).removeprefix(f"{file.name}: {item}: ")
                continue
            segments = _segments(entry, file.name, item, labels, problems, crowds_are_objects)
            annotated[image_id] = {"segment_map": [location], "segments": segments}
    report_missing(file.name, missing, len(file.images), "panoptic PNGs cannot be found", problems)
    rows = []
    for image_id in file.images:
        if image_id in annotated:
            rows.append({"image": file.locations[image_id], "image_id": image_id, **annotated[image_id]})
        elif image_id not in missing:
            problems.warn(file.name, f"image {shown(image_id)}", "the image has no panoptic annotation; it is left out")
    return rows


def _segments(
    entry: Mapping[str, Any],
    name: str,
    item: str,
    labels: Mapping[int, int | None],
    problems: ProblemList,
    crowds_are_objects: bool,
) -> Segments:
    rows: Segments = []
    seen: set[int] = set()
    infos = entry.get("segments_info")
    if not isinstance(infos, list):
        problems.error(name, item, "the annotation has no list segments_info; is this an instance file?")
        return rows
    for info in infos:
        segment_id = info.get("id") if isinstance(info, dict) else None
        if type(segment_id) is not int:
            segment_id = whole_number(segment_id) or segment_id
        if type(segment_id) is not int or not 0 < segment_id <= _LARGEST_ID:
            message = f"a segment's id is a whole number from 1 to {_LARGEST_ID}, as 0 is void"
            problems.error(name, _where(item, segment_id), message)
        elif segment_id in seen:
            problems.error(name, _where(item, segment_id), "two segments of the image have this id")
        else:
            try:
                label_id = category_label(info, labels)
            except KeyError:
                message = f"category {shown(info.get('category_id'))} is not in the list of categories"
                problems.error(name, _where(item, segment_id), message)
            else:
                is_crowd = info.get("iscrowd", 0)
                # Of a million segments nearly all have 0 or 1 here, and need no words about where they are.
                if type(is_crowd) is not int or is_crowd not in (0, 1):
                    is_crowd = crowd_flag(info, name, _where(item, segment_id), problems)
                if label_id is not None and label_id != VOID:
                    is_crowd = bool(is_crowd) and not crowds_are_objects
                    rows.append({"id": segment_id, "label_id": label_id, "is_crowd": is_crowd})
        if isinstance(segment_id, int):
            seen.add(segment_id)
    return rows


def _where(item: str, segment_id: Any) -> str:
    return f"{item}, segment {shown(segment_id)}"
