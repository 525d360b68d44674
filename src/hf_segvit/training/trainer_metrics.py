"""Scores for `EoMTTrainer`: `SegmentationScores` computes panoptic quality or mean IoU while `Trainer` evaluates.

Scores are at the resolution of the batches, crops and padding included, which is quick and good for watching;
`hf-segvit evaluate` follows the protocol of the papers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from ..metrics.accumulation import ImageMetric
from ..metrics.mean_iou import MeanIoU
from ..metrics.panoptic_quality import PanopticQuality

TASKS = ("panoptic", "semantic")


class SegmentationScores:
    """A `compute_metrics` for `EoMTTrainer`, with `batch_eval_metrics=True` among the training arguments.

    Args:
        processor: an `EoMTImageProcessor`, for its post-processing and its stuff classes.
        num_labels: classes C.
        task: "panoptic" or "semantic"; by default the processor's.

    Raises:
        ValueError: the task has no scores here.
    """

    def __init__(self, processor: Any, num_labels: int, task: str | None = None) -> None:
        self.task = task or processor.task
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no scores here; choose one of {', '.join(TASKS)}")
        self.processor, self.num_labels = processor, num_labels
        self.metric = self._fresh()

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Count a batch; the scores, in [0, 1], once it is the last one."""
        class_logits, mask_logits = (torch.as_tensor(logits) for logits in prediction.predictions[:2])
        maps, labels = (torch.as_tensor(label) for label in prediction.label_ids)
        outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        sizes = [tuple(maps.shape[1:])] * len(maps)
        if self.task == "semantic":
            answers = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            references: list[Any] = [_semantic_map(*pair) for pair in zip(maps, labels, strict=True)]
        else:
            answers = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
            references = [_panoptic_reference(*pair) for pair in zip(maps, labels, strict=True)]
        self.metric.add_batch(predictions=answers, references=references)
        if not compute_result:
            return {}
        result = self.metric.compute()
        self.metric = self._fresh()
        return {name: value for name, value in result.items() if isinstance(value, float)}

    def _fresh(self) -> ImageMetric:
        if self.task == "semantic":
            return MeanIoU(self.num_labels)
        return PanopticQuality(self.num_labels, self.processor.stuff_classes or [])


def _semantic_map(segment_map: Tensor, labels: Tensor) -> Tensor:
    """Label ids (H, W) of a map of places, -1 void."""
    return torch.where(segment_map < 0, -1, labels[segment_map.clamp(min=0)])


def _panoptic_reference(segment_map: Tensor, labels: Tensor) -> dict[str, Any]:
    places = [place for place in segment_map.unique().tolist() if place >= 0]
    rows = [{"id": place, "label_id": int(labels[place]), "is_crowd": False} for place in places]
    return {"segmentation": segment_map, "segments_info": rows}
