"""Mean intersection over union (mIoU) of semantic segmentation.

`MeanIoU` accumulates a matrix of counts over batches and processes; `mean_iou_from_counts` turns it into the result.
Counts are int64 (C, C + 1): pixels by true class (row) and predicted class (column); the last column counts pixels that
were given no class. C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import numpy as np

from .accumulation import ImageMetric, integer_array, require_same_size

# Papers treat a class that occurs neither in the truth nor in the predictions in two ways: most leave it out of the
# mean; torchmetrics' plain mean, which the official EoMT code uses, counts it as zero.
Absent = Literal["exclude", "zero"]


class MeanIoU(ImageMetric):
    """Mean intersection over union over a data set.

    A prediction is what `post_process_semantic_segmentation` returns for an image: a tensor or array (H, W) of label
    ids. A reference is the same. A prediction outside [0, num_labels) is "no class": wrong wherever the reference has a
    class.

    Args:
        num_labels: number of classes C; label ids are 0 .. C - 1.
        ignore_index: label of reference pixels that are not counted, besides negative ones.
        absent: "exclude" leaves classes that occur nowhere out of the means, "zero" counts them as 0.
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
        """The result so far; see `mean_iou_from_counts`."""
        return mean_iou_from_counts(self.counts["confusion"], self.absent, self.chosen(self.num_labels))

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {"confusion": np.zeros((self.num_labels, self.num_labels + 1), dtype=np.int64)}

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        return {"confusion": confusion_counts(prediction, reference, self.num_labels, self.ignore_index, name)}


def confusion_counts(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None = 255, name: str = "the image"
) -> np.ndarray:
    """(C, C + 1) int64 pixels of one image by true and predicted class; arguments and errors as for `MeanIoU`."""
    true, predicted = label_maps(prediction, reference, num_labels, ignore_index, name)
    # Both maps in one number per pixel, so that one pass counts all pairs of classes.
    pairs = np.bincount(true.ravel() * (num_labels + 1) + predicted.ravel(), minlength=(num_labels + 1) ** 2)
    return pairs.reshape(num_labels + 1, num_labels + 1)[:num_labels]


def label_maps(
    prediction: Any, reference: Any, num_labels: int, ignore_index: int | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Checked reference and prediction (H, W) int64, in which C means "not counted" and "no class"."""
    predicted = integer_array(prediction, f"{name}: the prediction")
    true = integer_array(reference, f"{name}: the reference")
    require_same_size(predicted.shape, true.shape, name)
    true, predicted = true.astype(np.int64), predicted.astype(np.int64)
    is_ignored = true < 0
    if ignore_index is not None:
        is_ignored |= true == ignore_index
    true[is_ignored] = num_labels
    # Two cheap passes tell whether a label is out of range; which one is searched for only then.
    if true.max() > num_labels or (true == num_labels).sum() > is_ignored.sum():
        unknown = np.unique(true[(true >= num_labels) & ~is_ignored])[:5].tolist()
        raise ValueError(
            f"{name}: the reference holds labels {unknown}, outside 0..{num_labels - 1}, and ignore_index is "
            f"{ignore_index}; map the data set's labels to label ids first, or give the right num_labels"
        )
    predicted[(predicted < 0) | (predicted >= num_labels)] = num_labels
    return true, predicted


def mean_iou_from_counts(
    confusion: np.ndarray, absent: Absent = "exclude", classes: np.ndarray | None = None
) -> dict[str, Any]:
    """Mean intersection over union from counts (C, C + 1) or (C, C) of pixels by true and predicted class.

    `classes` are the label ids that the result is about; all other classes count as what these are taken for.

    Returns:
        `mean_iou`, `mean_accuracy` (mean recall of the classes), `frequency_weighted_iou` (weighted by the share of the
        true pixels) and `pixel_accuracy`, in [0, 1] or NaN; `absent`; `num_classes`, how many classes `mean_iou`
        averages.
        `per_class` by label id: `iou`, `accuracy` (NaN where undefined) and the pixels `intersection`, `reference`,
        `prediction`.
    """
    num_labels = len(confusion)
    intersection = confusion.diagonal().astype(np.float64)
    reference, prediction = confusion.sum(1), confusion[:, :num_labels].sum(0)
    labels = np.arange(num_labels) if classes is None else classes
    intersection, reference, prediction = intersection[labels], reference[labels], prediction[labels]
    mean_iou, iou, num_classes = mean_iou_of_classes(intersection, reference, prediction, absent)
    occurs, accuracy = ~np.isnan(iou), _ratio(intersection, reference)
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
                "iou": float(iou[index]),
                "accuracy": float(accuracy[index]),
                "intersection": int(intersection[index]),
                "reference": int(reference[index]),
                "prediction": int(prediction[index]),
            }
            for index, label in enumerate(labels.tolist())
        },
    }


def mean_iou_of_classes(
    intersection: np.ndarray, reference: np.ndarray, prediction: np.ndarray, absent: Absent
) -> tuple[float, np.ndarray, int]:
    """Mean IoU, IoU of each class (NaN if it occurs nowhere), number of classes averaged, from pixels (C,)."""
    iou = _ratio(intersection, reference + prediction - intersection)
    mean, num_classes = _mean_of_classes(iou, absent)
    return mean, iou, num_classes


def _mean_of_classes(values: np.ndarray, absent: Absent) -> tuple[float, int]:
    """The mean over classes, NaN without any, and how many classes it is over."""
    present = values[~np.isnan(values)]  # a class that occurs nowhere has 0 / 0
    if not len(present):
        return float("nan"), 0
    counted = np.nan_to_num(values) if absent == "zero" else present
    return float(counted.mean()), len(counted)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise ratio, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
