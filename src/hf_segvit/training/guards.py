"""What may go wrong in a step, told so that it can be mended: values that are not finite, and memory that runs out.

`NonFiniteGuard` counts the steps that were skipped because loss or gradient was NaN or infinite, and stops training
when there are too many (replay.py keeps and repeats them). With fp16 some are normal, until its scale is found.
`explained_out_of_memory` turns PyTorch's error into one that says what to change, for an evaluation what
`evaluation_advice` lists.

A step that went wrong, kept and repeated.

`save_failed_step` writes what a step of a run was computed from: batch, random states, normalisers and weights, with
`save_for_replay`. `replay` computes it again in full precision, and says which input, output, weight or gradient is not
finite first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .recipe import Recipe
from .start import build_trained_model
from .step import to_device
from .tasks import TrainingTask, task_for
from .training_state import collect_weights, restore_random_states

MAX_CONSECUTIVE, MAX_SKIPPED = 3, 20
# The scale of fp16 begins with 65536 and is halved by each overflow. A gradient that overflows without being scaled up
# at all would do so without fp16 too, or needs more range than fp16 has.
MAX_OVERFLOWS, SMALLEST_SCALE = 30, 1.0


class TrainingFailed(ValueError):
    """Training cannot go on; the message says why and what to do."""


class NonFiniteGuard:
    """Skips steps whose loss or gradient is not finite, but not too many of them.

    Args:
        max_consecutive: skipped steps in a row after which training stops.
        max_skipped: skipped steps in all after which it stops.

    Attributes:
        consecutive: skipped steps in a row, up to now.
        skipped: skipped steps in all, without those that fp16 needed to find its scale.
        overflows: overflows of fp16 in a row, up to now.
        hopeless: no scale of fp16 helps, so that `failed` ends training at once.
    """

    def __init__(self, max_consecutive: int = MAX_CONSECUTIVE, max_skipped: int = MAX_SKIPPED) -> None:
        self.max_consecutive, self.max_skipped = max_consecutive, max_skipped
        self.consecutive = self.skipped = self.overflows = 0
        self.hopeless = False

    def passed(self) -> None:
        """A step was fine."""
        self.consecutive = self.overflows = 0

    def overflowed(self, scale: float) -> bool:
        """A gradient overflowed in fp16, so that its step was skipped.

        Args:
            scale: of the loss, after it was lowered for that.

        Returns:
            Whether that is no longer the search for the right scale, but a step that failed.
        """
        self.overflows += 1
        self.hopeless = scale < SMALLEST_SCALE or self.overflows >= MAX_OVERFLOWS
        return self.hopeless

    def failed(
        self, step: int, loss: float, gradient_norm: float, place: Path | None, newest: int | None = None
    ) -> str:
        """A step has to be skipped.

        Args:
            step: its number, from 1.
            loss: of the step.
            gradient_norm: of the step.
            place: where the batch was saved.
            newest: step of the newest checkpoint.

        Returns:
            A line for people.

        Raises:
            TrainingFailed: there were too many such steps.
        """
        self.skipped += 1
        self.consecutive += 1
        saved = f"; its batch is in {place}, run `hf-segvit train --replay {place}`" if place else ""
        text = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}; the step was skipped{saved}"
        if self.hopeless:
            how_often = f"{self.overflows} times in a row, however low the scale of fp16"
        elif self.consecutive >= self.max_consecutive:
            how_often = f"{self.consecutive} times in a row"
        elif self.skipped >= self.max_skipped:
            how_often = f"{self.skipped} times"
        else:
            return text
        remains = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
        raise TrainingFailed(
            f"{text}. That was {how_often}, so training stops. Lower learning_rate, raise warmup_steps, or use "
            f"precision=bf16 in place of fp16; {remains}"
        )


def evaluation_advice(recipe: Recipe) -> list[str]:
    """What to change where memory runs out in an evaluation; the checkpoint of its step is there already."""
    # Only points are asked for many images at a time, and as many as are trained on.
    fewer = ["a smaller device_batch_size"] if recipe.task == "points" and recipe.device_batch_size != 1 else []
    return [*fewer, "smaller images in val_data", "a device with more memory, on which the same command goes on"]


@contextmanager
def explained_out_of_memory(advice: Sequence[str]) -> Iterator[None]:
    """Say what to change where memory runs out in the block.

    Args:
        advice: what to change, in the order of trying.

    Raises:
        TrainingFailed: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        remedy = "; ".join(advice) or "use a smaller model or image_size"
        raise TrainingFailed(f"out of memory ({str(error).splitlines()[0]}); try: {remedy}") from error


BATCH, WEIGHTS = "batch-{process}.pt", "model.safetensors"


def save_failed_step(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    task: TrainingTask,
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    random_states: Mapping[str, Any],
) -> None:
    """Keep a step of a run; all processes call it.

    Args:
        folder: is made.
        step: its number.
        accelerator: of the run.
        task: of the run.
        model: prepared by the accelerator.
        batches: micro-batches of this process.
        random_states: of this process, from before the step.

    Raises:
        OSError: the folder cannot be written to.
    """
    core = accelerator.unwrap_model(model)
    normalizers = task.normalizers(core, batches, accelerator.device)
    facts: dict[str, Any] = {"recipe": task.recipe.to_dict(), "step": step}
    probabilities = getattr(core.config, "masked_attention_probabilities", None)
    if probabilities is not None:
        facts["masked_attention_probabilities"] = list(probabilities)
    weights = collect_weights(accelerator, model)
    index = accelerator.process_index
    save_for_replay(folder, index, batches, normalizers, random_states, None if index else weights, facts)


def save_for_replay(
    folder: Path,
    process: int,
    batches: Sequence[Mapping[str, Any]],
    normalizers: Any,
    random_states: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None,
    facts: Mapping[str, Any],
) -> None:
    """Keep what a step was computed from.

    Args:
        folder: is made.
        process: number of this process, which saves its own batch.
        batches: micro-batches, as the collator made them.
        normalizers: of the losses.
        random_states: from before the step.
        weights: state of the model, from one process alone.
        facts: plain values: the recipe and the step.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "batches": [dict(batch) for batch in batches],
        "normalizers": normalizers,
        "random_states": dict(random_states),
        "facts": dict(facts),
    }
    torch.save(content, folder / BATCH.format(process=process))
    if weights is not None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def replay(folder: Path, process: int = 0, device: torch.device | str = "cpu") -> str:
    """Run a step again that was saved, in full precision, and say where values cease to be finite.

    Args:
        folder: that `save_for_replay` wrote.
        process: whose batch to run.
        device: where to compute.

    Raises:
        ValueError: the folder holds no such step.
    """
    path = folder / BATCH.format(process=process)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; name a folder in `failures` of a run's output")
    content = torch.load(path, map_location="cpu", weights_only=True)
    facts = content["facts"]
    task = task_for(Recipe(**facts["recipe"]))
    model, processor = build_trained_model(task)
    if (folder / WEIGHTS).is_file():
        model.load_state_dict(load_file(folder / WEIGHTS))
    model.to(device).train()
    probabilities = facts.get("masked_attention_probabilities")
    if probabilities is not None:
        model.set_masked_attention_probabilities(probabilities)
    restore_random_states(content["random_states"])
    lines = [f"step {facts['step']} of {folder}"]
    total = 0.0
    with first_non_finite_module(model) as found:
        for number, batch in enumerate(content["batches"]):
            on_device = task.prepare_batch(to_device(batch, torch.device(device)), processor)
            lines += [f"input: {line}" for line in _non_finite_inputs(on_device)]
            normalizers = content["normalizers"]
            normalizers = normalizers.to(device) if isinstance(normalizers, Tensor) else normalizers
            loss, parts = task.loss(model, on_device, normalizers)
            loss.backward()
            total += float(loss.detach())
            bad = [name for name, value in parts.items() if not bool(torch.isfinite(value))]
            lines.append(f"micro-batch {number}: loss {float(loss.detach()):g}" + _listing(", not finite: ", bad))
    if found:
        lines.append(f"the first output that is not finite is that of {found[0]}")
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    lines.append(f"weights that are not finite: {', '.join(bad[:5]) or 'none'}")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    lines.append(f"gradients that are not finite: {', '.join(bad[:5]) or 'none'}")
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    lines.append(f"loss {total:g}, gradient norm {norm:g}")
    return "\n".join(lines)


@contextmanager
def first_non_finite_module(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output was not finite, in the order of computing, while the block runs."""
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
                found.append(name or type(module).__name__)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _non_finite_inputs(batch: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is not finite"
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def _listing(before: str, names: Sequence[str]) -> str:
    return before + ", ".join(names) if names else ""
