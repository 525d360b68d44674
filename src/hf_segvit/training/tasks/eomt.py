"""EoMT under the training loop: model from scratch, from a backbone or from a checkpoint; data, loss and evaluation.

Masked attention follows the plan's annealing. Evaluation is that of `hf-segvit evaluate`; while masks are still being
annealed a layer is masked there where its probability is at least 0.5, so such scores are not compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data.augmentation import AugmentedDataset, augmentation
from ...data.collation import MaskCollator, binary_masks, normalize_pixels, placed_pixels
from ...data.reading import DataDescription, describe, load_segmentation_dataset
from ...drawing.segments import draw_segments
from ...evaluation import evaluate
from ...evaluation.tasks import evaluation_task
from ...hub.model_card import make_model_card
from ...inference.loading import load_segmentation_model
from ...inference.segmenter import Segmenter
from ...lookup import is_import_path
from ...models.configuration_eomt import EoMTConfig
from ...models.image_decoding import to_rgb
from ...models.image_processing_eomt import EoMTImageProcessor
from ...models.image_processing_plain_vit import unit_normalization
from ...models.mask_criterion import MaskCriterion
from ...models.modeling_eomt import EoMTForUniversalSegmentation
from ..declarations import EoMTDeclaration
from ..derivation import augmentation_name, image_size, model_fields
from ..recipe import Recipe, cache_folder
from ..start import backbone_pixel_settings, carry_over_classes, load_changed, pixel_settings
from . import TrainingSamples, TrainingTask, side_by_side, validation_split

# How answers are made of outputs; a checkpoint's own go on with it, or its scores would change without any training.
_POST_PROCESSING_SETTINGS = (
    "threshold",
    "mask_threshold",
    "overlap_mask_area_threshold",
    "instance_threshold",
    "num_instances",
)


class EoMTTask(EoMTDeclaration, TrainingTask):
    """Training of `EoMTForUniversalSegmentation`; see `TrainingTask` for the methods."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.headline = evaluation_task(recipe.task, 1).headline
        self._train: Any = None
        self._validation: Any = None
        self._size: tuple[int, int] = image_size(recipe)

    def build_model(self) -> tuple[Any, Any]:
        """The model of the recipe, with the classes of the training data, and a processor for its input size."""
        recipe, description = self.recipe, self.description
        fields = model_fields(recipe)
        if recipe.image_size is not None:
            fields["image_size"] = recipe.image_size
        labels: dict[str, Any] = {
            "id2label": description.id2label,
            "label2id": {name: index for index, name in description.id2label.items()},
        }
        kept: dict[str, Any] = {}
        if recipe.init is not None:
            model, kept = self._from_checkpoint({**fields, **labels})
        elif recipe.backbone is not None:
            kept, self.remarks = backbone_pixel_settings(recipe.backbone)
            size = fields.pop("image_size", self._size)
            model = EoMTForUniversalSegmentation.from_backbone(self.backbone, image_size=size, **fields, **labels)
        else:
            size = list(self._size) if self._size[0] != self._size[1] else self._size[0]
            model = EoMTForUniversalSegmentation(EoMTConfig(**{"image_size": size, **fields}, **labels))
        self._size = image_size(recipe, model.config)
        processor = EoMTImageProcessor(
            task=recipe.task,
            size={"height": self._size[0], "width": self._size[1]},
            stuff_classes=description.stuff_classes if recipe.task == "panoptic" else None,
            num_labels=len(description.id2label),
            **kept,
        )
        return model, processor

    def train_samples(self) -> TrainingSamples:
        """The training images, augmented as the recipe says."""
        recipe = self.recipe
        name, options = augmentation_name(recipe), recipe.augmentation_options
        if not is_import_path(name):  # a class of one's own need not know of the device
            options = {"scale_later": self.device.type != "cpu", **options}
        augment = augmentation(name, self._size, **options)
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
            prepared["pixel_values"] = placed_pixels(crops, placements, self._size)
        if prepared["pixel_values"].dtype == torch.uint8:
            prepared["pixel_values"] = normalize_pixels(prepared["pixel_values"], *unit_normalization(vars(processor)))
        if "segment_maps" in prepared:
            maps = prepared.pop("segment_maps")
            prepared["mask_labels"] = [
                binary_masks(segment_map, len(labels))
                for segment_map, labels in zip(maps, prepared["class_labels"], strict=True)
            ]
        return prepared

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Matched masks and class weights of all micro-batches and processes."""
        config = model.config
        return MaskCriterion.count_normalizers(
            [labels for batch in batches for labels in batch["class_labels"]],
            config.num_queries,
            config.no_object_weight,
            config.loss_normalization,
            device,
        )

    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its mask, dice and class terms by layer."""
        outputs = model(**batch, loss_normalizers=normalizers)
        return outputs.loss, {_curve_name(name): value for name, value in outputs.loss_dict.items()}

    def before_step(self, model: Any, step: int, plan: Any) -> dict[str, float]:
        """Anneal masked attention."""
        if plan.annealing is None:
            return {}
        probabilities = plan.annealing.probabilities(step)
        model.set_masked_attention_probabilities(probabilities)
        return {f"annealing/query layer {layer + 1}": value for layer, value in enumerate(probabilities)}

    def not_comparable_yet(self, model: Any) -> str | None:
        """Scores count once nothing is masked any more, unless masks are there to stay."""
        probabilities = model.config.masked_attention_probabilities
        if self.recipe.annealing is False or not model.config.masked_attention or not any(probabilities):
            return None
        shown = ", ".join(f"{probability:.2f}" for probability in probabilities)
        return f"masked attention is still being annealed (probabilities {shown})"

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """The metrics of the recipe's task on the validation data."""
        dataset, description = self.validation_data(limit)
        predictor = self._predictor(model, processor, device, description)
        result = evaluate(predictor, dataset, description.id2label, stuff_classes=description.stuff_classes)
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    @property
    def score_names(self) -> Sequence[str]:
        """Those of the task's metric; some may be undefined on the data, such as that of stuff where there is none."""
        values = evaluation_task(self.recipe.task, 1).new_metric().compute()
        return [name for name, value in values.items() if isinstance(value, float)]

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """For each image a strip of image, truth and answer."""
        dataset, description = self.validation_data(count)
        predictor = self._predictor(model, processor, device, description)
        task = evaluation_task(self.recipe.task, len(description.id2label))
        strips = []
        for index in range(len(dataset)):
            entry = dataset[index]
            image = to_rgb(entry["image"])
            (answer,) = predictor.answers([image])
            size = (image.height, image.width)
            truth = draw_segments(image, *task.segments(task.reference(entry), size), description.id2label)
            drawing = draw_segments(image, *task.segments(answer, size), predictor.id2label)
            strips.append(side_by_side([image, truth, drawing]))
        return strips

    def model_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """The card, with the scores and how the model was trained."""
        return make_model_card(
            model.config,
            processor,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            results=results,
            training_data=about,
            base_model=self.base_model,
        )

    def validation_name(self) -> dict[str, str]:
        """What the scores are of."""
        recipe = self.recipe
        split = self.validation_data(None)[1].split
        return {"task": recipe.task, "dataset": str(recipe.val_data or recipe.data), "split": recipe.val_split or split}

    @property
    def description(self) -> DataDescription:
        """Classes of the training data."""
        return describe(self._training_data()) if self.published is None else self.published[0]

    @property
    def data_tasks(self) -> Sequence[str]:
        """The recipe's."""
        return (self.recipe.task,)

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

    def _predictor(self, model: Any, processor: Any, device: torch.device, data: DataDescription) -> Segmenter:
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

    def _from_checkpoint(self, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A segmentation checkpoint with the fields of the recipe, and the settings of its processor that stay.

        Classes that it does not know are new.
        """
        before, processor = load_segmentation_model(
            self.recipe.init
        )  # says in one line what is wrong with a checkpoint
        model, self.remarks = load_changed(
            EoMTForUniversalSegmentation, str(self.recipe.init), before, "class_predictor.", fields
        )
        labels_before = {int(label): str(name) for label, name in (before.config.id2label or {}).items()}
        remark = carry_over_classes(model.class_predictor, before.class_predictor, fields["id2label"], labels_before)
        self.remarks += [] if remark is None else [remark]
        if self.recipe.annealing is not False and model.config.masked_attention:
            model.set_masked_attention_probabilities(1.0)
        # Task, size and labels are the recipe's and the data's, and images are scaled as in training.
        kept = {name: getattr(processor, name) for name in _POST_PROCESSING_SETTINGS}
        return model, {**pixel_settings(processor), **kept}


@functools.cache
def _curve_name(name: str) -> str:
    """`loss_mask_layer_2` as a curve in the panel of its kind."""
    _, kind, _, layer = name.split("_")
    return f"{kind} loss/prediction {int(layer) + 1}"
