"""Average precision (AP) of instance segmentation over a data set, equal to pycocotools', COCO's evaluator.

`MaskAveragePrecision` accumulates records of matches (never masks) over batches and processes;
`average_precision_from_records` turns them into the result. Masks are compared once, when they are added, with
pycocotools' own IoU; a record takes some 40 bytes, so that a data set of any size fits.

C classes, n predictions of a class, T IoU thresholds, A ranges of areas, R recall levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .accumulation import ImageMetric
from .instance_masks import check_rles_together
from .instance_matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    Overlap,
    instance_records,
    mask_overlap,
    no_records,
    unpack,
)

RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
FEWER_DETECTIONS = (1, 10)  # recall is also reported for so many predictions of a class in a picture


class MaskAveragePrecision(ImageMetric):
    """Average precision of masks over a data set: feed batches, merge processes, compute.

    A prediction is what `post_process_instance_segmentation` returns: `segmentation`, which is masks (n, H, W)
    (`return_binary_maps=True`), a list of n COCO RLEs (`return_coco_annotation=True`) or, where masks do not overlap,
    an id map (H, W); and `segments_info`, n rows with `label_id` and `score` (and `id`, for an id map). A reference is
    the same with `is_crowd` in its rows (absent means False) and, instead of a score, `area` (absent means the mask's
    own; COCO's annotations have the polygon's, which decides between small, medium and large).

    Args:
        num_labels: number of classes; label ids are 0 .. num_labels - 1.

    Raises:
        ValueError: `num_labels` is not positive.
    """

    overlap: Overlap = staticmethod(mask_overlap)
    _max_parts = 2**31  # a sum is a copy of all records

    def __init__(self, num_labels: int) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        self.num_labels = num_labels
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far; see `average_precision_from_records`. Nothing is reset."""
        return average_precision_from_records(self.counts, self.num_labels)

    def _prepared(self, sides: Sequence[Any]) -> Sequence[Any]:
        return check_rles_together(sides)

    def _no_counts(self) -> dict[str, np.ndarray]:
        return no_records()

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        order = _order(image_id)
        return instance_records(prediction, reference, self.num_labels, order, name, self.overlap)

    def _sum(self, books: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([book[name] for book in books]) for name in books[0]}


def average_precision_from_records(records: dict[str, np.ndarray], num_labels: int) -> dict[str, Any]:
    """Average precision and recall from records of matches.

    Args:
        records: see `instance_records`.
        num_labels: number of classes.

    Returns:
        `ap` (mean over IoU 0.50 to 0.95), `ap_50`, `ap_75`, `ap_small`, `ap_medium`, `ap_large`, and the recalls
        `ar_1`, `ar_10`, `ar_100`, `ar_small`, `ar_medium`, `ar_large`, in [0, 1]: means over the classes that have a
        reference that counts, NaN where none has (pycocotools says -1). `num_classes` is the number of those classes.
        `per_class` maps every label id to its `ap`, `ap_50`, `ap_75`, `ar_100`, and the numbers `references` (that
        count) and `predictions`.
    """
    precision = np.full((num_labels, len(AREA_RANGES), len(IOU_THRESHOLDS)), np.nan)
    limits = (*FEWER_DETECTIONS, MAX_DETECTIONS)
    recall = np.full((num_labels, len(limits), len(AREA_RANGES), len(IOU_THRESHOLDS)), np.nan)
    # Exact ties in score fall in the order of image ids, whatever process saw them.
    order = np.lexsort((records["prediction_rank"], records["prediction_image"], -records["prediction_score"]))
    labels = records["prediction_label"][order]
    num_references = np.zeros((num_labels, len(AREA_RANGES)), np.int64)
    np.add.at(num_references, records["reference_label"], records["reference_counts"])
    for label in np.flatnonzero(num_references[:, 0]):
        rows = order[labels == label]
        matched, ignored = unpack(records["prediction_matched"][rows]), unpack(records["prediction_ignored"][rows])
        true_positive, false_positive = matched & ~ignored, ~matched & ~ignored
        totals = num_references[label][:, None]
        exists = totals[:, 0] > 0
        precision[label, exists] = _mean_precision(true_positive[:, exists], false_positive[:, exists], totals[exists])
        for index, limit in enumerate(limits):
            found = true_positive[records["prediction_rank"][rows] < limit].sum(0)
            recall[label, index, exists] = found[exists] / totals[exists]

    all_areas = precision[:, 0]
    # IoU 0.50 is the first threshold and 0.75 the sixth.
    result: dict[str, Any] = {"ap": _mean(all_areas), "ap_50": _mean(all_areas[:, 0]), "ap_75": _mean(all_areas[:, 5])}
    result |= {f"ap_{area}": _mean(precision[:, index]) for index, area in enumerate(AREA_RANGES) if index}
    result |= {f"ar_{limit}": _mean(recall[:, index, 0]) for index, limit in enumerate(limits)}
    result |= {f"ar_{area}": _mean(recall[:, -1, index]) for index, area in enumerate(AREA_RANGES) if index}
    num_predictions = np.bincount(labels, minlength=num_labels)
    result["num_classes"] = int((num_references[:, 0] > 0).sum())
    result["per_class"] = {
        label: {
            "ap": _mean(all_areas[label]),
            "ap_50": float(all_areas[label, 0]),
            "ap_75": float(all_areas[label, 5]),
            f"ar_{MAX_DETECTIONS}": _mean(recall[label, -1, 0]),
            "references": int(num_references[label, 0]),
            "predictions": int(num_predictions[label]),
        }
        for label in range(num_labels)
    }
    return result


def _mean_precision(true_positive: np.ndarray, false_positive: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(A, T) precision, averaged over recall levels, of (n, A, T) flags in falling order of score and (A, 1) totals."""
    num_predictions, num_areas, num_thresholds = true_positive.shape
    if not num_predictions:
        return np.zeros((num_areas, num_thresholds))
    found = true_positive.cumsum(0, dtype=np.float64)
    precision = found / (false_positive.cumsum(0, dtype=np.float64) + found + np.spacing(1))
    # Precision at a recall is the best at that recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = found / totals
    sums = np.zeros((num_areas, num_thresholds))
    for area in range(num_areas):
        for threshold in range(num_thresholds):
            place = np.searchsorted(recall[:, area, threshold], RECALL_LEVELS, side="left")
            sums[area, threshold] = precision[place[place < num_predictions], area, threshold].sum()
    return sums / len(RECALL_LEVELS)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _order(image_id: Hashable) -> int:
    """A number that orders pictures alike in every process: an integer id itself, of others a digest."""
    if isinstance(image_id, int | np.integer) and abs(int(image_id)) < 2**63:
        return int(image_id)
    digest = hashlib.blake2b(str(image_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
