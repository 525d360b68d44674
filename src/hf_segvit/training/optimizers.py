"""Build the optimiser: parameter groups, frozen parts, learning-rate schedule.

- `parameter_groups`: learning rate and weight decay of each parameter, with layer-wise decay of the learning rate
  (Clark et al., arXiv 2003.10555) over the N blocks of the ViT.
- `freeze`: parts of the model that are not trained.
- `learning_rate_schedule`: one or two stages of warm-up, then polynomial or cosine decay to 0 over T steps.

Source: the official code of EoMT (two stages, polynomial) and of ViT-P (one stage, cosine; two learning rates).
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

BACKBONE, REST, PROMPT = "backbone", "rest", "prompt"  # the ViT; queries and heads; ViT-P's prompt encoder


# Parts of a Mask2Former that have layers of their own.
_OUTSIDE_THE_VIT = re.compile(r"(^|\.)(adapter|pyramid|pixel_decoder|transformer_module)\.")


def parameter_groups(model: nn.Module, plan: TrainingPlan) -> list[dict[str, Any]]:
    """Groups of the parameters that require a gradient, for an optimiser and `learning_rate_schedule`.

    Returns:
        For each group `params`, their `names`, `role`, `lr` and `weight_decay`. The backbone comes first, from its
        first block to its last.

    Raises:
        ValueError: no parameter requires a gradient.
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
            # The official code has this as `llrd_l2_enabled`: the blocks that see the new queries learn faster.
            spared = 0 if recipe.decay_query_layers else getattr(config, "num_query_layers", 0)
            learning_rate *= layer_factor(name, config.num_hidden_layers, recipe.layer_decay, spared)
        elif role == PROMPT and recipe.prompt_learning_rate is not None:
            learning_rate = recipe.prompt_learning_rate
        decays = recipe.weight_decay_mode == "all" or is_matrix(parameter)
        weight_decay = recipe.weight_decay if decays else 0.0
        # Parameters with equal settings share a group: about as many groups as blocks, not as parameters.
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
    """`BACKBONE`, `REST` or `PROMPT`, from the name of a parameter."""
    if re.search(r"(^|\.)prompt_encoder\.", name):  # first, as it has layers and embeddings of its own
        return PROMPT
    if _OUTSIDE_THE_VIT.search(name):
        return REST
    return BACKBONE if re.search(r"(^|\.)(embeddings|layernorm|layers\.\d+)\.", name) else REST


def layer_of(name: str) -> int | None:
    """Index of the block that a parameter belongs to; -1: embeddings, `None`: anything else."""
    if _OUTSIDE_THE_VIT.search(name):
        return None
    block = re.search(r"(^|\.)layers\.(\d+)\.", name)
    if block is not None:
        return int(block.group(2))
    return -1 if re.search(r"(^|\.)embeddings\.", name) else None


def layer_factor(name: str, num_layers: int, decay: float, num_spared: int = 0) -> float:
    """Learning rate of a backbone parameter relative to the peak: decay ** (N - 1 - i) in block i of N.

    The last `num_spared` blocks and the final norm get 1.
    """
    layer = layer_of(name)
    if layer is None or layer >= num_layers - num_spared:
        return 1.0
    return decay ** (num_layers - 1 - max(layer, 0))  # embeddings (-1) learn like block 0, as in the official code


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or kernel, not a bias, norm, scale or single token."""
    return parameter.ndim > 1 and parameter.shape[0] > 1  # the class token is (1, 1, D)


def build_optimizer(model: nn.Module, plan: TrainingPlan) -> Optimizer:
    """The recipe's optimiser, AdamW or SGD, on the parameter groups of a model."""
    recipe = plan.recipe
    groups = parameter_groups(model, plan)
    if recipe.optimizer == "sgd":
        return SGD(groups, lr=plan.learning_rate, momentum=recipe.momentum)
    return AdamW(groups, lr=plan.learning_rate, betas=(recipe.betas[0], recipe.betas[1]), fused=True)


def freeze(model: nn.Module, setting: str | None) -> list[str]:
    """Freeze part of a model in place, and return the names of the frozen parameters.

    Args:
        setting: "backbone" (the whole ViT with its final norm), "until_layer:N" (embeddings and the first N blocks) or
            `None`.

    Raises:
        ValueError: the setting is unknown, or the model has fewer blocks.
    """
    until = parse_freeze(setting)
    if until is None:
        return []
    config: Any = model.config
    if until > config.num_hidden_layers:
        raise ValueError(f"freeze={setting}: the model has {config.num_hidden_layers} blocks; give at most that many")
    frozen = []
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if parameter_role(name) == BACKBONE and (until < 0 or (layer is not None and layer < until)):
            parameter.requires_grad_(False)
            frozen.append(name)
    for name, module in model.named_modules():
        if _is_block(name) and not any(parameter.requires_grad for parameter in module.parameters()):
            # Frozen blocks compute as in inference, without stochastic depth and dropout. `model.train()` calls
            # `train` of every module, so that is overridden here.
            module.__dict__["train"] = MethodType(_stay_in_evaluation, module)
            module.train()
    return frozen


def _is_block(name: str) -> bool:
    return name.rpartition(".")[2].isdecimal() and name.rpartition(".")[0].endswith("layers")


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def learning_rate_schedule(optimizer: Optimizer, plan: TrainingPlan) -> LambdaLR:
    """The schedule of an optimiser on `parameter_groups`; call its `step` after every optimiser step."""
    recipe = plan.recipe
    settings: dict[str, Any] = {"total_steps": plan.total_steps, "schedule": recipe.schedule, "power": recipe.power}
    factors: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        idle, warmup = warmup_of(group.get("role", ""), plan.warmup_steps)
        factors.append(partial(learning_rate_factor, idle=idle, warmup=warmup, **settings))
    return LambdaLR(optimizer, factors)


def restore_schedule(schedule: LambdaLR, state: Mapping[str, Any]) -> None:
    """Continue from a saved `state_dict` at this schedule's own learning rates and warm-up.

    The optimiser must have been restored before.
    """
    progress = {name: state[name] for name in ("last_epoch", "_step_count")}
    # The saved rates are ignored, as a resumed run may have changed them; a factor depends on the step only.
    factors = [factor(progress["last_epoch"]) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), **progress, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def highest_rates(optimizer: Optimizer) -> dict[str, float]:
    """The highest current learning rate of each role, by the name of its curve."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = f"learning rate/{group['role']}"
        rates[name] = max(rates.get(name, 0.0), group["lr"])
    return rates


def warmup_of(role: str, warmup_steps: tuple[int, ...]) -> tuple[int, int]:
    """Steps for which parameters of a role do not learn, and steps over which they then warm up."""
    # Gradients through untrained queries and heads would only harm the backbone, so it waits.
    if len(warmup_steps) == 2 and role == BACKBONE:
        return warmup_steps[0], warmup_steps[1]
    return 0, warmup_steps[0]


def learning_rate_factor(
    step: int, *, idle: int, warmup: int, total_steps: int, schedule: str = "polynomial", power: float = 0.9
) -> float:
    """Learning rate relative to its peak, after `step` steps have been taken.

    It is 0 for `idle` steps, rises to 1 over `warmup` steps, and decays to 0 at `total_steps`.

    Args:
        schedule: "polynomial", (1 - t) ** power, or "cosine", (1 + cos(pi t)) / 2, for t from 0 to 1.
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
