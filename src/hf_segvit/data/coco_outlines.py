"""COCO instance annotations: polygons or run-length masks, which may overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..models.image_claims import max_image_pixels
from .annotation_values import is_id, plain_number, plain_numbers, shown, whole_number
from .archives import parse_json
from .coco_files import CocoFile, category_label, crowd_flag, known_image_id
from .mask_files import compressed_counts, polygon_fault, rle_fault
from .problems import ProblemList


def instance_rows(
    file: CocoFile, labels: Mapping[int, int | None], problems: ProblemList, crowds_are_objects: bool = False
) -> list[dict[str, Any]]:
    """One row for each image, in the file's order.

    Args:
        labels: label ids by category id, `VOID` for void; annotations of a category with `None` are left out.
    """
    segments: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in file.images}
    seen: set[Any] = set()
    as_text: list[str] = []  # annotations with numbers stored as text
    for index, entry in enumerate(file.annotations):
        annotation_id = entry.get("id") if isinstance(entry, dict) else None
        item = f"annotation {shown(annotation_id)}" if annotation_id is not None else f"annotations[{index}]"
        if type(annotation_id) is not int:
            annotation_id = whole_number(annotation_id)
        if not isinstance(entry, dict) or annotation_id is None or not is_id(annotation_id):
            problems.error(file.name, item, "the annotation has no whole number as id")
            continue
        if annotation_id in seen:
            problems.error(file.name, item, "two annotations have this id; number them differently")
            continue
        seen.add(annotation_id)
        image_id = entry.get("image_id")
        if not is_id(image_id) or image_id not in segments:
            image_id = known_image_id(entry, segments, file.left_out)
        if image_id in file.left_out:
            continue  # its image was reported
        if image_id is None:
            problems.error(
                file.name, item, f"it is for image {shown(entry.get('image_id'))}, which `images` lacks; remove it"
            )
            continue
        try:
            label_id = category_label(entry, labels)
        except KeyError:
            problems.error(
                file.name, item, f"category {shown(entry.get('category_id'))} is not in the list of categories"
            )
            continue
        if label_id is None:
            continue
        image = file.images[image_id]
        # Checked here, so that training does not stop at a faulty outline after hours; masks are drawn on demand.
        outline = _outline(entry, (image["height"], image["width"]), file.name, item, problems, as_text)
        if outline is not None:
            is_crowd = crowd_flag(entry, file.name, item, problems) and not crowds_are_objects
            segments[image_id].append({"id": annotation_id, "label_id": label_id, "is_crowd": is_crowd, **outline})
    if as_text:
        message = "numbers are stored as text, and were read as numbers"
        rest = f" (and in {len(as_text) - 1} more annotations)" if len(as_text) > 1 else ""
        problems.warn(file.name, as_text[0], message + rest)
    # Images without annotations are kept: they teach the model what is not an object.
    return [
        {"image": file.locations[image_id], "image_id": image_id, "segment_map": [], "segments": segments[image_id]}
        for image_id in file.images
    ]


def _outline(
    entry: Mapping[str, Any],
    size: tuple[int, int],
    name: str,
    item: str,
    problems: ProblemList,
    as_text: list[str],
) -> dict[str, Any] | None:
    """`polygons`, `rle` and `area` of an annotation, or `None` if it cannot be drawn."""
    has_text = _check_box(entry, name, item, problems)
    area = entry.get("area")
    if isinstance(area, str):
        has_text, area = True, plain_number(area)
    area = _stated_area(entry if area is None else {"area": area}, name, item, problems)
    outline = entry.get("segmentation")
    if isinstance(outline, str):
        try:
            has_text, outline = True, parse_json(outline, item)
        except ValueError:
            problems.error(name, item, "its segmentation is a text; it must be polygons (lists of numbers) or RLE")
            return None
    polygons: list[Any] | None = None
    rle: dict[str, Any] = {"size": list(size), "counts": None}
    if isinstance(outline, list) and outline:
        if isinstance(outline[0], int | float | str):
            problems.warn(name, item, "segmentation is one flat polygon; read as a list of one")
            outline = [outline]
        polygons = []
        for polygon in outline:
            numbers = polygon
            try:
                sum(polygon)  # the fastest way to see that a list holds numbers alone
                if bool in map(type, polygon):  # true and false are numbers to Python
                    raise TypeError
            except TypeError:
                numbers = plain_numbers(polygon)
                if numbers is polygon:
                    problems.error(name, item, f"{_no_number(polygon)}; correct or remove the annotation")
                    return None
                has_text = True
            if fault := polygon_fault(numbers, size):
                problems.error(name, item, f"{fault}; correct or remove the annotation")
                return None
            polygons.append(numbers)
    elif isinstance(outline, dict):
        counts = outline.get("counts")
        if isinstance(counts, list) and str in map(type, counts):
            has_text, outline = True, {**outline, "counts": plain_numbers(counts)}
        if isinstance(outline.get("size"), list) and str in map(type, outline["size"]):
            has_text, outline = True, {**outline, "size": plain_numbers(outline["size"])}
        if fault := rle_fault(outline, size):
            problems.error(name, item, f"{fault}; correct or remove the annotation")
            return None
        rle["counts"] = compressed_counts(outline["counts"])
    else:
        problems.error(
            name, item, "it has no segmentation (polygons or RLE), only a box; draw its outline, or leave it out"
        )
        return None
    if has_text:
        as_text.append(item)
    return {"polygons": polygons, "rle": rle, "area": area}


def _no_number(polygon: Any) -> str:
    """What in a polygon is no number."""
    if isinstance(polygon, list):
        for value in polygon:
            if plain_number(value) is None and not isinstance(value, list | dict):
                return f"a polygon with {shown(value)}, which is no number"
    return "a polygon is a flat list of numbers x, y, x, y, ..."


def _check_box(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> bool:
    """Warn of a box that is none; returns whether its numbers are stored as text."""
    # Boxes are not used, but a wrong one is a sign that the export went wrong.
    box = entry.get("bbox")
    if box is None:
        return False
    if _is_box(box):
        return False
    numbers = plain_numbers(box)
    if numbers is not box and _is_box(numbers):
        return True
    problems.warn(name, item, f"bbox {shown(box)} is no box; it is not used")
    return False


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    try:
        # A sum is finite only if all its numbers are, and fails on anything else: one call for each of a million boxes.
        return math.isfinite(sum(box)) and box[2] >= 0 and box[3] >= 0
    except (TypeError, OverflowError):
        return False


def _stated_area(entry: Mapping[str, Any], name: str, item: str, problems: ProblemList) -> float | None:
    """The annotation's `area` in pixels, or None to use that of its mask."""
    # COCO's evaluator tells small from large objects by this field, not by the mask.
    area = entry.get("area")
    if area is None or (isinstance(area, int | float) and 0 < area <= max_image_pixels()):
        return None if area is None else float(area)
    problems.warn(name, item, f"area is {shown(area)}; the mask's own is used")
    return None
