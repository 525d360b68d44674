"""Parameter groups: which learning rate and weight decay each parameter has, and the optimiser on them.

With layer-wise decay (Clark et al., arXiv 2003.10555), block i of N learns at lr * decay ** (N - 1 - i), the embeddings
as slowly as the first block, the final norm and everything new at lr. `decay_query_layers=False` gives all blocks that
see the queries lr, and leaves the others as they were. Parameters of one rate share a group, so that there are about as
many groups as blocks.

Source: the official code of EoMT, whose dead `lr_mult` is left out; ViT-P's two rates.

Freezing: training a part of a model, with less memory and less to overfit.

`freeze` applies a recipe's setting. What is frozen needs no gradient, so it is in no parameter group and has no state
in the optimiser; where nothing before it is trained, the backward pass stops in front of it. Frozen blocks compute as
in inference, without stochastic depth and dropout, also under `model.train()`.

Learning-rate schedules: a warm-up of one or two stages, then polynomial or cosine decay to 0.

With two stages, the new parameters warm up first, while the backbone stands still: what they send back at first would
only harm it. Then the backbone warms up, and each decays from the end of its own warm-up to the end of training.

Source: the official code of EoMT (two stages, polynomial) and of ViT-P (one stage, cosine). T steps of training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .derivation import TrainingPlan
from .recipe import parse_freeze

BACKBONE, REST, PROMPT = "backbone", "rest", "prompt"


def parameter_groups(model: nn.Module, plan: TrainingPlan) -> list[dict[str, Any]]:
    """Groups of the parameters that are trained, for an optimiser and `learning_rate_schedule`.

    Args:
        model: one of ours, also with adapters; what does not require a gradient is in no group.
        plan: to train by.

    Returns:
        For each group `params`, their `names`, `role` ("backbone": the ViT, "rest": queries and heads, "prompt":
        ViT-P's prompt encoder), `lr` and `weight_decay`. Backbone first, from its first block to its last.

    Raises:
        ValueError: nothing is left to train.
    """
    recipe = plan.recipe
    config: Any = model.config
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name)
        learning_rate = plan.learning_rate
        if role == BACKBONE:
            query_layers = getattr(config, "num_query_layers", 0)
            spared = 0 if recipe.decay_query_layers else query_layers
            learning_rate *= layer_factor(name, config.num_hidden_layers, recipe.layer_decay, spared)
        elif role == PROMPT and recipe.prompt_learning_rate is not None:
            learning_rate = recipe.prompt_learning_rate
        decays = recipe.weight_decay_mode == "all" or is_matrix(parameter)
        weight_decay = recipe.weight_decay if decays else 0.0
        group = groups.setdefault(
            (role, learning_rate, weight_decay),
            {"params": [], "names": [], "role": role, "lr": learning_rate, "weight_decay": weight_decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter requires a gradient, so there is nothing to train; freeze less")
    order = {BACKBONE: 0, REST: 1, PROMPT: 2}
    return sorted(groups.values(), key=lambda group: (order[group["role"]], group["lr"]))


def parameter_role(name: str) -> str:
    """Part of the model that a parameter belongs to, from its name; see `parameter_groups`."""
    if re.search(r"(^|\.)prompt_encoder\.", name):
        return PROMPT
    return BACKBONE if re.search(r"(^|\.)(embeddings|layernorm|layers\.\d+)\.", name) else REST


def layer_of(name: str) -> int | None:
    """Block that a parameter belongs to; -1 are the embeddings, `None` everything else."""
    block = re.search(r"(^|\.)layers\.(\d+)\.", name)
    if block is not None:
        return int(block.group(2))
    return -1 if re.search(r"(^|\.)embeddings\.", name) else None


def layer_factor(name: str, num_layers: int, decay: float, num_spared: int = 0) -> float:
    """Share of the highest learning rate that a parameter of the backbone gets.

    Args:
        name: of the parameter.
        num_layers: blocks N.
        decay: from one block to the one before.
        num_spared: blocks at the end that do not decay.
    """
    layer = layer_of(name)
    if layer is None or layer >= num_layers - num_spared:
        return 1.0
    return decay ** (num_layers - 1 - max(layer, 0))


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or kernel, not a bias, norm, scale or single token."""
    return parameter.ndim > 1 and parameter.shape[0] > 1


def build_optimizer(model: nn.Module, plan: TrainingPlan) -> Optimizer:
    """AdamW or SGD on the groups of a model, as the recipe says."""
    recipe = plan.recipe
    groups = parameter_groups(model, plan)
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=plan.learning_rate, momentum=recipe.momentum)
    return AdamW(groups, lr=plan.learning_rate, betas=(recipe.betas[0], recipe.betas[1]), fused=True)


def freeze(model: nn.Module, setting: str | None) -> list[str]:
    """Freeze a part of a model, in place.

    Args:
        model: one of ours.
        setting: "backbone" (the whole ViT, its final norm included), "until_layer:N" (embeddings and the first N
            blocks) or `None`.

    Returns:
        Names of the frozen parameters.

    Raises:
        ValueError: the setting is unknown, or the model has fewer blocks.
    """
    until = parse_freeze(setting)
    if until is None:
        return []
    config: Any = model.config
    if until > config.num_hidden_layers:
        raise ValueError(f"freeze={setting}: the model has {config.num_hidden_layers} blocks; give at most so many")
    frozen = []
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if parameter_role(name) == BACKBONE and (until < 0 or (layer is not None and layer < until)):
            parameter.requires_grad_(False)
            frozen.append(name)
    for name, module in model.named_modules():
        if _is_block(name) and not any(parameter.requires_grad for parameter in module.parameters()):
            # `model.train()` asks every module; this one says no.
            module.__dict__["train"] = MethodType(_stay_in_evaluation, module)
            module.train()
    return frozen


def _is_block(name: str) -> bool:
    return name.rpartition(".")[2].isdecimal() and name.rpartition(".")[0].endswith("layers")


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def learning_rate_schedule(optimizer: Optimizer, plan: TrainingPlan) -> LambdaLR:
    """The schedule of an optimiser on `parameter_groups`; call its `step` after every step of the optimiser.

    Args:
        optimizer: whose groups have a `role` each; a group without one is none of the backbone.
        plan: to train by.
    """
    factors: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        idle, warmup = warmup_of(group.get("role", ""), plan.warmup_steps)
        factors.append(
            partial(
                learning_rate_factor,
                idle=idle,
                warmup=warmup,
                total_steps=plan.total_steps,
                schedule=plan.recipe.schedule,
                power=plan.recipe.power,
            )
        )
    return LambdaLR(optimizer, factors)


def restore_schedule(schedule: LambdaLR, state: Mapping[str, Any]) -> None:
    """Go on where a schedule was saved, at this schedule's own rates and warm-up.

    Args:
        schedule: as `learning_rate_schedule` made it, whose optimiser has its state already.
        state: `state_dict()` of the other one, of the same training, perhaps with other rates.
    """
    progress = {name: state[name] for name in ("last_epoch", "_step_count")}
    # A factor is a function of the steps taken alone, so that no rate need be saved.
    rates = [
        base * factor(progress["last_epoch"])
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**schedule.state_dict(), **progress, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def highest_rates(optimizer: Optimizer) -> dict[str, float]:
    """The highest learning rate of each role, as a curve by its name."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = f"learning rate/{group['role']}"
        rates[name] = max(rates.get(name, 0.0), group["lr"])
    return rates


def warmup_of(role: str, warmup_steps: tuple[int, ...]) -> tuple[int, int]:
    """Steps for which parameters of a role stand still, and those over which they then warm up."""
    if len(warmup_steps) == 2 and role == BACKBONE:
        return warmup_steps[0], warmup_steps[1]
    return 0, warmup_steps[0]


def learning_rate_factor(
    step: int, *, idle: int, warmup: int, total_steps: int, schedule: str = "polynomial", power: float = 0.9
) -> float:
    """Share of the highest learning rate for the step after `step` steps have been taken.

    Args:
        step: steps taken; at `total_steps` and beyond the share is 0.
        idle: steps without learning.
        warmup: steps after these over which the share rises from 0 to 1.
        total_steps: T.
        schedule: "polynomial", (1 - t) ** power, or "cosine", (1 + cos(pi t)) / 2, over the rest of training.
        power: of the former.
    """
    if step < idle:
        return 0.0
    if step < idle + warmup:
        return (step - idle) / warmup
    begin = idle + warmup
    progress = min((step - begin) / max(total_steps - begin, 1), 1.0)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return (1 - progress) ** power
