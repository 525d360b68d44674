"""The simplest loop that trains EoMT as the paper does: masked attention first, annealed away layer by layer.

`train` runs it; `masked_attention_probabilities` and `learning_rate_factor` are its two schedules. It is for one
process, a tiny model and batches in memory.

Source: Kerssies et al., CVPR 2025, section 3.3 and appendix; power 0.9 in both schedules.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW

POWER = 0.9


def train(
    model: Any,
    make_batch: Callable[[int], dict[str, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    warmup_steps: int = 50,
    weight_decay: float = 0.05,
    max_grad_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model; afterwards it is in evaluation mode and masks no attention.

    Args:
        model: an `EoMTForUniversalSegmentation`.
        make_batch: step to the arguments of the model, `pixel_values`, `mask_labels` and `class_labels`.
        steps: optimiser steps.
        learning_rate: the highest, right after warm-up.
        warmup_steps: steps over which it rises from 0.
        weight_decay: on matrices; biases, norms and single tokens have none.
        max_grad_norm: gradients are scaled down to this norm.
        betas: AdamW's.
        on_step: called after every step with its number, from 1, and its loss.

    Returns:
        The loss of every step.

    Raises:
        ValueError: the loss stopped being finite; the message names the step.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter.shape[0] > 1]
    others = [parameter for parameter in model.parameters() if not (parameter.ndim > 1 and parameter.shape[0] > 1)]
    optimizer = AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )
    model.train()
    losses = []
    for step in range(steps):
        model.set_masked_attention_probabilities(
            masked_attention_probabilities(step, steps, model.config.num_query_layers)
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, steps, warmup_steps)
        loss = model(**make_batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not losses[-1] < float("inf"):
            raise ValueError(f"the loss is {losses[-1]} at step {step + 1}; use a lower learning rate")
        if on_step is not None:
            on_step(step + 1, losses[-1])
    model.set_masked_attention_probabilities(0.0)
    model.eval()
    return losses


def masked_attention_probabilities(step: int, steps: int, num_query_layers: int) -> list[float]:
    """Probability of masked attention in each query layer, the first of which is annealed first.

    Args:
        step: steps taken so far.
        steps: steps T of the whole training.
        num_query_layers: number of layers L.

    Returns:
        For layer k 1 until T/6 + k * (T/2) / (L - 1), then (1 - t) ** 0.9 over the next T/6 steps, then 0.
    """
    distance = steps / 2 / max(num_query_layers - 1, 1)
    probabilities = []
    for layer in range(num_query_layers):
        progress = (step - steps / 6 - layer * distance) / (steps / 6)
        probabilities.append((1 - min(max(progress, 0.0), 1.0)) ** POWER)
    return probabilities


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the highest learning rate: rising over the warm-up, then falling to 0 as (1 - t) ** 0.9."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 - (step - warmup_steps) / (steps - warmup_steps)) ** POWER
