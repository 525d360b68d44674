"""Learning-rate schedules: a warm-up of one or two stages, then polynomial or cosine decay to 0.

With two stages, the new parameters warm up first, while the backbone stands still: what they send back at first would
only harm it. Then the backbone warms up, and each decays from the end of its own warm-up to the end of training.

Source: the official code of EoMT (two stages, polynomial) and of ViT-P (one stage, cosine). T steps of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .derivation import TrainingPlan
from .parameter_groups import BACKBONE


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
