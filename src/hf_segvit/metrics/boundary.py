"""Boundary IoU and boundary AP: masks compared near their outlines.

The boundary region of a mask holds its pixels at most `dilation_ratio` of the image's diagonal from its outline.
`BoundaryIoU` compares the regions of each class of label maps; `BoundaryAveragePrecision` is mask AP with the smaller
of mask IoU and boundary IoU. Source: Cheng et al., "Boundary IoU", CVPR 2021. C classes, H W pixels, n predicted and m
true masks.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from scipy import ndimage

from ..models.mask_encoding import decode_mask
from .accumulation import ImageMetric
from .mask_average_precision import IOU_THRESHOLDS, MAX_DETECTIONS, MaskAveragePrecision, mask_overlap
from .mean_iou import Absent, MeanIoU, label_maps, mean_iou_of_classes

DILATION_RATIO = 0.02  # of the diagonal; the paper's value for COCO


class BoundaryIoU(ImageMetric):
    """Boundary IoU of semantic segmentation over a data set.

    Predictions, references and other arguments are those of `MeanIoU`; pixels that are not counted belong to no region.

    Args:
        dilation_ratio: width of the regions, as a share of the image's diagonal; at least one pixel.
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int | None = 255,
        absent: Absent = "exclude",
        dilation_ratio: float = DILATION_RATIO,
    ) -> None:
        MeanIoU(num_labels, ignore_index, absent)  # only for its checks of these arguments
        _check_ratio(dilation_ratio)
        self.num_labels, self.ignore_index, self.absent = num_labels, ignore_index, absent
        self.dilation_ratio = dilation_ratio
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """`boundary_iou` in [0, 1], `absent`, `num_classes`, and `per_class` with `iou`."""
        chosen = self.chosen(self.num_labels)
        intersection, true, predicted = self.counts["boundary"][chosen].T
        mean, iou, num_classes = mean_iou_of_classes(intersection, true, predicted, self.absent)
        return {
            "boundary_iou": mean,
            "absent": self.absent,
            "num_classes": num_classes,
            "per_class": {label: {"iou": float(value)} for label, value in zip(chosen.tolist(), iou, strict=True)},
        }

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {"boundary": np.zeros((self.num_labels, 3), dtype=np.int64)}  # pixels: intersection, true, predicted

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        true, predicted = label_maps(prediction, reference, self.num_labels, self.ignore_index, name)
        # In the prediction too, so that it is not judged by the outline of void.
        predicted[true == self.num_labels] = self.num_labels
        counts = np.zeros((self.num_labels, 3), dtype=np.int64)
        for label in np.union1d(true, predicted).tolist():
            if label < self.num_labels:
                regions = [boundary_region(labels == label, self.dilation_ratio) for labels in (true, predicted)]
                counts[label] = (regions[0] & regions[1]).sum(), regions[0].sum(), regions[1].sum()
        return {"boundary": counts}


class BoundaryAveragePrecision(MaskAveragePrecision):
    """Boundary AP over a data set, used like `MaskAveragePrecision`; `dilation_ratio` as for `BoundaryIoU`."""

    def __init__(
        self, num_labels: int, dilation_ratio: float = DILATION_RATIO, max_detections: int = MAX_DETECTIONS
    ) -> None:
        _check_ratio(dilation_ratio)
        self.dilation_ratio = dilation_ratio
        super().__init__(num_labels, max_detections)

    def overlap(self, predicted: list[dict[str, Any]], true: list[dict[str, Any]], is_crowd: np.ndarray) -> np.ndarray:
        """(n, m) smaller of mask IoU and boundary IoU, exact where it can reach a threshold; mask IoU for crowds."""
        overlaps = mask_overlap(predicted, true, is_crowd)
        # The smaller of the two cannot reach a threshold that mask IoU misses, and outlines take most of the time.
        reaches = (overlaps >= IOU_THRESHOLDS[0]) & ~is_crowd
        rows, columns = np.flatnonzero(reaches.any(1)), np.flatnonzero(reaches.any(0))
        if len(rows):
            near_prediction = [self._region(predicted[index]) for index in rows]
            near_truth = [self._region(true[index]) for index in columns]
            boundary_iou = mask_overlap(near_prediction, near_truth, np.zeros(len(columns), dtype=bool))
            cells = np.ix_(rows, columns)
            overlaps[cells] = np.minimum(overlaps[cells], boundary_iou)
        return overlaps

    def _region(self, rle: dict[str, Any]) -> dict[str, Any]:
        region = boundary_region(decode_mask(rle), self.dilation_ratio)
        return coco_masks.encode(np.asfortranarray(region.astype(np.uint8)))


def boundary_region(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """(H, W) bool: the pixels of a mask near its outline.

    They have a pixel outside the mask, or outside the image, at most `dilation_ratio` of the diagonal (at least one
    pixel) away along both rows and columns.
    """
    distance = max(1, round(dilation_ratio * float(np.hypot(*mask.shape))))
    region = np.zeros(mask.shape, dtype=bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return region
    # Only the bounding box is filtered; everything outside it is background anyway.
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inner = np.ascontiguousarray(mask[window]).view(np.uint8)
    # Erosion by a square, as two passes over lines; cval=0 makes the edge of the image an outline.
    for axis in (0, 1):
        inner = ndimage.minimum_filter1d(inner, 2 * distance + 1, axis, mode="constant", cval=0)
    region[window] = mask[window] & (inner == 0)
    return region


def _check_ratio(dilation_ratio: float) -> None:
    if not 0 < dilation_ratio <= 1:
        raise ValueError(f"dilation_ratio is {dilation_ratio}; give a share of the diagonal, in (0, 1]")
