"""A step that went wrong, kept and repeated.

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

from .distributed_state import collect_weights
from .optimizer_step import to_device
from .random_states import restore_random_states
from .recipe import Recipe
from .tasks import TrainingTask, task_for
from .trained_model import build_trained_model

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
