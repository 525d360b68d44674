"""Calibration of a model's scores, before and after temperature scaling.

The images are split in two halves by a hash of their ids. On the first a temperature is found; on the second the
expected calibration error is measured, without and with it. Pixels and segments (`HeldOutCalibration`) are scaled as
`calibrated` in models/confidence.py does it, to the lowest Brier score; points (`PointCalibration`) by dividing their
logits, to the highest likelihood (Guo et al., ICML 2017). N answers, C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax

from ..atomic_files import write_json, writing
from ..metrics.accumulation import ImageMetric
from ..metrics.calibration import Calibration, expected_calibration_error, reliability_diagram
from ..metrics.point_accuracy import NUM_BINS
from ..models.checkpoint_json import read_table
from ..models.confidence import CERTAIN, calibrated
from ..models.image_processing_plain_vit import PROCESSOR

BOUNDS = (0.05, 20.0)  # of temperatures
POINTS_PER_IMAGE = 64  # whose logits are kept
_LEVELS = 2**18  # scores that are told apart


@dataclass(frozen=True)
class RightAnswers:
    """Scores of an image's answers, of any shape, which are right, and which do not count (bool, of the same shape)."""

    scores: np.ndarray
    right: np.ndarray
    void: np.ndarray


@dataclass(frozen=True)
class CalibrationResult:
    """How well scores are calibrated.

    Attributes:
        temperature: found on the first half; `None` where `undefined` gives the reason.
        ece, ece_calibrated: expected calibration error on the second half, without and with the temperature.
        fitted, measured: answers of the first and the second half.
        reliability, reliability_calibrated: rows of the diagrams, see `reliability_diagram`.
    """

    temperature: float | None
    ece: float | None
    ece_calibrated: float | None
    fitted: int
    measured: int
    reliability: list[dict[str, Any]]
    reliability_calibrated: list[dict[str, Any]]
    undefined: str | None = None


def is_measured(image_id: Hashable) -> bool:
    """Whether an image is of the second half, the same way on every machine."""
    return hashlib.sha256(str(image_id).encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


class HeldOutCalibration:
    """Calibration of pixels or segments; a `Metric` (see metrics/accumulation.py) that keeps counts by score.

    Args:
        right_answers: the scores of an image and what is right, from prediction, reference and a name for errors.
    """

    def __init__(self, right_answers: Callable[[Any, Any, str], RightAnswers]) -> None:
        self.right_answers = right_answers
        self.parts = {name: Calibration(max_distinct=_LEVELS) for name in ("fitted", "measured")}

    def reset(self) -> None:
        """Forget everything that was added."""
        for part in self.parts.values():
            part.reset()

    def add_batch(
        self, *, predictions: Sequence[Any], references: Sequence[Any], image_ids: Sequence[Hashable]
    ) -> None:
        """Count images."""
        for prediction, reference, image_id in zip(predictions, references, image_ids, strict=True):
            answers = self.right_answers(prediction, reference, f"image {image_id!r}")
            part = self.parts["measured" if is_measured(image_id) else "fitted"]
            part.update(answers.scores, answers.right, answers.void, image_id)

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add another one's `state_dict()`."""
        for name, part in self.parts.items():
            part.merge(other[name])

    def compute(self) -> dict[str, Any]:
        """`result`, a `CalibrationResult`."""
        (right, wrong, scores), measured = (self.parts[name].ranked() for name in ("fitted", "measured"))
        temperature, reason = None, _reason(int(right.sum()), int(wrong.sum()), int((measured[0] + measured[1]).sum()))
        if reason is None:
            temperature = fitted_temperature(scores, right, wrong)
        bins = self.parts["measured"].counts["bins"]
        after = _bins(calibrated(torch.from_numpy(measured[2].astype(np.float64)), temperature).numpy(), *measured[:2])
        return {"result": _result(temperature, bins, after, int(right.sum() + wrong.sum()), reason)}


class PointCalibration(ImageMetric):
    """Calibration of points; predictions are logits (N, C), references label ids (N,), of which negative ones are void.

    The logits of the first `POINTS_PER_IMAGE` points of each image are kept.
    """

    _max_unsummed = 2**31  # a sum is a copy of all logits

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """`result`, a `CalibrationResult`."""
        logits, labels = (self.counts[name] for name in ("logits", "labels"))
        measured = self.counts["measured"].astype(bool)
        fitted, temperature = ~measured, None
        right = logits.argmax(1) == labels
        reason = _reason(int(right[fitted].sum()), int((~right[fitted]).sum()), int(measured.sum()))
        if reason is None:
            own = logits[fitted].astype(np.float64)
            temperature = _minimised(
                lambda value: -log_softmax(own / value, 1)[np.arange(len(own)), labels[fitted]].mean()
            )
        before, after = (
            _bins(
                softmax(logits[measured].astype(np.float64) / (value or 1), 1).max(1, initial=0),
                right[measured],
                ~right[measured],
            )
            for value in (None, temperature)
        )
        return {"result": _result(temperature, before, after, int(fitted.sum()), reason)}

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {
            "logits": np.zeros((0, self.num_labels), np.float32),
            "labels": np.zeros(0, np.int64),
            "measured": np.zeros(0, np.uint8),
        }

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        logits, labels = torch.as_tensor(prediction).float().cpu().numpy(), np.asarray(reference).astype(np.int64)
        kept = np.flatnonzero(labels >= 0)[:POINTS_PER_IMAGE]
        return {
            "logits": logits[kept],
            "labels": labels[kept],
            "measured": np.full(len(kept), is_measured(image_id), np.uint8),
        }

    def _sum(self, counts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([each[name] for each in counts]) for name in counts[0]}


def fitted_temperature(scores: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """The temperature with the lowest Brier score: the mean square of confidence less 1 (right) or 0 (wrong).

    Args:
        scores: (n,) in [0, 1].
        right, wrong: (n,) how many answers with this score were right and wrong; at least one is.
    """
    logits = logit(np.clip(scores.astype(np.float64), CERTAIN, 1 - CERTAIN))

    # Not the likelihood: class scores of overlapping queries add up to more than 1 and are cut there, also where they
    # are wrong, and a few wrong answers with a score of 1 would alone decide about the temperature.
    def loss(temperature: float) -> float:
        confidence = expit(logits / temperature)
        return float((right * (1 - confidence) ** 2 + wrong * confidence**2).sum() / (right + wrong).sum())

    return _minimised(loss)


def _minimised(loss: Callable[[float], float]) -> float:
    found = minimize_scalar(lambda value: loss(math.exp(value)), bounds=tuple(map(math.log, BOUNDS)), method="bounded")
    return round(float(math.exp(found.x)), 6)


def _reason(right: int, wrong: int, measured: int) -> str | None:
    """Why there is no temperature, or `None`."""
    if not right + wrong or not measured:
        return "too few images: their ids must fall in both halves, and have answers"
    if not right or not wrong:
        return f"all {right + wrong} answers of the first half are {'right' if right else 'wrong'}"
    return None


def _bins(confidence: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(NUM_BINS, 3) answers, sums of confidences, and right answers; bins are closed above."""
    index = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    total = right.astype(np.float64) + wrong
    columns = (total, confidence * total, right.astype(np.float64))
    return np.stack([np.bincount(index, weights, minlength=NUM_BINS) for weights in columns], axis=1)


def _result(
    temperature: float | None, before: np.ndarray, after: np.ndarray, fitted: int, reason: str | None
) -> CalibrationResult:
    ece, ece_calibrated = (
        None if math.isnan(error) else error for error in map(expected_calibration_error, (before, after))
    )
    return CalibrationResult(
        temperature,
        ece,
        ece_calibrated,
        fitted,
        int(before[:, 0].sum()),
        reliability_diagram(before),
        reliability_diagram(after),
        reason,
    )


_PROCESSORS = ("EoMTImageProcessor", "ViTPImageProcessor", "ViTPFusionImageProcessor")  # that have a temperature


def temperature_file(folder: str | PathLike[str]) -> Path:
    """The file of a model's folder that its temperature is stored in.

    Raises:
        ValueError: there is none, or it belongs to an image processor that has no temperature.
    """
    path = Path(folder) / PROCESSOR
    if not path.is_file():
        raise ValueError(f"{folder} has no {PROCESSOR} to store a temperature in; name the folder of a model")
    kind = read_table(str(path)).get("image_processor_type")
    if kind not in _PROCESSORS:
        raise ValueError(
            f"{path} is of type {kind!r}, which has no temperature; save the model with this package's processor, "
            f"{' or '.join(_PROCESSORS)}"
        )
    return path


def save_temperature(folder: str | PathLike[str], temperature: float) -> Path:
    """Store a temperature in the image processor of a model's folder, and return the file; errors as above."""
    path = temperature_file(folder)
    write_json(path, {**read_table(str(path)), "temperature": temperature})
    return path


def calibration_lines(result: CalibrationResult) -> list[str]:
    """The result as text."""
    measured = "-" if result.ece is None else f"{100 * result.ece:.2f}"
    lines = [f"Calibration: ECE {measured} % of {result.measured:,} answers of one half of the images"]
    if result.temperature is None or result.ece_calibrated is None:
        return [*lines, f"  no temperature: {result.undefined}"]
    lines.append(
        f"  {100 * result.ece_calibrated:.2f} % with the temperature {result.temperature:.3f}, found on "
        f"{result.fitted:,} answers of the other half"
    )
    if result.temperature <= BOUNDS[0] * 1.01 or result.temperature >= BOUNDS[1] / 1.01:
        lines.append(f"  (the temperature is at its limit of {BOUNDS[0]:g} to {BOUNDS[1]:g}, so the scores say little)")
    elif result.ece is not None and result.ece_calibrated > result.ece:
        lines.append("  (the temperature made it worse: keep the scores as they are, or measure on more images)")
    return lines


def plot_reliability(path: Path, result: CalibrationResult, title: str = "") -> None:
    """Draw the reliability diagrams before and after.

    Raises:
        ValueError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(8.4, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    sides = (("as it is", result.ece, result.reliability), ("", result.ece_calibrated, result.reliability_calibrated))
    for position, (name, error, rows) in enumerate(sides, start=1):
        axes = figure.add_subplot(1, 2, position)
        name = name or (f"temperature {result.temperature:.3g}" if result.temperature else "no temperature")
        axes.set_title(name if error is None else f"{name}: ECE {100 * error:.2f} %", fontsize=11)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        filled = [row for row in rows if row["count"]]
        total = sum(row["count"] for row in filled)
        for row in filled:
            width = row["upper"] - row["lower"]
            # Pale bars hold few answers, which matter as little for the error.
            opacity = 0.25 + 0.75 * min(1.0, len(rows) * row["count"] / total)
            axes.bar(row["lower"], row["accuracy"], width, align="edge", color="tab:blue", alpha=opacity)
            axes.plot([row["confidence"]], [row["accuracy"]], marker="o", markersize=3, color="black")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share of right answers", aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
    with writing(path) as partial:
        figure.savefig(partial)
