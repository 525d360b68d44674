"""Train any model on images with segments: data, batches, scores, drawings.

`SegmentationTask` reads the recipe's data, makes batches of `pixel_values`, `mask_labels` and `class_labels`, and
scores as `hf-segvit evaluate` does. A derived task builds the model and computes its loss: EoMT's is in eomt.py, and
docs/extending.md has one for a linear probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...data.augmentation import AugmentedDataset, augmentation
from ...data.collation import MaskCollator, binary_masks, normalize_pixels, placed_pixels
from ...data.reading import DataDescription
from ...drawing.segments import class_legend, draw_segments
from ...evaluation import evaluate
from ...evaluation.tasks import evaluation_task
from ...inference.segmenter import Segmenter
from ...lookup import import_object, is_import_path
from ...metrics.accumulation import METRIC_METHODS
from ...models.image_decoding import image_size, shown_rgb, to_pixels
from ...models.image_processing_eomt import EoMTImageProcessor
from ...models.image_processing_plain_vit import unit_normalization
from ..declarations import SegmentationDeclaration
from ..derivation import augmentation_name
from ..recipe import Recipe, cache_folder
from . import DatasetTask, TrainingSamples, side_by_side


class SegmentationTask(SegmentationDeclaration, DatasetTask):
    """Data and scores of panoptic, instance or semantic segmentation; see `TrainingTask` for the methods.

    Attributes:
        metrics: classes of the recipe's additional metrics.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.headline = evaluation_task(recipe.task, 1).headline
        self.metrics = [import_object(path, "metrics", METRIC_METHODS) for path in recipe.metrics]
        self._augmentation()  # refuses wrong options before data are read

    def new_processor(self, **kept: Any) -> EoMTImageProcessor:
        """An image processor for the recipe's task, size and classes, with settings of the starting model."""
        description = self.description
        return EoMTImageProcessor(
            task=self.recipe.task,
            size={"height": self.size[0], "width": self.size[1]},
            stuff_classes=description.stuff_classes if self.recipe.task == "panoptic" else None,
            num_labels=len(description.id2label),
            **{**kept, **self.file_settings},
        )

    def train_samples(self) -> TrainingSamples:
        """The augmented training images."""
        recipe, data = self.recipe, self.training_data
        return AugmentedDataset(data, self._training_augmentation(), seed=recipe.seed, cache=cache_folder(recipe))

    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """Batches of masks, finished on the device if it is a GPU."""
        # A GPU scales, normalises and unpacks masks faster than the workers, and less has to be copied to it.
        return MaskCollator(
            *unit_normalization(vars(processor)),
            with_loss_mask=self.recipe.loss_mask,
            on_device=device.type != "cpu",
        )

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Place crops, normalise pixels and make binary masks, if the collator left them to the device."""
        prepared = dict(batch)
        if "crops" in prepared:
            crops, placements = prepared.pop("crops"), prepared.pop("placements")
            prepared["pixel_values"] = placed_pixels(crops, placements, self.size)
        if prepared["pixel_values"].dtype == torch.uint8:
            prepared["pixel_values"] = normalize_pixels(prepared["pixel_values"], *unit_normalization(vars(processor)))
        if "segment_maps" in prepared:
            maps = prepared.pop("segment_maps")
            prepared["mask_labels"] = [
                binary_masks(segment_map, len(labels))
                for segment_map, labels in zip(maps, prepared["class_labels"], strict=True)
            ]
        return prepared

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Finite scores of the task's metric and of the recipe's `metrics`."""
        dataset, description = self.validation_data(limit)
        segmenter = self._segmenter(model, processor, device, description)
        stuff_classes = description.stuff_classes
        settings = {"stuff_classes": stuff_classes, "metrics": self.metrics, "progress": self.progress}
        result = evaluate(segmenter, dataset, description.id2label, **settings)
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
        # NaN where the truth has nothing to count, such as no stuff: it must not be the best score.
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    @property
    def score_names(self) -> Sequence[str]:
        """Names of all metrics; some may be undefined on the data, such as that of stuff if there is none."""
        # Empty metrics already compute all names, and that needs no data.
        added = [metric(id2label={0: "0"}, stuff_classes=[]) for metric in self.metrics]
        metrics = [evaluation_task(self.recipe.task, 1).new_metric(), *added]
        values = [pair for metric in metrics for pair in metric.compute().items()]
        return [name for name, value in values if isinstance(value, float)]

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """Strips of image, true segments and predicted segments."""
        dataset, description = self.validation_data(count)
        segmenter = self._segmenter(model, processor, device, description)
        task = evaluation_task(self.recipe.task, len(description.id2label))
        strips = []
        for index in range(len(dataset)):
            entry = dataset[index]
            image = to_pixels(entry["image"], settings=segmenter.image_settings)
            (answer,) = segmenter.answers([image])
            size = image_size(image)
            sides = [
                (*task.segments(task.reference(entry), size), description.id2label),
                (*task.segments(answer, size), segmenter.id2label),
            ]
            entries = {name: color for _, rows, names in sides for name, color in class_legend([rows], names).items()}
            panels = [shown_rgb(image), *(draw_segments(image, *side) for side in sides)]
            strips.append(side_by_side(panels, entries))
        return strips

    def _training_augmentation(self) -> Any:
        """Hook for tasks that change images after the augmentation."""
        return self._augmentation()

    def _augmentation(self, **others: Any) -> Any:
        name, options = augmentation_name(self.recipe), self.recipe.augmentation_options
        if not is_import_path(name):  # an imported class need not have this option
            options = {"scale_later": self.device.type != "cpu", **options, **others}
        return augmentation(name, self.size, **options)

    def _segmenter(self, model: Any, processor: Any, device: torch.device, data: DataDescription) -> Segmenter:
        task, stuff_classes, labels = self.recipe.task, data.stuff_classes, data.id2label
        return Segmenter(model, processor, task=task, device=device, stuff_classes=stuff_classes, data_labels=labels)
