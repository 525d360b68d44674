"""Parameter groups: which learning rate and weight decay each parameter has, and the optimiser on them.

With layer-wise decay (Clark et al., arXiv 2003.10555), block i of N learns at lr * decay ** (N - 1 - i), the embeddings
as slowly as the first block, the final norm and everything new at lr. `decay_query_layers=False` gives all blocks that
see the queries lr, and leaves the others as they were. Parameters of one rate share a group, so that there are about as
many groups as blocks.

Source: the official code of EoMT, whose dead `lr_mult` is left out; ViT-P's two rates.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from .derivation import TrainingPlan

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
