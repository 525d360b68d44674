"""Exponential moving average (EMA) of the weights, which often scores better than the weights themselves.

`MovingAverage` follows a model step by step; `applied_to` puts the average into the model for an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .training_state import spread_like, whole


class MovingAverage:
    """Moving average of the trainable parameters, in float32 on their device.

    Args:
        decay: share of the old average that a step keeps, in [0, 1).

    Raises:
        ValueError: the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; give a number in [0, 1), such as 0.9999")
        self.decay, self.steps = decay, 0
        self.average = {name: p.detach().float().clone() for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after one more step."""
        self.steps += 1
        # The decay starts low, so that the initial weights are soon forgotten.
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parameters = _trainable(model)
        averages = [self.average[name] for name in parameters]
        # One fused call for all parameters: a loop would launch a kernel for each.
        torch._foreach_lerp_(averages, [p.detach().float() for p in parameters.values()], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the average as its weights within the block."""
        parameters = _trainable(model)
        current = {name: p.detach().clone() for name, p in parameters.items()}
        _set(parameters, self.average)
        try:
            yield
        finally:
            _set(parameters, current)

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name; every process calls it."""
        return whole(self.average)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved average.

        Raises:
            ValueError: it is of other parameters.
        """
        if tensors.keys() != self.average.keys():
            different = sorted(tensors.keys() ^ self.average.keys())
            raise ValueError(f"the saved moving average is of other parameters, such as {different[0]}")
        self.steps = steps
        for name, average in self.average.items():
            average.copy_(spread_like(tensors[name], average))


def _trainable(model: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _set(parameters: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
