"""Anomaly detection by connected components, as SegmentMeIfYouCan scores it.

A threshold makes components (of 8 neighbours) of an image's anomaly scores. `sIoU` of a true component: its overlap
with the predicted ones that touch it, over their union, less what they cover of other true components. `PPV` of a
predicted component: the share of it that is anomalous. F1 at a limit t counts true components of sIoU >= t as found,
the others as missed, and predicted ones of PPV < t as false; the mean is over 0.25, 0.30 ... 0.75. (Chan et al.,
NeurIPS Datasets and Benchmarks 2021.) H W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from scipy import ndimage

from .accumulation import ImageMetric, integer_array, require_same_size
from .ranking import VOID, plain_array

LIMITS = tuple(round(0.25 + 0.05 * step, 2) for step in range(11))
# Pixels of the smallest predicted and true components that count.
TRACKS = {"anomaly": (500, 100), "obstacle": (50, 10)}
_NEIGHBOURS = np.ones((3, 3), dtype=int)


class AnomalyComponents(ImageMetric):
    """sIoU, PPV and mean F1 of components over a data set.

    A prediction is an image's anomaly scores (H, W), a reference its map (H, W) of 0 (known), 1 (anomaly) and 255
    (void). True components below the smallest size are void.

    Args:
        threshold: pixels of at least this score are anomalous; the benchmark takes the threshold of the best F1 over
            the pixels of all images, `best_f1_threshold` of `AnomalyPixels`, so that it needs a second pass.
        track: "anomaly" or "obstacle", for the sizes of `TRACKS`.
        smallest_prediction, smallest_truth: other sizes, in pixels.
    """

    def __init__(
        self,
        threshold: float,
        track: str = "anomaly",
        smallest_prediction: int | None = None,
        smallest_truth: int | None = None,
    ) -> None:
        if track not in TRACKS:
            raise ValueError(f"track is {track!r}; choose one of {', '.join(TRACKS)}")
        if not np.isfinite(threshold):
            raise ValueError(f"threshold is {threshold}; give a score, such as best_f1_threshold of AnomalyPixels")
        self.threshold = threshold
        sizes = TRACKS[track]
        self.smallest_prediction = sizes[0] if smallest_prediction is None else smallest_prediction
        self.smallest_truth = sizes[1] if smallest_truth is None else smallest_truth
        super().__init__()

    def update(self, scores: Any, labels: Any, image_id: Hashable | None = None) -> None:
        """Count one image; arguments and errors as for `add_batch`."""
        ids = None if image_id is None else [image_id]
        self.add_batch(predictions=[scores], references=[labels], image_ids=ids)

    def compute(self) -> dict[str, Any]:
        """The result so far.

        Returns:
            `siou` and `ppv` (means over all components, `None` without any), `mean_f1`; by limit, `f1`, `found`,
            `missed` and `false_alarms` (lists along `limits`); `true_components`, `predicted_components`; `undefined`:
            why values are `None`, or `None`.
        """
        counts = self.counts
        true, predicted = int(counts["numbers"][0]), int(counts["numbers"][1])
        found, false_alarms = counts["found"], counts["false_alarms"]
        missed = true - found
        result: dict[str, Any] = {
            "siou": float(counts["sums"][0] / true) if true else None,
            "ppv": float(counts["sums"][1] / predicted) if predicted else None,
            "mean_f1": None,
            "limits": list(LIMITS),
            "f1": [],
            "found": found.tolist(),
            "missed": missed.tolist(),
            "false_alarms": false_alarms.tolist(),
            "true_components": true,
            "predicted_components": predicted,
            "undefined": None,
        }
        if true:
            f1 = 2 * found / (2 * found + missed + false_alarms)
            result["f1"], result["mean_f1"] = f1.tolist(), float(f1.mean())
            if not predicted:
                result["undefined"] = f"no predicted component of {self.smallest_prediction} pixels, so there is no PPV"
        else:
            result["undefined"] = (
                f"no anomaly of at least {self.smallest_truth} pixels in {self.num_images} images; the masks must "
                "hold 1 (anomaly)"
            )
        return result

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {
            "numbers": np.zeros(2, dtype=np.int64),  # true and predicted components
            "sums": np.zeros(2),  # of sIoU, of PPV
            "found": np.zeros(len(LIMITS), dtype=np.int64),
            "false_alarms": np.zeros(len(LIMITS), dtype=np.int64),
        }

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        scores, labels = plain_array(prediction), integer_array(reference, f"{name}: the reference")
        require_same_size(scores.shape, labels.shape, name)
        if unknown := np.unique(labels[(labels != 0) & (labels != 1) & (labels != VOID)])[:5].tolist():
            raise ValueError(
                f"{name}: the reference holds the values {unknown}; map them to 0 (known), 1 (anomaly) and 255 (void)"
            )
        if not np.isfinite(scores[labels != VOID]).all():
            raise ValueError(f"{name}: NaN or infinity in the anomaly scores; check the model's weights and its input")
        # As `AnomalyPixels` keeps them: its threshold is one of these values, which rounding may have raised.
        siou, ppv = self.component_scores(scores.astype(np.float32), labels)
        limits = np.array(LIMITS)[:, None]
        return {
            "numbers": np.array([len(siou), len(ppv)]),
            "sums": np.array([siou.sum(), ppv.sum()]),
            "found": (siou >= limits).sum(1),
            "false_alarms": (ppv < limits).sum(1),
        }

    def component_scores(self, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """sIoU of an image's true components, and PPV of its predicted ones."""
        truth, num_true = ndimage.label(labels == 1, _NEIGHBOURS)
        predicted, num_predicted = ndimage.label((scores >= self.threshold) & (labels != VOID), _NEIGHBOURS)
        kept_predictions = np.bincount(predicted.ravel(), minlength=num_predicted + 1) >= self.smallest_prediction
        kept_truths = np.bincount(truth.ravel(), minlength=num_true + 1) >= self.smallest_truth
        kept_predictions[0], kept_truths[0] = False, True  # where there is no component
        # A truth that is too small is void together with what was predicted on it.
        counted = (labels != VOID) & kept_truths[truth]
        # Numbered anew without those that are too small: there may be so many that no table of pairs would fit.
        predicted, num_predicted = _renumbered(predicted, kept_predictions)
        kept_truths[0] = False
        truth, num_true = _renumbered(truth, kept_truths)
        pairs = truth[counted].astype(np.int64) * (num_predicted + 1) + predicted[counted]
        overlap = np.bincount(pairs, minlength=(num_true + 1) * (num_predicted + 1))
        overlap = overlap.reshape(num_true + 1, num_predicted + 1)
        true_sizes, predicted_sizes = overlap[1:].sum(1), overlap[:, 1:].sum(0)
        both = overlap[1:, 1:]
        touching = both > 0
        hit = both.sum(1)
        # Of the predicted components that touch it: all their pixels, less those on other true components.
        on_others = touching @ both.sum(0) - hit
        union = true_sizes + touching @ predicted_sizes - hit - on_others
        exists, predicts = true_sizes > 0, predicted_sizes > 0
        return hit[exists] / union[exists], both.sum(0)[predicts] / predicted_sizes[predicts]


def _renumbered(components: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, int]:
    """A map whose kept components count from 1 in their order, with 0 elsewhere, and their number."""
    return (np.cumsum(kept) * kept)[components], int(kept.sum())
