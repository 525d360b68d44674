"""Anomaly detection by pixel: AUROC, AUPRC, and FPR at 95 % TPR.

`AnomalyPixels` pools the pixels of all images, as Fishyscapes and SegmentMeIfYouCan do. H W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .ranking import (
    RankingMetric,
    area_under_roc,
    average_precision,
    best_f1,
    false_positive_rate,
    ranking_errors,
)


class AnomalyPixels(RankingMetric):
    """How well a score tells anomalous pixels from known ones, over a data set.

    A prediction is an image's anomaly scores (H, W), higher = more anomalous. A reference is its map (H, W) of 0
    (known), 1 (anomaly) and 255 (void).
    """

    _score = "the anomaly score"
    _meaning = "0 (known), 1 (anomaly) and 255 (void)"

    def update(self, scores: Any, labels: Any, image_id: Hashable | None = None) -> None:
        """Count one image; arguments and errors as for `add_batch`."""
        ids = None if image_id is None else [image_id]
        self.add_batch(predictions=[scores], references=[labels], image_ids=ids)

    def compute(self) -> dict[str, Any]:
        """The result so far.

        Returns:
            `auroc`; `auprc`, the average precision of anomalies; `fpr95`, the share of known pixels among the alarms
            when 95 % of the anomalous ones are found; `best_f1`, and `best_f1_threshold`, which alarms are at least. In
            [0, 1], and `None` where `undefined` gives the reason. `auroc_bound`, `auprc_bound`, `fpr95_bound`: how far
            each can be from its exact value, 0 if `exact`. `anomaly_pixels` and `known_pixels`.
        """
        positives, negatives, scores = self.ranked()
        anomaly, known = int(positives.sum()), int(negatives.sum())
        names = ("auroc", "auprc", "fpr95", "best_f1", "best_f1_threshold", "auroc_bound", "auprc_bound", "fpr95_bound")
        result: dict[str, Any] = dict.fromkeys(names)
        result |= {"exact": self.is_exact, "anomaly_pixels": anomaly, "known_pixels": known, "undefined": None}
        if not anomaly or not known:
            lacking = " and no ".join(name for name, count in (("anomalous", anomaly), ("known", known)) if not count)
            result["undefined"] = (
                f"no {lacking} pixel in {self.num_images} images, so that nothing can be told apart; the masks must "
                "hold both 1 (anomaly) and 0 (known)"
            )
            return result
        result["auroc"] = area_under_roc(positives, negatives)
        result["auprc"] = average_precision(positives, negatives)
        result["fpr95"] = false_positive_rate(positives, negatives)
        result["best_f1"], index = best_f1(positives, negatives)
        result["best_f1_threshold"] = float(scores[index])
        errors = (0.0, 0.0, 0.0) if self.is_exact else ranking_errors(positives, negatives)
        result["auroc_bound"], result["auprc_bound"], result["fpr95_bound"] = errors
        return result
