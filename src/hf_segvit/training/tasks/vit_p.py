"""Train ViT-P, a point classifier: from scratch, a backbone or a checkpoint.

Prompts are drawn as the recipe's `points` say, also from a mixture of data sets. Training in two stages, such as boxes
first, then points, takes two recipes, of which the second has the model of the first as `init`. The loss is the mean
cross-entropy of the labelled prompts over all processes and micro-batches.

`PointSettings`, at the end, are the recipe's `points`, whose keys are declared in ../declarations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...data.augmentation import AugmentedDataset, augmentation
from ...data.collation import PointCollator, normalize_pixels
from ...data.mixture import MixedDataset, MixturePart
from ...data.prompts import IGNORED
from ...data.reading import DataDescription, available_tasks, describe, load_segmentation_dataset
from ...drawing.segments import draw_prompts
from ...evaluation.points import evaluate_points, point_source
from ...inference.loading import load_point_classifier
from ...inference.point_classifier import PointClassifier
from ...inference.segmenter import Segmenter
from ...metrics.point_accuracy import PointAccuracy
from ...models.configuration_vit_p import ViTPConfig
from ...models.image_decoding import shown_rgb, to_pixels
from ...models.image_processing_plain_vit import unit_normalization
from ...models.image_processing_vit_p import ViTPImageProcessor
from ...models.image_values import AS_STORED
from ...models.modeling_vit_p import ViTPForPointClassification
from ..declarations import PointOptions, PromptOptions, ViTPDeclaration, checked
from ..derivation import augmentation_name, image_size, model_fields
from ..recipe import Recipe, cache_folder
from ..start import backbone_pixel_settings, channel_statistics, load_changed, pixel_settings
from . import DatasetTask, TrainingSamples, check_model_config, config_errors, missing_weights_explained, side_by_side

_EVALUATION_BATCH = 8  # images, if the recipe sets no device_batch_size


class ViTPTask(ViTPDeclaration, DatasetTask):
    """Training of `ViTPForPointClassification`; see `TrainingTask` for the methods."""

    headline = "top_1"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        for name in ("criterion", "metrics"):
            if getattr(recipe, name):
                raise ValueError(f"{name} is for segmentation; derive a task from ViTPTask to change those of ViT-P")
        self.points = point_settings(recipe.points)
        self._mixed: list[Any] | None = None
        self._augmentation(self.points.sampling)  # refuses wrong options before data are read
        check_model_config(recipe.model_config, ViTPConfig)

    def build_model(self) -> tuple[Any, Any]:
        """The model with the classes of the training data, and a processor for its input size."""
        recipe, fields = self.recipe, {**model_fields(self.recipe), **self.labels}
        kept: dict[str, Any] = {}
        start = recipe.init or recipe.backbone
        sizes = {} if start is None else self.stand_in(start)
        if sizes is not None:
            if start is None:
                self._remark_derived_width(fields)
            with config_errors(), torch.device("meta" if start is not None else "cpu"):
                model = ViTPForPointClassification(ViTPConfig(**{"image_size": list(self.size), **sizes, **fields}))
        elif recipe.init is not None:
            if recipe.image_size is not None:
                fields["image_size"] = recipe.image_size
            with missing_weights_explained():
                model, kept = self._from_checkpoint(fields)
        else:
            kept, remarks = backbone_pixel_settings(start)
            self.remarks += remarks
            with missing_weights_explained():
                model = ViTPForPointClassification.from_backbone(self.backbone, image_size=list(self.size), **fields)
        self.size = image_size(recipe, model.config)
        self.take_channels(model.config.num_channels)
        kept |= channel_statistics(kept, model.config.num_channels)
        processor = ViTPImageProcessor(
            size={"height": self.size[0], "width": self.size[1]},
            patch_size=model.config.patch_size,
            point_origin=model.config.point_origin,
            id2label=self.description.id2label,
            **{**kept, **self.file_settings},
        )
        return model, processor

    def train_samples(self) -> TrainingSamples:
        """The augmented training images, of all data sets of the mixture."""
        recipe, settings = self.recipe, self.points
        augment = self._augmentation(settings.sampling)
        if not settings.mixture:
            return AugmentedDataset(self.training_data, augment, seed=recipe.seed, cache=cache_folder(recipe))
        parts = [MixturePart(self.training_data, augment, settings.share)]
        for part, data in zip(settings.mixture, self._mixed_data(), strict=True):
            parts.append(MixturePart(data, self._augmentation(part.sampling), part.share))
        return MixedDataset(parts, seed=recipe.seed)

    def training_datasets(self) -> Sequence[Any]:
        """The recipe's data set, and those mixed with it."""
        return [self.training_data, *self._mixed_data()]

    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """Batches of prompts; pixels are normalised on the device if it is a GPU."""
        return PointCollator(*unit_normalization(vars(processor)), on_device=device.type != "cpu")

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Normalise pixels, if the collator left that to the device."""
        pixels = batch["pixel_values"]
        if pixels.dtype == torch.uint8:
            pixels = normalize_pixels(pixels, *unit_normalization(vars(processor)))
        return {**batch, "pixel_values": pixels}

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Number of labelled prompts in all micro-batches and processes, divided by the number of processes."""
        count = torch.tensor(sum(int((batch["labels"] != IGNORED).sum()) for batch in batches), dtype=torch.float32)
        count = count.to(device)
        num_processes = 1
        # Every process takes part in the sum, also one whose images have no labels.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            num_processes = torch.distributed.get_world_size()
            torch.distributed.all_reduce(count)
        # Gradients are averaged over processes; without any label the loss is 0, not 0 / 0.
        return count.clamp(min=1) / num_processes

    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, which has no parts."""
        return model(**batch, loss_normalizer=normalizers).loss, {}

    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Accuracy and calibration at each kind of points.

        The first kind has plain names, such as `top_1`; the others have a prefix, such as `interior_top_1`.
        """
        dataset, description = self.validation_data(limit)
        predictor = PointClassifier(model, processor, device)
        numbers: dict[str, float] = {}
        for kind in self.points.evaluate:
            source = self._point_source(kind, description, device)
            batch_size = self.recipe.device_batch_size or _EVALUATION_BATCH
            settings = {"batch_size": batch_size, "progress": self.progress}
            result = evaluate_points(predictor, dataset, description.id2label, source, **settings)
            prefix = "" if kind == self.points.evaluate[0] else f"{kind}_"
            numbers |= {f"{prefix}{name}": float(value) for name, value in result.metrics.items()}
        return {name: value for name, value in numbers.items() if value == value}  # without NaN, of no points

    @property
    def score_names(self) -> Sequence[str]:
        """Names of the scores at each kind of points; with a generator, also of the classes it gives itself."""
        plain = [name for name, value in PointAccuracy(1).compute().items() if isinstance(value, int | float)]
        names = plain if self.points.generator is None else [*plain, *(f"generator_{name}" for name in plain)]
        others = self.points.evaluate[1:]
        return [*names, *(f"{kind}_{name}" for kind in others for name in names)]

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """Strips of image, true classes and answers, at the innermost point of every segment."""
        dataset, description = self.validation_data(count)
        predictor = PointClassifier(model, processor, device)
        source = point_source("interior", description.id2label)
        strips = []
        for index in range(len(dataset)):
            entry = dataset[index]
            image = to_pixels(entry["image"], settings=AS_STORED)
            asked = source(entry, index)
            probabilities = predictor([image], [asked.points])[0].softmax(-1)
            labels, scores = probabilities.argmax(-1).tolist(), []
            if labels:  # no point, no classes to take the maximum of
                scores = probabilities.amax(-1).tolist()
            truth = _draw_points(image, asked.points, asked.labels.tolist(), None, description.id2label)
            answer = _draw_points(image, asked.points, labels, scores, predictor.id2label)
            strips.append(side_by_side([shown_rgb(image), truth, answer]))
        return strips

    def model_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """The detailed card."""
        return self.released_card(model, processor, results, about)

    @property
    def data_tasks(self) -> Sequence[str]:
        """The tasks with what the training points need, the quickest to read first."""
        return _data_tasks(needs_segments(self.points.sampling))

    def read_data(self, spec: str, split: str | None, to_score: bool = False) -> Any:
        """For the points to train on, or to score at."""
        # An interior point is one of each segment, whatever the training points need.
        with_segments = "interior" in self.points.evaluate if to_score else needs_segments(self.points.sampling)
        return _read(spec, split, with_segments)

    def _mixed_data(self) -> list[Any]:
        """The data sets of the mixture, without the recipe's own."""
        if self._mixed is None:
            self._mixed = []
            for part in self.points.mixture:
                data = _read(part.data, part.split, needs_segments(part.sampling))
                _refuse_other_classes(part.data, describe(data), self.description)
                self._mixed.append(data)
        return self._mixed

    def _augmentation(self, sampling: Mapping[str, Any]) -> Any:
        options = {**self.recipe.augmentation_options, **sampling}
        return augmentation(augmentation_name(self.recipe), self.size, **options)

    def _point_source(self, kind: str, description: DataDescription, device: torch.device) -> Any:
        generator, labels = None, description.id2label
        if kind == "maximum" and self.points.generator is not None:
            generator = Segmenter.from_pretrained(self.points.generator, task="panoptic", device=device)
        num_points = self.points.sampling.get("num_points", 200)  # as many as in training
        return point_source(kind, labels, num_points=num_points, seed=self.recipe.seed, generator=generator)

    def _from_checkpoint(self, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The starting checkpoint with the fields of the recipe, and the settings of its processor to keep."""
        source = str(self.recipe.init)
        before, processor = load_point_classifier(source)  # also for its errors, which name the remedy
        # Training points are pixel centres, whatever those of the checkpoint were.
        fields = {"point_origin": "center", **fields}
        model, remarks = load_changed(ViTPForPointClassification, source, before, "classifier.", fields)
        self.remarks += remarks
        # All or nothing, unlike EoMT's head: the hidden layer of an MLP head serves all classes together.
        if self.points.reset_head or list((before.config.id2label or {}).values()) != list(fields["id2label"].values()):
            for module in model.classifier.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=model.config.initializer_range)
                    nn.init.zeros_(module.bias)
            reason = "points.reset_head" if self.points.reset_head else "the checkpoint has other classes than the data"
            self.remarks += [f"class head: all {len(fields['id2label'])} classes are new ({reason})"]
        return model, pixel_settings(processor)


def _read(spec: str, split: str | None, with_segments: bool) -> Any:
    """A data set, read for the first task that it offers and that has what the points need."""
    task = next(name for name in _data_tasks(with_segments) if name in available_tasks(spec))
    return load_segmentation_dataset(spec, split=split, task=task)


def _data_tasks(with_segments: bool) -> tuple[str, str, str]:
    # Semantic maps are the smallest to read, but merge the segments of a class.
    return ("panoptic", "instance", "semantic") if with_segments else ("semantic", "panoptic", "instance")


def _refuse_other_classes(spec: str, theirs: DataDescription, ours: DataDescription) -> None:
    if theirs.id2label != ours.id2label:
        names = [name for name in theirs.id2label.values() if name not in ours.id2label.values()][:5]
        raise ValueError(
            f"points.mixture: {spec} has {len(theirs.id2label)} classes, among them {names}, and {ours.format}:"
            f"{ours.path} has {len(ours.id2label)}; mixed data sets need the same classes in the same order"
        )


def _draw_points(
    image: Any, points: Tensor, labels: list[int], scores: list[float] | None, id2label: Mapping[int, str]
) -> Image.Image:
    """A disc at every point, in the colour and with the name of its class."""
    image = shown_rgb(image)  # it may have other bands
    scale = torch.tensor([image.width, image.height])
    names = [id2label[label] for label in labels]
    texts = names if scores is None else [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    # Integers are pixel centres there.
    return draw_prompts(image, (points.cpu() * scale - 0.5).tolist(), [], labels, texts)


@dataclass(frozen=True)
class PointPart:
    """Another data set of a mixture."""

    data: str  # "FORMAT:PATH"
    split: str | None
    share: float
    sampling: dict[str, Any]  # settings of `PointAugmentation`


@dataclass(frozen=True)
class PointSettings:
    """The `points` of a recipe; meanings are those of `PointOptions`."""

    sampling: dict[str, Any]  # settings of `PointAugmentation`, for the recipe's own data
    share: float
    mixture: tuple[PointPart, ...]
    reset_head: bool
    evaluate: tuple[str, ...]
    generator: str | None


def point_settings(values: Mapping[str, Any]) -> PointSettings:
    """Read the `points` of a recipe; a `ValueError` names a bad key or value and the remedy."""
    values = checked(PointOptions, values, "points.")
    options, own = PointOptions(**values), _sampling(values)
    kinds = (options.evaluate,) if isinstance(options.evaluate, str) else tuple(options.evaluate)
    if not kinds:
        raise ValueError("points.evaluate names no points to score at; give random, interior or maximum")
    if "maximum" in kinds and not options.generator:
        raise ValueError("points.evaluate has maximum, which needs masks: name a model as points.generator")
    if not all("data" in part for part in options.mixture):
        raise ValueError("points.mixture must be a list of data sets, each with `data`, such as data=coco:/data/coco")
    # A part inherits the settings of the recipe's own points.
    mixture = tuple(
        PointPart(part["data"], part.get("split"), part.get("share", 1), {**own, **_sampling(part)})
        for part in options.mixture
    )
    return PointSettings(own, options.share, mixture, options.reset_head, kinds, options.generator)


def needs_segments(sampling: Mapping[str, Any]) -> bool:
    """Whether these settings need segments of one class to be separate."""
    return bool(sampling.get("instance_aware")) or sampling.get("source") == "box"


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for `PointAugmentation`, without defaults, which it has itself."""
    return {field.name: values[field.name] for field in fields(PromptOptions) if field.name in values}
