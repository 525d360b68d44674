"""ViT-P under the training loop: a point classifier from scratch, from a backbone or from a checkpoint.

Prompts are drawn as the recipe's `points` say, also from a mixture of data sets. Training in two
stages, such as boxes first and points then, are two recipes: the second starts with `init` from the model of the first,
whose head is kept where the classes are the same and made anew where they are not or `reset_head` asks for it. The loss
is the mean cross-entropy of the labelled prompts of all processes and micro-batches.

`PointSettings`, at the end, is the recipe's `points` as `point_settings` reads them. Their keys are declared in
../recipe.py; `hf-segvit train --fields` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...data.augmentation import AugmentedDataset, augmentation
from ...data.collation import PointCollator, normalize_pixels
from ...data.mixture import MixedDataset, MixturePart
from ...data.prompts import IGNORED
from ...data.reading import DataDescription, available_tasks, describe, load_segmentation_dataset
from ...drawing.segments import draw_segments
from ...evaluation.points import evaluate_points, point_source
from ...hub.model_card import make_model_card
from ...inference.loading import load_point_classifier
from ...inference.point_classifier import PointClassifier
from ...inference.segmenter import Segmenter
from ...metrics.point_accuracy import PointAccuracy
from ...models.configuration_vit_p import ViTPConfig
from ...models.image_decoding import to_rgb
from ...models.image_processing_plain_vit import unit_normalization
from ...models.image_processing_vit_p import ViTPImageProcessor
from ...models.modeling_vit_p import ViTPForPointClassification
from ..declarations import PointOptions, PromptOptions, ViTPDeclaration
from ..derivation import augmentation_name, image_size, model_fields
from ..fields import checked
from ..recipe import Recipe, cache_folder
from ..start import backbone_pixel_settings, load_changed, pixel_settings
from . import TrainingSamples, TrainingTask, side_by_side, validation_split

_EVALUATION_BATCH = 8  # images


class ViTPTask(ViTPDeclaration, TrainingTask):
    """Training of `ViTPForPointClassification`; see `TrainingTask` for the methods."""

    headline = "top_1"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        for name in ("criterion", "metrics"):
            if getattr(recipe, name):
                raise ValueError(f"{name} is for segmentation; subclass ViTPTask to change what ViT-P learns by")
        self.points = point_settings(recipe.points)
        self._train: Any = None
        self._mixed: list[Any] | None = None
        self._validation: Any = None
        self._size: tuple[int, int] = image_size(recipe)

    def build_model(self) -> tuple[Any, Any]:
        """The model of the recipe, with the classes of the training data, and a processor for its input size."""
        recipe, id2label = self.recipe, self.description.id2label
        fields = model_fields(recipe)
        labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
        kept: dict[str, Any] = {}
        if recipe.init is not None:
            if recipe.image_size is not None:
                fields["image_size"] = recipe.image_size
            model, kept = self._from_checkpoint({**fields, **labels})
        elif recipe.backbone is not None:
            kept, self.remarks = backbone_pixel_settings(recipe.backbone)
            model = ViTPForPointClassification.from_backbone(
                self.backbone, image_size=list(self._size), **fields, **labels
            )
        else:
            model = ViTPForPointClassification(ViTPConfig(**{"image_size": list(self._size), **fields}, **labels))
        self._size = image_size(recipe, model.config)
        processor = ViTPImageProcessor(
            size={"height": self._size[0], "width": self._size[1]},
            patch_size=model.config.patch_size,
            point_origin=model.config.point_origin,
            id2label=id2label,
            **kept,
        )
        return model, processor

    def train_samples(self) -> TrainingSamples:
        """The training images, of all parts of the mixture, augmented as the recipe says."""
        recipe, settings = self.recipe, self.points
        own = self._training_data()
        if not settings.mixture:
            augment = self._augmentation(settings.sampling)
            return AugmentedDataset(own, augment, seed=recipe.seed, cache=cache_folder(recipe))
        parts = [MixturePart(own, self._augmentation(settings.sampling), settings.share)]
        for part, data in zip(settings.mixture, self._mixed_data(), strict=True):
            parts.append(MixturePart(data, self._augmentation(part.sampling), part.share))
        return MixedDataset(parts, seed=recipe.seed)

    def training_datasets(self) -> Sequence[Any]:
        """The recipe's, and those mixed with it."""
        return [self._training_data(), *self._mixed_data()]

    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """Batches for the model; for a GPU, pixels are finished there."""
        return PointCollator(*unit_normalization(vars(processor)), on_device=device.type != "cpu")

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Finish what the collator left to the device."""
        pixels = batch["pixel_values"]
        if pixels.dtype == torch.uint8:
            pixels = normalize_pixels(pixels, *unit_normalization(vars(processor)))
        return {**batch, "pixel_values": pixels}

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Labelled prompts of all micro-batches and processes, over the number of processes."""
        count = torch.tensor(sum(int((batch["labels"] != IGNORED).sum()) for batch in batches), dtype=torch.float32)
        count = count.to(device)
        num_processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            num_processes = torch.distributed.get_world_size()
            torch.distributed.all_reduce(count)
        return count.clamp(min=1) / num_processes

    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; it has no parts."""
        return model(**batch, loss_normalizer=normalizers).loss, {}

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Accuracy and calibration at every kind of points of the recipe.

        Random points have the plain names, such as `top_1`; the others theirs before, such as `interior_top_1`.
        """
        dataset, description = self.validation_data(limit)
        predictor = PointClassifier(model, processor, device)
        numbers: dict[str, float] = {}
        for kind in self.points.evaluate:
            source = self._point_source(kind, description, device)
            batch_size = self.recipe.device_batch_size or _EVALUATION_BATCH
            result = evaluate_points(predictor, dataset, description.id2label, source, batch_size=batch_size)
            prefix = "" if kind == self.points.evaluate[0] else f"{kind}_"
            numbers |= {f"{prefix}{name}": float(value) for name, value in result.metrics.items()}
        return {name: value for name, value in numbers.items() if value == value}  # undefined ones are left out

    @property
    def score_names(self) -> Sequence[str]:
        """Those of every kind of points; where a generator finds the points, also those of its own classes."""
        plain = [name for name, value in PointAccuracy(1).compute().items() if isinstance(value, int | float)]
        names = plain if self.points.generator is None else [*plain, *(f"generator_{name}" for name in plain)]
        others = self.points.evaluate[1:]
        return [*names, *(f"{kind}_{name}" for kind in others for name in names)]

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """For each image a strip of image, true classes and answers, at the innermost point of every segment."""
        dataset, description = self.validation_data(count)
        predictor = PointClassifier(model, processor, device)
        source = point_source("interior", description.id2label)
        strips = []
        for index in range(len(dataset)):
            entry = dataset[index]
            image = to_rgb(entry["image"])
            asked = source(entry, index)
            probabilities = predictor([image], [asked.points])[0].softmax(-1)
            drawings = [
                _draw_points(image, asked.points, asked.labels.tolist(), None, description.id2label),
                _draw_points(
                    image,
                    asked.points,
                    probabilities.argmax(-1).tolist(),
                    probabilities.amax(-1).tolist() if len(probabilities) else [],
                    predictor.id2label,
                ),
            ]
            strips.append(side_by_side([image, *drawings]))
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
        description = self.validation_data(None)[1]
        dataset = str(self.recipe.val_data or self.recipe.data)
        return {"task": self.recipe.task, "dataset": dataset, "split": description.split}

    @property
    def description(self) -> DataDescription:
        """Classes of the training data."""
        return describe(self._training_data()) if self.published is None else self.published[0]

    @property
    def data_tasks(self) -> Sequence[str]:
        """Those that tell what the points need."""
        return _data_tasks(self.points.wants_segments)

    def validation_data(self, limit: int | None) -> tuple[Any, DataDescription]:
        """The validation data, or its first images, and what its classes are."""
        if self._validation is None:
            spec = self.recipe.val_data or self.recipe.data
            dataset = _read(spec, self.recipe.val_split or validation_split(spec), "interior" in self.points.evaluate)
            self._validation = (dataset, describe(dataset))
        dataset, description = self._validation
        return (dataset if limit is None else dataset.select(range(min(limit, len(dataset))))), description

    def _training_data(self) -> Any:
        if self._train is None:
            recipe = self.recipe
            if recipe.data is None:
                raise ValueError("the recipe names no data; add data=FORMAT:PATH, such as data=coco:/data/coco")
            self._train = _read(recipe.data, recipe.train_split, self.points.wants_segments)
        return self._train

    def _mixed_data(self) -> list[Any]:
        """The data sets of the recipe's mixture besides the first."""
        if self._mixed is None:
            self._mixed = []
            for part in self.points.mixture:
                data = _read(part.data, part.split, needs_segments(part.sampling))
                _refuse_other_classes(part.data, describe(data), self.description)
                self._mixed.append(data)
        return self._mixed

    def _augmentation(self, sampling: Mapping[str, Any]) -> Any:
        options = {**self.recipe.augmentation_options, **sampling}
        return augmentation(augmentation_name(self.recipe), self._size, **options)

    def _point_source(self, kind: str, description: DataDescription, device: torch.device) -> Any:
        generator = None
        if kind == "maximum" and self.points.generator is not None:
            generator = Segmenter.from_pretrained(self.points.generator, task="panoptic", device=device)
        num_points = self.points.sampling.get("num_points", 200)
        return point_source(
            kind, description.id2label, num_points=num_points, seed=self.recipe.seed, generator=generator
        )

    def _from_checkpoint(self, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A point classifier with the fields of the recipe, and the settings of its processor that stay.

        Its head is new where the classes are other ones.
        """
        source = str(self.recipe.init)
        before, processor = load_point_classifier(source)  # says in one line what is wrong with a checkpoint
        # Training points are the middles of pixels, whatever the checkpoint's were.
        fields = {"point_origin": "center", **fields}
        model, self.remarks = load_changed(ViTPForPointClassification, source, before, "classifier.", fields)
        if self.points.reset_head or list((before.config.id2label or {}).values()) != list(fields["id2label"].values()):
            for module in model.classifier.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=model.config.initializer_range)
                    nn.init.zeros_(module.bias)
            reason = "points.reset_head" if self.points.reset_head else "the checkpoint's are not those of the data"
            self.remarks += [f"class head: all {len(fields['id2label'])} classes are new ({reason})"]
        return model, pixel_settings(processor)


def _read(spec: str, split: str | None, with_segments: bool) -> Any:
    """A data set, for the task that tells what the points need."""
    task = next(name for name in _data_tasks(with_segments) if name in available_tasks(spec))
    return load_segmentation_dataset(spec, split=split, task=task)


def _data_tasks(with_segments: bool) -> tuple[str, str, str]:
    return ("panoptic", "instance", "semantic") if with_segments else ("semantic", "panoptic", "instance")


def _refuse_other_classes(spec: str, theirs: DataDescription, ours: DataDescription) -> None:
    if theirs.id2label != ours.id2label:
        names = [name for name in theirs.id2label.values() if name not in ours.id2label.values()][:5]
        raise ValueError(
            f"points.mixture: {spec} has {len(theirs.id2label)} classes, {names} among them, and {ours.format}:"
            f"{ours.path} has {len(ours.id2label)}; data sets that are mixed need the same classes in the same order"
        )


def _draw_points(
    image: Image.Image, points: Tensor, labels: list[int], scores: list[float] | None, id2label: Mapping[int, str]
) -> Image.Image:
    """A disc at every point, in the colour and with the name of its class."""
    radius = max(2.0, 0.02 * min(image.size))
    rows, columns = np.mgrid[: image.height, : image.width] + 0.5
    discs = np.full((image.height, image.width), -1, dtype=np.int64)
    info = []
    for place, ((x, y), label) in enumerate(zip(points.tolist(), labels, strict=True)):
        discs[(columns - x * image.width) ** 2 + (rows - y * image.height) ** 2 <= radius**2] = place
        info.append({"id": place, "label_id": label, **({} if scores is None else {"score": scores[place]})})
    return draw_segments(image, discs, info, id2label, alpha=0.9)


@dataclass(frozen=True)
class PointPart:
    """Further data of a mixture.

    Attributes:
        data: "FORMAT:PATH".
        split: of the data; `None` is the first there is.
        share: of the samples.
        sampling: settings of `PointAugmentation`.
    """

    data: str
    split: str | None
    share: float
    sampling: dict[str, Any]


@dataclass(frozen=True)
class PointSettings:
    """The `points` of a recipe; see the module.

    Attributes:
        sampling: settings of `PointAugmentation`, for the recipe's own data.
        share: of the recipe's own data.
        mixture: further data.
        reset_head: whether the head of `init` is made anew.
        evaluate: kinds of points to score at.
        generator: segmentation model for kind "maximum".
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    mixture: tuple[PointPart, ...] = ()
    reset_head: bool = False
    evaluate: tuple[str, ...] = ("random",)
    generator: str | None = None

    @property
    def wants_segments(self) -> bool:
        """Whether segments of one class must be told apart."""
        return needs_segments(self.sampling)


def point_settings(values: Mapping[str, Any]) -> PointSettings:
    """Read the `points` of a recipe.

    Raises:
        ValueError: a key is unknown or a value cannot be meant; the message names it and the remedy.
    """
    values = checked(PointOptions, values, "points.")
    own, kinds = _sampling(values), values.get("evaluate", ["random"])
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds:
        raise ValueError("points.evaluate names no points to score at; give random, interior or maximum")
    if "maximum" in kinds and not values.get("generator"):
        raise ValueError(
            "points.evaluate has maximum, which needs masks: name a segmentation model as points.generator"
        )
    parts = values.get("mixture", [])
    if not all("data" in part for part in parts):
        raise ValueError(
            "points.mixture must be a list of data sets, each with `data` and perhaps `share` and `source`"
        )
    return PointSettings(
        sampling=own,
        share=values.get("share", 1),
        mixture=tuple(
            PointPart(part["data"], part.get("split"), part.get("share", 1), {**own, **_sampling(part)})
            for part in parts
        ),
        reset_head=values.get("reset_head", False),
        evaluate=kinds,
        generator=values.get("generator"),
    )


def needs_segments(sampling: Mapping[str, Any]) -> bool:
    """Whether prompts drawn with these settings tell segments of one class apart."""
    return bool(sampling.get("instance_aware")) or sampling.get("source") == "box"


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is stated for `PointAugmentation`, which has the defaults."""
    return {field.name: values[field.name] for field in fields(PromptOptions) if field.name in values}
