"""A training plan in words: what follows from a recipe, which parameters learn at which rate, and how to save memory.

`explain` is what `hf-segvit train RECIPE --explain` prints; `memory_advice` lists, for a recipe whose batch does not
fit on the device, what to change, what costs nothing first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.image_processing_plain_vit import unit_normalization
from .derivation import TrainingPlan, augmentation_name, image_size
from .optimizers import parameter_groups
from .recipe import Recipe


def explain(plan: TrainingPlan, model: nn.Module, processor: Any) -> str:
    """Everything that was decided, and a table of the parameter groups.

    Args:
        plan: to train by.
        model: that is trained, with its frozen parts and adapters.
        processor: its image processor.

    Returns:
        Lines of text; in the table, parameters of one module and shape stand together.
    """
    recipe = plan.recipe
    groups = parameter_groups(model, plan)
    lines = [f"{name:<16}{text}" for name, text in _decisions(plan, model, processor).items()]
    lines += ["", f"{'role':<10}{'learning rate':>14}{'decay':>8}{'parameters':>13}  names"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        start = f"{group['role']:<10}{group['lr']:>14.4g}{group['weight_decay']:>8.3g}{count:>13,}"
        shapes = [tuple(parameter.shape) for parameter in group["params"]]
        for row in _rows(group["names"], shapes):
            lines.append(f"{start}  {row}")
            start = " " * len(start)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    count = sum(parameter.numel() for parameter in frozen)
    lines += ["", f"{trained:,} parameters in {len(groups)} groups are trained, {count:,} are frozen"]
    advice = memory_advice(recipe, plan)
    if advice:
        lines += ["", "If memory runs out:", *(f"  {line}" for line in advice)]
    return "\n".join(lines)


def memory_advice(recipe: Recipe, plan: TrainingPlan) -> list[str]:
    """What to change where the batch does not fit on a device, in the order of trying.

    The first ones leave the result as it is: losses are normalised over the whole batch, however it is split.

    Args:
        recipe: to train by.
        plan: that follows from it.

    Returns:
        Lines, each with a setting to add to the command; none where nothing is left to change.
    """
    advice = []
    if plan.device_batch_size > 1:
        smaller = _largest_divisor(plan.device_batch_size)
        steps = plan.accumulation_steps * plan.device_batch_size // smaller
        advice.append(f"device_batch_size={smaller}: the same result, in {steps} parts a step")
    if not recipe.gradient_checkpointing:
        advice.append("gradient_checkpointing=true: the same result, about a third slower")
    if recipe.precision == "no":
        advice.append("precision=bf16: half the activations, and faster on a GPU")
    height, width = image_size(recipe)
    if min(height, width) >= 256:
        smaller_size = [side * 3 // 4 // 16 * 16 for side in (height, width)]
        value = smaller_size[0] if height == width else smaller_size
        advice.append(f"image_size={str(value).replace(' ', '')}: half the memory, and small things are seen less well")
    if recipe.lora is None and recipe.freeze is None:
        started = recipe.init is not None or recipe.backbone is not None
        if started:
            advice.append("freeze=until_layer:N: no gradient and no optimiser state for the first N blocks")
        if recipe.model == "eomt" and recipe.init is not None:
            advice.append("the recipe own_lora: adapters in place of the backbone's weights")
    return advice


def _decisions(plan: TrainingPlan, model: Any, processor: Any) -> dict[str, str]:
    recipe, annealing = plan.recipe, plan.annealing
    height, width = image_size(recipe, model.config)
    parts = f"{plan.world_size} x {plan.accumulation_steps} x {plan.device_batch_size}"
    warmup = [f"{steps:,}" for steps in plan.warmup_steps]
    stages = f"{warmup[0]} steps" if len(warmup) == 1 else f"{warmup[0]} steps, then {warmup[1]} for the backbone"
    limit = "gradients as they are" if recipe.max_grad_norm is None else f"gradients at most {recipe.max_grad_norm}"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in unit_normalization(vars(processor)))
    decisions = {
        "recipe": f"{recipe.name}: {recipe.model}, {recipe.task}",
        "data": f"{recipe.data}, {plan.num_images:,} images",
        "start": recipe.init or recipe.backbone or "from scratch",
        "images": f"{height} x {width}, augmentation {augmentation_name(recipe)}",
        "normalisation": f"mean {mean}, standard deviation {std}, of pixels in [0, 1]",
        "length": f"{plan.total_steps:,} steps = {plan.epochs:.4g} epochs of {plan.steps_per_epoch:,} steps",
        "batch": f"{recipe.batch_size} = {parts} (processes x accumulation x images on a device)",
        "optimiser": f"{recipe.optimizer}, learning rate {plan.learning_rate:.4g}, {limit}",
        "warm-up": f"{stages}; then {recipe.schedule} decay",
        "evaluation": f"every {plan.evaluate_every_steps:,} steps; a checkpoint every {plan.save_every_steps:,}",
    }
    if recipe.patience is not None:
        decisions["patience"] = _patience(recipe.patience, plan)
    if annealing is not None:
        phases = zip(annealing.starts, annealing.ends, strict=True)
        decisions["annealing"] = ", ".join(f"{start:,} to {end:,}" for start, end in phases) + " (a query layer each)"
    return decisions


def _patience(patience: int, plan: TrainingPlan) -> str:
    """When training may stop early, or that it cannot."""
    count, total = plan.comparable_evaluations, len(plan.evaluation_steps)
    of_all = f"{count} of the {total} evaluations count" + (", those after annealing" if count < total else "")
    if patience < count - 1:  # the first is a best score to beat, and the last is the end anyway
        return f"{patience}: training stops after as many evaluations without a better score; {of_all}"
    most = f"at most {count - 2}, or " if count > 2 else ""
    return f"WARNING: {patience} cannot stop this training early, as {of_all}; give {most}a lower evaluate_every"


def _rows(names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """One row per module: its block or part, and the shapes of its parameters."""
    rows: dict[str, list[str]] = {}
    for name, shape in zip(names, shapes, strict=True):
        part = re.match(r"(.*?layers\.\d+|.*?embeddings|.*?upscale_block|.*?mask_head|.*)(?:\.|$)", name)
        prefix = part.group(1) if part is not None else name
        rest = name.removeprefix(prefix).removeprefix(".")
        rows.setdefault(prefix, []).append(f"{rest} {'x'.join(map(str, shape))}".strip())
    return [f"{prefix}: {', '.join(parameters)}" for prefix, parameters in rows.items()]


def _largest_divisor(number: int) -> int:
    """The largest divisor that is smaller than the number."""
    return next(divisor for divisor in range(number // 2, 0, -1) if number % divisor == 0)
