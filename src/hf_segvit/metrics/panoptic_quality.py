"""Panoptic quality (PQ) over a data set, equal to panopticapi's, COCO's reference evaluator.

`PanopticQuality` accumulates counts (never pictures) over batches and processes; `panoptic_quality_from_counts`
turns counts into the result. `panoptic_counts` (sibling module) scores one picture, for callers that keep their own
books: worst pictures, oracle labels. Counts are float64 arrays (C, 4): true positives, false positives, false
negatives, summed IoU of the true positives; the metric holds them as `counts["panoptic"]`. C classes.

Source of the measure: Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from .accumulation import ImageMetric
from .panoptic_counts import panoptic_counts


class PanopticQuality(ImageMetric):
    """Panoptic quality over a data set: feed batches, merge processes, compute.

    A prediction is what `post_process_panoptic_segmentation` returns: `segmentation` (H, W), a tensor or array of
    segment ids, and `segments_info`, rows with `id` and `label_id`. A reference is the same with `is_crowd` in its
    rows (absent means False). Every id in a map has a row and every row has pixels; -1 is void.

    The rules are panopticapi's. Segments of one class match where their IoU is above 0.5, counting in the union no
    pixel where the reference is void. Crowd regions never match and are never missed. An unmatched prediction is
    forgiven if more than half of it lies on void and on the crowd region of its class (the last in row order, if
    there are several).

    Args:
        num_labels: number of classes; label ids are 0 .. num_labels - 1.
        stuff_classes: label ids that are stuff, all others are things. Only the `_things` and `_stuff` averages
            depend on it.
        void_ids: ids that mean void where no row has them. Transformers' Mask2Former, MaskFormer and OneFormer
            processors write void as 0 and number segments from 1: give (-1, 0) for those.

    Raises:
        ValueError: `num_labels` is not positive, or a stuff class is not a label id.
    """

    def __init__(self, num_labels: int, stuff_classes: Iterable[int], void_ids: Sequence[int] = (-1,)) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        self.stuff_classes = sorted(set(stuff_classes))
        strangers = [label for label in self.stuff_classes if not 0 <= label < num_labels]
        if strangers:
            raise ValueError(f"stuff_classes {strangers} are not label ids; those are 0..{num_labels - 1}")
        self.num_labels = num_labels
        self.void_ids = tuple(void_ids)
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far, in [0, 1]; see `panoptic_quality_from_counts`. Nothing is reset."""
        return panoptic_quality_from_counts(self.counts["panoptic"], self.stuff_classes)

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {"panoptic": np.zeros((self.num_labels, 4))}

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        return {"panoptic": panoptic_counts(prediction, reference, self.num_labels, self.void_ids, name)}


def panoptic_quality_from_counts(counts: np.ndarray, stuff_classes: Iterable[int]) -> dict[str, Any]:
    """Panoptic quality from counts.

    Args:
        counts: (C, 4) true positives, false positives, false negatives, summed IoU of the true positives.
        stuff_classes: label ids that are stuff.

    Returns:
        `pq`, `sq`, `rq` in [0, 1] and `num_classes`, the number of classes that they average over: those that occur
        in a reference or in a false positive. The same with `_things` and `_stuff`. All three are NaN where no class
        occurs. `per_class` maps every label id to its `pq`, `sq`, `rq` (0.0 for a class that does not occur), the
        counts `tp`, `fp`, `fn` and the summed `iou`.
    """
    tp, fp, fn, iou = counts.T
    denominator = tp + 0.5 * fp + 0.5 * fn
    occurs = denominator > 0
    qualities = {
        "pq": np.divide(iou, denominator, out=np.zeros_like(iou), where=occurs),
        "sq": np.divide(iou, tp, out=np.zeros_like(iou), where=tp > 0),
        "rq": np.divide(tp, denominator, out=np.zeros_like(iou), where=occurs),
    }
    is_stuff = np.isin(np.arange(len(counts)), list(stuff_classes))
    result: dict[str, Any] = {}
    for suffix, group in (("", occurs), ("_things", occurs & ~is_stuff), ("_stuff", occurs & is_stuff)):
        for key, values in qualities.items():
            result[key + suffix] = float(values[group].mean()) if group.any() else float("nan")
        result["num_classes" + suffix] = int(group.sum())
    result["per_class"] = {
        label: {key: float(values[label]) for key, values in qualities.items()}
        | {"tp": int(tp[label]), "fp": int(fp[label]), "fn": int(fn[label]), "iou": float(iou[label])}
        for label in range(len(counts))
    }
    return result
