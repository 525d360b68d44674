"""Accuracy of point classification: top-1, top-5, by class, and calibration.

`PointAccuracy` accumulates counts over batches and processes; `point_accuracy_from_counts` turns them into the result.
Calibration is the expected calibration error of Guo et al. (ICML 2017): the mean over the points of the distance
between accuracy and mean confidence of their bin. C classes, N points of an image.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from .accumulation import ImageMetric

NUM_BINS = 15  # of equal width, as in Guo et al.; bin k is (k / 15, (k + 1) / 15]
TOP_K = 5


class PointAccuracy(ImageMetric):
    """Accuracy of point classification over a data set.

    A prediction holds the logits of an image's points, a tensor or array (N, C), or with `probabilities` rows that sum
    to 1. A reference holds their label ids (N,); `ignore_index` and negative ones are not counted.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = -100, probabilities: bool = False) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        if ignore_index is not None and 0 <= ignore_index < num_labels:
            raise ValueError(
                f"ignore_index {ignore_index} is one of the classes 0..{num_labels - 1}; map void to -100 and give that"
            )
        self.num_labels, self.ignore_index, self.probabilities = num_labels, ignore_index, probabilities
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far; see `point_accuracy_from_counts`."""
        return point_accuracy_from_counts(**self.counts)

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {
            "confusion": np.zeros((self.num_labels, self.num_labels), dtype=np.int64),
            "top_k": np.zeros(self.num_labels, dtype=np.int64),
            "bins": np.zeros((NUM_BINS, 3)),
        }

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        scores, true = self._checked(prediction, reference, name)
        counts = self._no_counts()
        if not len(true):
            return counts
        probabilities = scores if self.probabilities else _softmax(scores)
        predicted = scores.argmax(1)
        np.add.at(counts["confusion"], (true, predicted), 1)
        own = scores[np.arange(len(true)), true]
        # Of equal scores the lower label id wins, as argmax has it: top-5 then always contains top-1.
        ahead = (scores > own[:, None]) | ((scores == own[:, None]) & (np.arange(self.num_labels) < true[:, None]))
        counts["top_k"] = np.bincount(true[ahead.sum(1) < TOP_K], minlength=self.num_labels)
        confidence = probabilities.max(1)
        # Bins are closed above, so a confidence of exactly 1 lies in the last one.
        bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        for column, weights in enumerate((np.ones(len(true)), confidence, (predicted == true).astype(np.float64))):
            counts["bins"][:, column] = np.bincount(bins, weights, minlength=NUM_BINS)
        return counts

    def _checked(self, prediction: Any, reference: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, C) float64 scores and (n,) int64 labels of the points that count."""
        scores, true = _array(prediction).astype(np.float64), _array(reference)
        if scores.ndim != 2 or scores.shape[1] != self.num_labels or true.shape != scores.shape[:1]:
            raise ValueError(
                f"{name}: predictions of shape {scores.shape} and references of {true.shape}; they must be "
                f"(points, {self.num_labels}) and (points,)"
            )
        if true.dtype.kind not in "iu":
            raise ValueError(f"{name}: the references are {true.dtype}; they must be integer label ids")
        counted = true >= 0
        if self.ignore_index is not None:
            counted &= true != self.ignore_index
        scores, true = scores[counted], true[counted].astype(np.int64)
        unknown = np.unique(true[true >= self.num_labels])[:5].tolist()
        if unknown:
            raise ValueError(
                f"{name}: the references hold labels {unknown}, outside 0..{self.num_labels - 1}; map void to "
                f"{self.ignore_index}, or give the right num_labels"
            )
        if not np.isfinite(scores).all():
            raise ValueError(f"{name}: NaN or infinity in the predictions; check the model's weights and its input")
        if self.probabilities and len(scores):
            distance = max(np.abs(scores.sum(1) - 1).max(), -scores.min())
            if distance > 1e-2:  # half precision rounds sums of many classes
                raise ValueError(
                    f"{name}: the predictions are no probabilities (off by {distance:.3g}); give logits with "
                    "probabilities=False"
                )
        return scores, true


def point_accuracy_from_counts(confusion: np.ndarray, top_k: np.ndarray, bins: np.ndarray) -> dict[str, Any]:
    """Accuracy and calibration from counts.

    Args:
        confusion: (C, C) points by true and predicted class.
        top_k: (C,) points by true class, of those whose class is among the five that score highest.
        bins: (NUM_BINS, 3) points, sum of their confidences, and number of correct answers.

    Returns:
        `top_1`, `top_5`, `class_balanced` (mean top-1 of the classes that occur), `expected_calibration_error` and
        `mean_confidence`, in [0, 1], NaN without points; `num_points`, and `num_classes` that occur. `per_class` by
        label
        id: `top_1`, `top_5` (NaN if the class does not occur), `points`, and `predicted`, how often it was the answer.
    """
    points, correct = confusion.sum(1), confusion.diagonal()
    total = int(points.sum())
    present = points > 0
    top_1, top_5 = (np.divide(hits, points, np.full(len(points), np.nan), where=present) for hits in (correct, top_k))
    predicted = confusion.sum(0)
    return {
        "top_1": float(correct.sum() / total) if total else math.nan,
        "top_5": float(top_k.sum() / total) if total else math.nan,
        "class_balanced": float(top_1[present].mean()) if total else math.nan,
        "expected_calibration_error": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total) if total else math.nan,
        "mean_confidence": float(bins[:, 1].sum() / total) if total else math.nan,
        "num_points": total,
        "num_classes": int(present.sum()),
        "per_class": {
            label: {
                "top_1": float(top_1[label]),
                "top_5": float(top_5[label]),
                "points": int(points[label]),
                "predicted": int(predicted[label]),
            }
            for label in range(len(points))
        },
    }


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(1, keepdims=True))  # the maximum is taken off so that exp cannot overflow
    return weights / weights.sum(1, keepdims=True)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    return np.asarray(values)
