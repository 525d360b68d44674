"""Calibration of a confidence, and how well it tells right from wrong.

`Calibration` gives the expected calibration error (ECE, Guo et al., ICML 2017), the Brier score, the data of a
reliability diagram, and the figures of a ranking by confidence: AUROC, AUPR-Success, AUPR-Error and FPR at 95 % TPR, as
in Corbière et al. (NeurIPS 2019) and BRAVO. H W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .point_accuracy import NUM_BINS
from .ranking import (
    VOID,
    RankingMetric,
    area_under_roc,
    average_precision,
    false_positive_rate,
    plain_array,
    ranking_errors,
)


class Calibration(RankingMetric):
    """Whether a confidence is as high as the accuracy, over a data set.

    A prediction is the confidence in [0, 1] of an image's answers, of any shape (H, W) or (N,): pixels, segments or
    points. A reference has the same shape: 1 (the answer is right), 0 (wrong) and 255 (void).

    Args:
        num_bins: bins of equal width; bin k is (k / n, (k + 1) / n].
        max_distinct: see `RankingMetric`; the ECE, the Brier score and the diagram are exact in any case.
    """

    _score = "the confidence"
    _meaning = "0 (wrong), 1 (right) and 255 (void)"

    def __init__(self, num_bins: int = NUM_BINS, max_distinct: int | None = 2**20) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins is {num_bins}; give at least 1")
        self.num_bins = num_bins
        super().__init__(max_distinct)

    def update(self, confidence: Any, correct: Any, void: Any = None, image_id: Hashable | None = None) -> None:
        """Count one image: its confidences, which of them are right (bool), and which do not count (bool)."""
        confidence, values = (np.atleast_2d(plain_array(each)) for each in (confidence, correct))
        if void is not None:
            values = np.where(np.atleast_2d(plain_array(void)).astype(bool), VOID, values.astype(np.int64))
        if not values.size:  # an image without segments or points
            confidence, values = np.zeros((1, 1)), np.full((1, 1), VOID)
        ids = None if image_id is None else [image_id]
        self.add_batch(predictions=[confidence], references=[values], image_ids=ids)

    def compute(self) -> dict[str, Any]:
        """The result so far.

        Returns:
            `ece`, `brier` (of right or wrong: the mean square of confidence - correctness), `accuracy`,
            `mean_confidence`; `auroc`, `fpr95` and `auprc_success` of a ranking in which right answers should come
            first; `auprc_error`, the same with wrong answers first and the lowest confidence on top; all in [0, 1], and
            `None` where `undefined` gives the reason. `num_pixels`; `reliability`, see `reliability_diagram`.
            `auroc_bound`, `auprc_bound` (of both areas) and `fpr95_bound` bound the difference to exact values.
        """
        positives, negatives, _ = self.ranked()
        right, wrong = int(positives.sum()), int(negatives.sum())
        bins, total = self.counts["bins"], right + wrong
        names = ("ece", "brier", "accuracy", "mean_confidence", "auroc", "fpr95", "auprc_success", "auprc_error")
        result: dict[str, Any] = dict.fromkeys((*names, "auroc_bound", "auprc_bound", "fpr95_bound"))
        result |= {"exact": self.is_exact, "num_pixels": total, "reliability": reliability_diagram(bins)}
        result["undefined"] = self._undefined(right, wrong)
        if total:
            result["ece"] = expected_calibration_error(bins)
            result["brier"] = float(bins[:, 3].sum() / total)
            result["accuracy"] = right / total
            result["mean_confidence"] = float(bins[:, 1].sum() / total)
        if right and wrong:
            result["auroc"] = area_under_roc(positives, negatives)
            result["fpr95"] = false_positive_rate(positives, negatives)
            result["auprc_success"] = average_precision(positives, negatives)
            result["auprc_error"] = average_precision(negatives[::-1], positives[::-1])
            roc = success = rate = error = 0.0
            if not self.is_exact:
                roc, success, rate = ranking_errors(positives, negatives)
                _, error, _ = ranking_errors(negatives[::-1], positives[::-1])
            result |= {"auroc_bound": roc, "auprc_bound": max(success, error), "fpr95_bound": rate}
        return result

    def _undefined(self, right: int, wrong: int) -> str | None:
        """Why results are missing, or `None`."""
        if not right + wrong:
            return f"no answer was counted in {self.num_images} images: all are void"
        if not right or not wrong:
            state = "wrong" if wrong else "right"
            return f"all {right + wrong} answers are {state}, so that no ranking can tell right from wrong"
        return None

    def _no_counts(self) -> dict[str, np.ndarray]:
        # Answers, sums of confidences, right answers, and sums of squares.
        return {**super()._no_counts(), "bins": np.zeros((self.num_bins, 4))}

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        confidence, right = self._checked(prediction, reference, name)
        counts = super()._count(prediction, reference, name, image_id)
        exact, correct = confidence.astype(np.float64), right.astype(np.float64)
        # Bins are closed above, so a confidence of exactly 1 lies in the last one.
        index = np.clip(np.ceil(exact * self.num_bins).astype(np.int64) - 1, 0, self.num_bins - 1)
        columns = (None, exact, correct, (exact - correct) ** 2)
        sums = [np.bincount(index, weights, minlength=self.num_bins) for weights in columns]
        return {**counts, "bins": np.stack(sums, axis=1).astype(np.float64)}

    def _sum(self, counts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {**super()._sum(counts), "bins": np.sum([each["bins"] for each in counts], axis=0)}

    def _checked(self, prediction: Any, reference: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        confidence, right = super()._checked(prediction, reference, name)
        if len(confidence) and (confidence.min() < 0 or confidence.max() > 1):
            raise ValueError(
                f"{name}: the confidence reaches from {confidence.min():.4g} to {confidence.max():.4g}; it must be in "
                "[0, 1]: clip it, as class scores of overlapping queries add up to more than 1"
            )
        return confidence, right


def expected_calibration_error(bins: np.ndarray) -> float:
    """ECE from (n, 3 or more) answers, sums of confidences, and right answers; NaN without answers."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()) if bins[:, 0].any() else float("nan")


def reliability_diagram(bins: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a reliability diagram from the same counts.

    Returns:
        By bin: `lower`, `upper`, `count`, and `confidence` and `accuracy` (means, `None` if the bin is empty).
    """
    rows = []
    for index, (count, confidence, right) in enumerate(bins[:, :3].tolist()):
        rows.append(
            {
                "lower": index / len(bins),
                "upper": (index + 1) / len(bins),
                "count": int(count),
                "confidence": confidence / count if count else None,
                "accuracy": right / count if count else None,
            }
        )
    return rows
