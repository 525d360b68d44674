"""Save the whole state of a run in checkpoints, and resume from them.

`RunSaver.save` writes a checkpoint; `resume` continues from the newest valid one. Every process calls them: the main
process writes, all read. The format of the files is the business of checkpoints.py. A checkpoint is saved before its
weights are evaluated, as that may fail; `note_evaluation` adds the scores later, in `evaluation.json`.
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
    """Everything that changes during a run; model and optimiser as the accelerator prepared them."""

    model: Any
    processor: Any
    optimizer: Any
    schedule: Any
    ema: MovingAverage | None
    selection: Selection
    guard: NonFiniteGuard
    callbacks: Callbacks


class RunSaver:
    """Writes and reads the checkpoints of a run, which is recognised by its `identity` (see checkpoints.py)."""

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
        self.newest_step: int | None = None  # of the checkpoint that was saved or read last

    def save(self, step: int, seconds: float) -> bool:
        """Write a checkpoint after `step` steps, which took `seconds`; `False` if this step was saved already.

        Raises:
            OSError: it cannot be written; existing checkpoints are unharmed.
        """
        if self.newest_step == step:
            return False
        accelerator, parts = self.accelerator, self.parts
        # Every process takes part: each has its own random states, and perhaps a shard of weights and moments.
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
            # With adapters, the folder also has an ordinary model, which can be loaded without PEFT.
            adapted = self.recipe.lora is not None
            merged = merged_weights(accelerator.unwrap_model(parts.model), weights) if adapted else None
            state = TrainingState(step, weights, average, optimizer, states, progress, merged)
            best = parts.selection.best
            self.checkpoints.save(state, self._save_settings, None if best is None else best["step"])
        self.newest_step = step
        accelerator.wait_for_everyone()  # nobody may read the checkpoint or exit before it is complete
        return True

    def note_evaluation(self) -> None:
        """Add the last evaluation to the checkpoint of its step, and delete the previous best.

        Raises:
            OSError: it cannot be written.
        """
        row, best = self.parts.selection.evaluations[-1], self.parts.selection.best
        if self.accelerator.is_main_process:
            with replacing(self.checkpoints.path(row["step"]) / EVALUATION) as partial:
                # Saved again here: `on_evaluate` may have changed them since the checkpoint was written.
                states = self.parts.callbacks.states()
                row = {**row, **({"callbacks": states} if states else {})}
                # Not `write_json`, which would turn a NaN score into null and change what resuming compares.
                partial.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            self.checkpoints.prune(None if best is None else best["step"])

    def best_weights(self, say: Callable[[str], None]) -> dict[str, Tensor] | None:
        """The weights, or their moving average, of the best checkpoint; `None` if there is none or it is damaged."""
        selection = self.parts.selection
        if selection.best is None:
            return None
        path = self.checkpoints.path(selection.best["step"])
        problem: list[str | None] = [None]
        if self.accelerator.is_main_process:
            problem = [_damage(path)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            say(f"the best checkpoint is lost: {problem[0]}; the weights at the end are published instead")
            selection.lose_best()
            return None
        state = read(path)
        return state.model | (state.ema or {})  # the average has trainable parameters only

    def resume(self, say: Callable[[str], None]) -> tuple[int, float]:
        """Continue from the newest valid checkpoint, if there is one; steps taken and the seconds they took.

        Raises:
            ValueError: the checkpoint is of another run, has no optimiser state, or the recipe has resume=false.
        """
        path = self._newest()
        if path is None:
            return 0, 0.0
        state = read(path)
        changes = refuse_other_run(state.progress["identity"], self.identity, path)
        if "optimizer" not in state.optimizer:
            raise ValueError(
                f"{path} was saved under DeepSpeed, without the state of the optimiser, so the run cannot be resumed; "
                f"start another run from its weights with init={path} and another output="
            )
        parts = self.parts
        model = self.accelerator.unwrap_model(parts.model)
        put_weights(model, state.model)
        put_optimizer(model, parts.optimizer, state.optimizer["optimizer"])
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
        say(f"resuming from {path}")
        if changes is not None:
            say(changes)
        self._restore_pixel_settings(path, say)
        self._restore_random_states(state, say)  # last, as everything above may draw random numbers
        return state.step, state.progress["seconds"]

    def _newest(self) -> Path | None:
        """The checkpoint to resume from; the main process decides for all."""
        newest: list[Any] = [None]
        if self.accelerator.is_main_process:
            if not self.recipe.resume and self.checkpoints.steps():
                raise ValueError(
                    f"{self.checkpoints.folder} holds checkpoints of an earlier run; delete them or give another "
                    "output= to start anew, or continue that run with resume=true"
                )
            newest = [self.checkpoints.newest_valid()]
        broadcast_object_list(newest)
        return newest[0]

    def _restore_evaluation(self, path: Path) -> None:
        """Restore the scores of the checkpoint; if it has none yet, the loop repeats the evaluation."""
        try:
            row = json.loads((path / EVALUATION).read_text(encoding="utf-8"))
            step, metrics, not_comparable = row["step"], row["metrics"], row["not_comparable"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        selection = self.parts.selection
        if selection.last_step != step and selection.metric in metrics:  # keep_best may have changed since
            selection.add(step, metrics, not_comparable)
            self.parts.callbacks.restore(row.get("callbacks", {}))

    def _restore_pixel_settings(self, path: Path, say: Callable[[str], None]) -> None:
        """Keep the pixel normalisation that the weights were trained with."""
        # The backbone or checkpoint that the run started from may have another preprocessor_config.json by now.
        processor = self.parts.processor
        saved = pixel_settings(type(processor).from_pretrained(path))
        if unit_normalization(saved) != unit_normalization(vars(processor)):
            say(f"pixels are still normalised as in {path}, though the model that the run started from now differs")
        for name, value in saved.items():
            setattr(processor, name, value)

    def _restore_random_states(self, state: TrainingState, say: Callable[[str], None]) -> None:
        before, now = len(state.random_states), self.accelerator.num_processes
        if before == now:
            restore_random_states(state.random_states[self.accelerator.process_index])
            return
        # States cannot be divided among another number of processes: each starts afresh, reproducibly.
        seed_everything(self.recipe.seed, state.step, self.accelerator.process_index)
        say(
            f"there were {before} processes and are {now} now: the batches are the same, but random numbers drawn in "
            "the model are not"
        )

    def _save_settings(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.parts.model)
        # `save_pretrained` of the model would set this; the Auto classes and pipelines go by it.
        model.config.architectures = [_published_name(model)]
        model.config.save_pretrained(folder)
        self.parts.processor.save_pretrained(folder)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    if not path.is_dir():
        return f"{path} no longer exists"
    try:
        check(path)
    except (DamagedCheckpoint, OSError) as error:
        return str(error)
    return None


def _published_name(model: Any) -> str:
    """Class name of a model without adapters, and without the prefix that FSDP2 adds."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(plain).__name__.removeprefix("FSDP")
