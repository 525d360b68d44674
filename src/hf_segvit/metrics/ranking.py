"""Rankings of pixels by a score: ROC, precision and recall, from counts.

`RankingMetric` counts positive and negative pixels by score and keeps at most `max_distinct` different scores; with
more of them, it merges neighbours and states how far each result can be from the exact one. The functions at the
beginning take counts of positives and negatives by score, highest score first, and equal those of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .accumulation import ImageMetric, integer_array, require_same_size

VOID = 255  # in references, besides 0 and 1


def area_under_roc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve by the trapezoidal rule: a pair of equal scores counts a half."""
    above = np.cumsum(positives, dtype=np.float64) - positives / 2
    return float((above * negatives).sum() / (positives.sum(dtype=np.float64) * negatives.sum(dtype=np.float64)))


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the curve of precision and recall: the sum of precisions weighted by the steps of recall."""
    true, false = np.cumsum(positives), np.cumsum(negatives)
    precision = true / np.maximum(true + false, 1)
    return float((positives * precision).sum() / true[-1])


def false_positive_rate(positives: np.ndarray, negatives: np.ndarray, recall: float = 0.95) -> float:
    """False-positive rate at the highest score at which the true-positive rate reaches `recall`; not interpolated."""
    true, false = np.cumsum(positives), np.cumsum(negatives)
    return float(false[np.searchsorted(true / true[-1], recall)] / false[-1])


def best_f1(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, int]:
    """The best F1 of all thresholds, and the index of its score (the highest if several reach it)."""
    true, false = np.cumsum(positives), np.cumsum(negatives)
    # 2 TP / (2 TP + FP + FN), and TP + FN is the number of all positives.
    f1 = 2 * true / (true + false + true[-1])
    index = int(f1.argmax())
    return float(f1[index]), index


def ranking_errors(positives: np.ndarray, negatives: np.ndarray, recall: float = 0.95) -> tuple[float, float, float]:
    """How far the three figures can be from those of the scores before they were merged: ROC, precision, rate."""
    true, false = np.cumsum(positives), np.cumsum(negatives)
    # Merged pixels were in an unknown order: with all positives first, or with all of them last, at the extremes.
    pairs = (positives.astype(np.float64) * negatives).sum() / 2 / (float(true[-1]) * float(false[-1]))
    before, after = true - positives, false - negatives
    best = (positives * (true / np.maximum(true + after, 1))).sum() / true[-1]
    worst = (positives * ((before + 1) / (before + 1 + false))).sum() / true[-1]
    precision = average_precision(positives, negatives)
    index = np.searchsorted(true / true[-1], recall)
    return float(pairs), float(max(best - precision, precision - worst)), float(negatives[index] / false[-1])


class RankingMetric(ImageMetric):
    """Counts of negative and positive pixels by score, over a data set.

    A prediction is an image's scores (H, W), of which float32 is kept. A reference is its map (H, W) of 0 (negative), 1
    (positive) and 255 (void, not counted).

    Args:
        max_distinct: how many different scores are told apart. With more of them, lower bits of all scores are dropped
            until they fit, whatever the order of images and processes. `None`: no limit, and results are exact.
    """

    _max_unsummed = 4  # summing sorts all scores
    # What the two values stand for, in messages.
    _score = "the score"
    _meaning = "0 (negative), 1 (positive) and 255 (void)"

    def __init__(self, max_distinct: int | None = 2**20) -> None:
        if max_distinct is not None and max_distinct < 2:
            raise ValueError(f"max_distinct is {max_distinct}; give at least 2, or None for no limit")
        self.max_distinct = max_distinct
        super().__init__()

    @property
    def is_exact(self) -> bool:
        """Whether every score that occurred is still told apart."""
        return int(self.counts["dropped_bits"][0]) == 0

    def ranked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) positives, negatives, and lowest score of each level, highest first."""
        counts = self.counts["pixels"][::-1]
        return counts[:, 1], counts[:, 0], _scores(self.counts["keys"][::-1])

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {
            "keys": np.zeros(0, dtype=np.uint32),
            "pixels": np.zeros((0, 2), dtype=np.int64),
            "dropped_bits": np.zeros(1, dtype=np.int64),
        }

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        scores, values = self._checked(prediction, reference, name)
        keys = _keys(scores)
        sides = [np.unique(keys[values == value], return_counts=True) for value in (0, 1)]
        both = _distinct(np.concatenate([sides[0][0], sides[1][0]]))
        pixels = np.zeros((len(both), 2), dtype=np.int64)
        for column, (side, counts) in enumerate(sides):
            pixels[np.searchsorted(both, side), column] = counts
        return {"keys": both, "pixels": pixels, "dropped_bits": np.zeros(1, dtype=np.int64)}

    def _sum(self, counts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        dropped = max(int(each["dropped_bits"][0]) for each in counts)
        sets = [_merged(each["keys"].astype(np.uint32), each["pixels"], dropped) for each in counts]
        keys = _distinct(np.concatenate([each for each, _ in sets]))
        pixels = np.zeros((len(keys), 2), dtype=np.int64)
        for own, numbers in sets:
            pixels[np.searchsorted(keys, own)] += numbers
        if self.max_distinct is not None and len(keys) > self.max_distinct:
            # Neighbours stay apart as long as their highest differing bit is kept: a property of the set of scores, so
            # that the order in which sets arrive cannot matter.
            kept = np.sort(np.frexp((keys[1:] ^ keys[:-1]).astype(np.float64))[1])[::-1]
            dropped = max(dropped, int(kept[self.max_distinct - 1]))
            keys, pixels = _merged(keys, pixels, dropped)
        return {"keys": keys, "pixels": pixels, "dropped_bits": np.array([dropped], dtype=np.int64)}

    def _checked(self, prediction: Any, reference: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(n,) float32 scores and values 0 or 1 of the pixels that count."""
        scores, values = plain_array(prediction), integer_array(reference, f"{name}: the reference")
        require_same_size(scores.shape, values.shape, name)
        if unknown := np.unique(values[(values != 0) & (values != 1) & (values != VOID)])[:5].tolist():
            raise ValueError(f"{name}: the reference holds the values {unknown}; map them to {self._meaning} first")
        counted = values != VOID
        # Exact for float32, 16-bit floats, and integers of 24 bits.
        scores = scores[counted].astype(np.float32)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{name}: {self._score} is NaN or infinite at {int((~np.isfinite(scores)).sum())} pixels; check the "
                "model's weights and its input"
            )
        return scores, values[counted]


def plain_array(values: Any) -> np.ndarray:
    """A NumPy array of a tensor or array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _keys(scores: np.ndarray) -> np.ndarray:
    """Integers in the order of float32 scores, one for each."""
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum turns -0 into 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _scores(keys: np.ndarray) -> np.ndarray:
    """The inverse of `_keys`."""
    return np.where(keys >> 31, keys & np.uint32(2**31 - 1), ~keys).astype(np.uint32).view(np.float32)


def _distinct(keys: np.ndarray) -> np.ndarray:
    """All keys once, ascending."""
    # NumPy's `unique` hashes when it need not count, which takes a hundred times as long as sorting.
    keys = np.sort(keys)
    return keys[np.concatenate([np.ones(len(keys[:1]), dtype=bool), keys[1:] != keys[:-1]])]


def _merged(keys: np.ndarray, pixels: np.ndarray, dropped: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending keys without their lowest bits, and the sums of their pixels."""
    if not dropped or not len(keys):
        return keys, pixels
    coarse = keys >> np.uint32(dropped) << np.uint32(dropped)
    starts = np.flatnonzero(np.concatenate([[True], coarse[1:] != coarse[:-1]]))
    return coarse[starts], np.add.reduceat(pixels, starts, axis=0)
