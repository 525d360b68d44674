"""Saving a run and going on with it: model, optimiser, random numbers and loop into a checkpoint, and back.

`RunSaver.save` writes a checkpoint of where the run is; `resume` goes on from the newest valid one. All processes call
them together: the first writes, and all read. The files themselves are the matter of checkpoints.py. A checkpoint is
saved before its weights are evaluated, as that may fail; `note_evaluation` adds the scores, in `evaluation.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..atomic_files import replacing
from ..models.image_processing_plain_vit import unit_normalization
from .callbacks import Callbacks
from .checkpoints import Checkpoints, DamagedCheckpoint, TrainingState, check, read, refuse_other_run
from .ema import MovingAverage
from .guards import NonFiniteGuard
from .optimizers import restore_schedule
from .recipe import Recipe
from .results import Selection
from .start import merged_weights, pixel_settings
from .training_state import (
    collect_optimizer,
    collect_weights,
    put_optimizer,
    put_weights,
    random_states,
    restore_random_states,
    seed_everything,
)

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class RunParts:
    """All that changes while a run trains; model and optimiser as the accelerator prepared them."""

    model: Any
    processor: Any
    optimizer: Any
    schedule: Any
    ema: MovingAverage | None
    selection: Selection
    guard: NonFiniteGuard
    callbacks: Callbacks


class RunSaver:
    """The checkpoints of a run.

    Args:
        identity: what is trained on what, see checkpoints.py.

    Attributes:
        newest_step: step of the checkpoint that was saved or read last, or `None`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        checkpoints: Checkpoints,
        identity: dict[str, Any],
        parts: RunParts,
    ) -> None:
        self.accelerator, self.recipe, self.checkpoints = accelerator, recipe, checkpoints
        self.identity, self.parts = identity, parts
        self.newest_step: int | None = None

    def save(self, step: int, seconds: float) -> bool:
        """Write a checkpoint, unless there is one of this step; whether there was none.

        Args:
            step: steps taken.
            seconds: that they took.

        Raises:
            OSError: it cannot be written; those that were there are unharmed.
        """
        if self.newest_step == step:
            return False
        accelerator, parts = self.accelerator, self.parts
        states = gather_object([random_states()])
        weights = collect_weights(accelerator, parts.model)
        moments = collect_optimizer(accelerator, parts.model, parts.optimizer)
        average = None if parts.ema is None else parts.ema.tensors()
        if accelerator.is_main_process:
            optimizer = {"schedule": parts.schedule.state_dict()}
            if moments is not None:
                optimizer["optimizer"] = moments
            if accelerator.scaler is not None:
                optimizer["scaler"] = accelerator.scaler.state_dict()
            progress = {
                "identity": self.identity,
                "selection": parts.selection.state(),
                "skipped_steps": parts.guard.skipped,
                "consecutive_skips": parts.guard.consecutive,
                "seconds": seconds,
                "ema_steps": 0 if parts.ema is None else parts.ema.steps,
                "callbacks": parts.callbacks.states(),
            }
            adapted = self.recipe.lora is not None
            merged = merged_weights(accelerator.unwrap_model(parts.model), weights) if adapted else None
            state = TrainingState(step, weights, average, optimizer, states, progress, merged)
            best = parts.selection.best
            self.checkpoints.save(state, self._save_settings, None if best is None else best["step"])
        self.newest_step = step
        accelerator.wait_for_everyone()
        return True

    def note_evaluation(self) -> None:
        """Add the last evaluation to the checkpoint of its step, and delete what is not the best any more.

        Raises:
            OSError: it cannot be written.
        """
        row, best = self.parts.selection.evaluations[-1], self.parts.selection.best
        if self.accelerator.is_main_process:
            with replacing(self.checkpoints.path(row["step"]) / EVALUATION) as partial:
                states = self.parts.callbacks.states()  # the evaluation was an event to them
                row = {**row, **({"callbacks": states} if states else {})}
                partial.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            self.checkpoints.prune(None if best is None else best["step"])

    def best_weights(self, say: Callable[[str], None]) -> dict[str, Tensor] | None:
        """The weights, or their average, of the best checkpoint, which is given up where it is damaged.

        Args:
            say: takes a line of text for people.

        Returns:
            `None` where none is the best.
        """
        selection = self.parts.selection
        if selection.best is None:
            return None
        path = self.checkpoints.path(selection.best["step"])
        problem: list[str | None] = [None]
        if self.accelerator.is_main_process:
            problem = [_damage(path)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            say(f"the best checkpoint is lost: {problem[0]}; in its place the weights at the end are published")
            selection.lose_best()
            return None
        state = read(path)
        return state.model | (state.ema or {})

    def resume(self, say: Callable[[str], None]) -> tuple[int, float]:
        """Go on from the newest valid checkpoint, if there is one.

        Args:
            say: takes lines of text for people.

        Returns:
            Steps taken and the seconds that they took.

        Raises:
            ValueError: the checkpoint is of another run, has no optimiser to go on with, or is not to be used.
        """
        path = self._newest()
        if path is None:
            return 0, 0.0
        state = read(path)
        changes = refuse_other_run(state.progress["identity"], self.identity, path)
        if "optimizer" not in state.optimizer:
            raise ValueError(
                f"{path} was saved under DeepSpeed, whose optimiser's state is not in it, so that training cannot go "
                f"on from it; start another training from its weights with init={path} and another output="
            )
        parts = self.parts
        core = self.accelerator.unwrap_model(parts.model)
        put_weights(core, state.model)
        put_optimizer(core, parts.optimizer, state.optimizer["optimizer"])
        restore_schedule(parts.schedule, state.optimizer["schedule"])
        if self.accelerator.scaler is not None and "scaler" in state.optimizer:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        if parts.ema is not None and state.ema is not None:
            parts.ema.restore(state.ema, state.progress["ema_steps"])
        parts.selection.restore(state.progress["selection"])
        parts.callbacks.restore(state.progress.get("callbacks", {}))  # older checkpoints lack it
        self._restore_evaluation(path)
        parts.guard.skipped = state.progress["skipped_steps"]
        parts.guard.consecutive = state.progress.get("consecutive_skips", 0)  # older checkpoints lack it
        self.newest_step = state.step
        say(f"going on from {path}")
        if changes is not None:
            say(changes)
        self._restore_pixel_settings(path, say)
        self._restore_random_states(state, say)
        return state.step, state.progress["seconds"]

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, the same on all processes."""
        newest: list[Any] = [None]
        if self.accelerator.is_main_process:
            if not self.recipe.resume and self.checkpoints.steps():
                raise ValueError(
                    f"{self.checkpoints.folder} holds checkpoints of an earlier run; delete them or give another "
                    "output= to begin anew, or go on with resume=true"
                )
            newest = [self.checkpoints.newest_valid()]
        broadcast_object_list(newest)
        return newest[0]

    def _restore_evaluation(self, path: Path) -> None:
        """Scores of the checkpoint; where it was left before they were there, they are computed again."""
        try:
            row = json.loads((path / EVALUATION).read_text(encoding="utf-8"))
            step, metrics, not_comparable = row["step"], row["metrics"], row["not_comparable"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        selection = self.parts.selection
        if selection.last_step != step and selection.metric in metrics:  # which may be another one now
            selection.add(step, metrics, not_comparable)
            self.parts.callbacks.restore(row.get("callbacks", {}))

    def _restore_pixel_settings(self, path: Path, say: Callable[[str], None]) -> None:
        """Go on with the pixels that the weights were trained on, also where the source of the run says others now."""
        processor = self.parts.processor
        before = pixel_settings(type(processor).from_pretrained(path))
        if unit_normalization(before) != unit_normalization(vars(processor)):
            say(f"pixels go on being normalised as in {path}, though what the training started from says otherwise now")
        for name, value in before.items():
            setattr(processor, name, value)

    def _restore_random_states(self, state: TrainingState, say: Callable[[str], None]) -> None:
        before, now = len(state.random_states), self.accelerator.num_processes
        if before == now:
            restore_random_states(state.random_states[self.accelerator.process_index])
            return
        seed_everything(self.recipe.seed, state.step, self.accelerator.process_index)
        say(
            f"there were {before} processes and are {now} now: the batches are the same, but what is drawn at random "
            "in the model is not"
        )

    def _save_settings(self, folder: Path) -> None:
        core = self.accelerator.unwrap_model(self.parts.model)
        core.config.architectures = [published_name(core)]
        core.config.save_pretrained(folder)
        self.parts.processor.save_pretrained(folder)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    if not path.is_dir():
        return f"{path} is not there any more"
    try:
        check(path)
    except (DamagedCheckpoint, OSError) as error:
        return str(error)
    return None


def published_name(model: Any) -> str:
    """Name of a model's class without adapters, and without the prefix that PyTorch gives to those that it shards."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(plain).__name__.removeprefix("FSDP")
