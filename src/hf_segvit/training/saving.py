"""Save the whole state of a run in checkpoints, and resume from them.

`RunSaver.save` writes a checkpoint; `resume` continues from the newest valid one. Every process calls them: the main
process writes, all read. The format of the files is the business of checkpoints.py. A checkpoint is saved before its
weights are evaluated, as that may fail; `note_evaluation` adds the scores later, in `evaluation.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..atomic_files import replacing
from ..models.image_processing_plain_vit import unit_normalization
from .callbacks import Callbacks
from .checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    TrainingState,
    are_callback_states,
    check,
    check_progress,
    is_evaluation,
    is_number,
    read,
    refuse_other_run,
)
from .ema import MovingAverage
from .guards import NonFiniteGuard
from .optimizers import restore_schedule
from .recipe import Recipe
from .results import Selection
from .start import merged_weights, pixel_settings
from .training_state import (
    collect_optimizer,
    collect_weights,
    optimizer_fault,
    put_optimizer,
    put_weights,
    random_states,
    restore_random_states,
    seed_everything,
    unchanged_random_states,
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
        found = self._newest()
        if found is None:
            return 0, 0.0
        path, state = found
        changes = refuse_other_run(state.progress["identity"], self.identity, path)
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
        self._restore_evaluation(path, state.step)
        parts.guard.skipped = state.progress["skipped_steps"]
        parts.guard.consecutive = state.progress.get("consecutive_skips", 0)  # older checkpoints lack it
        self.newest_step = state.step
        say(f"resuming from {path}")
        if changes is not None:
            say(changes)
        self._restore_pixel_settings(path, say)
        self._restore_random_states(state, say)  # last, as everything above may draw random numbers
        return state.step, state.progress["seconds"]

    def _newest(self) -> tuple[Path, TrainingState] | None:
        """The checkpoint to resume from; the main process decides for all."""
        found: tuple[Path, TrainingState] | None = None
        shared: list[Any] = [None, None]  # the folder, or why there is none
        if self.accelerator.is_main_process:
            try:
                if not self.recipe.resume and self.checkpoints.steps():
                    raise ValueError(
                        f"{self.checkpoints.folder} holds checkpoints of an earlier run; delete them or give another "
                        "output= to start anew, or continue that run with resume=true"
                    )
                found = self.checkpoints.newest(self._check)
                shared[0] = None if found is None else found[0]
            except ValueError as error:
                shared[1] = str(error)
        broadcast_object_list(shared)
        if shared[1] is not None:
            raise ValueError(shared[1])
        if found is None and shared[0] is not None:
            found = shared[0], read(shared[0])
        return found

    def _check(self, path: Path, state: TrainingState) -> None:
        """Refuse a checkpoint of another run, and one that would fail when it is loaded or in the next step."""
        check_progress(path, state.progress)
        refuse_other_run(state.progress["identity"], self.identity, path)
        if "optimizer" not in state.optimizer:
            raise ValueError(
                f"{path} was saved under DeepSpeed, without the state of the optimiser, so the run cannot be resumed; "
                f"start another run from its weights with init={path} and another output="
            )
        try:
            fault = self._misfit(path, state)
        except Exception as error:  # whatever it holds that is nothing of ours
            fault = f"what it holds is of another form ({str(error)[:200] or type(error).__name__})"
        if fault is not None:
            raise DamagedCheckpoint(f"{path}: {fault}")

    def _misfit(self, path: Path, state: TrainingState) -> str | None:
        """Why the content of a checkpoint does not fit this run, if it does not; other errors say the same."""
        parts = self.parts
        own = self.accelerator.unwrap_model(parts.model).state_dict()
        if fault := _other_tensors(state.model, own):
            return f"its weights are not those of this model: {fault}"
        if parts.ema is not None:
            if state.ema is None and state.progress["ema_steps"]:
                return "its moving average is missing"
            if state.ema is not None and (fault := _other_tensors(state.ema, parts.ema.average)):
                return f"its moving average is not that of this model: {fault}"
        if fault := optimizer_fault(state.optimizer["optimizer"], parts.optimizer, own, state.step):
            return f"the state of its optimiser {fault}"
        schedule = state.optimizer["schedule"]
        if not all(
            type(schedule[name]) is int and 0 <= schedule[name] < 2**63 for name in ("last_epoch", "_step_count")
        ):
            return "the state of its learning-rate schedule is not one"
        scaler = self.accelerator.scaler
        if scaler is not None and "scaler" in state.optimizer:
            saved = state.optimizer["scaler"]
            if saved.keys() != scaler.state_dict().keys() or not all(map(is_number, saved.values())):
                return "the state of its gradient scaler is not one"
        unit_normalization(pixel_settings(type(parts.processor).from_pretrained(path)))
        with unchanged_random_states():
            for states in state.random_states:
                restore_random_states(states)
        return None if state.random_states else "it has no random states"

    def _restore_evaluation(self, path: Path, step: int) -> None:
        """Restore the scores of the checkpoint; if it has no sound ones, the loop scores it again."""
        try:
            row = json.loads((path / EVALUATION).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if not is_evaluation(row) or row["step"] != step or not are_callback_states(row.get("callbacks", {})):
            return
        selection, metrics = self.parts.selection, row["metrics"]
        # keep_best may have changed since
        if selection.last_step != step and (selection.metric in metrics or row["not_comparable"] is not None):
            selection.add(step, metrics, row["not_comparable"])
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


def _other_tensors(found: Mapping[str, Tensor], own: Mapping[str, Any]) -> str | None:
    """The first difference in names, shapes and kinds of tensors."""
    if found.keys() != own.keys():
        return f"{min(found.keys() ^ own.keys())!r} is in one of them only"
    for name, tensor in own.items():
        other = found[name]
        if other.shape != tensor.shape or other.is_floating_point() != tensor.is_floating_point():
            return f"{name!r} is {tuple(other.shape)} {other.dtype} instead of {tuple(tensor.shape)} {tensor.dtype}"
    return None


def _published_name(model: Any) -> str:
    """Class name of a model without adapters, and without the prefix that FSDP2 adds."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(plain).__name__.removeprefix("FSDP")
