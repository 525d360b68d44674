"""What a finished run leaves: `model/` to use and to publish, `results.json`, `curves.png`.

`write_results` writes them; `model/` has a model card and the scores in the form that a push publishes.
`TrainingOutcome` is what the program that trained gets.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..atomic_files import replacing
from ..drawing.segments import plot_curves
from .derivation import TrainingPlan
from .selection import Selection
from .tasks import TrainingTask
from .tracking import EXACT_CURVES, HISTORY, curves, read_history

MODEL_FOLDER, RESULTS, CURVES = "model", "results.json", "curves.png"


@dataclass(frozen=True)
class TrainingOutcome:
    """What training came to.

    Attributes:
        output: folder with everything.
        step: steps taken.
        stopped: name of the signal that asked it to stop before the end, or `None`: then the results are written.
        results: what results.json holds; empty where it was stopped.
        model: unwrapped, in evaluation mode, with the weights that were published.
        processor: of the model.
    """

    output: Path
    step: int
    stopped: str | None
    results: dict[str, Any]
    model: Any
    processor: Any


def write_results(
    output: Path,
    task: TrainingTask,
    model: Any,
    processor: Any,
    plan: TrainingPlan,
    selection: Selection,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything that a run is for.

    Args:
        output: folder of the run.
        task: of the run.
        model: with the weights that are to be published, on any device.
        processor: that belongs to it.
        plan: that was trained by.
        selection: the evaluations.
        facts: more for results.json, such as times.

    Returns:
        What results.json holds.

    Raises:
        OSError: a file cannot be written.
    """
    row = selection.best or (selection.evaluations[-1] if selection.evaluations else None)
    metrics = row["metrics"] if row else {}
    scored = {**task.validation_name(), "metrics": metrics}
    results = {
        **scored,
        "step": row["step"] if row else plan.total_steps,
        "selection": selection.explanation(),
        "evaluations": selection.evaluations,
        "plan": {
            "total_steps": plan.total_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "pictures": plan.num_images,
            "processes": plan.world_size,
            "device_batch_size": plan.device_batch_size,
            "accumulation_steps": plan.accumulation_steps,
            "learning_rate": plan.learning_rate,
            "warmup_steps": list(plan.warmup_steps),
            "annealing": None if plan.annealing is None else vars(plan.annealing),
        },
        "recipe": plan.recipe.to_dict(),
        **facts,
        "versions": {name: version(name) for name in ("hf-segvit", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
    }
    _write_json(output / RESULTS, results)
    history = curves(read_history(output / HISTORY))
    if history:
        plot_curves(history, output / CURVES, exact=EXACT_CURVES)

    folder = output / MODEL_FOLDER
    task.save(model, processor, folder)
    published = [scored] if metrics else []
    if published:
        _write_json(folder / RESULTS, scored)
    card = task.model_card(model, processor, published, training_in_words(plan, selection))
    with replacing(folder / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    return results


def training_in_words(plan: TrainingPlan, selection: Selection) -> str:
    """How a model was trained, for its card."""
    recipe = plan.recipe
    start = (
        f"from the checkpoint {recipe.init}"
        if recipe.init
        else f"from the backbone {recipe.backbone}"
        if recipe.backbone
        else "from scratch"
    )
    size = recipe.image_size if recipe.image_size is not None else "the model's"
    limit = f" (the first {recipe.evaluate_limit} pictures)" if recipe.evaluate_limit else ""
    return (
        f"Trained {start} on `{recipe.data}`, {plan.num_images} pictures, with hf_segvit {version('hf-segvit')}: "
        f"{plan.total_steps} steps of {recipe.batch_size} pictures ({plan.epochs:.3g} epochs), image size {size}, "
        f"{recipe.optimizer} with a learning rate of {plan.learning_rate:.3g}, precision {recipe.precision}. "
        f"Weights: {selection.explanation()}{limit}."
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
