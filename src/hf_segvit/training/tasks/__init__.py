"""What the training loop needs to know of a model: `TrainingTask` is the interface, `task_for` chooses by recipe.

The loop (loop.py) does steps, schedules, checkpoints and logs; a task supplies model, data, loss, evaluation and
images. `TrainingSamples` is what a task gives the loop to train on. `SegmentationTask` (segmentation.py) has all but
model and loss of a task on images with segments; EoMT's is in eomt.py. A task of one's own is named in a recipe by
`model: package.module:Task`, see docs/extending.md.

What tasks share in scoring and drawing: `validation_split` finds the data, `side_by_side` lays answers out.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ...data import reading
from ...drawing.segments import contact_sheet
from ...inference.loading import quiet_transformers
from ..declarations import TaskDeclaration
from ..published_data import published_data

_TASKS = {"eomt": ("eomt", "EoMTTask"), "vit_p": ("vit_p", "ViTPTask")}


class TrainingSamples(Protocol):
    """A map-style data set by (epoch, index), such as `AugmentedDataset`.

    A key gives the same sample on every process and worker, however often it is asked.
    """

    def __len__(self) -> int:
        """Samples of an epoch."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The sample of an epoch and index, which the collator makes batches of."""

    def name(self, index: int) -> str:
        """The image in words, for errors."""


class TrainingTask(TaskDeclaration, ABC):
    """One kind of model, as the training loop sees it.

    Args:
        recipe: what to train, see `Recipe`. Data sets are opened when they are first asked for.

    Attributes:
        headline: name of the metric by which checkpoints are compared; higher is better.
        device: where the model computes; the loop sets it before it asks for samples.
        published: description and size of training data that is not there, see `without_data`.
        remarks: lines for people on how the model was built, from `build_model`.
    """

    headline: str

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.device = torch.device("cpu")
        self.published: tuple[Any, int] | None = None
        self.remarks: list[str] = []

    def without_data(self) -> int | None:
        """Go by what is published about the training data if it is not there; nothing can be trained then.

        The model is built without the weights of its backbone, which are not downloaded.

        Returns:
            The number of training images; `None` where the data is there, or nothing is known of it.
        """
        self.published = published_data(self.recipe.data, self.data_tasks)
        return None if self.published is None else self.published[1]

    @property
    def backbone(self) -> Any:
        """What `from_backbone` starts from: as the recipe says, or without data its architecture alone."""
        if self.published is None:
            return self.recipe.backbone
        from ...conversion.backbones import load_backbone

        return load_backbone(self.recipe.backbone, with_weights=False)[0]

    @property
    def data_tasks(self) -> Sequence[str]:
        """The tasks that data sets are read for, the one to prefer first."""
        return (self.recipe.task,)

    @property
    def base_model(self) -> str | None:
        """Hub id of what training starts from, for the card; `None` where it is a folder, or nothing."""
        source = self.recipe.init or self.recipe.backbone
        return source if source and source.count("/") == 1 and not source.startswith((".", "/")) else None

    @abstractmethod
    def build_model(self) -> tuple[Any, Any]:
        """The model, on the CPU and in float32, and its image processor.

        Raises:
            ValueError: recipe and data set, checkpoint or backbone do not go together.
        """

    @abstractmethod
    def train_samples(self) -> TrainingSamples:
        """The samples to train on.

        Raises:
            ValueError: the data set cannot be read.
        """

    def training_datasets(self) -> Sequence[Any]:
        """The data sets that the samples are of, by which a run that goes on sees that they are still the same.

        None where there is nothing to tell but their number.
        """
        return ()

    @abstractmethod
    def collator(self, processor: Any, device: torch.device) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes a batch of samples, for a model that computes on `device`; it runs in the workers."""

    def normalizers(self, model: Any, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """What `loss` has to divide by in this step: by default the number of micro-batches, which suits a mean.

        Called once a step by every process, with all the micro-batches of the process. The quotients must be such that
        the sum over micro-batches, averaged over processes, is the loss of the joint batch.
        """
        return len(batches)

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any], normalizers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch on the model's device, and its parts without gradient, for the log.

        Parts are named "PANEL/CURVE", or by a single word, and have the same names in every step.
        """

    def prepare_batch(self, batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
        """Finish a batch that has just been copied to the device."""
        return dict(batch)

    def before_step(self, model: Any, step: int, plan: Any) -> dict[str, float]:
        """Set what changes with the step, from 0 on, such as annealing; the result is logged.

        Called once more with the number of all steps when training is over.
        """
        return {}

    def not_comparable_yet(self, model: Any) -> str | None:
        """Why evaluations do not count for the best checkpoint yet; `None` once they do."""
        return None

    @abstractmethod
    def evaluate(self, model: Any, processor: Any, device: torch.device, limit: int | None) -> dict[str, float]:
        """Metrics on the validation data, at most `limit` images; every process calls it and gets the same."""

    def draw(self, model: Any, processor: Any, device: torch.device, count: int) -> list[Image.Image]:
        """Images of the first `count` validation samples with truth and answer side by side; by default none."""
        return []

    def model_card(self, model: Any, processor: Any, results: Sequence[Mapping[str, Any]], about: str) -> str:
        """The text of README.md for the trained model; `about` says how it was trained."""
        scores = [f"- {name}: {value:.4f}" for result in results for name, value in result["metrics"].items()]
        return "\n".join([f"# {type(model).__name__}", "", about, "", *scores]) + "\n"

    @property
    def score_names(self) -> Sequence[str]:
        """Names of the metrics that `evaluate` may give, which is known before; none where it is not."""
        return ()

    def validation_name(self) -> dict[str, str]:
        """`task`, `dataset` and `split` of the validation data, as results.json has them."""
        return {
            "task": self.recipe.task,
            "dataset": str(self.recipe.val_data or self.recipe.data),
            "split": str(self.recipe.val_split),
        }

    def save(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the trained model for use, not for going on."""
        with quiet_transformers():
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


def task_for(recipe: Any) -> TrainingTask:
    """The task of a recipe: one of ours by name, or a `TrainingTask` by import path.

    Raises:
        ValueError: there is no such model, or the class is no complete task.
    """
    if recipe.model not in _TASKS:
        return recipe.declaration(recipe)
    module, name = _TASKS[recipe.model]
    return getattr(importlib.import_module(f".{module}", __package__), name)(recipe)


def validation_split(spec: str) -> str:
    """The split of "FORMAT:PATH" to score on where a recipe names none.

    Raises:
        ValueError: it has none of the usual names.
    """
    return reading.validation_split(spec, "name one with val_split=, or other data with val_data=")


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Image, truth and answer in a row, under these titles."""
    return contact_sheet([panels], ("image", "truth", "answer"))
