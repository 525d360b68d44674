"""Pictures in, answers out in the form that the metrics take.

`Predictor` asks a model for one task; `load_predictor` loads one: ours, or any of Transformers' models for universal
segmentation (Mask2Former, MaskFormer, OneFormer, EoMT), whose peculiarities it hides.

H W pixels of the picture as it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor, PreTrainedConfig

from ..model_loading import SEGMENTATION_TYPES, load_segmentation_model
from ..models.image_post_processing import SegmentationPostProcessing
from ..segmentation import served_task


class Predictor:
    """A model with its image processor, asked for one task.

    Args:
        model: any model whose outputs have `class_queries_logits` and `masks_queries_logits`.
        processor: the image processor that belongs to it.
        task: `panoptic`, `instance` or `semantic`.
        device: where to compute.
        threshold: score that a panoptic segment needs; `None`: the processor's own value. Of instances all are kept,
            as average precision ranks them.
        stuff_classes: label ids whose panoptic segments are merged, where the processor stores none.

    Raises:
        ValueError: the checkpoint cannot do the task.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        task: str,
        device: str | torch.device = "cpu",
        threshold: float | None = None,
        stuff_classes: Sequence[int] = (),
    ) -> None:
        self.task = served_task(processor, task)
        self.model, self.processor = model.eval().to(device), processor
        self.device, self.threshold, self.stuff_classes = torch.device(device), threshold, list(stuff_classes)
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
        self._is_ours = isinstance(processor, SegmentationPostProcessing)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[Any]:
        """Answer a batch, all in one forward pass.

        Returns:
            For each picture what the metric of the task takes: a label map (H, W), or `segmentation` and
            `segments_info`; tensors are on the CPU.

        Raises:
            ValueError: a picture cannot be brought to the model's input.
        """
        inputs = self._inputs(list(pictures)).to(self.device)
        outputs = self.model(**inputs)
        sizes = [(picture.height, picture.width) for picture in pictures]
        if self.task == "semantic":
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            return [label_map.cpu() for label_map in maps]
        if self.task == "instance":
            form = {"return_coco_annotation": True} if self._is_ours else {"return_binary_maps": True}
            answers = self.processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=sizes, **form
            )
            return [_on_cpu(answer) for answer in answers]
        settings: dict[str, Any] = {} if self.threshold is None else {"threshold": self.threshold}
        if not self._is_ours:
            settings["label_ids_to_fuse"] = set(self.stuff_classes)
        elif self.processor.stuff_classes is None:
            settings["stuff_classes"] = self.stuff_classes
        answers = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **settings)
        return [_one_row_per_segment(_on_cpu(answer)) for answer in answers]

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        if getattr(self.model.config, "model_type", None) == "oneformer":
            return self.processor(pictures, task_inputs=[self.task] * len(pictures), return_tensors="pt")
        return self.processor(images=pictures, return_tensors="pt")


def load_predictor(
    source: str,
    *,
    task: str,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    threshold: float | None = None,
    stuff_classes: Sequence[int] = (),
) -> Predictor:
    """Load a checkpoint for evaluation.

    Args:
        source: a folder, or the id of a Hub repository.
        task: see `Predictor`, as are the other arguments.
        device: where to compute.
        revision: branch, tag or commit of the repository.
        threshold: score that a panoptic segment needs.
        stuff_classes: label ids whose segments are merged.

    Raises:
        ValueError: it cannot be loaded, is no model for universal segmentation, or cannot do the task.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    except OSError:
        model_type = None  # load_segmentation_model says what is wrong
    if model_type is None or model_type in SEGMENTATION_TYPES:
        model, processor = load_segmentation_model(source, revision=revision)
    else:
        try:
            model = AutoModelForUniversalSegmentation.from_pretrained(source, revision=revision)
            loader = AutoProcessor if model_type == "oneformer" else AutoImageProcessor
            processor = loader.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load {source}, a model of type {model_type!r}, for universal segmentation: {error}"
            ) from error
    return Predictor(model, processor, task=task, device=device, threshold=threshold, stuff_classes=stuff_classes)


def _on_cpu(answer: Mapping[str, Any]) -> dict[str, Any]:
    segmentation = answer["segmentation"]
    return {**answer, "segmentation": segmentation.cpu() if hasattr(segmentation, "cpu") else segmentation}


def _one_row_per_segment(answer: dict[str, Any]) -> dict[str, Any]:
    """Drop the rows of ids that have no pixel or a row already.

    Transformers' processors write a row for every query that they fuse into a segment, and void as 0.
    """
    present = set(answer["segmentation"].unique().long().tolist())
    rows = {row["id"]: row for row in reversed(answer["segments_info"]) if row["id"] in present}
    kept = [row for row in answer["segments_info"] if rows.get(row["id"]) is row]
    return {**answer, "segments_info": kept}
