"""COCO's panoptic form: a JSON file with `segments_info`, and PNGs of ids in colours.

Segment ids stay those of the files. Regions of a PNG that the JSON does not list are an error when the picture is read;
segments that the JSON lists but the PNG lacks are dropped then, and told by the data check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .archives import Location, location_name
from .coco_annotations import CocoFile, crowd_flag, is_id, known_category
from .data_folder import FileList, find_named
from .decoding import Segments
from .mask_files import VOID, present_values, read_color_ids
from .problems import ProblemList

_LARGEST_ID = 2**24 - 1


@dataclass(frozen=True)
class PanopticMasks:
    """Masks of panoptic PNGs."""

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        ids = read_color_ids(maps[0])
        present = set(present_values(ids))
        if 0 in present:
            ids[ids == 0] = VOID
            present.remove(0)
        rows = segments or []
        if strangers := sorted(present - {row["id"] for row in rows}):
            raise ValueError(
                f"{location_name(maps[0])}: the PNG holds the ids {strangers[:5]}, which segments_info does not list; "
                "PNG and JSON are of different versions: get both from one source"
            )
        return ids, [row for row in rows if row["id"] in present]


def panoptic_rows(
    file: CocoFile, maps: FileList, labels: Mapping[int, int], problems: ProblemList
) -> list[dict[str, Any]]:
    """Rows of the images that have a panoptic annotation, in the order of `images`.

    Args:
        file: the JSON file.
        maps: PNG files by the names that the JSON uses.
        labels: label id by category id.
        problems: gets what is wrong with entries.
    """
    annotated: dict[Any, dict[str, Any]] = {}
    for place, entry in enumerate(file.annotations):
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        item = f"image {image_id!r}" if isinstance(entry, dict) else f"annotations[{place}]"
        if not is_id(image_id) or image_id not in file.images:
            problems.error(
                file.name, item, f"annotations[{place}] is for an image that `images` lacks, or left out above"
            )
        elif image_id in annotated:
            problems.error(file.name, item, "the image has two panoptic annotations; keep one")
        else:
            try:
                location = find_named(maps, entry.get("file_name"), f"{file.name}: {item}")
            except ValueError as error:
                problems.error(file.name, item, str(error).removeprefix(f"{file.name}: {item}: "))
                continue
            segments = _segments(entry, file.name, item, labels, problems)
            annotated[image_id] = {"segment_map": [location], "segments": segments}
    missing = [image_id for image_id in file.images if image_id not in annotated]
    for image_id in missing:
        problems.warn(file.name, f"image {image_id!r}", "the image has no panoptic annotation; it is left out")
    return [
        {"image": file.pictures[image_id], "image_id": image_id, **annotated[image_id]}
        for image_id in file.images
        if image_id in annotated
    ]


def _segments(
    entry: Mapping[str, Any], name: str, item: str, labels: Mapping[int, int], problems: ProblemList
) -> Segments:
    rows: Segments = []
    seen: set[int] = set()
    infos = entry.get("segments_info")
    if not isinstance(infos, list):
        problems.error(name, item, "the annotation has no list segments_info; is this an instance file?")
        return rows
    for info in infos:
        segment_id = info.get("id") if isinstance(info, dict) else None
        place = f"{item}, segment {segment_id!r}"
        if type(segment_id) is not int or not 0 < segment_id <= _LARGEST_ID:
            problems.error(name, place, f"a segment's id is a whole number from 1 to {_LARGEST_ID}, as 0 is void")
        elif segment_id in seen:
            problems.error(name, place, "two segments of the image have this id")
        elif not known_category(info, labels):
            problems.error(name, place, f"category {info.get('category_id')!r} is not in the list of categories")
        else:
            label_id = labels[info["category_id"]]
            rows.append({"id": segment_id, "label_id": label_id, "is_crowd": crowd_flag(info, name, place, problems)})
        if isinstance(segment_id, int):
            seen.add(segment_id)
    return rows
