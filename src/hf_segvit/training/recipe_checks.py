"""What a recipe may hold: the choices of its fields, their ranges, and values that contradict each other.

`check_recipe` refuses everything that can be told without data, weights or devices, so that a mistake shows before
anything is loaded.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

CHOICES = {
    "model": ("eomt", "vit_p"),
    "task": ("panoptic", "instance", "semantic", "points"),
    "optimizer": ("adamw", "sgd"),
    "weight_decay_mode": ("all", "matrices"),
    "schedule": ("polynomial", "cosine"),
    "precision": ("no", "bf16", "fp16"),
}
POSITIVE = (
    "epochs",
    "steps",
    "batch_size",
    "device_batch_size",
    "learning_rate",
    "base_learning_rate",
    "prompt_learning_rate",
    "max_grad_norm",
    "power",
    "layer_decay",
    "evaluate_every",
    "evaluate_limit",
    "patience",
    "save_every",
    "save_every_steps",
    "keep_last",
    "log_every",
)
NOT_NEGATIVE = ("weight_decay", "momentum", "seed", "num_workers", "draw")
LORA_KEYS = ("rank", "alpha", "dropout", "targets")


def check_recipe(recipe: Any) -> None:
    """Refuse a `Recipe` that cannot be meant.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    for name, choices in CHOICES.items():
        value = getattr(recipe, name)
        if value not in choices:
            near = get_close_matches(value, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
            raise ValueError(f"{name}={value!r} is unknown; {hint}")
    for name in POSITIVE:
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be greater than 0")
    for name in NOT_NEGATIVE:
        value = getattr(recipe, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name}={value} must not be negative")
    if (recipe.task == "points") != (recipe.model == "vit_p"):
        raise ValueError(
            f"model={recipe.model} and task={recipe.task} do not go together; ViT-P's task is points, EoMT's are "
            "panoptic, instance and semantic"
        )
    if recipe.epochs is not None and recipe.steps is not None:
        raise ValueError(f"epochs={recipe.epochs} and steps={recipe.steps} both say how long; set one of them to null")
    if recipe.init is not None and recipe.backbone is not None:
        raise ValueError(f"init={recipe.init} and backbone={recipe.backbone}: start from one of them; set one to null")
    _check_optimization(recipe)
    _check_image_size(recipe.image_size)
    _check_annealing(recipe)
    parse_freeze(recipe.freeze)
    _check_lora(recipe)


def parse_freeze(freeze: str | None) -> int | None:
    """What `freeze` asks for: `None` nothing, -1 the whole backbone, N the embeddings and the first N blocks.

    Raises:
        ValueError: it is neither.
    """
    if freeze is None:
        return None
    if freeze == "backbone":
        return -1
    match = re.fullmatch(r"until_layer:(\d+)", freeze)
    if match is None:
        raise ValueError(f"freeze={freeze!r} is unknown; give backbone, until_layer:N (such as until_layer:6) or null")
    return int(match.group(1))


def parse_fraction(value: Any) -> float:
    """A number in [0, 1], or a text such as "1/6".

    Raises:
        ValueError: it is neither.
    """
    try:
        number = Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"annealing has {value!r}; give fractions of training, such as 0.25 or 1/4") from error
    if not 0 <= number <= 1:
        raise ValueError(f"annealing has {value!r}, not a fraction of training; give 0 to 1, such as 0.25 or 1/4")
    return float(number)


def _check_optimization(recipe: Any) -> None:
    if recipe.layer_decay > 1:
        raise ValueError(f"layer_decay={recipe.layer_decay} must be at most 1, which is the same rate for all layers")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        raise ValueError(f"betas={recipe.betas} must be two numbers in [0, 1)")
    if recipe.momentum >= 1:
        raise ValueError(f"momentum={recipe.momentum} must be below 1")
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        raise ValueError(f"ema_decay={recipe.ema_decay} must lie between 0 and 1, such as 0.999; null keeps no average")
    if recipe.device_batch_size is not None and recipe.batch_size % recipe.device_batch_size:
        raise ValueError(
            f"device_batch_size={recipe.device_batch_size} does not divide batch_size={recipe.batch_size}, which "
            "counts all devices and accumulation"
        )
    warmup = recipe.warmup_steps
    if warmup is not None and (len(warmup) not in (1, 2) or min(warmup) < 0):
        raise ValueError(f"warmup_steps={warmup} must be one or two whole numbers, such as [500] or [500, 1000]")


def _check_image_size(image_size: int | list[int] | None) -> None:
    sides = [image_size] if isinstance(image_size, int) else image_size
    if sides is not None and (len(sides) > 2 or not sides or min(sides) < 1):
        raise ValueError(f"image_size={image_size} must be a number of pixels, or [height, width]")


def _check_annealing(recipe: Any) -> None:
    annealing = recipe.annealing
    if annealing is True:
        raise ValueError("annealing=true says nothing; null anneals by the rule, false not at all, or give fractions")
    for pair in annealing or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"annealing={annealing} must hold [start, end] for each query layer")
        start, end = (parse_fraction(value) for value in pair)
        if start > end:
            raise ValueError(f"annealing has [{pair[0]}, {pair[1]}], which ends before it starts; swap them")
    if annealing and recipe.model != "eomt":
        raise ValueError(f"annealing is for EoMT's masked attention, not for model={recipe.model}; leave it out")


def _check_lora(recipe: Any) -> None:
    if recipe.lora is None:
        return
    for key in recipe.lora:
        if key not in LORA_KEYS:
            near = get_close_matches(str(key), LORA_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(LORA_KEYS)}"
            raise ValueError(f"lora has no key {key!r}; {hint}")
    if recipe.freeze is not None:
        raise ValueError(f"lora and freeze={recipe.freeze}: adapters freeze what they adapt; set one of them to null")
