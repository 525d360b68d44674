"""Freezing: training a part of a model, with less memory and less to overfit.

`freeze` applies a recipe's setting. What is frozen needs no gradient, so it is in no parameter group and has no state
in the optimiser; where nothing before it is trained, the backward pass stops in front of it. Frozen blocks compute as
in inference, without stochastic depth and dropout, also under `model.train()`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from .parameter_groups import BACKBONE, layer_of, parameter_role
from .recipe_checks import parse_freeze


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
