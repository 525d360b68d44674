"""Training tasks: what the training loop needs to know of each kind of model.

The loop (loop.py) does steps, schedules, checkpoints and logs; a `TrainingTask` supplies model, data, loss, evaluation
and drawings. `DatasetTask` reads the data, `SegmentationTask` (segmentation.py) also makes batches and scores;
`task_for` chooses the task of a recipe. `model: package.module:Task` names your own task, see docs/extending.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ...data import reading
from ...drawing.colors import Color
from ...drawing.segments import contact_sheet
from ...hub.check import published_data_name
from ...hub.model_card import make_model_card
from ...inference.loading import quiet_transformers
from ...lookup import suggestion
from ..declarations import TaskDeclaration, shown
from ..derivation import image_size
from ..held_out import HeldOut, hold_out, image_names
from ..preflight import check_training_data, with_classes_of
from ..published_data import (
    ASSUMED_CLASSES,
    ASSUMED_IMAGES,
    are_weights_here,
    assumed_data,
    named_architecture,
    published_data,
)

# By name, so that training one model does not import the others.
_TASKS = {
    "eomt": ("eomt", "EoMTTask"),
    "mask2former_vit": ("mask2former_vit", "Mask2FormerViTTask"),
    "vit_p": ("vit_p", "ViTPTask"),
}


class TrainingSamples(Protocol):
    """A map-style data set by (epoch, index), such as `AugmentedDataset`."""

    # A key must give the same sample in every process and worker, or a run could not be resumed exactly.

    def __len__(self) -> int:
        """Samples per epoch."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The sample of an (epoch, index), for the collator."""

    def name(self, index: int) -> str:
        """The name of an image, for errors."""


class TrainingTask(TaskDeclaration, ABC):
    """One kind of model, as the training loop sees it.

    Attributes:
        headline: name of the metric that compares checkpoints; higher is better.
        device: where the model computes; the loop sets it before it asks for samples.
        published: description and size of training data that does not exist here, see `without_data`.
        remarks: lines for the log on how `build_model` built the model.
    """

    headline: str

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.device = torch.device("cpu")
        self.published: tuple[reading.DataDescription, int] | None = None
        self.remarks: list[str] = []
        self.progress = False  # whether `evaluate` shows how far it is; the loop sets it
        self.explaining = False  # whether nothing is trained, so that architectures do without their weights

    def without_data(self) -> int | None:
        """To explain a recipe without its data, use what is published about it, and return its number of images."""
        self.explaining = True
        recipe, tasks = self.recipe, self.data_tasks
        self.published = published_data(recipe.data, tasks)
        if self.published is None and (assumed := assumed_data(recipe.data, tasks)) is not None:
            self.published = assumed
            self.remarks.append(
                f"{recipe.data} does not exist here; explained for {ASSUMED_IMAGES} images of {ASSUMED_CLASSES} classes"
            )
        return None if self.published is None else self.published[1]

    @property
    def backbone(self) -> Any:
        """The argument for `from_backbone`: the recipe's backbone, or without data its architecture only."""
        if self.published is None and not self.explaining:
            return self.recipe.backbone
        # An explanation needs no weights, which may be gigabytes to download.
        from ...conversion.backbones import load_backbone

        return load_backbone(self.recipe.backbone, with_weights=False)[0]

    def stand_in(self, source: str) -> dict[str, Any] | None:
        """Sizes of a model whose weights are not here and are not needed, as nothing but an explanation is wanted."""
        if not self.explaining or source.startswith("timm/") or are_weights_here(source):
            return None
        self.remarks.append(
            f"{source} is not on this machine yet; explained for the architecture that its name tells, and ImageNet's "
            "normalisation: those of the weights count"
        )
        return named_architecture(source)

    @property
    def data_tasks(self) -> Sequence[str]:
        """The tasks that data sets are read for, the preferred one first."""
        return (self.recipe.task,)

    @property
    def base_model(self) -> str | None:
        """Hub id of what training starts from, for the model card; `None` if it is a folder, or nothing."""
        source = self.recipe.init or self.recipe.backbone
        # The card may only name a model of the Hub: owner/name, not a path.
        is_hub_id = source and source.count("/") == 1 and not source.startswith((".", "/", "~"))
        return source if is_hub_id and not Path(str(source)).exists() else None

    @abstractmethod
    def build_model(self) -> tuple[Any, Any]:
        """The model, on the CPU and in float32, and its image processor."""

    @abstractmethod
    def train_samples(self) -> TrainingSamples:
        """The samples to train on."""

    def training_datasets(self) -> Sequence[Any]:
        """The data sets behind the samples, if any: a resumed run compares them with those of its checkpoint."""
        return ()

    @abstractmethod
    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """A function, run in the workers, that makes a batch of samples for a model on `device`."""

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """What `loss` divides by in this step, from all micro-batches of this process.

        Summed over micro-batches and averaged over processes, the quotients must be the loss of the joint batch.
        """
        return len(batches)  # suits a loss that is a mean

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its parts without gradient for the log.

        Parts are named "PANEL/CURVE" or by one word, with the same names in every step.
        """

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Finish a batch that has just been copied to the device."""
        return dict(batch)

    def before_step(self, model: Any, step: int, plan: Any) -> dict[str, float]:
        """Set what changes with the step (from 0), such as annealing, and return values for the log.

        Called once more after training, with the total number of steps.
        """
        return {}

    def not_comparable_yet(self, model: Any) -> str | None:
        """Why evaluations do not yet count for the best checkpoint; `None` once they do."""
        return None

    @abstractmethod
    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Scores on at most `limit` validation images; every process calls it and gets the same scores."""

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """For each of the first `count` validation images, truth and prediction side by side; by default nothing."""
        return []

    def model_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """README.md of the trained model; `about` is how it was trained."""
        scores = [f"- {name}: {value:.4f}" for result in results for name, value in result["metrics"].items()]
        return "\n".join([f"# {type(model).__name__}", "", about, "", *scores]) + "\n"

    @property
    def score_names(self) -> Sequence[str]:
        """Names of the scores that `evaluate` may return; empty if they are not known beforehand."""
        return ()

    def validation_name(self) -> dict[str, str]:
        """`task`, `dataset` and `split` of the validation data for results.json."""
        recipe = self.recipe
        dataset = published_data_name(str(recipe.val_data or recipe.data))
        return {"task": recipe.task, "dataset": dataset, "split": str(recipe.val_split)}

    def check_data(self) -> list[str]:
        """Refuse data that cannot be learnt or scored, before step 1; lines for the log about what was found."""
        return []

    def save(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the trained model for inference; checkpoints to resume from are the loop's."""
        with quiet_transformers():
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


class DatasetTask(TrainingTask):
    """A task whose data sets are read by `load_segmentation_dataset`.

    Attributes:
        size: (height, width) of training images; `build_model` sets that of the model.
    """

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self.size: tuple[int, int] = image_size(recipe)
        self._train: Any = None  # both are read only when needed: explaining a recipe does without
        self._validation: Any = None
        self._channels: int | None = None  # of the model's input, once it is built
        self.held_out: HeldOut | None = None  # with `val_fraction`, once the training data have been read

    def take_channels(self, channels: int) -> None:
        """Read images with as many channels as the model takes; others are an error that names the file."""
        self._channels = channels
        if self._train is not None:
            self._train = self._with_channels(self._train)

    def _with_channels(self, dataset: Any) -> Any:
        settings = reading.image_settings_of(dataset)
        # Ordinary images need no change, and data sets that are drawn or held by others know none.
        if self._channels in (None, settings.channels) or not reading.has_image_settings(dataset):
            return dataset
        return reading.with_image_settings(dataset, replace(settings, channels=self._channels))

    @property
    def file_settings(self) -> dict[str, Any]:
        """How the data's files become pixels, for the image processor: later images are read in the same way."""
        if self.published is not None:
            return {}
        settings = reading.image_settings_of(self.training_data)
        given = {"value_range": settings.value_range, "bands": settings.bands}
        return {name: list(value) for name, value in given.items() if value is not None}

    def read_data(self, spec: str, split: str | None, to_score: bool = False) -> Any:
        """Read a data set for training, or one `to_score` on."""
        return reading.load_segmentation_dataset(spec, split=split, task=self.recipe.task)

    @property
    def training_data(self) -> Any:
        """The recipe's training data."""
        if self._train is None:
            if self.recipe.data is None:
                raise ValueError(
                    f"the recipe {self.recipe.name!r} names no data; add data=FORMAT:PATH, such as data=coco:/data/coco"
                )
            self._train = self._with_channels(self.read_data(self.recipe.data, self.recipe.train_split))
            if self.recipe.val_fraction is not None:
                self.held_out = hold_out(self._train, self.recipe.val_fraction, self.recipe.seed)
                self._train = self._part(self._train, held_out=False)
        return self._train

    def _part(self, dataset: Any, held_out: bool) -> Any:
        """The held-out images of the training split, or the others."""
        names = set() if self.held_out is None else self.held_out.names
        return dataset.select([index for index, name in enumerate(image_names(dataset)) if (name in names) is held_out])

    def _remark_derived_width(self, fields: Mapping[str, Any]) -> None:
        """Say that the width of the MLPs follows from that of the blocks, where the recipe sets only the latter."""
        given = self.recipe.model_config
        if "hidden_size" in given and "intermediate_size" not in given:
            self.remarks.append(
                f"model_config: intermediate_size is 4 times hidden_size, {fields['intermediate_size']}"
            )

    @property
    def description(self) -> reading.DataDescription:
        """Classes of the training data."""
        return reading.describe(self.training_data) if self.published is None else self.published[0]

    @property
    def labels(self) -> dict[str, Any]:
        """The classes of the training data as fields of a model's configuration."""
        id2label = self.description.id2label
        return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}

    def training_datasets(self) -> Sequence[Any]:
        """The recipe's data set."""
        return [self.training_data]

    def validation_data(self, limit: int | None) -> tuple[Any, reading.DataDescription]:
        """The validation data, or its first images, and its description."""
        if self._validation is None:
            spec = self.recipe.val_data or self.recipe.data
            if self.recipe.val_fraction is not None and self.training_data is not None:
                dataset = self._part(self.read_data(spec, self.recipe.train_split, to_score=True), held_out=True)
            else:
                dataset = self.read_data(spec, self.recipe.val_split or validation_split(spec), to_score=True)
            dataset = self._with_channels(dataset)
            # Predictions have the classes of the training data, so the truth gets them, too.
            self._validation = with_classes_of(dataset, reading.describe(dataset), self.description)
        dataset, description = self._validation
        return (dataset if limit is None else dataset.select(range(min(limit, len(dataset))))), description

    def check_data(self) -> list[str]:
        """The cheap part of `hf-segvit check-data`."""
        dataset, ours = self.validation_data(None)[0], self.description
        theirs = reading.describe(dataset)  # as the table says, also where labels are translated
        names = [f"{part.format}:{part.path}, split {part.split!r}," for part in (ours, theirs)]
        if self.held_out is not None:
            names[1] = f"the held-out part of {names[0]}"
        lines = check_training_data(
            self.training_data, dataset, ours, theirs, (names[0], names[1]), self.recipe.evaluate_limit
        )
        return lines if self.held_out is None else [f"validation: {self.held_out.explanation}", *lines]

    @property
    def validation_size(self) -> int:
        """Images that are scored."""
        return len(self.validation_data(self.recipe.evaluate_limit)[0])

    def validation_in_words(self) -> str:
        """What is scored, for an explanation; a reason if that cannot be told."""
        try:
            data, description = self.validation_data(self.recipe.evaluate_limit)
        except ValueError as error:
            return f"WARNING: {error}"
        if self.held_out is not None:
            return self.held_out.explanation
        return f"{description.format}:{description.path}, split {description.split!r}, {len(data):,} images"

    def validation_name(self) -> dict[str, str]:
        """The same with the split that was found."""
        # Reads the data even if the recipe names the split: called before step 1, it refuses data that is missing.
        split = self.validation_data(None)[1].split
        if self.recipe.val_fraction is not None:
            split = f"{self.recipe.val_fraction:g} of {split}"
        return {**super().validation_name(), "split": self.recipe.val_split or split}

    def released_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """The detailed `model_card`, for configurations of this package."""
        return make_model_card(
            model.config,
            processor,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            results=results,
            training_data=about,
            base_model=self.base_model,
        )


def task_for(recipe: Any) -> TrainingTask:
    """The task of a recipe: one of ours by name, or a `TrainingTask` by import path."""
    if recipe.model not in _TASKS:
        return recipe.declaration(recipe)
    module, name = _TASKS[recipe.model]
    return getattr(importlib.import_module(f".{module}", __package__), name)(recipe)


NO_WEIGHTS = (
    "without weights at hand, init=scratch trains from random ones, and the recipes own_tiny_semantic, "
    "own_tiny_instance and own_tiny_panoptic do so in minutes on a CPU"
)


@contextmanager
def missing_weights_explained() -> Iterator[None]:
    """Add to an error about weights that cannot be loaded how to do without."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{str(error.filename)[:200]}: {str(error.strerror).lower()}"
        raise ValueError(f"{text}; check the path or Hub id; {NO_WEIGHTS}") from error


@contextmanager
def config_errors() -> Iterator[None]:
    """Errors about `model_config` as one line: types are checked by a library, with errors of its own."""
    try:
        yield
    except (StrictDataclassError, TypeError) as error:
        text = " ".join(str(error).split())
        # The library's sentence has a name of an error and of a class in it; its middle says all.
        if match := re.search(r"Field '(\w+)' expected (.+?), got .*\(value: (.+)\)", text):
            raise ValueError(f"model_config.{match[1]}={match[3]} does not fit; expected {match[2]}") from error
        raise ValueError(f"model_config does not fit ({text}); see hf-segvit train --fields") from error


# Fields of every configuration of Transformers: how it is used or saved, not what the model is. The classes are the
# data's.
_NOT_OURS = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"num_labels"}
_ACTIVATIONS = ("hidden_act", "gate_act")
_LARGEST = 65_536  # of any size or number of a model's parts


def check_model_config(settings: Mapping[str, Any], config_class: type, others: bool = False) -> None:
    """Refuse fields of `model_config` that a configuration lacks, and values that no model can be built with.

    Args:
        others: whether it may have fields that the configuration does not know, for one's own criterion or model.

    Raises:
        ValueError: naming the field and what fits.
    """
    known = {field.name for field in dataclasses.fields(config_class)} - _NOT_OURS
    for name, value in settings.items():
        if name in _NOT_OURS or not (others or name in known):
            raise ValueError(f"model_config has no field {shown(name)}; {suggestion(name, sorted(known))}")
        for number in value if isinstance(value, list | tuple) else [value]:
            least = -_LARGEST if name == "rope_offset" else 0
            if isinstance(number, int | float) and not least <= number <= _LARGEST:
                raise ValueError(f"model_config.{name}={shown(value)} must be from {least:,} to {_LARGEST:,}")
        if name in _ACTIVATIONS and value not in tuple(ACT2FN):
            near = suggestion(str(value), sorted(ACT2FN))
            raise ValueError(f"model_config.{name}={shown(value)} is no activation; {near}")


def own_task_class(task: TrainingTask) -> str | None:
    """Import path of the class of a task that is not the one that its recipe names; `None` if it is."""
    cls = type(task)
    named = task.recipe.declaration
    if task.recipe.model in _TASKS:
        module, name = _TASKS[task.recipe.model]
        named = getattr(importlib.import_module(f".{module}", __package__), name)
    return None if cls is named else f"{cls.__module__}:{cls.__qualname__}"


def validation_split(spec: str) -> str:
    """The split of "FORMAT:PATH" to score on if the recipe names none; a `ValueError` if none has a usual name."""
    return reading.validation_split(
        spec, "name one with val_split=, other data with val_data=, or hold out a part with val_fraction=0.2"
    )


def side_by_side(panels: Sequence[Image.Image], entries: Mapping[str, Color] | None = None) -> Image.Image:
    """Image, truth and answer in a row, under these titles, over a legend of colours by name."""
    return contact_sheet([panels], ("image", "truth", "answer"), entries=entries)
