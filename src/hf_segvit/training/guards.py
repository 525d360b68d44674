"""Guards against steps that are not finite and memory that runs out, and the replay of a failed step.

`NonFiniteGuard` counts the steps skipped because loss or gradient was NaN or infinite, and ends training if there are
too many. `explained_out_of_memory` turns PyTorch's error into one that says what to change; `evaluation_advice` is the
advice for evaluations. `save_failed_step` writes what a failed step was computed from (batches, random states,
normalizers, weights); `replay` computes it again in full precision and names the first input, output, weight or
gradient that is not finite.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..atomic_files import naming_full_disk
from ..inference.segmenter import NonFiniteOutputs
from .recipe import Recipe
from .start import build_trained_model
from .step import to_device
from .tasks import TrainingTask, task_for
from .training_state import collect_weights, restore_random_states, save_plain

# One bad batch is bad luck; three in a row suggest ruined weights, and 20 in all bad settings.
MAX_CONSECUTIVE, MAX_SKIPPED = 3, 20
# The loss scale of fp16 starts at 65536 and is halved by each overflow. A gradient that overflows even at a scale of 1
# would also do so unscaled: no scale helps.
MAX_OVERFLOWS, SMALLEST_SCALE = 30, 1.0
BATCH, WEIGHTS = "batch-{process}.pt", "model.safetensors"
_SHOWN = 5  # names in a line of a replay


class TrainingFailed(ValueError):
    """Training has to give up; the message says why and what to change."""


class NonFiniteGuard:
    """Counts skipped steps, and raises `TrainingFailed` when there are too many in a row or in all."""

    def __init__(self, max_consecutive: int = MAX_CONSECUTIVE, max_skipped: int = MAX_SKIPPED) -> None:
        self.max_consecutive, self.max_skipped = max_consecutive, max_skipped
        self.consecutive = 0  # skipped steps in a row
        self.skipped = 0  # skipped steps in all, without those that fp16 needed to find its scale
        self.overflows = 0  # of fp16, in a row
        self.hopeless = False  # no scale of fp16 helps, so `failed` ends training at once

    def passed(self) -> None:
        """Note a good step."""
        self.consecutive = self.overflows = 0

    def overflowed(self, scale: float) -> bool:
        """Note a step skipped because its gradient overflowed in fp16; whether it counts as failed.

        While fp16 searches its scale, overflows are normal. `scale` is the one after it was lowered.
        """
        self.overflows += 1
        self.hopeless = scale < SMALLEST_SCALE or self.overflows >= MAX_OVERFLOWS
        return self.hopeless

    def failed(
        self, step: int, loss: float, gradient_norm: float, folder: Path | None, newest: int | None = None
    ) -> str:
        """Note a failed step, whose batch is in `folder`; a line about it for the log.

        Raises:
            TrainingFailed: there were too many such steps.
        """
        self.skipped += 1
        self.consecutive += 1
        saved = f"; its batch is in {folder}, run `hf-segvit train --replay {folder}`" if folder else ""
        text = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}; the step was skipped{saved}"
        if self.hopeless:
            how_often = f"{self.overflows} times in a row, however low the scale of fp16"
        elif self.consecutive >= self.max_consecutive:
            how_often = f"{self.consecutive} times in a row"
        elif self.skipped >= self.max_skipped:
            how_often = f"{self.skipped} times"
        else:
            return text
        raise TrainingFailed(f"{text}. That was {how_often}, so training stops. {_remedy(newest)}")

    def refuse_ruined(self, model: nn.Module, step: int, newest: int | None = None) -> None:
        """Raise `TrainingFailed` if a step left weights that are not finite: neither saved nor scored they are of use.

        The gradient of a step can be finite, and what a huge learning rate makes of it not.
        """
        names = _non_finite(dict(model.named_parameters()))
        if names:
            raise TrainingFailed(
                f"step {step}: {len(names)} weights are no longer finite, such as {names[0]}, so training stops. "
                f"{_remedy(newest)}"
            )


def _remedy(newest: int | None) -> str:
    remains = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
    return f"Lower learning_rate, raise warmup_steps, or use precision=bf16 in place of fp16; {remains}"


def evaluation_advice(recipe: Recipe) -> list[str]:
    """What to change where an evaluation runs out of memory."""
    # Only points are evaluated in batches, of the size trained with; masks are evaluated image by image.
    fewer = ["a smaller device_batch_size"] if recipe.task == "points" and recipe.device_batch_size != 1 else []
    # The checkpoint was saved before the evaluation, so nothing is lost.
    return [*fewer, "smaller images in val_data", "a device with more memory, where the same command resumes the run"]


@contextmanager
def explained_out_of_memory(advice: Sequence[str]) -> Iterator[None]:
    """Turn running out of memory within the block into a `TrainingFailed` with advice, in the order to try it."""
    try:
        yield
    except RuntimeError as error:
        # On the CPU, PyTorch raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        remedy = "; ".join(advice) or "use a smaller model or image_size"
        raise TrainingFailed(f"out of memory ({str(error).splitlines()[0]}); try: {remedy}") from error


@contextmanager
def explained_non_finite_outputs() -> Iterator[None]:
    """Turn outputs that are not finite within an evaluation into a `TrainingFailed` that says what to change."""
    try:
        yield
    except NonFiniteOutputs as error:
        raise TrainingFailed(
            f"the evaluation stopped at {error}. In training, the usual cause is a step that was too large: lower "
            "learning_rate, raise warmup_steps, or use precision=bf16 in place of fp16; then start again, or resume "
            "from an earlier checkpoint"
        ) from error


def save_failed_step(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    task: TrainingTask,
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    random_states: Mapping[str, Any],
) -> None:
    """Save what a step was computed from, for `replay`; every process calls it and saves its own micro-batches.

    Args:
        model: as prepared by the accelerator.
        random_states: of this process, from before the step.

    Raises:
        OSError: the folder cannot be written to.
    """
    unwrapped = accelerator.unwrap_model(model)
    content = {
        "batches": [dict(batch) for batch in batches],
        "normalizers": task.normalizers(unwrapped, batches, accelerator.device),
        "random_states": dict(random_states),
        "facts": {"recipe": task.recipe.to_dict(), "step": step},  # plain values only: `replay` reads weights_only
    }
    probabilities = getattr(unwrapped.config, "masked_attention_probabilities", None)
    if probabilities is not None and unwrapped.config.masked_attention:
        content["facts"]["masked_attention_probabilities"] = list(probabilities)
    weights = collect_weights(accelerator, model)  # outside the `if` below: sharded weights need every process
    with naming_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_plain(content, folder / BATCH.format(process=accelerator.process_index))
        if accelerator.is_main_process:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def replay(folder: Path, process: int = 0, device: torch.device | str = "cpu") -> str:
    """Repeat a saved step in full precision, and report where values stop being finite.

    Args:
        folder: as `save_failed_step` wrote it.
        process: index of the process whose micro-batches to run.

    Raises:
        ValueError: the folder has no such step.
    """
    path = folder / BATCH.format(process=process)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; name a folder in `failures` of a run's output")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        facts = content["facts"]
        recipe = Recipe(**facts["recipe"])
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{path}: damaged, or not of a run of this version ({reason}); name another folder") from error
    task = task_for(recipe)
    model, processor = build_trained_model(task)
    if (folder / WEIGHTS).is_file():
        model.load_state_dict(load_file(folder / WEIGHTS))
    model.to(device).train()
    probabilities = facts.get("masked_attention_probabilities")
    if probabilities is not None:
        model.set_masked_attention_probabilities(probabilities)
    # Only now: building the model has drawn from the generators.
    restore_random_states(content["random_states"])
    normalizers = content["normalizers"]
    normalizers = normalizers.to(device) if isinstance(normalizers, Tensor) else normalizers
    lines = [f"step {facts['step']} of {folder}"]
    total = 0.0
    with first_non_finite_module(model) as modules:
        for index, batch in enumerate(content["batches"]):
            on_device = task.prepare_batch(to_device(batch, torch.device(device)), processor)
            lines += [f"input: {name} is not finite" for name in _non_finite(on_device)]
            loss, parts = task.loss(model, on_device, normalizers)
            loss.backward()
            total += float(loss.detach())
            bad_parts = _non_finite(parts)
            remark = f", not finite: {', '.join(bad_parts)}" if bad_parts else ""
            lines.append(f"micro-batch {index}: loss {float(loss.detach()):g}{remark}")
    if modules:
        lines.append(f"the first output that is not finite is that of {modules[0]}")
    weights = dict(model.named_parameters())
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for kind, tensors in (("weights", weights), ("gradients", gradients)):
        lines.append(f"{kind} that are not finite: {', '.join(_non_finite(tensors)[:_SHOWN]) or 'none'}")
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    lines.append(f"loss {total:g}, gradient norm {norm:g}")
    return "\n".join(lines)


@contextmanager
def first_non_finite_module(model: nn.Module) -> Iterator[list[str]]:
    """A list to which the block adds the names of modules with outputs that are not finite, in the order computed."""
    names: list[str] = []
    name_of = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if _non_finite({"output": output}):
            names.append(name_of[module] or type(module).__name__)  # the model itself has an empty name

    handles = [module.register_forward_hook(note) for module in name_of]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _non_finite(values: Mapping[str, Any]) -> list[str]:
    """Names of the floating-point tensors with NaN or infinite values."""
    return [
        name
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
