"""What evaluation needs to know of each task: metric, truth, and score of one image.

`EvaluationTask` is the interface, `SegmentationTask` that of the kinds of segmentation; `evaluation_task` chooses one
by name. Label ids are those of the data set.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.entries import replace_ids
from ..lookup import suggestion
from ..metrics.boundary import BoundaryAveragePrecision, BoundaryIoU
from ..metrics.instance_masks import decoded_masks
from ..metrics.mask_average_precision import MAX_DETECTIONS, MaskAveragePrecision, cut_note, instance_records, unpack
from ..metrics.mean_iou import Absent, MeanIoU
from ..metrics.panoptic_quality import PanopticQuality, right_segments
from .calibration import HeldOutCalibration, RightAnswers


@dataclass(frozen=True)
class RichAnswer:
    """An answer as the task's metric takes it, and what further metrics take instead.

    Attributes:
        masks: what the oracle labels (see oracle.py), if it is asked.
        confidence: (H, W) of a semantic answer, for its calibration, if that is asked for.
    """

    answer: Any
    masks: Any = None
    confidence: Any = None


class EvaluationTask(ABC):
    """What a model is scored at.

    Attributes:
        headline: name of the metric that the result is judged by.
        columns: of the table by class, after the class; the first is the headline metric of the class.
    """

    name: str
    headline: str
    columns: tuple[str, ...]
    classes: Sequence[int] | None = None  # label ids that are scored; `None`: all

    @abstractmethod
    def new_metric(self) -> Any:
        """An empty metric."""

    def new_boundary_metric(self) -> Any:
        """An empty metric of the same kind that looks at outlines; tasks without one refuse."""
        raise ValueError(
            f"boundaries are scored for the tasks semantic and instance, not for {self.name}; leave them out"
        )

    @abstractmethod
    def new_calibration(self) -> Any:
        """An empty metric of how well scores are calibrated."""

    @abstractmethod
    def image_score(self, metric: Any) -> float:
        """Score of an image in [0, 1], from a metric that has seen it alone; NaN where undefined."""

    def note(self, metric: Any) -> str:
        """What readers of the metric's result must know, or ""."""
        return ""

    @abstractmethod
    def row(self, label: int, values: Mapping[str, Any], metric: Any) -> dict[str, Any]:
        """The columns of a class, from its entry in `per_class`."""


class SegmentationTask(EvaluationTask):
    """One kind of segmentation, as evaluation sees it."""

    def __init__(self, num_labels: int, stuff_classes: Sequence[int], absent: Absent) -> None:
        self.num_labels, self.stuff_classes, self.absent = num_labels, list(stuff_classes), absent

    @abstractmethod
    def reference(self, entry: Mapping[str, Any]) -> Any:
        """The truth of a data set's entry, as the metric takes it."""

    def relabel(self, prediction: Any, table: np.ndarray) -> Any:
        """The prediction with every label id replaced by its entry in the table."""
        # Model and data set may number the same classes differently, see models/label_spaces.py.
        return {**prediction, "segments_info": _relabelled_rows(prediction["segments_info"], table)}

    def relabel_both(self, answer: Any, table: np.ndarray) -> Any:
        """`relabel` of an answer and, in a `RichAnswer`, of its masks too."""
        if not isinstance(answer, RichAnswer):
            return self.relabel(answer, table)
        masks = answer.masks
        if masks is not None:
            # The masks have rows in every task, so semantic's own relabel does not fit them.
            masks = {**masks, "segments_info": _relabelled_rows(masks["segments_info"], table)}
        return RichAnswer(self.relabel(answer.answer, table), masks, answer.confidence)

    def new_calibration(self) -> HeldOutCalibration:
        """An empty metric of how well scores are calibrated."""
        return HeldOutCalibration(self.right_answers)

    @abstractmethod
    def right_answers(self, prediction: Any, reference: Any, name: str) -> RightAnswers:
        """The scores of an image's pixels or segments, which of them are right, and which do not count."""

    def segments(self, answer: Any, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """An answer (or truth) for an image of size (H, W) as an id map and its rows, to draw it."""
        rows = [dict(row) for row in answer["segments_info"]]
        return np.asarray(answer["segmentation"]).astype(np.int64), rows


class PanopticTask(SegmentationTask):
    """Panoptic quality."""

    name = "panoptic"
    headline = "pq"
    columns = ("pq", "sq", "rq", "missed", "false")

    def new_metric(self) -> PanopticQuality:
        """An empty metric."""
        # Transformers' processors write void as 0 and number segments from 1.
        return PanopticQuality(self.num_labels, self.stuff_classes, void_ids=(-1, 0))

    def reference(self, entry: Mapping[str, Any]) -> Any:
        """The truth, as the metric takes it."""
        return {"segmentation": np.asarray(entry["segment_map"]), "segments_info": entry["segments"]}

    def image_score(self, metric: PanopticQuality) -> float:
        """Panoptic quality of all segments together, whatever their class."""
        # Averaged over classes, as for a data set, one small stray segment could halve the score of an image.
        tp, fp, fn, iou = metric.counts["panoptic"][metric.chosen(self.num_labels)].sum(0)
        return _ratio(iou, tp + (fp + fn) / 2)

    def row(self, label: int, values: Mapping[str, Any], metric: Any) -> dict[str, Any]:
        """The columns of a class."""
        return {**{name: values[name] for name in ("pq", "sq", "rq")}, "missed": values["fn"], "false": values["fp"]}

    def right_answers(self, prediction: Any, reference: Any, name: str) -> RightAnswers:
        """Scores of segments; right is a true positive of panoptic quality."""
        right, counts = right_segments(prediction, reference, self.num_labels, (-1, 0), name)
        return RightAnswers(np.array([row["score"] for row in prediction["segments_info"]], float), right, ~counts)

    def segments(self, answer: Any, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """An id map and its rows."""
        id_map, rows = super().segments(answer, size)
        # The map may hold ids without rows, such as 0 for void, which cannot be drawn.
        id_map[~np.isin(id_map, [row["id"] for row in rows])] = -1
        return id_map, rows


class SemanticTask(SegmentationTask):
    """Mean intersection over union."""

    name = "semantic"
    headline = "mean_iou"
    columns = ("iou", "accuracy", "pixels", "mostly taken for")

    def new_metric(self) -> MeanIoU:
        """An empty metric."""
        return MeanIoU(self.num_labels, ignore_index=None, absent=self.absent)

    def right_answers(self, prediction: Any, reference: Any, name: str) -> RightAnswers:
        """Confidences of pixels, of a pair of label map and confidence."""
        if not isinstance(prediction, tuple):
            raise ValueError(f"{name}: calibration needs confidences of pixels, which only a Segmenter gives")
        label_map, confidence = (np.asarray(side) for side in prediction)
        return RightAnswers(np.clip(confidence, 0, 1), label_map == reference, np.asarray(reference) < 0)

    def new_boundary_metric(self) -> BoundaryIoU:
        """Boundary IoU."""
        return BoundaryIoU(self.num_labels, ignore_index=None, absent=self.absent)

    def reference(self, entry: Mapping[str, Any]) -> Any:
        """The truth, as the metric takes it."""
        labels = {row["id"]: row["label_id"] for row in entry["segments"]}
        return replace_ids(np.asarray(entry["segment_map"]), labels, f"image {entry.get('image_id')!r}")

    def relabel(self, prediction: Any, table: np.ndarray) -> Any:
        """The prediction with other label ids."""
        label_map = np.asarray(prediction).astype(np.int64)
        return np.where(label_map >= 0, table[label_map], -1)

    def image_score(self, metric: MeanIoU) -> float:
        """Mean IoU of the classes in the image."""
        return metric.compute()["mean_iou"]

    def row(self, label: int, values: Mapping[str, Any], metric: MeanIoU) -> dict[str, Any]:
        """The columns of a class."""
        columns = {"iou": values["iou"], "accuracy": values["accuracy"], "pixels": values["reference"]}
        return {**columns, "mostly taken for": mostly_taken_for(label, metric)}

    def segments(self, answer: Any, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """An id map and its rows."""
        label_map = np.asarray(answer).astype(np.int64)
        return label_map, [{"id": i, "label_id": i} for i in np.unique(label_map).tolist() if i >= 0]


class InstanceTask(SegmentationTask):
    """Average precision of masks."""

    name = "instance"
    headline = "ap"
    columns = ("ap", "ap_50", "ap_75", "ar_100", "references", "predictions")
    shown_score = 0.5  # for drawings and scores of images: what a user would see, not all that AP ranks
    max_detections = MAX_DETECTIONS

    def limit_detections(self, max_detections: int) -> None:
        """Count so many predictions of a class in an image."""
        self.max_detections = max_detections
        self.columns = ("ap", "ap_50", "ap_75", f"ar_{max_detections}", "references", "predictions")

    def new_metric(self) -> MaskAveragePrecision:
        """An empty metric."""
        return MaskAveragePrecision(self.num_labels, self.max_detections)

    def right_answers(self, prediction: Any, reference: Any, name: str) -> RightAnswers:
        """Scores of instances; right is one that matches at IoU 0.5."""
        records = instance_records(
            prediction, reference, self.num_labels, name=name, max_detections=self.max_detections
        )
        # Index 0 is all areas, and the lowest IoU threshold, 0.5.
        right, void = (unpack(records[f"prediction_{side}"])[:, 0, 0] for side in ("matched", "ignored"))
        return RightAnswers(np.clip(records["prediction_score"], 0, 1), right, void)

    def new_boundary_metric(self) -> BoundaryAveragePrecision:
        """Boundary AP."""
        return BoundaryAveragePrecision(self.num_labels, max_detections=self.max_detections)

    def note(self, metric: MaskAveragePrecision) -> str:
        """What the limit on predictions left out."""
        return cut_note(metric.counts, self.max_detections)

    def reference(self, entry: Mapping[str, Any]) -> Any:
        """The truth, as the metric takes it."""
        rows = entry["segments"]
        rles = [row.get("rle") for row in rows]  # preferred: true instances may overlap, which a map cannot hold
        if rows and all(rle is not None for rle in rles):
            return {"segmentation": rles, "segments_info": rows}
        if entry["segment_map"] is None:
            raise ValueError(f"image {entry['image_id']!r} has neither a segment map nor an rle for each segment")
        return {"segmentation": np.asarray(entry["segment_map"]), "segments_info": rows}

    def image_score(self, metric: MaskAveragePrecision) -> float:
        """F1 at IoU 0.5, of the predictions whose score reaches `shown_score`."""
        records = metric.counts
        chosen = metric.chosen(self.num_labels)
        shown = (records["prediction_score"] >= self.shown_score) & np.isin(records["prediction_label"], chosen)
        # Index 0 is all areas, and the lowest IoU threshold, 0.5.
        matched = unpack(records["prediction_matched"])[shown, 0, 0]
        ignored = unpack(records["prediction_ignored"])[shown, 0, 0]
        is_true = np.isin(records["reference_label"], chosen)
        tp, fp = (matched & ~ignored).sum(), (~matched & ~ignored).sum()
        return _ratio(2 * tp, tp + fp + records["reference_counts"][is_true, 0].sum())

    def row(self, label: int, values: Mapping[str, Any], metric: Any) -> dict[str, Any]:
        """The columns of a class."""
        return {name: values[name] for name in self.columns}

    def segments(self, answer: Any, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """An id map and its rows."""
        rows = answer["segments_info"]
        masks = decoded_masks(answer["segmentation"], rows, size)
        # Painted by rising score, so that the best lies on top.
        order = np.argsort([row.get("score", 1.0) for row in rows], kind="stable")
        id_map = np.full(size, -1, dtype=np.int64)
        drawn = []
        for index in order.tolist():
            if rows[index].get("score", 1.0) >= self.shown_score:
                id_map[masks[index]] = index
                drawn.append({**rows[index], "id": index})
        return id_map, drawn


def mostly_taken_for(label: int, metric: Any) -> int | None:
    """The wrong class that most pixels or points of a class are given, from the metric's confusion counts."""
    wrong = metric.counts["confusion"][label].copy()
    wrong[label] = 0
    # The last column of mean IoU's counts is "no class", which has no name.
    return int(wrong.argmax()) if wrong.any() and wrong.argmax() < metric.num_labels else None


def evaluation_task(
    name: str,
    num_labels: int,
    stuff_classes: Sequence[int] = (),
    absent: Absent = "exclude",
    max_detections: int | None = None,
    scored: Sequence[int] | None = None,
) -> SegmentationTask:
    """The task of a name, for a data set's classes, of which only the label ids `scored` may count."""
    classes: tuple[type[SegmentationTask], ...] = (PanopticTask, SemanticTask, InstanceTask)
    tasks = {cls.name: cls for cls in classes}
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}; {suggestion(name, tasks)}")
    task = tasks[name](num_labels, stuff_classes, absent)
    task.classes = scored
    if max_detections is not None:
        if not isinstance(task, InstanceTask):
            raise ValueError(f"max_detections={max_detections} is for the task instance, not for {name}; leave it out")
        task.limit_detections(max_detections)
    return task


def _relabelled_rows(rows: Sequence[Mapping[str, Any]], table: np.ndarray) -> list[dict[str, Any]]:
    return [{**row, "label_id": int(table[row["label_id"]])} for row in rows]


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
