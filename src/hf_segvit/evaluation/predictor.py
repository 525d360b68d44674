"""Images in, answers out in the form that the metrics take.

`Predictor` asks a model for one task; `load_predictor` loads one: ours, any of Transformers' models for universal
segmentation (Mask2Former, MaskFormer, OneFormer, EoMT), whose peculiarities it hides, or one of them joined with a
ViT-P. `AlphaPredictor` answers with several weights of the ViT-P at once.

H W pixels of the image as it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..inference.loading import is_fused, load_fused_model, load_universal_model, with_alpha
from ..inference.segmenter import image_batches, refuse_views, served_task
from ..inference.views import PLAIN, View, Views, ask_views, merge_views, patch_size_of
from ..models.class_fusion import check_alpha
from ..models.image_post_processing import SegmentationPostProcessing
from ..models.label_spaces import match_labels
from ..models.segment_masks import instance_segments
from .oracle import mask_owners, sure_outputs
from .tasks import MaskedAnswer

_ABOVE_ZERO = 1e-12  # a score: classes of which a query is sure that they are wrong have 0


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
        data_labels: classes of the data set that `stuff_classes` numbers; `None` where these are the model's own ids.
        views: of each image, for semantic segmentation.

    Raises:
        ValueError: the checkpoint cannot do the task, views are given for another than semantic segmentation, or the
            data set has another number of classes.
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
        data_labels: Mapping[int, str] | None = None,
        views: Views = PLAIN,
    ) -> None:
        self.task = served_task(processor, task)
        refuse_views(self.task, views)
        self.model, self.processor = model.eval().to(device), processor
        self.device, self.threshold, self.views = torch.device(device), threshold, views
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
        if data_labels is not None:
            stuff_classes = match_labels(self.id2label, data_labels).model_ids(stuff_classes)
        self.stuff_classes = list(stuff_classes)
        self._is_ours = isinstance(processor, SegmentationPostProcessing)
        self._is_oneformer = getattr(model.config, "model_type", None) == "oneformer"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[Any]:
        """Answer a batch, all in one forward pass where the processor can.

        Returns:
            For each image what the metric of the task takes: a label map (H, W), or `segmentation` and
            `segments_info`; tensors are on the CPU.

        Raises:
            ValueError: an image cannot be brought to the model's input.
        """
        return [
            answer for batch in image_batches(self.processor, images) for answer in self._answers(*self._ask(batch))
        ]

    @torch.inference_mode()
    def with_masks(self, images: Sequence[Image.Image]) -> list[Any]:
        """Answer a batch, each answer with the masks that an oracle would label; otherwise as a call.

        Returns:
            For each image a `MaskedAnswer`.
        """
        answers: list[Any] = []
        for batch in image_batches(self.processor, images):
            asked = self._ask(batch)
            answers += map(MaskedAnswer, self._answers(*asked), self._masks(*asked))
        return answers

    def _ask(self, images: list[Image.Image]) -> tuple[list[View], list[tuple[int, int]]]:
        """The model's outputs for each view, and (height, width) of the images."""
        views = ask_views(self._outputs, self.processor, images, self.views, patch_size_of(self.model))
        return views, [(image.height, image.width) for image in images]

    def _outputs(self, images: list[Image.Image], **settings: Any) -> Any:
        inputs = self.inputs(images, **settings).to(self.device)
        outputs = self.model(**inputs, **self._model_settings())
        if self._is_oneformer:
            outputs["input_sizes"] = torch.tensor(inputs["pixel_values"].shape[-2:]).expand(len(images), 2)
        return outputs

    def inputs(self, images: list[Image.Image], **settings: Any) -> Any:
        """The processor's output for images, on the CPU, with further settings for it."""
        if self._is_oneformer:
            settings["task_inputs"] = [self.task] * len(images)
        return self.processor(images=images, return_tensors="pt", **settings)

    def _model_settings(self) -> dict[str, Any]:
        if not is_fused(self.model):
            return {}
        threshold = self.processor.threshold if self.threshold is None else self.threshold
        return {"task": self.task, "pruning_threshold": threshold if self.task == "panoptic" else None}

    def _answers(self, views: list[View], sizes: list[tuple[int, int]], change: Any = None) -> list[Any]:
        """Post-processed outputs of images, changed before that if a function is given."""
        if self.task == "semantic":
            return [label_map.cpu() for label_map in merge_views(self.processor, views, sizes, change)]
        outputs = views[0].outputs if change is None else change(views[0].outputs)
        if self.task == "instance":
            return self._instances(outputs, sizes, 0.0)
        stored = self.processor.stuff_classes if self._is_ours else None
        return self._panoptic(outputs, sizes, stored or self.stuff_classes)

    def _masks(self, views: list[View], sizes: list[tuple[int, int]]) -> list[Any]:
        """The masks of images for the oracle; the same whatever the weight of a classifier."""
        if self.task == "semantic":
            return mask_owners(self.processor, views, sizes)
        outputs = sure_outputs(views[0].outputs)
        if self.task == "instance":
            return self._instances(outputs, sizes, _ABOVE_ZERO)
        return self._panoptic(outputs, sizes, [])  # what is one by its true class is merged when that is known

    def _panoptic(
        self, outputs: Any, sizes: list[tuple[int, int]], stuff_classes: Sequence[int]
    ) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {} if self.threshold is None else {"threshold": self.threshold}
        settings["label_ids_to_fuse"] = list(stuff_classes) if self._is_ours else set(stuff_classes)
        answers = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **settings)
        return [_one_row_per_segment(_on_cpu(answer)) for answer in answers]

    def _instances(self, outputs: Any, sizes: list[tuple[int, int]], threshold: float) -> list[dict[str, Any]]:
        if self._is_oneformer:
            # Its processor takes logits for probabilities, and gives masks that do not overlap; the official code's
            # rule, which is ours too, takes the best pairs of query and class as they are.
            height, width = outputs["input_sizes"][0].tolist()
            answers = instance_segments(
                outputs.class_queries_logits,
                outputs.masks_queries_logits,
                sizes,
                input_size=(height, width),
                threshold=threshold,
                return_coco_annotation=True,
            )
        else:
            form = {"return_coco_annotation": True} if self._is_ours else {"return_binary_maps": True}
            answers = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=sizes, **form
            )
        return [_on_cpu(answer) for answer in answers]


class AlphaPredictor(Predictor):
    """A fused model, asked once and fused with several alphas.

    Args:
        predictor: whose model is a fused one; it can go on being used.
        alphas: weights of ViT-P in [0, 1]; 0 is the generator alone.

    Raises:
        ValueError: the model is not fused, or an alpha is outside [0, 1].
    """

    def __init__(self, predictor: Predictor, alphas: Sequence[float]) -> None:
        super().__init__(
            predictor.model,
            predictor.processor,
            task=predictor.task,
            device=predictor.device,
            threshold=predictor.threshold,
            stuff_classes=predictor.stuff_classes,
            views=predictor.views,
        )
        if not is_fused(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no classifier whose weight alpha could be; name one with --classifier"
            )
        for alpha in alphas:
            check_alpha(alpha)
        self.alphas = list(alphas)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Any]]:
        """Answer a batch.

        Returns:
            For each image the answers with each alpha, in the form of `Predictor`'s.
        """
        rows: list[list[Any]] = []
        for batch in image_batches(self.processor, images):
            rows += self._by_alpha(*self._ask(batch))
        return rows

    @torch.inference_mode()
    def with_masks(self, images: Sequence[Image.Image]) -> list[list[Any]]:
        """As a call, but for `MaskedAnswer`s, whose masks are the same for each alpha."""
        rows: list[list[Any]] = []
        for batch in image_batches(self.processor, images):
            asked = self._ask(batch)
            for answers, masks in zip(self._by_alpha(*asked), self._masks(*asked), strict=True):
                rows.append([MaskedAnswer(answer, masks) for answer in answers])
        return rows

    def _by_alpha(self, views: list[View], sizes: list[tuple[int, int]]) -> list[list[Any]]:
        """For each image the answers with each alpha."""
        columns = [self._answers(views, sizes, self._change(alpha)) for alpha in self.alphas]
        return [list(answers) for answers in zip(*columns, strict=True)]

    def _model_settings(self) -> dict[str, Any]:
        # Alpha 1 has ViT-P asked; all queries are, so that its answers serve any alpha.
        return {"task": self.task, "alpha": 1.0}

    def _change(self, alpha: float) -> Callable[[Any], Any]:
        return lambda outputs: with_alpha(self.model, outputs, alpha)


def load_predictor(
    source: str,
    *,
    task: str,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    threshold: float | None = None,
    stuff_classes: Sequence[int] = (),
    data_labels: Mapping[int, str] | None = None,
    views: Views = PLAIN,
    classifier: str | None = None,
    alpha: float | None = None,
    label_mismatch: str = "error",
) -> Predictor:
    """Load a checkpoint for evaluation.

    Args:
        source: a folder, or the id of a Hub repository.
        task: see `Predictor`, as are the other arguments.
        device: where to compute.
        revision: branch, tag or commit of the repository.
        threshold: score that a panoptic segment needs.
        stuff_classes: label ids whose segments are merged.
        data_labels: classes of the data set that `stuff_classes` numbers.
        views: of each image, for semantic segmentation.
        classifier: folder or Hub id of a ViT-P that corrects the labels.
        alpha: its weight; `None`: 0.4, or what a fused checkpoint says.
        label_mismatch: `"keep"` where ViT-P knows other classes, see `ViTPFusionConfig`.

    Raises:
        ValueError: it cannot be loaded, is no model for universal segmentation, or cannot do the task.
    """
    if classifier is None and alpha is None:
        model, processor = load_universal_model(source, revision=revision)
    else:
        model, processor = load_fused_model(
            source, classifier, alpha=alpha, label_mismatch=label_mismatch, revision=revision
        )
    return Predictor(
        model,
        processor,
        task=task,
        device=device,
        threshold=threshold,
        stuff_classes=stuff_classes,
        data_labels=data_labels,
        views=views,
    )


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
