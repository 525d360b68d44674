"""Average precision (AP) of instance segmentation, equal to COCO's evaluator (pycocotools).

`MaskAveragePrecision` accumulates records of matches over batches and processes; `average_precision_from_records` turns
them into the result; `instance_records` makes those of an image. Masks are compared once, when they are added, and not
kept: a record takes some 40 bytes. C classes, n predictions and m references of one class, T IoU thresholds, A ranges
of areas, R recall levels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from .accumulation import ImageMetric, require_same_size
from .instance_masks import InstanceMasks, check_rles_together, instance_masks

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_LARGEST = 1e5**2  # pixels; COCO's stand-in for infinity
# COCO's ranges of areas in pixels, both ends included.
AREA_RANGES = {
    "all": (0.0, _LARGEST),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, _LARGEST),
}
MAX_DETECTIONS = 100  # of one class in one image, as in COCO

logger = logging.getLogger(__name__)

# (n, m) overlaps of predicted and true RLE masks, given which (m,) are crowds.
Overlap = Callable[[list[dict[str, Any]], list[dict[str, Any]], np.ndarray], np.ndarray]


def mask_overlap(predicted: list[dict[str, Any]], true: list[dict[str, Any]], is_crowd: np.ndarray) -> np.ndarray:
    """(n, m) IoU of RLE masks; with a crowd, the share of the prediction that lies on it."""
    return np.asarray(coco_masks.iou(predicted, true, is_crowd.astype(np.uint8)))


def no_records() -> dict[str, np.ndarray]:
    """Records of no image, see `instance_records`."""
    # Packed into bits: the flags for every range and threshold would else be most of a record.
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
        "cut": np.zeros((0, 2), np.int64),
    }


def instance_records(
    prediction: Mapping[str, Any],
    reference: Mapping[str, Any],
    num_labels: int,
    image_order: int = 0,
    name: str = "the image",
    overlap: Overlap = mask_overlap,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, np.ndarray]:
    """Compare the masks of one image; the first arguments are described at `MaskAveragePrecision`.

    Returns:
        For each prediction that counts its `label`, `score`, `image` (`image_order`), `rank` in its class, and whether
        it is `matched` and `ignored` for every range of areas and threshold, (A, T) packed into bits; for each
        reference its `label` and whether it `counts` in every range of areas; and `cut`, for each class with more than
        `max_detections` predictions or references how many of both are beyond.
    """
    predicted = instance_masks(prediction, num_labels, f"{name}, prediction", is_reference=False)
    true = instance_masks(reference, num_labels, f"{name}, reference", is_reference=True)
    if predicted.size and true.size:
        require_same_size(predicted.size, true.size, name)
    records = no_records()
    is_outside_true, is_outside_predicted = _outside(true.areas), _outside(predicted.areas)
    ignored_references = is_outside_true | true.is_crowd[:, None]
    order = np.argsort(-predicted.scores, kind="stable")
    kept, ranks, matches, ignores = [], [], [], []
    cut = []
    for label in np.union1d(predicted.labels, true.labels):
        numbers = (predicted.labels == label).sum(), ((true.labels == label) & ~true.is_crowd).sum()
        if max(numbers) > max_detections:
            cut.append([max(0, number - max_detections) for number in numbers])
    if cut:
        records["cut"] = np.array(cut, np.int64)
    for label in np.unique(predicted.labels):
        columns = np.flatnonzero(true.labels == label)
        rows = order[predicted.labels[order] == label][:max_detections]
        shape = (len(rows), len(AREA_RANGES), len(IOU_THRESHOLDS))
        matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        if len(columns):
            overlaps = overlap(_pick(predicted, rows), _pick(true, columns), true.is_crowd[columns])
            _match(overlaps, ignored_references[columns].T, true.is_crowd[columns], matched, ignored)
        # A false positive outside the range is no error there; a match is judged by its reference alone.
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
    """Fill `matched` and `ignored` (n, A, T) from overlaps (n, m), ignored references (A, m) and crowds (m,).

    By falling score, each prediction takes the free reference of its class with the highest IoU that reaches the
    threshold. References that do not count (crowds, areas outside the range) are taken only if no other is left, and
    what matches them does not count either; a crowd may be taken any number of times.
    """
    reaches = overlaps[:, None, :] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]  # (n, T, m)
    candidates = reaches[:, 0]
    if candidates.sum(1).max() <= 1 and candidates[:, ~is_crowd].sum(0).max(initial=0) <= 1:
        # The common case: no two predictions compete for a reference, so each takes what it reaches.
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


RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
FEWER_DETECTIONS = (1, 10)  # recall is also reported for so many predictions of a class in an image


class MaskAveragePrecision(ImageMetric):
    """Average precision of masks over a data set.

    A prediction is what `post_process_instance_segmentation` returns: `segmentation`, which is masks (n, H, W)
    (`return_binary_maps=True`), a list of n COCO RLEs (`return_coco_annotation=True`) or, where masks do not overlap,
    an id map (H, W); and `segments_info`, n rows with `label_id` and `score` (and `id`, for an id map). A reference is
    the same with `is_crowd` (absent means False) and `area` (absent means the mask's own) instead of a score.

    Args:
        max_detections: predictions of a class in an image that count, the best ones; 100 is COCO's rule.
    """

    overlap: Overlap = staticmethod(mask_overlap)
    _max_unsummed = 2**31  # a sum is a copy of all records

    def __init__(self, num_labels: int, max_detections: int = MAX_DETECTIONS) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}; give a number of at least 1, such as 300")
        self.num_labels, self.max_detections = num_labels, max_detections
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far; see `average_precision_from_records`."""
        if len(self.counts["cut"]):
            _warn_once(self.max_detections)
        chosen = self.chosen(self.num_labels)
        return average_precision_from_records(self.counts, self.num_labels, self.max_detections, chosen)

    def _prepared(self, sides: Sequence[Any]) -> Sequence[Any]:
        return check_rles_together(sides)

    def _no_counts(self) -> dict[str, np.ndarray]:
        return no_records()

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        order = _order(image_id)
        arguments = self.num_labels, order, name, self.overlap, self.max_detections
        return instance_records(prediction, reference, *arguments)

    def _sum(self, counts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([each[name] for each in counts]) for name in counts[0]}


def cut_note(records: Mapping[str, np.ndarray], max_detections: int) -> str:
    """What the limit on the predictions of a class in an image leaves out, and the remedy; "" if nothing."""
    cut = records["cut"]
    if not len(cut):
        return ""
    predictions, references = cut.sum(0).tolist()
    return (
        f"only the best {max_detections} predictions of a class in an image count, which leaves out {predictions} "
        f"predictions, and makes {references} true objects impossible to find; to score all, raise the limit "
        "(max_detections=, or --max-detections of hf-segvit evaluate)"
    )


@lru_cache(maxsize=64)
def _warn_once(max_detections: int) -> None:
    # Once a process and without numbers, as a metric may be computed after every epoch; `cut_note` has the numbers.
    logger.warning(
        f"some images have more than {max_detections} objects or predictions of a class, and only the best "
        f"{max_detections} count; raise max_detections= (--max-detections of hf-segvit evaluate) to score all"
    )


def average_precision_from_records(
    records: dict[str, np.ndarray],
    num_labels: int,
    max_detections: int = MAX_DETECTIONS,
    classes: np.ndarray | None = None,
) -> dict[str, Any]:
    """Average precision and recall from the records of `instance_records`, of the label ids `classes` or of all.

    Returns:
        `ap` (mean over IoU 0.50 to 0.95), `ap_50`, `ap_75`, `ap_small`, `ap_medium`, `ap_large`, and the recalls
        `ar_1`, `ar_10`, `ar_100` (or another `max_detections`), `ar_small`, `ar_medium`, `ar_large`, in [0, 1]: means
        over the `num_classes` classes with a reference that counts, NaN if there is none (pycocotools says -1).
        `per_class` by label id: `ap`, `ap_50`, `ap_75`, `ar_100`, and the numbers `references` (that count) and
        `predictions`.
    """
    precision = np.full((num_labels, len(AREA_RANGES), len(IOU_THRESHOLDS)), np.nan)
    limits = (*(limit for limit in FEWER_DETECTIONS if limit < max_detections), max_detections)
    recall = np.full((num_labels, len(limits), len(AREA_RANGES), len(IOU_THRESHOLDS)), np.nan)
    # Ties in score are broken by image id, so that the result does not depend on which process saw an image.
    order = np.lexsort((records["prediction_rank"], records["prediction_image"], -records["prediction_score"]))
    labels = records["prediction_label"][order]
    num_references = np.zeros((num_labels, len(AREA_RANGES)), np.int64)
    np.add.at(num_references, records["reference_label"], records["reference_counts"])
    chosen = np.arange(num_labels) if classes is None else classes
    num_references[np.isin(np.arange(num_labels), chosen, invert=True)] = 0  # as if they occurred nowhere
    for label in np.flatnonzero(num_references[:, 0]):
        rows = order[labels == label]
        matched, ignored = unpack(records["prediction_matched"][rows]), unpack(records["prediction_ignored"][rows])
        true_positive, false_positive = matched & ~ignored, ~matched & ~ignored
        totals = num_references[label][:, None]
        exists = totals[:, 0] > 0
        precision[label, exists] = _mean_precision(true_positive[:, exists], false_positive[:, exists], totals[exists])
        for index, limit in enumerate(limits):
            num_found = true_positive[records["prediction_rank"][rows] < limit].sum(0)
            recall[label, index, exists] = num_found[exists] / totals[exists]

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
            f"ar_{max_detections}": _mean(recall[label, -1, 0]),
            "references": int(num_references[label, 0]),
            "predictions": int(num_predictions[label]),
        }
        for label in chosen.tolist()
    }
    return result


def _mean_precision(true_positive: np.ndarray, false_positive: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(A, T) precision averaged over recall levels, from (n, A, T) flags by falling score and (A, 1) totals."""
    num_predictions, num_areas, num_thresholds = true_positive.shape
    if not num_predictions:
        return np.zeros((num_areas, num_thresholds))
    found = true_positive.cumsum(0, dtype=np.float64)
    precision = found / (false_positive.cumsum(0, dtype=np.float64) + found + np.spacing(1))  # pycocotools' own epsilon
    # Precision at a recall is the best at that recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = found / totals
    sums = np.zeros((num_areas, num_thresholds))
    for area in range(num_areas):
        for threshold in range(num_thresholds):
            index = np.searchsorted(recall[:, area, threshold], RECALL_LEVELS, side="left")
            # Recall levels that are never reached have precision 0.
            sums[area, threshold] = precision[index[index < num_predictions], area, threshold].sum()
    return sums / len(RECALL_LEVELS)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _order(image_id: Hashable) -> int:
    """A number that orders images alike in every process: an integer id itself, a digest of any other."""
    if isinstance(image_id, int | np.integer) and abs(int(image_id)) < 2**63:
        return int(image_id)
    # Not hash(), which differs from process to process.
    digest = hashlib.blake2b(str(image_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # fits int64
