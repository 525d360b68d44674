"""Accuracy of point classification: top-1, top-5, by class, and how far confidence can be trusted.

`PointAccuracy` accumulates counts over batches and processes; `point_accuracy_from_counts` turns them into the result.
Calibration is the expected calibration error of Guo et al. (ICML 2017) with `NUM_BINS` bins of equal width: bin k holds
the points whose highest probability lies in (k / 15, (k + 1) / 15]; the error is the mean over the points of the
distance between the share of right answers and the mean confidence of their bin.

C classes, N points of an image.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from .accumulation import ImageMetric

NUM_BINS = 15
TOP_K = 5


class PointAccuracy(ImageMetric):
    """Accuracy of point classification over a data set: feed batches, merge processes, compute.

    A prediction holds the logits (or probabilities) of an image's points: a tensor or array (N, C). A reference holds
    their label ids (N,). Points whose reference is `ignore_index` or negative are not counted. Where two classes score
    alike the one with the lower label id wins, as `argmax` has it.

    Args:
        num_labels: number of classes C.
        ignore_index: label of points that are not counted, besides negative ones.
        probabilities: predictions are probabilities already, each row summing to 1.

    Raises:
        ValueError: an argument is out of its range.
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
        """The result so far; see `point_accuracy_from_counts`. Nothing is reset."""
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
        ahead = (scores > own[:, None]) | ((scores == own[:, None]) & (np.arange(self.num_labels) < true[:, None]))
        counts["top_k"] = np.bincount(true[ahead.sum(1) < TOP_K], minlength=self.num_labels)
        confidence = probabilities.max(1)
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
        strangers = np.unique(true[true >= self.num_labels])[:5].tolist()
        if strangers:
            raise ValueError(
                f"{name}: the references hold labels {strangers}, outside 0..{self.num_labels - 1}; map void to "
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
        bins: (NUM_BINS, 3) points, sum of their confidences, and right answers among them.

    Returns:
        `top_1`, `top_5` and `class_balanced` (top-1 by class, averaged over the classes that occur), all in [0, 1];
        `expected_calibration_error` and `mean_confidence`; NaN where there is no point. `num_points`, and
        `num_classes`, how many classes occur. `per_class` maps every label id to its `top_1`, `top_5` (NaN where it
        does not occur), `points` and `predicted`, how often it was the answer.
    """
    points, right = confusion.sum(1), confusion.diagonal()
    total = int(points.sum())
    top_1, top_5 = (np.divide(part, points, np.full(len(points), np.nan), where=points > 0) for part in (right, top_k))
    present = points > 0
    predicted = confusion.sum(0)
    return {
        "top_1": float(right.sum() / total) if total else math.nan,
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
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
