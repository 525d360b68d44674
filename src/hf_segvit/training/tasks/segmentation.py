"""Training on images with segments, whichever model: data, batches, scores and drawings.

`SegmentationTask` reads the recipe's data, brings it to the model as `pixel_values`, `mask_labels` and `class_labels`,
and scores as `hf-segvit evaluate` does. What is left to a model's own task is to build the model and its loss: that of
EoMT is in eomt.py, and docs/extending.md has one for a linear probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...data.augmentation import AugmentedDataset, augmentation
from ...data.collation import MaskCollator, binary_masks, normalize_pixels, placed_pixels
from ...data.reading import DataDescription, describe, load_segmentation_dataset
from ...drawing.segments import draw_segments
from ...evaluation import evaluate
from ...evaluation.tasks import evaluation_task
from ...inference.segmenter import Segmenter
from ...lookup import import_object, is_import_path
from ...metrics.accumulation import METRIC_METHODS
from ...models.image_decoding import to_rgb
from ...models.image_processing_eomt import EoMTImageProcessor
from ...models.image_processing_plain_vit import unit_normalization
from ..declarations import SegmentationDeclaration
from ..derivation import augmentation_name, image_size
from ..recipe import Recipe, cache_folder
from . import TrainingSamples, TrainingTask, side_by_side, validation_split


class SegmentationTask(SegmentationDeclaration, TrainingTask):
    """Data and scores of panoptic, instance or semantic segmentation; see `TrainingTask` for the methods.

    Attributes:
        metrics: the recipe's classes of further metrics, see `evaluate`.
        size: (height, width) of training images; `build_model` sets that of the model.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.headline = evaluation_task(recipe.task, 1).headline
        self.metrics = [import_object(path, "metrics", METRIC_METHODS) for path in recipe.metrics]
        self.size: tuple[int, int] = image_size(recipe)
        self._train: Any = None
        self._validation: Any = None

    def new_processor(self, **kept: Any) -> EoMTImageProcessor:
        """An image processor for the recipe's task, the size of the images and the classes of the data.

        Args:
            kept: its settings that training takes over from where it starts, such as `image_mean`.
        """
        description = self.description
        return EoMTImageProcessor(
            task=self.recipe.task,
            size={"height": self.size[0], "width": self.size[1]},
            stuff_classes=description.stuff_classes if self.recipe.task == "panoptic" else None,
            num_labels=len(description.id2label),
            **kept,
        )

    @property
    def labels(self) -> dict[str, Any]:
        """The classes of the data as fields of a model's configuration."""
        id2label = self.description.id2label
        return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}

    def train_samples(self) -> TrainingSamples:
        """The training images, augmented as the recipe says."""
        recipe = self.recipe
        name, options = augmentation_name(recipe), recipe.augmentation_options
        if not is_import_path(name):  # a class of one's own need not know of the device
            options = {"scale_later": self.device.type != "cpu", **options}
        augment = augmentation(name, self.size, **options)
        return AugmentedDataset(self._training_data(), augment, seed=recipe.seed, cache=cache_folder(recipe))

    def training_datasets(self) -> Sequence[Any]:
        """The recipe's."""
        return [self._training_data()]

    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """Batches for the model; for a GPU, pixels and masks are finished there."""
        return MaskCollator(
            *unit_normalization(vars(processor)),
            with_loss_mask=self.recipe.loss_mask,
            on_device=device.type != "cpu",
        )

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Finish what the collator left to the device."""
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
        """The metrics of the recipe's task on the validation data, and those that the recipe adds."""
        dataset, description = self.validation_data(limit)
        segmenter = self._segmenter(model, processor, device, description)
        stuff_classes = description.stuff_classes
        result = evaluate(segmenter, dataset, description.id2label, stuff_classes=stuff_classes, metrics=self.metrics)
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    @property
    def score_names(self) -> Sequence[str]:
        """Those of the metrics; some may be undefined on the data, such as that of stuff where there is none."""
        added = [metric(id2label={0: "0"}, stuff_classes=[]) for metric in self.metrics]
        metrics = [evaluation_task(self.recipe.task, 1).new_metric(), *added]
        values = [pair for metric in metrics for pair in metric.compute().items()]
        return [name for name, value in values if isinstance(value, float)]

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """For each image a strip of image, truth and answer."""
        dataset, description = self.validation_data(count)
        segmenter = self._segmenter(model, processor, device, description)
        task = evaluation_task(self.recipe.task, len(description.id2label))
        strips = []
        for index in range(len(dataset)):
            entry = dataset[index]
            image = to_rgb(entry["image"])
            (answer,) = segmenter.answers([image])
            size = (image.height, image.width)
            truth = draw_segments(image, *task.segments(task.reference(entry), size), description.id2label)
            drawing = draw_segments(image, *task.segments(answer, size), segmenter.id2label)
            strips.append(side_by_side([image, truth, drawing]))
        return strips

    def validation_name(self) -> dict[str, str]:
        """What the scores are of."""
        recipe = self.recipe
        split = self.validation_data(None)[1].split
        return {"task": recipe.task, "dataset": str(recipe.val_data or recipe.data), "split": recipe.val_split or split}

    @property
    def description(self) -> DataDescription:
        """Classes of the training data."""
        return describe(self._training_data()) if self.published is None else self.published[0]

    def validation_data(self, limit: int | None) -> tuple[Any, DataDescription]:
        """The validation data, or its first images, and what its classes are."""
        if self._validation is None:
            recipe = self.recipe
            spec = recipe.val_data or recipe.data
            split = recipe.val_split or validation_split(spec)
            dataset = load_segmentation_dataset(spec, split=split, task=recipe.task)
            self._validation = (dataset, describe(dataset))
        dataset, description = self._validation
        return (dataset if limit is None else dataset.select(range(min(limit, len(dataset))))), description

    def _segmenter(self, model: Any, processor: Any, device: torch.device, data: DataDescription) -> Segmenter:
        return Segmenter(
            model,
            processor,
            task=self.recipe.task,
            device=device,
            stuff_classes=data.stuff_classes,
            data_labels=data.id2label,
        )

    def _training_data(self) -> Any:
        if self._train is None:
            recipe = self.recipe
            if recipe.data is None:
                raise ValueError("the recipe names no data; add data=FORMAT:PATH, such as data=coco:/data/coco")
            self._train = load_segmentation_dataset(recipe.data, split=recipe.train_split, task=recipe.task)
        return self._train
