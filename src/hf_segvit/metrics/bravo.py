"""Metrics of the BRAVO challenge, semantic and out-of-distribution (OOD).

Confidences have 65,536 levels and count at 100,000 sampled pixels of each image; counts are pooled over a subset. Over
valid pixels: mIoU (of all of them), and, with correctly classified pixels as positives, AUROC, FPR at 95 % TPR,
AUPR-Success, AUPR-Error and ECE (15 bins). Over all sampled pixels, with invalid ones as positives and 65535 -
confidence as score: AUROC, AUPRC and FPR at 95 % TPR. (Vu et al., ECCV Workshops 2024.) H W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from .accumulation import ImageMetric, integer_array, require_same_size
from .calibration import expected_calibration_error
from .mean_iou import MeanIoU, confusion_counts, mean_iou_from_counts
from .point_accuracy import NUM_BINS
from .ranking import VOID, area_under_roc, average_precision, false_positive_rate, plain_array

NUM_CLASSES = 19  # of Cityscapes
NUM_LEVELS = 2**16
NUM_SAMPLES = 100_000
# Which kinds of result each subset has: semantic, OOD.
SUBSETS = {
    "ACDCfog": (True, False),
    "ACDCrain": (True, False),
    "ACDCnight": (True, False),
    "ACDCsnow": (True, False),
    "synrain": (True, False),
    "SMIYC": (False, True),
    "synobjs": (True, True),
    "synflare": (True, False),
    "outofcontext": (True, False),
}
_LOWER_IS_BETTER = ("ece_valid", "fpr95_valid", "fpr95_ood")


def sampled_pixels(labels: Any, num_samples: int = NUM_SAMPLES, seed: int = 1) -> np.ndarray:
    """Ascending indices, into the flattened map, of the pixels at which confidences count: void ones (255) never do.

    They are those of the challenge, whose toolkit draws them alike; its own lists are read by `read_samples`.
    """
    indices = np.flatnonzero(np.asarray(labels) != VOID)
    if len(indices) > num_samples:
        # The old generator, since the lists of the challenge were drawn with it.
        indices = np.sort(np.random.RandomState(seed).choice(indices, num_samples, replace=False))
    return indices


class BravoSubset(ImageMetric):
    """The results of one subset of BRAVO.

    A prediction has `classes`, (H, W) train ids, and `confidence`, (H, W) levels 0..65535 or those at the sampled
    pixels alone. A reference has `labels`, (H, W) train ids with 255 as void; `invalid`, (H, W), 0 where an image shows
    what it should; and may have `samples`, ascending indices of pixels (see `sampled_pixels`, the default).
    """

    def __init__(self, subset: str) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"subset is {subset!r}; choose one of {', '.join(SUBSETS)}")
        self.subset = subset
        self.semantic, self.ood = SUBSETS[subset]
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far.

        Returns:
            Of semantic subsets `miou_valid`, `auroc_valid`, `fpr95_valid`, `auprc_success_valid`, `auprc_error_valid`
            and `ece_valid`; of OOD subsets `auroc_ood`, `auprc_ood` and `fpr95_ood`; `hmean`, the harmonic mean of
            these with 1 - x for ECE and FPR. `None` where `undefined` gives the reason.
        """
        result: dict[str, Any] = {}
        reasons = []
        if self.semantic:
            levels = self.counts["valid"][::-1]
            right, wrong = levels[:, 1], levels[:, 0]
            iou = mean_iou_from_counts(self.counts["confusion"])["mean_iou"]
            result["miou_valid"] = None if np.isnan(iou) else iou
            result |= dict.fromkeys(
                f"{name}_valid" for name in ("auroc", "fpr95", "auprc_success", "auprc_error", "ece")
            )
            if right.any() or wrong.any():
                result["ece_valid"] = _calibration_error(self.counts["valid"])
            if right.any() and wrong.any():
                result["auroc_valid"] = area_under_roc(right, wrong)
                result["fpr95_valid"] = false_positive_rate(right, wrong)
                result["auprc_success_valid"] = average_precision(right, wrong)
                result["auprc_error_valid"] = average_precision(wrong[::-1], right[::-1])
            else:
                reasons.append("the sampled valid pixels are not both rightly and wrongly classified")
        if self.ood:
            invalid, valid = self.counts["ood"][:, 1], self.counts["ood"][:, 0]
            result |= dict.fromkeys(f"{name}_ood" for name in ("auroc", "auprc", "fpr95"))
            if invalid.any() and valid.any():
                # The lowest confidence comes first.
                result["auroc_ood"] = area_under_roc(invalid, valid)
                result["auprc_ood"] = average_precision(invalid, valid)
                result["fpr95_ood"] = false_positive_rate(invalid, valid)
            else:
                reasons.append("the sampled pixels are not both valid and invalid")
        values = [_higher_is_better(name, value) for name, value in result.items()]
        result["hmean"] = harmonic_mean(values)
        result["undefined"] = f"{self.subset}: {'; '.join(reasons)}" if reasons else None
        return result

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {
            "confusion": MeanIoU(NUM_CLASSES)._no_counts()["confusion"],
            "valid": np.zeros((NUM_LEVELS, 2), dtype=np.int64),  # wrong and right by level
            "ood": np.zeros((NUM_LEVELS, 2), dtype=np.int64),  # valid and invalid by level
        }

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        classes = integer_array(prediction["classes"], f"{name}: the class map").astype(np.int64)
        labels = integer_array(reference["labels"], f"{name}: the labels").astype(np.int64)
        invalid = integer_array(reference["invalid"], f"{name}: the invalid mask") != 0
        require_same_size(classes.shape, labels.shape, name)
        require_same_size(invalid.shape, labels.shape, name)
        if unknown := np.unique(classes[(classes < 0) | (classes >= NUM_CLASSES)])[:5].tolist():
            raise ValueError(f"{name}: the class map holds {unknown}; it must hold train ids 0..{NUM_CLASSES - 1}")
        samples = reference.get("samples")
        samples = sampled_pixels(labels) if samples is None else checked_samples(samples, labels, name)
        confidence = confidence_levels(prediction["confidence"], labels.shape, samples, name)
        truth, shown = labels.ravel()[samples], invalid.ravel()[samples]
        right = truth == classes.ravel()[samples]
        counts = {"ood": _by_level(confidence, shown), "valid": _by_level(confidence[~shown], right[~shown])}
        valid_labels = np.where(invalid, VOID, labels)
        # Subsets without semantic results have maps that only tell void pixels from others.
        confusion = self._no_counts()["confusion"]
        if self.semantic:
            confusion = confusion_counts(classes, valid_labels, NUM_CLASSES, VOID, name)
        return {"confusion": confusion, **counts}


def confidence_levels(confidence: Any, size: tuple[int, ...], samples: np.ndarray, name: str) -> np.ndarray:
    """(n,) levels at the sampled pixels, of a whole map or of those pixels alone."""
    levels = plain_array(confidence)
    if levels.dtype.kind not in "iu" or (levels.size and not 0 <= levels.min() <= levels.max() < NUM_LEVELS):
        raise ValueError(
            f"{name}: the confidence must be whole levels 0..{NUM_LEVELS - 1}, but is {levels.dtype}; "
            "`quantized_confidence` makes them of values in [0, 1]"
        )
    if levels.ndim == 2:
        require_same_size(levels.shape, size, name)
        levels = levels.ravel()[samples]
    if len(levels) != len(samples):
        raise ValueError(f"{name}: {len(levels)} confidences, but {len(samples)} sampled pixels; use one list for both")
    return levels.astype(np.int64)


def quantized_confidence(confidence: Any) -> np.ndarray:
    """uint16 levels of confidences, clipped to [0, 1] first: a larger value would wrap around; NaN is an error."""
    values = plain_array(confidence).astype(np.float64)
    if np.isnan(values).any():
        raise ValueError(
            f"the confidence is NaN at {int(np.isnan(values).sum())} pixels; check the model's weights and its input"
        )
    return (np.clip(values, 0, 1) * (NUM_LEVELS - 1)).astype(np.uint16)


def bravo_index(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of all subsets, from the results of each by name.

    Returns:
        `semantic_hmean` and `ood_hmean`, the harmonic means of all values `..._valid` and `..._ood` with 1 - x for ECE
        and FPR, and `bravo_index`, the harmonic mean of both; `None` where `undefined` gives the reason.
    """
    missing = [name for name in SUBSETS if name not in results]
    reasons = [f"no results of {', '.join(missing)}"] if missing else []
    reasons += [str(result["undefined"]) for result in results.values() if result.get("undefined")]
    summary: dict[str, Any] = {}
    for key, ending in (("semantic_hmean", "_valid"), ("ood_hmean", "_ood")):
        # Without all subsets it would be another figure under the same name.
        lacking = [name for name in missing if SUBSETS[name][ending == "_ood"]]
        values = [
            _higher_is_better(name, value)
            for result in results.values()
            for name, value in result.items()
            if name.endswith(ending)
        ]
        summary[key] = None if lacking else harmonic_mean(values)
    summary["bravo_index"] = harmonic_mean([summary["semantic_hmean"], summary["ood_hmean"]])
    summary["undefined"] = "; ".join(reasons) or None
    return summary


def harmonic_mean(values: list[float | None]) -> float | None:
    """The harmonic mean: 0 if any value is 0, `None` without values or if any is `None`."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return len(known) / sum(1 / value for value in known) if all(known) else 0.0


def checked_samples(samples: Any, labels: np.ndarray, name: str) -> np.ndarray:
    """Sampled pixels of an image, which must be ascending, inside of it, and not void."""
    indices = plain_array(samples).astype(np.int64)
    if len(indices) and (indices[0] < 0 or indices[-1] >= labels.size or (np.diff(indices) <= 0).any()):
        raise ValueError(
            f"{name}: the sampled pixels must ascend within 0..{labels.size - 1}; is it another image's list?"
        )
    if void := int((labels.ravel()[indices] == VOID).sum()):
        raise ValueError(f"{name}: {void} sampled pixels are void; the list belongs to another image or version")
    return indices


def _higher_is_better(name: str, value: float | None) -> float | None:
    return 1 - value if name in _LOWER_IS_BETTER and value is not None else value


def _by_level(levels: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(65536, 2) pixels by level: negative ones, positive ones."""
    return np.stack([np.bincount(levels[positive == side], minlength=NUM_LEVELS) for side in (False, True)], axis=1)


def _calibration_error(levels: np.ndarray) -> float:
    """ECE of counts by level, with the middle of each level as its confidence."""
    confidence = (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS
    total = levels.sum(1)
    bins = (confidence * NUM_BINS).astype(np.int64)  # no middle of a level is an edge of a bin
    columns = (total, total * confidence, levels[:, 1])
    return expected_calibration_error(np.stack([np.bincount(bins, weights) for weights in columns], axis=1))
