"""Matching of predicted with true instances in one picture, by the rules of pycocotools, COCO's evaluator.

`instance_records` compares the masks of a picture and returns one record for every prediction and reference:
all that average precision needs, without a mask. `MaskAveragePrecision` (sibling module) accumulates the records.

A prediction may match a reference of its class whose IoU reaches a threshold. In order of falling score, each takes the
free reference of highest IoU. References that do not count (crowds, and those outside a range of areas) are taken only
where no other is left; what matches them does not count either, and crowds may be taken any number of times.

n predictions and m references of one class, T IoU thresholds, A ranges of areas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from .instance_masks import InstanceMasks, instance_masks

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_LARGEST = 1e5**2
# COCO's ranges of areas in pixels, both ends included.
AREA_RANGES = {
    "all": (0.0, _LARGEST),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, _LARGEST),
}
MAX_DETECTIONS = 100  # of one class in one picture

# (n, m) overlaps of predicted and true RLE masks, given which (m,) are crowds.
Overlap = Callable[[list[dict[str, Any]], list[dict[str, Any]], np.ndarray], np.ndarray]


def mask_overlap(predicted: list[dict[str, Any]], true: list[dict[str, Any]], is_crowd: np.ndarray) -> np.ndarray:
    """(n, m) IoU of RLE masks; with a crowd, the share of the prediction that lies on it."""
    return np.asarray(coco_masks.iou(predicted, true, is_crowd.astype(np.uint8)))


def no_records() -> dict[str, np.ndarray]:
    """Records of no picture, see `instance_records`."""
    packed = -(-len(AREA_RANGES) * len(IOU_THRESHOLDS) // 8)
    return {
        "prediction_label": np.zeros(0, np.int64),
        "prediction_score": np.zeros(0, np.float64),
        "prediction_image": np.zeros(0, np.int64),
        "prediction_rank": np.zeros(0, np.int64),
        "prediction_matched": np.zeros((0, packed), np.uint8),
        "prediction_ignored": np.zeros((0, packed), np.uint8),
        "reference_label": np.zeros(0, np.int64),
        "reference_counts": np.zeros((0, len(AREA_RANGES)), bool),
    }


def instance_records(
    prediction: Mapping[str, Any],
    reference: Mapping[str, Any],
    num_labels: int,
    image_order: int = 0,
    name: str = "the image",
    overlap: Overlap = mask_overlap,
) -> dict[str, np.ndarray]:
    """Compare the masks of one picture; the first arguments are described at `MaskAveragePrecision`.

    Returns:
        For each prediction that counts its `label`, `score`, `image` (the given order), `rank` among those of its
        class, and whether it is `matched` and `ignored` for every range of areas and threshold, (A, T) packed into
        bits; for each reference its `label` and whether it `counts` in every range of areas.

    Raises:
        ValueError: see `instance_masks`, or the two sides have masks of different sizes.
    """
    predicted = instance_masks(prediction, num_labels, f"{name}, prediction", is_reference=False)
    true = instance_masks(reference, num_labels, f"{name}, reference", is_reference=True)
    if predicted.size and true.size and predicted.size != true.size:
        raise ValueError(
            f"{name}: the prediction has (height, width) {predicted.size} but the reference {true.size}; pass "
            "target_sizes= to the post-processing"
        )
    records = no_records()
    is_outside_true, is_outside_predicted = _outside(true.areas), _outside(predicted.areas)
    ignored_references = is_outside_true | true.is_crowd[:, None]
    order = np.argsort(-predicted.scores, kind="stable")
    kept, ranks, matches, ignores = [], [], [], []
    for label in np.unique(predicted.labels):
        columns = np.flatnonzero(true.labels == label)
        rows = order[predicted.labels[order] == label][:MAX_DETECTIONS]
        shape = (len(rows), len(AREA_RANGES), len(IOU_THRESHOLDS))
        matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        if len(columns):
            overlaps = overlap(_pick(predicted, rows), _pick(true, columns), true.is_crowd[columns])
            _match(overlaps, ignored_references[columns].T, true.is_crowd[columns], matched, ignored)
        ignored |= ~matched & is_outside_predicted[rows][:, :, None]
        kept.append(rows)
        ranks.append(np.arange(len(rows)))
        matches.append(matched.reshape(len(rows), -1))
        ignores.append(ignored.reshape(len(rows), -1))
    if kept:
        rows = np.concatenate(kept)
        records |= {
            "prediction_label": predicted.labels[rows],
            "prediction_score": predicted.scores[rows],
            "prediction_image": np.full(len(rows), image_order, np.int64),
            "prediction_rank": np.concatenate(ranks),
            "prediction_matched": np.packbits(np.concatenate(matches), axis=1),
            "prediction_ignored": np.packbits(np.concatenate(ignores), axis=1),
        }
    return records | {"reference_label": true.labels, "reference_counts": ~ignored_references}


def unpack(bits: np.ndarray) -> np.ndarray:
    """(n, A, T) bool of packed `matched` or `ignored`."""
    shape = (len(bits), len(AREA_RANGES), len(IOU_THRESHOLDS))
    return np.unpackbits(bits, axis=1, count=shape[1] * shape[2]).astype(bool).reshape(shape)


def _outside(areas: np.ndarray) -> np.ndarray:
    """(n, A) bool: the area is outside the range."""
    low, high = np.array(list(AREA_RANGES.values())).T
    return (areas[:, None] < low) | (areas[:, None] > high)


def _pick(masks: InstanceMasks, rows: np.ndarray) -> list[dict[str, Any]]:
    return [masks.rles[row] for row in rows]


def _match(
    overlaps: np.ndarray, is_ignored: np.ndarray, is_crowd: np.ndarray, matched: np.ndarray, ignored: np.ndarray
) -> None:
    """Fill `matched` and `ignored` (n, A, T) from overlaps (n, m), ignored references (A, m) and crowds (m,)."""
    reaches = overlaps[:, None, :] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]  # (n, T, m)
    candidates = reaches[:, 0]
    if candidates.sum(1).max() <= 1 and candidates[:, ~is_crowd].sum(0).max(initial=0) <= 1:
        # No two compete, as mostly: everyone takes what it reaches.
        for row, column in zip(*np.nonzero(candidates), strict=True):
            matched[row] = reaches[row, :, column]
            ignored[row] = matched[row] & is_ignored[:, column, None]
        return
    num_references = len(is_crowd)
    is_free = np.ones((len(is_ignored), len(IOU_THRESHOLDS), num_references), bool)
    for row in np.flatnonzero(candidates.any(1)):
        possible = reaches[row] & is_free
        counted = possible & ~is_ignored[:, None]
        possible = np.where(counted.any(-1, keepdims=True), counted, possible)
        # Of equal overlaps the last wins, as in pycocotools.
        best = num_references - 1 - np.where(possible, overlaps[row], -1.0)[..., ::-1].argmax(-1)
        found = possible.any(-1)
        matched[row] = found
        ignored[row] = found & np.take_along_axis(is_ignored, best, 1)
        area, threshold = np.nonzero(found & ~is_crowd[best])
        is_free[area, threshold, best[area, threshold]] = False
