"""COCO's instance form: annotations with polygons or run-length masks, which may overlap.

Outlines are checked when the file is read, so that training does not stop at one in its third hour; masks are drawn
when a picture is asked for. Images without annotations are kept: they teach what is no object. An annotation's `area`
is kept, as COCO's evaluator takes it, not the mask's, to tell small from large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..models.picture_decoding import MAX_PICTURE_PIXELS
from .coco_annotations import CocoFile, crowd_flag, is_id, known_category
from .polygons import compressed_counts, polygon_fault, rle_fault
from .problems import ProblemList


def instance_rows(file: CocoFile, labels: Mapping[int, int], problems: ProblemList) -> list[dict[str, Any]]:
    """Rows of all images, in the order of `images`.

    Args:
        file: the JSON file.
        labels: label id by category id.
        problems: gets what is wrong with entries.
    """
    segments: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in file.images}
    seen: set[Any] = set()
    for place, entry in enumerate(file.annotations):
        annotation_id = entry.get("id") if isinstance(entry, dict) else None
        item = f"annotation {annotation_id!r}" if annotation_id is not None else f"annotations[{place}]"
        if not isinstance(entry, dict) or type(annotation_id) is not int or not is_id(annotation_id):
            problems.error(file.name, item, "the annotation has no whole number as id")
        elif annotation_id in seen:
            problems.error(file.name, item, "two annotations have this id; number them differently")
        elif not is_id(entry.get("image_id")) or entry["image_id"] not in segments:
            problems.error(
                file.name, item, f"it is for image {entry.get('image_id')!r}, which `images` lacks, or left out above"
            )
        elif not known_category(entry, labels):
            problems.error(file.name, item, f"category {entry.get('category_id')!r} is not in the list of categories")
        else:
            image = file.images[entry["image_id"]]
            outline = _outline(entry, (image["height"], image["width"]), file.name, item, problems)
            if outline is not None:
                segments[entry["image_id"]].append(
                    {
                        "id": annotation_id,
                        "label_id": labels[entry["category_id"]],
                        "is_crowd": crowd_flag(entry, file.name, item, problems),
                        **outline,
                    }
                )
        if isinstance(annotation_id, int):
            seen.add(annotation_id)
    return [
        {"image": file.pictures[image_id], "image_id": image_id, "segment_map": [], "segments": segments[image_id]}
        for image_id in file.images
    ]


def _outline(
    entry: Mapping[str, Any], size: tuple[int, int], name: str, item: str, problems: ProblemList
) -> dict[str, Any] | None:
    """`polygons`, `rle` and `area` of an annotation, or `None` if it cannot be drawn."""
    _check_box(entry, name, item, problems)
    area = _stated_area(entry, name, item, problems)
    outline = entry.get("segmentation")
    if isinstance(outline, list) and outline:
        if isinstance(outline[0], int | float):
            problems.warn(name, item, "segmentation is one flat polygon; read as a list of one")
            outline = [outline]
        for polygon in outline:
            if fault := polygon_fault(polygon, size):
                problems.error(name, item, f"{fault}; correct or remove the annotation")
                return None
        return {"polygons": outline, "rle": {"size": list(size), "counts": None}, "area": area}
    if isinstance(outline, dict):
        if fault := rle_fault(outline, size):
            problems.error(name, item, f"{fault}; correct or remove the annotation")
            return None
        rle = {"size": list(size), "counts": compressed_counts(outline["counts"])}
        return {"polygons": None, "rle": rle, "area": area}
    problems.error(name, item, "it has no segmentation (polygons or RLE); boxes alone cannot train masks")
    return None


def _check_box(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> None:
    # Boxes are not used; wrong ones still tell that an export went wrong.
    box = entry.get("bbox")
    if box is not None:
        plain = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
        if not plain or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            problems.warn(name, item, f"bbox {box!r} is no box; it is not used")


def _stated_area(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> float | None:
    """The annotation's `area` in pixels, which average precision sorts objects by size with; `None`: the mask's own."""
    area = entry.get("area")
    if area is None or (isinstance(area, int | float) and 0 < area <= MAX_PICTURE_PIXELS):
        return None if area is None else float(area)
    problems.warn(name, item, f"area is {area!r}; the mask's own is used")
    return None
