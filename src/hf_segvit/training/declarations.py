"""What a recipe may say of a kind of model: `TaskDeclaration`, those of EoMT and ViT-P, and those of others by import.

A `TrainingTask` is a declaration, too. Those of EoMT and ViT-P are classes of their own, which their tasks inherit, so
that a recipe is read and checked without PyTorch.
"""

# ruff: noqa: RUF009 - `option` makes a field, which belongs into the class

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..lookup import import_object
from .fields import option


@dataclass(frozen=True)
class SegmentationOptions:
    """What models that learn from masks have."""

    loss_mask: bool = option(
        False, "keep void, crowds and padding out of the loss; officially false, wise for own data"
    )


@dataclass(frozen=True)
class EoMTOptions(SegmentationOptions):
    """What only EoMT has."""

    annealing: list[Any] | bool | None = option(
        None,
        "[start, end] per query layer, as fractions of training, in which its masked attention fades; null: by "
        "the rule; false: masked attention stays as the configuration has it",
    )
    decay_query_layers: bool = option(True, "whether layer_decay counts for the blocks that see the queries")


@dataclass(frozen=True)
class PromptOptions:
    """How training points are drawn, see data/prompts.py; what is left out has its default there."""

    num_points: int = option(200, "prompts of an image", limits="> 0")
    source: str = option("mask", "what they are drawn from", choices=("mask", "coarse", "box"))
    instance_aware: bool = option(False, "draw a segment of the class before a pixel of it")
    box_share: float = option(0.5, "with box: prompts that are boxes; others are points in them", limits=">= 0, <= 1")
    coarse_margin: float = option(0.03, "with coarse: how far labels stay from borders", limits=">= 0")


@dataclass(frozen=True)
class MixtureOptions(PromptOptions):
    """Further data of a mixture; how points are drawn is as for the recipe's own where it is not said."""

    data: str = option(None, "FORMAT:PATH")
    share: float = option(1.0, "of the training images, relative to the other parts", limits="> 0")
    split: str | None = option(None, "null: the first there is")


@dataclass(frozen=True)
class PointOptions(PromptOptions):
    """The keys of `points`."""

    share: float = option(1.0, "of the recipe's own data, where it is mixed", limits="> 0")
    mixture: list[dict[str, Any]] = option([], "further data: data, split, share, source, ...", keys=MixtureOptions)
    reset_head: bool = option(False, "with init: learn the classes anew")
    evaluate: str | list[str] = option(["random"], "points to score at", choices=("random", "interior", "maximum"))
    generator: str | None = option(None, "segmentation model whose masks maximum asks about")


@dataclass(frozen=True)
class ViTPOptions:
    """What only ViT-P has."""

    prompt_learning_rate: float | None = option(None, "of the prompt encoder", limits="> 0", resume="told")
    points: dict[str, Any] = option({}, "how training points are drawn", keys=PointOptions)


@dataclass(frozen=True)
class NoOptions:
    """Of a model that has the fields of every recipe alone."""


class TaskDeclaration:
    """What a recipe may say of a kind of model. `TrainingTask` is one; its subclasses set what differs.

    Attributes:
        tasks: what `task` may be; the first is the default.
        default_image_size: pixels of a side, for all tasks or by task.
        default_augmentation: name or import path, for all tasks or by task.
        options: dataclass of fields, see fields.py, that not every recipe has. Those that are fields of `Recipe` are
            stated as such, the others under `options`.
    """

    tasks: ClassVar[Sequence[str]] = ()
    default_image_size: ClassVar[int | Mapping[str, int]] = 512
    default_augmentation: ClassVar[str | Mapping[str, str]] = "eomt_semantic"
    options: ClassVar[type] = NoOptions


class SegmentationDeclaration(TaskDeclaration):
    """Segmentation by masks, with the sizes and augmentations of EoMT's official configurations."""

    tasks = ("panoptic", "instance", "semantic")
    default_image_size: ClassVar = {"panoptic": 640, "instance": 640, "semantic": 512}
    default_augmentation: ClassVar = {
        **{"panoptic": "eomt_coco_panoptic", "instance": "eomt_coco_instance", "semantic": "eomt_semantic"}
    }
    options: ClassVar[type] = SegmentationOptions


class EoMTDeclaration(SegmentationDeclaration):
    """EoMT."""

    options = EoMTOptions


class ViTPDeclaration(TaskDeclaration):
    """ViT-P, with the size of its official configurations."""

    tasks = ("points",)
    default_image_size = 518
    default_augmentation = "vit_p"
    options = ViTPOptions


DECLARATIONS: dict[str, type[TaskDeclaration]] = {"eomt": EoMTDeclaration, "vit_p": ViTPDeclaration}


def task_declaration(model: str) -> type[TaskDeclaration]:
    """What may be said of a recipe's `model`; a task of one's own is imported.

    Raises:
        ValueError: there is no such class, or it is no complete training task.
    """
    if model in DECLARATIONS:
        return DECLARATIONS[model]
    found = import_object(model, "model")
    if not issubclass(found, TaskDeclaration):
        raise ValueError(f"model={model} is no training task; derive it from hf_segvit.training.tasks.TrainingTask")
    missing = [*sorted(getattr(found, "__abstractmethods__", ())), *([] if found.tasks else ["tasks"])]
    if missing:
        raise ValueError(f"model={model} lacks {', '.join(missing)}; add it, see TrainingTask")
    return found
