"""Mean intersection over union (mIoU) of semantic segmentation, from one matrix of counts.

`MeanIoU` accumulates the matrix over batches and processes; `mean_iou_from_counts` turns it into the result. Counts are
int64 (C, C + 1): pixels by true class (row) and predicted class (column); the last column counts pixels that were
given no class. C classes, H W pixels.

Papers differ in what they do with a class that occurs neither in the truth nor in the predictions of a data set. Most
leave it out of the mean (`absent="exclude"`); torchmetrics' plain mean, which the official EoMT code uses, counts it as
zero (`absent="zero"`). The choice is part of the result.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import numpy as np

from .accumulation import ImageMetric, integer_array

Absent = Literal["exclude", "zero"]


class MeanIoU(ImageMetric):
    """Mean intersection over union over a data set: feed batches of label maps, merge processes, compute.

    A prediction is what `post_process_semantic_segmentation` returns for an image: a tensor or array (H, W) of label
    ids. A reference is the same. Reference pixels that are negative or `ignore_index` are not counted. A prediction
    outside [0, num_labels) is "no class": wrong wherever the reference has a class.

    Args:
        num_labels: number of classes C; label ids are 0 .. C - 1.
        ignore_index: label of reference pixels that are not counted, besides negative ones.
        absent: what classes that occur nowhere mean for the averages, see the module.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = 255, absent: Absent = "exclude") -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        if ignore_index is not None and 0 <= ignore_index < num_labels:
            raise ValueError(
                f"ignore_index {ignore_index} is one of the classes 0..{num_labels - 1}; map void to -1 or to an index "
                "behind the last class, and give that"
            )
        if absent not in ("exclude", "zero"):
            raise ValueError(f'absent is {absent!r}; choose "exclude" or "zero"')
        self.num_labels, self.ignore_index, self.absent = num_labels, ignore_index, absent
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far; see `mean_iou_from_counts`. Nothing is reset."""
        return mean_iou_from_counts(self.counts["confusion"], self.absent)

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {"confusion": np.zeros((self.num_labels, self.num_labels + 1), dtype=np.int64)}

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        return {"confusion": confusion_counts(prediction, reference, self.num_labels, self.ignore_index, name)}


def confusion_counts(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None = 255, name: str = "the image"
) -> np.ndarray:
    """Count the pixels of one image by true and predicted class; the arguments are described at `MeanIoU`.

    Returns:
        (C, C + 1) int64.

    Raises:
        ValueError: sizes differ, or a reference label is out of range; the message starts with `name`.
    """
    true, predicted = label_maps(prediction, reference, num_labels, ignore_index, name)
    pairs = np.bincount(true.ravel() * (num_labels + 1) + predicted.ravel(), minlength=(num_labels + 1) ** 2)
    return pairs.reshape(num_labels + 1, num_labels + 1)[:num_labels]


def label_maps(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction (H, W) int64, checked, where C stands for "not counted" and for "no class"."""
    predicted = integer_array(prediction, f"{name}: the prediction")
    true = integer_array(reference, f"{name}: the reference")
    if predicted.shape != true.shape:
        raise ValueError(
            f"{name}: the prediction has (height, width) {predicted.shape} but the reference {true.shape}; pass "
            "target_sizes= to the post-processing"
        )
    true, predicted = true.astype(np.int64), predicted.astype(np.int64)
    is_ignored = true < 0
    if ignore_index is not None:
        is_ignored |= true == ignore_index
    true[is_ignored] = num_labels
    if true.max() > num_labels or (true == num_labels).sum() > is_ignored.sum():
        strangers = np.unique(true[(true >= num_labels) & ~is_ignored])[:5].tolist()
        raise ValueError(
            f"{name}: the reference holds labels {strangers}, outside 0..{num_labels - 1}, and ignore_index is "
            f"{ignore_index}; map the data set's labels to label ids first, or give the right num_labels"
        )
    predicted[(predicted < 0) | (predicted >= num_labels)] = num_labels
    return true, predicted


def mean_iou_from_counts(confusion: np.ndarray, absent: Absent = "exclude") -> dict[str, Any]:
    """Mean intersection over union from counts.

    Args:
        confusion: (C, C + 1) or (C, C) pixels by true and predicted class.
        absent: see the module.

    Returns:
        `mean_iou` and `mean_accuracy` (recall of a class, averaged), `frequency_weighted_iou` (weights: share of the
        true pixels) and `pixel_accuracy`, all in [0, 1], NaN where there is nothing to average; `absent`, and
        `num_classes`, the number of classes that `mean_iou` averages over. `per_class` maps every label id to its
        `iou`, `accuracy` (NaN where undefined), and the pixels `intersection`, `reference`, `prediction`.
    """
    num_labels = len(confusion)
    intersection = confusion.diagonal().astype(np.float64)
    reference, prediction = confusion.sum(1), confusion[:, :num_labels].sum(0)
    mean_iou, iou, num_classes = mean_iou_of_classes(intersection, reference, prediction, absent)
    occurs, accuracy = ~np.isnan(iou), _share(intersection, reference)
    total = reference.sum()
    return {
        "mean_iou": mean_iou,
        "mean_accuracy": _mean_of_classes(accuracy, absent)[0],
        "frequency_weighted_iou": float((reference[occurs] / total * iou[occurs]).sum()) if total else float("nan"),
        "pixel_accuracy": float(intersection.sum() / total) if total else float("nan"),
        "absent": absent,
        "num_classes": num_classes,
        "per_class": {
            label: {
                "iou": float(iou[label]),
                "accuracy": float(accuracy[label]),
                "intersection": int(intersection[label]),
                "reference": int(reference[label]),
                "prediction": int(prediction[label]),
            }
            for label in range(num_labels)
        },
    }


def mean_iou_of_classes(
    intersection: np.ndarray, reference: np.ndarray, prediction: np.ndarray, absent: Absent
) -> tuple[float, np.ndarray, int]:
    """Mean IoU, the IoU of each class and the number of classes that the mean is over, from pixels (C,).

    The IoU of a class that occurs nowhere is NaN, and so is a mean without any class.
    """
    iou = _share(intersection, reference + prediction - intersection)
    return _mean_of_classes(iou, absent)[0], iou, _mean_of_classes(iou, absent)[1]


def _mean_of_classes(values: np.ndarray, absent: Absent) -> tuple[float, int]:
    """Mean over the classes that have a value, or over all if those without shall count zero; and their number."""
    present = values[~np.isnan(values)]
    if not len(present):
        return float("nan"), 0
    counted = np.nan_to_num(values) if absent == "zero" else present
    return float(counted.mean()), len(counted)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part divided by whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
