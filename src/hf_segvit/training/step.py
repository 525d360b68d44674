"""One optimiser step: forward, backward, gradient reduction, clipping, update.

`OptimizerStep` runs the micro-batches of a step through Accelerate. The result is that of one process with the whole
batch: the task divides each loss by counts over the whole step, so losses are summed over micro-batches and gradients
averaged over processes. A step whose loss or gradient is not finite leaves the weights unchanged, on all processes.
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

_LEFT_ON_CPU = ("placements",)  # read as Python numbers: on a GPU each read would wait for the device


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step, the same on all processes except for `parts`."""

    loss: float  # of the joint batch
    gradient_norm: float  # before clipping
    updated: bool  # whether the weights changed
    finite: bool  # loss and gradient; a gradient that overflowed in fp16 is reported by `overflow_scale` instead
    overflow_scale: float | None  # the fp16 loss scale after such an overflow, else `None`
    stop: bool  # whether any process was asked to stop
    parts: dict[str, Tensor]  # parts of this process's loss by name, on its device


class OptimizerStep:
    """The steps of a run, with model and optimiser as the accelerator prepared them.

    Gradients are clipped to the norm `max_grad_norm`; `None` leaves them as they are.
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
        self.unwrapped = accelerator.unwrap_model(model)
        self._parameters = [parameter for parameter in self.unwrapped.parameters() if parameter.requires_grad]

    def __call__(self, batches: Sequence[Mapping[str, Any]], stop: bool = False) -> StepOutcome:
        """Take a step with the micro-batches of this process; `stop` reaches all processes through the outcome."""
        accelerator = self.accelerator
        normalizers = self.task.normalizers(self.unwrapped, batches, accelerator.device)
        total: Any = None
        parts: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):  # one gradient reduction per step
                prepared = self.task.prepare_batch(to_device(batch, accelerator.device), self.processor)
                with accelerator.autocast():
                    loss, terms = self.task.loss(self.model, prepared, normalizers)
                accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
            for name, term in terms.items():
                parts[name] = parts[name] + term if name in parts else term

        norm = accelerator.clip_grad_norm_(self._parameters, self.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # under FSDP2 each process holds its share of the norm
        loss_value, gradient_norm, stopping = self._shared(total, norm, stop)
        # With fp16 an infinite gradient is no failure yet: the scaler skips the step and lowers its scale.
        scaled = accelerator.scaler is not None
        finite = math.isfinite(loss_value) and (scaled or math.isfinite(gradient_norm))
        updated, overflow_scale = finite, None
        if finite:
            self.optimizer.step()
            updated = not self.optimizer.step_was_skipped
            # Decided by the shared norm: all processes must take the same branch.
            if scaled and not math.isfinite(gradient_norm):
                overflow_scale = accelerator.scaler.get_scale()
        elif scaled:
            accelerator.scaler.update()  # else it would refuse to unscale the gradients of the next step
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            # The schedule counts skipped steps too; PyTorch warns where the very first step is one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        return StepOutcome(loss_value, gradient_norm, updated, finite, overflow_scale, stopping, parts)

    def _shared(self, loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, float, bool]:
        """Mean loss, mean norm and whether to stop, over all processes."""
        # One tensor for all three: a single reduction and a single wait for the device per step.
        numbers = torch.stack([loss.float(), torch.as_tensor(norm, device=loss.device).float()])
        if self.accelerator.num_processes == 1:
            loss_value, gradient_norm = numbers.tolist()
            return loss_value, gradient_norm, stop
        shared = torch.cat([numbers, numbers.new_tensor([float(stop)])])
        loss_value, gradient_norm, stopping = self.accelerator.reduce(shared, "mean").tolist()
        return loss_value, gradient_norm, stopping > 0


def to_device(value: Any, device: torch.device) -> Any:
    """Copy the tensors of a nested batch to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: entry if key in _LEFT_ON_CPU else to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(entry, device) for entry in value]
    return value
