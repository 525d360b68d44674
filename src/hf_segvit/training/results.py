"""The results of a finished run, and the choice of its best checkpoint.

`write_results` writes `model/` (with model card and the scores that a push publishes), `results.json` and
`curves.png`. `TrainingOutcome` is what `train` returns. `Selection` keeps the evaluations of a run, and decides which
is the best and when patience ends. Only evaluations that the task calls comparable count: while EoMT's masked attention
is annealed, the model scored is not yet the one that inference will run.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..atomic_files import delete_remains, json_text, replacing, replacing_folder, write_json
from ..drawing.segments import plot_curves
from ..hub.check import published_data_name, published_path_name, published_settings
from ..hub.model_card import code_span, markdown_text
from .derivation import TrainingPlan, epochs_text
from .tasks import TrainingTask
from .tracking import EXACT_CURVES, HISTORY, curves, read_history

MODEL_FOLDER, RESULTS, CURVES = "model", "results.json", "curves.png"


@dataclass(frozen=True)
class TrainingOutcome:
    """What `train` returns."""

    output: Path  # the folder with everything
    step: int  # steps taken
    stopped: str | None  # name of the signal that stopped the run early; `None` once results are written
    results: dict[str, Any]  # the content of results.json; empty if stopped early
    model: Any  # unwrapped, in evaluation mode, with the published weights
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
    """Write model, scores and curves, and return the content of results.json, to which `facts` adds keys.

    Raises:
        OSError, ValueError: a file cannot be written.
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
            "pictures": plan.num_images,  # a key of the file format, which keeps its name
            "processes": plan.world_size,
            "device_batch_size": plan.device_batch_size,
            "accumulation_steps": plan.accumulation_steps,
            "learning_rate": plan.learning_rate,
            "warmup_steps": list(plan.warmup_steps),
            "annealing": None if plan.annealing is None else vars(plan.annealing),
        },
        "recipe": published_settings(plan.recipe.to_dict()),
        **facts,
        "versions": {name: version(name) for name in ("hf-segvit", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
    }
    history = curves(read_history(output / HISTORY))
    if history:
        plot_curves(history, output / CURVES, exact=EXACT_CURVES)
    published = [scored] if metrics else []
    card = task.model_card(model, processor, published, training_in_words(plan, selection))
    target = output / MODEL_FOLDER
    delete_remains(target)
    # results.json says that the run is complete, so it takes its place last; everything is on the disk before anything
    # is replaced, so that a full disk changes nothing.
    with replacing(output / RESULTS, durable=True) as results_file:
        results_file.write_text(json_text(results), encoding="utf-8")
        with replacing_folder(target) as folder:
            task.save(model, processor, folder)
            if published:
                write_json(folder / RESULTS, scored)
            (folder / "README.md").write_text(card, encoding="utf-8")
            _keep_foreign_files(target, folder)
    return results


def _keep_foreign_files(old: Path, new: Path) -> None:
    """Copy what others have put into a model folder, such as a LICENSE, into the one that replaces it."""
    for path in sorted(old.iterdir()) if old.is_dir() and not old.is_symlink() else ():
        is_weights = ".safetensors" in path.name  # perhaps shards of other weights
        if path.is_file() and not path.is_symlink() and not is_weights and not (new / path.name).exists():
            shutil.copy2(path, new / path.name)


def training_in_words(plan: TrainingPlan, selection: Selection) -> str:
    """How a model was trained, in a paragraph for its card."""
    recipe = plan.recipe
    start, data = "from scratch", published_data_name(str(recipe.data))
    if recipe.init or recipe.backbone:
        kind, source = ("checkpoint", recipe.init) if recipe.init else ("backbone", recipe.backbone)
        start = f"from the {kind} {markdown_text(published_path_name(str(source)))}"
    size = recipe.image_size if recipe.image_size is not None else "the model's"
    limit = f" (the first {recipe.evaluate_limit} images)" if recipe.evaluate_limit else ""
    return (
        f"Trained {start} on {code_span(data)}, {plan.num_images} images, with hf_segvit {version('hf-segvit')}: "
        f"{plan.total_steps} steps of {recipe.batch_size} images ({epochs_text(plan.epochs)}), image size {size}, "
        f"{recipe.optimizer} with a learning rate of {plan.learning_rate:.3g}, precision {recipe.precision}. "
        f"Weights: {markdown_text(selection.explanation())}{limit}."
    )


class Selection:
    """The evaluations of a run, and the best of them by `metric`, of which higher is better.

    `patience` comparable evaluations without a better score end the run; with `None` they never do.
    """

    def __init__(self, metric: str, patience: int | None = None) -> None:
        self.metric, self.patience = metric, patience
        # Rows of `step`, `metrics` and `not_comparable` (the reason, or `None`).
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.lost: dict[str, Any] | None = None  # what was the best, if its checkpoint is damaged

    def add(self, step: int, metrics: Mapping[str, float], not_comparable: str | None) -> bool:
        """Add an evaluation; whether it is the best so far.

        Raises:
            ValueError: the metric that decides is not among the metrics.
        """
        if self.metric not in metrics and not_comparable is None:
            raise ValueError(
                f"keep_best={self.metric!r} is no score of this task; choose one of {', '.join(sorted(metrics))}"
            )
        row = {"step": step, "metrics": dict(metrics), "not_comparable": not_comparable}
        self.evaluations.append(row)
        if not_comparable is None and (self.best is None or metrics[self.metric] > self.best["metrics"][self.metric]):
            self.best = row
            return True
        return False

    def lose_best(self) -> None:
        """Give up the best evaluation because its checkpoint is damaged; the last weights are published instead."""
        self.best, self.lost = None, self.best

    @property
    def last_step(self) -> int | None:
        """Step of the last evaluation, if there was one."""
        return self.evaluations[-1]["step"] if self.evaluations else None

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` comparable evaluations were no better than an earlier one."""
        if self.patience is None or self.best is None:
            return False
        since = [row for row in self.evaluations if row["step"] > self.best["step"] and row["not_comparable"] is None]
        return len(since) >= self.patience

    def explanation(self) -> str:
        """How the published weights were chosen, in a sentence."""
        left_out = [row for row in self.evaluations if row["not_comparable"] is not None]
        text = f"best of {len(self.evaluations) - len(left_out)} evaluations by {self.metric}"
        if self.lost is not None:
            text += f" was step {self.lost['step']}, but its checkpoint is damaged: these are the weights at the end"
        elif self.best is None:
            text = "no evaluation was comparable, so these are the weights at the end"
        if left_out:
            text += f"; those up to step {left_out[-1]['step']} were left out, as {left_out[-1]['not_comparable']}"
        return text

    def state(self) -> dict[str, Any]:
        """The evaluations as plain values for a checkpoint."""
        return {"evaluations": self.evaluations, "best_step": self.best["step"] if self.best else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint."""
        self.evaluations = list(state["evaluations"])
        self.best = next((row for row in self.evaluations if row["step"] == state["best_step"]), None)
        if self.best is not None and self.metric not in self.best["metrics"]:  # keep_best may have changed since
            self.best = None
