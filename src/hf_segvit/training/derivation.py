"""What follows from a recipe: `derive` fills in everything that it leaves open, given the data and the processes.

The rules, each the identity at the official settings (batch of 16, official length):

- epochs to steps: an epoch is num_images / batch_size steps, rounded to the nearest, at least one.
- learning rate: `base_learning_rate` times the square root of batch_size / 16 with AdamW, whose step does not grow
  with the gradient, so that what should stay is the noise of a pass (Malladi et al., arXiv 2205.10287); linear in
  batch_size / 80 with SGD, whose steps add up (Goyal et al., arXiv 1706.02677; 80 is ViT-P's batch).
- warm-up: 500 steps for new parameters, then 1000 for the backbone, but no more than 1/36 and 1/18 of training, which
  shortens it in runs below 18,000 steps. From scratch nothing has to be spared: one warm-up for all, of their sum.
- annealing: see `MaskAnnealing.by_rule`.
- evaluation: once an epoch, but at most 50 times; records: every `log_every` steps, but at least 20.
- queries: 100 in semantic, 200 in panoptic and instance segmentation. Query layers: 3 of 12 blocks, 4 of 24, 5 of 40.

Whatever the recipe states is taken as it is. `model_fields`, `augmentation_name` and `image_size` need no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .annealing import MaskAnnealing
from .declarations import EoMTDeclaration
from .recipe import Recipe

# optimizer: learning rate, the batch size it is for, and the exponent with which it follows the batch size
BASE_LEARNING_RATES = {"adamw": (1e-4, 16, 0.5), "sgd": (1e-2, 80, 1.0)}
WARMUP_STEPS, WARMUP_SHARES = (500, 1000), (1 / 36, 1 / 18)
MOST_EVALUATIONS = 50
FEWEST_RECORDS = 20  # of losses and the like, in a training of at least as many steps


@dataclass(frozen=True)
class TrainingPlan:
    """A recipe with everything decided.

    Attributes:
        recipe: that it follows from.
        num_images: of the training data.
        world_size: processes.
        steps_per_epoch: steps of the optimiser.
        total_steps: T, steps of the whole training.
        device_batch_size: images on a device at once.
        accumulation_steps: of these batches per step of the optimiser.
        learning_rate: the highest.
        warmup_steps: (all parameters,) or (new parameters, then the backbone).
        annealing: of masked attention; `None` where it stays as the configuration has it.
        evaluate_every_steps: steps between evaluations.
        save_every_steps: steps between checkpoints.
    """

    recipe: Recipe
    num_images: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    device_batch_size: int
    accumulation_steps: int
    learning_rate: float
    warmup_steps: tuple[int, ...]
    annealing: MaskAnnealing | None
    evaluate_every_steps: int
    save_every_steps: int

    @property
    def log_every(self) -> int:
        """Steps between records: as the recipe says, but a short training still has enough for a curve."""
        return min(self.recipe.log_every, max(1, self.total_steps // FEWEST_RECORDS))

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.total_steps / self.steps_per_epoch

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps after which the model is scored; the last is the end."""
        every = self.evaluate_every_steps
        return [*range(every, self.total_steps, every), self.total_steps]

    @property
    def comparable_evaluations(self) -> int:
        """How many of them decide which checkpoint is best, and count for `patience`: those without annealing."""
        annealing = self.annealing
        return sum(annealing is None or annealing.finished(step) for step in self.evaluation_steps)


def derive(recipe: Recipe, num_images: int, world_size: int = 1, config: Any = None) -> TrainingPlan:
    """Decide what a recipe leaves open.

    Args:
        recipe: to train by.
        num_images: images in the training data.
        world_size: processes, each with its device.
        config: of the model, where there is one already; otherwise the recipe's `model_config` has to tell.

    Raises:
        ValueError: the batch does not divide among the processes, the warm-up is longer than the training, or there are
            not as many annealing phases as query layers; the message names the numbers and the remedy.
    """
    if num_images < 1:
        raise ValueError(f"{recipe.data}: there are no images to train on; check the split and the filters")
    device_batch_size, accumulation_steps = _split_batch(recipe, world_size)
    steps_per_epoch = steps_of_epoch(num_images, recipe.batch_size)
    if recipe.steps is None and recipe.epochs is None:
        raise ValueError("neither epochs nor steps says how long to train; give one, such as epochs=12")
    total_steps = recipe.steps or max(1, round((recipe.epochs or 0) * steps_per_epoch))
    if recipe.evaluate_every is None:
        evaluate_every_steps = max(steps_per_epoch, math.ceil(total_steps / MOST_EVALUATIONS))
    else:
        evaluate_every_steps = max(1, round(recipe.evaluate_every * steps_per_epoch))
    save_every_steps = recipe.save_every_steps or (
        evaluate_every_steps if recipe.save_every is None else max(1, round(recipe.save_every * steps_per_epoch))
    )
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


def steps_of_epoch(num_images: int, batch_size: int) -> int:
    """Steps of an epoch: at least one, and otherwise the nearest to num_images / batch_size, a half rounded up."""
    return max(1, math.floor(num_images / batch_size + 0.5))


def derived_learning_rate(recipe: Recipe) -> float:
    """The highest learning rate: the recipe's own, or by the rule of the optimiser from its batch size."""
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    base, reference_batch_size, exponent = BASE_LEARNING_RATES[recipe.optimizer]
    base = base if recipe.base_learning_rate is None else recipe.base_learning_rate
    return base * (recipe.batch_size / reference_batch_size) ** exponent


def derived_warmup(recipe: Recipe, total_steps: int) -> tuple[int, ...]:
    """Steps of the warm-up stages, one or two.

    Raises:
        ValueError: the recipe's own take as long as the training.
    """
    if recipe.warmup_steps is not None:
        stages = tuple(recipe.warmup_steps)
        if sum(stages) >= total_steps:
            raise ValueError(
                f"warmup_steps={list(stages)} do not fit into a training of {total_steps} steps; warmup_steps=null "
                "takes a share of it"
            )
        return stages
    stages = tuple(
        min(steps, int(share * total_steps)) for steps, share in zip(WARMUP_STEPS, WARMUP_SHARES, strict=True)
    )
    starts_trained = recipe.init is not None or recipe.backbone is not None
    return stages if starts_trained and is_eomt(recipe) else (sum(stages),)


def derived_annealing(recipe: Recipe, total_steps: int, config: Any = None) -> MaskAnnealing | None:
    """When masked attention fades; `None` where there is none, or the recipe leaves it alone.

    Raises:
        ValueError: the recipe's phases are not one for each query layer.
    """
    stated = recipe.model_config.get("masked_attention", True) if config is None else False
    masked = getattr(config, "masked_attention", stated)
    if not is_eomt(recipe) or recipe.annealing is False or not masked:
        return None
    num_query_layers = getattr(config, "num_query_layers", None) or model_fields(recipe).get("num_query_layers", 4)
    if not isinstance(recipe.annealing, list):
        return MaskAnnealing.by_rule(total_steps, num_query_layers, recipe.power)
    if len(recipe.annealing) != num_query_layers:
        raise ValueError(
            f"annealing has {len(recipe.annealing)} phases, and the model {num_query_layers} query layers; give one "
            "[start, end] for each, or annealing=null"
        )
    return MaskAnnealing.from_fractions(recipe.annealing, total_steps, recipe.power)


def model_fields(recipe: Recipe, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """Fields of the model's configuration that a recipe asks for, with those that follow from its task.

    Args:
        recipe: to train by. One that starts from a segmentation checkpoint asks for what it states alone.
        num_hidden_layers: blocks of the backbone, where they are known; the query layers follow from them.
    """
    fields = dict(recipe.model_config)
    if not is_eomt(recipe) or recipe.init is not None:
        return fields
    fields.setdefault("num_queries", 100 if recipe.task == "semantic" else 200)
    depth = fields.get("num_hidden_layers", num_hidden_layers)
    if depth is not None:
        fields.setdefault("num_query_layers", min(depth, 3 if depth <= 12 else 4 if depth <= 24 else 5))
    return fields


def augmentation_name(recipe: Recipe) -> str:
    """The augmentation of the recipe, or that of its task."""
    return recipe.augmentation or _of_task(recipe.declaration.default_augmentation, recipe)


def image_size(recipe: Recipe, config: Any = None) -> tuple[int, int]:
    """Height and width of training images: the recipe's, that of the model it starts from, or the task's."""
    size = recipe.image_size or getattr(config, "image_size", None)
    size = size or _of_task(recipe.declaration.default_image_size, recipe)
    height, width = (size, size) if isinstance(size, int) else (size * 2)[:2]
    return height, width


def _of_task(defaults: Any, recipe: Recipe) -> Any:
    return defaults[recipe.task] if isinstance(defaults, Mapping) else defaults


def is_eomt(recipe: Recipe) -> bool:
    """Also a task of one's own that is derived from EoMT's, whose model has queries and masked attention, too."""
    return issubclass(recipe.declaration, EoMTDeclaration)


def _split_batch(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Images on a device at once, and how many of these batches a process accumulates."""
    if recipe.batch_size % world_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} does not divide among {world_size} processes; give a multiple of "
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
