"""Answers of image processors, ours and those of Transformers, in one form.

`renumbered` and `encoded` bring those of Transformers to ours, of which `as_segmented_image` makes a `SegmentedImage`.
H W pixels of the image as it was given, upright.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from ..models.mask_encoding import decode_mask, encode_mask
from .segmented_image import Segment, SegmentedImage


def as_segmented_image(
    answer: Any, task: str, size: tuple[int, int], id2label: dict[int, str], limit: int | None = None
) -> SegmentedImage:
    """The answer for an image of size (H, W), with areas and boxes; `limit` is the most segments that it may have."""
    rows: Sequence[Mapping[str, Any]] = () if task == "semantic" else answer["segments_info"]
    rles: list[Any] = [None] * len(rows)
    # As in files, where 0 is void; in semantic maps classes count from 0.
    first = 0 if task == "semantic" else 1
    if task == "instance":
        rles, segment_map = answer["segmentation"], np.full(size, -1, dtype=np.int32)
        measures = {}
        for row, rle in sorted(zip(rows, rles, strict=True), key=lambda pair: pair[0]["score"]):
            mask = decode_mask(rle)
            segment_map[mask] = row["id"] + first  # by rising score, so that the best lies on top
            measures[row["id"] + first] = _areas_and_boxes(mask.astype(np.int32) - 1)[0]
    elif task == "semantic":
        segment_map = answer.int().numpy()
        measures = _areas_and_boxes(segment_map)
        rows, rles = [{"id": label, "label_id": label, "score": None} for label in measures], [None] * len(measures)
    else:
        segment_map = answer["segmentation"].numpy()
        measures = {id_ + first: measure for id_, measure in _areas_and_boxes(segment_map).items()}
        segment_map = np.where(segment_map < 0, np.int32(-1), segment_map + np.int32(first))
    segments = [
        Segment(
            row["id"] + first,
            row["label_id"],
            id2label[row["label_id"]],
            row["score"],
            *measures[row["id"] + first],
            rle,
        )
        for row, rle in zip(rows, rles, strict=True)
    ]
    return SegmentedImage(task, segment_map, segments, limit=limit, id2label=id2label)


def renumbered(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A panoptic answer of Transformers' processors in our form: ids from 0, void -1, one row for each segment."""
    # They write a row for every query fused into a segment, and void as 0 or -1, in float32 if all is void.
    ids = answer["segmentation"].cpu().long()
    rows: dict[int, Mapping[str, Any]] = {}
    for row in answer["segments_info"]:
        rows.setdefault(row["id"], row)
    # One table for all pixels; its first entry, for id -1, stays -1, as do ids without a row.
    new_ids = torch.full((max([*rows, int(ids.max())]) + 2,), -1, dtype=torch.int32)
    present = set(ids.unique().tolist())
    kept = [row for id_, row in rows.items() if id_ in present]
    new_ids[[row["id"] + 1 for row in kept]] = torch.arange(len(kept), dtype=torch.int32)
    return {
        "segmentation": new_ids[ids + 1],
        "segments_info": [{**row, "id": index} for index, row in enumerate(kept)],
    }


def encoded(answer: Mapping[str, Any], limit: int | None = None) -> dict[str, Any]:
    """An instance answer of Transformers' processors, its best masks in COCO's run-length encoding."""
    rows = answer["segments_info"]  # without rows, the masks are replaced by an id map
    kept = sorted(sorted(range(len(rows)), key=lambda index: -rows[index]["score"])[:limit])
    masks = [encode_mask(answer["segmentation"][index].cpu().numpy()) for index in kept]
    return {**answer, "segmentation": masks, "segments_info": [rows[index] for index in kept]}


def _areas_and_boxes(segment_map: np.ndarray) -> dict[int, tuple[int, tuple[int, int, int, int]]]:
    """Area and (x, y, width, height) of every id in a map (H, W) with void -1, in one pass."""
    areas = np.bincount(segment_map.ravel() + 1)
    return {
        segment_id: (
            int(areas[segment_id + 1]),
            (box[1].start, box[0].start, box[1].stop - box[1].start, box[0].stop - box[0].start),
        )
        for segment_id, box in enumerate(ndimage.find_objects(segment_map + 1))
        if box is not None
    }
