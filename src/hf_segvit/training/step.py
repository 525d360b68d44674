"""One step of the optimiser: micro-batches forward and backward, gradients of all processes, clipping, update.

`OptimizerStep` does it through Accelerate. Losses of micro-batches are added, since the task divides them by counts
over the whole step; gradients are averaged over processes, for which those counts allow. So the result is that of one
process with the whole batch. A step whose loss or gradient is not finite leaves the weights alone, on all processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from .tasks import TrainingTask

_LEFT_ON_CPU = ("placements",)  # read as numbers, for which a device would be waited for


@dataclass(frozen=True)
class StepOutcome:
    """What a step was like, on all processes alike.

    Attributes:
        loss: of the joint batch.
        gradient_norm: before clipping.
        updated: whether the weights changed.
        finite: whether loss and gradient were; with fp16 a gradient that overflowed is told by `overflow_scale`.
        overflow_scale: what the scale of fp16 fell to as the gradient was not finite; `None` where it did not fall.
        stop: a process was asked to stop.
        parts: of the loss, of this process alone, by name; on the device.
    """

    loss: float
    gradient_norm: float
    updated: bool
    finite: bool
    overflow_scale: float | None
    stop: bool
    parts: dict[str, Tensor]


class OptimizerStep:
    """Steps of one training run, with model and optimiser as the accelerator prepared them.

    Gradients are scaled down to the norm `max_grad_norm`; `None` leaves them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: TrainingTask,
        model: Any,
        processor: Any,
        optimizer: Any,
        schedule: Any,
        max_grad_norm: float | None,
    ) -> None:
        self.accelerator, self.task, self.model, self.processor = accelerator, task, model, processor
        self.optimizer, self.schedule = optimizer, schedule
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.core = accelerator.unwrap_model(model)
        self._parameters = [parameter for parameter in self.core.parameters() if parameter.requires_grad]

    def __call__(self, batches: Sequence[Mapping[str, Any]], stop: bool = False) -> StepOutcome:
        """Take a step with the micro-batches of this process; that it was asked to `stop`, all get to know."""
        accelerator = self.accelerator
        normalizers = self.task.normalizers(self.core, batches, accelerator.device)
        total: Any = None
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                prepared = self.task.prepare_batch(to_device(batch, accelerator.device), self.processor)
                with accelerator.autocast():
                    loss, terms = self.task.loss(self.model, prepared, normalizers)
                accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
            for name, term in terms.items():
                parts[name] = parts[name] + term if name in parts else term

        norm = accelerator.clip_grad_norm_(self._parameters, self.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        loss_value, gradient_norm, stopping = self._shared(total, norm, stop)
        scaled = accelerator.scaler is not None
        finite = math.isfinite(loss_value) and (scaled or math.isfinite(gradient_norm))
        updated, overflow_scale = finite, None
        if finite:
            self.optimizer.step()
            updated = not self.optimizer.step_was_skipped
            # By the norm, which all processes share: each of them has to take the same way.
            if scaled and not math.isfinite(gradient_norm):
                overflow_scale = accelerator.scaler.get_scale()
        elif scaled:
            accelerator.scaler.update()  # forgets that these gradients were unscaled
        self.optimizer.zero_grad()
        with warnings.catch_warnings():  # where the first step of all is skipped, the schedule goes on all the same
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        return StepOutcome(loss_value, gradient_norm, updated, finite, overflow_scale, stopping, parts)

    def _shared(self, loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, float, bool]:
        """Loss and norm as numbers, with one wait for the device; the mean loss, and the stop, of all processes."""
        numbers = torch.stack([loss.float(), torch.as_tensor(norm, device=loss.device).float()])
        if self.accelerator.num_processes == 1:
            loss_value, gradient_norm = numbers.tolist()
            return loss_value, gradient_norm, stop
        shared = torch.cat([numbers, numbers.new_tensor([float(stop)])])
        loss_value, gradient_norm, stopping = self.accelerator.reduce(shared, "mean").tolist()
        return loss_value, gradient_norm, stopping > 0


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: entry if key in _LEFT_ON_CPU else to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(entry, device) for entry in value]
    return value
