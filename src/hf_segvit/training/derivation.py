"""Derive the training plan: everything that a recipe leaves open.

`derive` fills in steps, batches, learning rate, warm-up, annealing, evaluations and checkpoints, by rules that keep the
official values at the official settings (batch of 16, official length). Whatever the recipe sets is taken as it is.
`model_fields`, `augmentation_name` and `image_size` need no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .annealing import MaskAnnealing
from .declarations import DECLARATIONS, MOST_STEPS, EoMTDeclaration, Mask2FormerViTDeclaration, QueryDeclaration
from .recipe import Recipe, parse_interval

# Optimiser: learning rate, the batch size it is for, and the exponent by which it follows the batch size. AdamW's step
# does not grow with the gradient, so the square root keeps the noise of an epoch (Malladi et al., arXiv 2205.10287);
# SGD's steps add up, so linear (Goyal et al., arXiv 1706.02677). 16 and 80 are the batches of EoMT and ViT-P.
BASE_LEARNING_RATES = {"adamw": (1e-4, 16, 0.5), "sgd": (1e-2, 80, 1.0)}
# New parameters, then the backbone: official steps, but at most these shares of training, reached at 18,000 steps.
WARMUP_STEPS, WARMUP_SHARES = (500, 1000), (1 / 36, 1 / 18)
MOST_EVALUATIONS = 50  # in a run: with few images an epoch is over in seconds, and scoring would take longer
_MOST_EVALUATIONS = 100_000  # even if the recipe wants more
FEWEST_RECORDS = 20  # log records, enough for a curve


@dataclass(frozen=True)
class TrainingPlan:
    """A recipe with everything decided; steps are optimiser steps."""

    recipe: Recipe
    num_images: int
    world_size: int  # processes
    steps_per_epoch: int
    total_steps: int
    device_batch_size: int
    accumulation_steps: int  # batches of a device per step
    learning_rate: float  # at its peak
    warmup_steps: tuple[int, ...]  # (all parameters,) or (new parameters, then the backbone)
    annealing: MaskAnnealing | None  # None: masked attention stays as the configuration has it
    evaluate_every_steps: int
    save_every_steps: int

    @property
    def log_every(self) -> int:
        """Steps between log records; fewer than in the recipe if the run is short."""
        return min(self.recipe.log_every, max(1, self.total_steps // FEWEST_RECORDS))

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.total_steps / self.steps_per_epoch

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps after which the model is scored; the last is the end."""
        return [*range(self.evaluate_every_steps, self.total_steps, self.evaluate_every_steps), self.total_steps]

    @property
    def comparable_evaluations(self) -> int:
        """Number of evaluations that select the best model and count for `patience`: those after annealing."""
        return sum(self.annealing is None or self.annealing.finished(step) for step in self.evaluation_steps)


def derive(recipe: Recipe, num_images: int, world_size: int = 1, config: Any = None) -> TrainingPlan:
    """Decide what a recipe leaves open.

    Args:
        num_images: images in the training data.
        world_size: processes, each with one device.
        config: of the model if it is built already; otherwise the recipe's `model_config` is read.

    Raises:
        ValueError: the batch cannot be split among the processes, the warm-up is longer than the run, or the number of
            annealing phases is not that of the query layers; the message names the numbers and the remedy.
    """
    if num_images < 1:
        raise ValueError(f"{recipe.data}: there are no images to train on; check the split and the filters")
    device_batch_size, accumulation_steps = _split_batch(recipe, world_size)
    steps_per_epoch = steps_of_epoch(num_images, recipe.batch_size)
    if recipe.steps is None and recipe.epochs is None:
        raise ValueError("neither epochs nor steps is set; give one, such as epochs=12")
    total_steps = recipe.steps or max(1, round((recipe.epochs or 0) * steps_per_epoch))
    if total_steps > MOST_STEPS:
        raise ValueError(
            f"epochs={recipe.epochs:g} of {num_images:,} images are {total_steps:,} steps of batch_size="
            f"{recipe.batch_size}, and {MOST_STEPS:,} are the most of a run; give fewer epochs"
        )
    evaluate_every_steps = _interval_steps(recipe, "evaluate_every", total_steps, steps_per_epoch)
    if evaluate_every_steps is None:
        evaluate_every_steps = max(steps_per_epoch, math.ceil(total_steps / MOST_EVALUATIONS))
    if total_steps / evaluate_every_steps > _MOST_EVALUATIONS:
        raise ValueError(
            f"evaluate_every={recipe.evaluate_every} scores the model {total_steps // evaluate_every_steps:,} times "
            f"in {total_steps:,} steps; give a longer interval"
        )
    if recipe.save_every_steps is not None and recipe.save_every_steps > total_steps:
        raise ValueError(
            f"save_every_steps={recipe.save_every_steps:,} is beyond the end of the run, which has {total_steps:,} "
            "steps; give fewer, or save_every=end for once at the end"
        )
    save_every_steps = _interval_steps(recipe, "save_every", total_steps, steps_per_epoch)
    save_every_steps = recipe.save_every_steps or save_every_steps or evaluate_every_steps
    return TrainingPlan(
        recipe=recipe,
        num_images=num_images,
        world_size=world_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        device_batch_size=device_batch_size,
        accumulation_steps=accumulation_steps,
        learning_rate=derived_learning_rate(recipe),
        warmup_steps=derived_warmup(recipe, total_steps),
        annealing=derived_annealing(recipe, total_steps, config),
        evaluate_every_steps=evaluate_every_steps,
        save_every_steps=save_every_steps,
    )


def _interval_steps(recipe: Recipe, name: str, total_steps: int, steps_per_epoch: int) -> int | None:
    """Steps that an interval of the recipe has; a `ValueError` if the run ends before."""
    interval = parse_interval(name, getattr(recipe, name))
    if interval is None:
        return None
    number, unit = interval
    steps = {"epochs": number * steps_per_epoch, "steps": number, "end": total_steps}[unit]
    if round(steps) > total_steps:
        hint = f' (a bare number counts epochs: for steps give "{number:g} steps")' * (unit == "epochs")
        raise ValueError(
            f"{name}={number:g} {unit} is {round(steps):,} steps, but the run ends after {total_steps:,} steps = "
            f"{epochs_text(total_steps / steps_per_epoch)}{hint}; give less, or {name}=end for once at the end"
        )
    return max(1, round(steps))


def epochs_text(epochs: float) -> str:
    """A number of epochs for people."""
    number = f"{epochs:.4g}"
    return f"{number} epoch" if number == "1" else f"{number} epochs"


def steps_of_epoch(num_images: int, batch_size: int) -> int:
    """num_images / batch_size steps, rounded to the nearest, at least one."""
    # Not round(): it rounds a half to the even number, and epochs of neighbouring batch sizes would jump.
    return max(1, math.floor(num_images / batch_size + 0.5))


def derived_learning_rate(recipe: Recipe) -> float:
    """The peak learning rate: the recipe's, or scaled to its batch size, see `BASE_LEARNING_RATES`."""
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    base, reference_batch_size, exponent = BASE_LEARNING_RATES[recipe.optimizer]
    base = base if recipe.base_learning_rate is None else recipe.base_learning_rate
    return base * (recipe.batch_size / reference_batch_size) ** exponent


def derived_warmup(recipe: Recipe, total_steps: int) -> tuple[int, ...]:
    """Steps of the one or two warm-up stages.

    Raises:
        ValueError: the recipe's stages take as long as the whole run.
    """
    if recipe.warmup_steps is not None:
        stages = tuple(recipe.warmup_steps)
        if sum(stages) >= total_steps:
            raise ValueError(
                f"warmup_steps={list(stages)} do not fit into a run of {total_steps} steps; give fewer, or "
                "warmup_steps=null for a share of the run"
            )
        return stages
    stages = tuple(
        min(steps, int(share * total_steps)) for steps, share in zip(WARMUP_STEPS, WARMUP_SHARES, strict=True)
    )
    # From scratch there is no trained backbone to protect: one warm-up for all parameters.
    starts_trained = recipe.init is not None or recipe.backbone is not None
    return stages if starts_trained and has_queries(recipe) else (sum(stages),)


def derived_annealing(recipe: Recipe, total_steps: int, config: Any = None) -> MaskAnnealing | None:
    """When masked attention fades; `None` without masked attention or with `annealing=False`.

    Raises:
        ValueError: the recipe has phases, but not one for each layer with masks, or the model has no masks.
    """
    if config is None:
        masked = recipe.model_config.get("masked_attention", True)
    else:
        masked = getattr(config, "masked_attention", False)
    if has_queries(recipe) and not masked and isinstance(recipe.annealing, list):
        raise ValueError(
            f"annealing={recipe.annealing} and model_config.masked_attention=false: without masks there is nothing to "
            "anneal; leave one of them out"
        )
    if not has_queries(recipe) or recipe.annealing is False or not masked:
        return None
    kind, default = ("query", 4) if is_eomt(recipe) else ("decoder", 9)
    num_layers = getattr(config, f"num_{kind}_layers", None)
    num_layers = num_layers or model_fields(recipe).get(f"num_{kind}_layers", default)
    if not isinstance(recipe.annealing, list):
        return MaskAnnealing.by_rule(total_steps, num_layers, recipe.power)
    if len(recipe.annealing) != num_layers:
        raise ValueError(
            f"annealing has {len(recipe.annealing)} phases, and the model {num_layers} {kind} layers; give one "
            "[start, end] for each, or annealing=null"
        )
    return MaskAnnealing.from_fractions(recipe.annealing, total_steps, recipe.power)


def model_fields(recipe: Recipe, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """Fields of the model's configuration: those of the recipe, and those that follow from its task.

    Args:
        num_hidden_layers: blocks of the backbone if known; they decide the number of query layers.
    """
    fields = dict(recipe.model_config)
    if recipe.init is None and recipe.backbone is None and recipe.model in DECLARATIONS and "hidden_size" in fields:
        # The default belongs to the default width: a narrow model would be nearly all MLP.
        width = fields["hidden_size"]
        if isinstance(width, int):  # whoever builds the model refuses anything else
            fields.setdefault("intermediate_size", 4 * width)
    # A segmentation checkpoint has its queries already; only what the recipe sets is changed.
    if not has_queries(recipe) or recipe.init is not None:
        return fields
    # Queries and query layers of the official configurations: blocks are 12 (S, B), 24 (L) or 40 (g).
    fields.setdefault("num_queries", 100 if recipe.task == "semantic" else 200)
    if issubclass(recipe.declaration, Mask2FormerViTDeclaration):
        fields.setdefault("patch_size", 16)  # the strides of its features allow no other
    if not is_eomt(recipe):
        return fields
    depth = fields.get("num_hidden_layers", num_hidden_layers)
    if isinstance(depth, int):
        fields.setdefault("num_query_layers", min(depth, 3 if depth <= 12 else 4 if depth <= 24 else 5))
    return fields


def augmentation_name(recipe: Recipe) -> str:
    """The augmentation of the recipe, or the default of its task."""
    return recipe.augmentation or _of_task(recipe.declaration.default_augmentation, recipe)


def image_size(recipe: Recipe, config: Any = None) -> tuple[int, int]:
    """(height, width) of training images, from the recipe, the starting model or the task, in this order."""
    size = recipe.image_size or getattr(config, "image_size", None)
    size = size or _of_task(recipe.declaration.default_image_size, recipe)
    height, width = (size, size) if isinstance(size, int) else (size * 2)[:2]
    return height, width


def _of_task(defaults: Any, recipe: Recipe) -> Any:
    return defaults[recipe.task] if isinstance(defaults, Mapping) else defaults


def has_queries(recipe: Recipe) -> bool:
    """Whether the model has queries and masked attention; also true of tasks derived from ours."""
    return issubclass(recipe.declaration, QueryDeclaration)


def is_eomt(recipe: Recipe) -> bool:
    """Whether the queries join the blocks of the ViT; also true of tasks derived from EoMT's."""
    return issubclass(recipe.declaration, EoMTDeclaration)


def _split_batch(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """(device_batch_size, accumulation_steps)."""
    if recipe.batch_size % world_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} cannot be split among {world_size} processes; give a multiple of "
            f"{world_size}, such as batch_size={math.ceil(recipe.batch_size / world_size) * world_size}"
        )
    share = recipe.batch_size // world_size
    device_batch_size = min(recipe.device_batch_size or share, share)
    if share % device_batch_size:
        raise ValueError(
            f"device_batch_size={device_batch_size} does not divide the {share} images of each of {world_size} "
            f"processes (batch_size={recipe.batch_size}); give a divisor of {share}"
        )
    return device_batch_size, share // device_batch_size
