"""User callbacks in the training loop, with the interface of Transformers' `TrainerCallback`.

`load_callbacks` creates those of a recipe; `Callbacks` calls them and collects what they request. A callback is any
object with some of `EVENTS` as methods. As in Transformers' `Trainer`, each is called with `args`, `state` and
`control`, and by keyword with `model` (unwrapped), `processing_class`, `optimizer`, `lr_scheduler`, `train_dataloader`
and `eval_dataloader` (`None`), and, depending on the event, `logs` or `metrics`, whose names begin with "eval_".

Honoured in `control`: `should_evaluate`, `should_save`, and `should_training_stop`, after which the model is scored
once more and results are written. Callbacks with a `state()`, like Transformers' `ExportableState`, are saved in
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ..lookup import import_object
from .derivation import TrainingPlan
from .results import Selection

EVENTS = (
    *("on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_epoch_end", "on_log"),
    *("on_evaluate", "on_save", "on_train_end"),
)
_FLAGS = ("should_training_stop", "should_evaluate", "should_save")


def load_callbacks(paths: Sequence[str]) -> list[Any]:
    """Import and create the callbacks that a recipe names.

    Raises:
        ValueError: a path leads to no class, or the class has no event method or needs arguments.
    """
    callbacks = []
    for path in paths:
        cls = import_object(path, "callbacks")
        if not any(hasattr(cls, event) for event in EVENTS):
            raise ValueError(f"callbacks={path} has no method that is called; give it one of {', '.join(EVENTS)}")
        try:
            callbacks.append(cls())
        except TypeError as error:
            raise ValueError(f"callbacks={path} is created without arguments ({error}); give them defaults") from error
    return callbacks


class Callbacks:
    """The callbacks of a run, in the order of calling; `objects` are passed to every event by keyword."""

    def __init__(
        self,
        callbacks: Sequence[Any],
        accelerator: Accelerator,
        plan: TrainingPlan,
        output: Path,
        selection: Selection,
        **objects: Any,
    ) -> None:
        self.callbacks, self.accelerator, self.plan, self.selection = callbacks, accelerator, plan, selection
        self.objects = {**objects, "eval_dataloader": None}
        self.args = _arguments(accelerator, plan, output, selection.metric)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=plan.total_steps,
            num_train_epochs=max(1, round(plan.epochs)),
            train_batch_size=plan.device_batch_size,
            logging_steps=plan.log_every,
            eval_steps=plan.evaluate_every_steps,
            save_steps=plan.save_every_steps,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )

    @property
    def should_stop(self) -> bool:
        """Whether a callback ended the run."""
        return self.control.should_training_stop

    @property
    def wants_evaluation(self) -> bool:
        """Whether to score the model now; also at an early end, so that results have scores."""
        return self.control.should_evaluate or self.control.should_training_stop

    def call(self, event: str, step: int, **named: Any) -> None:
        """Report an event after `step` steps to all callbacks; every process calls it, and all agree on requests."""
        if not self.callbacks:
            return
        state, best = self.state, self.selection.best
        state.global_step, state.epoch = step, step / self.plan.steps_per_epoch
        state.best_metric = None if best is None else best["metrics"][self.selection.metric]
        state.best_global_step = None if best is None else best["step"]
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            answer = None if method is None else method(self.args, state, self.control, **self.objects, **named)
            self.control = self.control if answer is None else answer
        if self.accelerator.num_processes > 1:
            # Requests may differ, if a clock decides for example; all processes must take the same branch.
            requests = [float(getattr(self.control, flag)) for flag in _FLAGS]
            shared = self.accelerator.reduce(torch.tensor(requests, device=self.accelerator.device), "sum").tolist()
            for flag, count in zip(_FLAGS, shared, strict=True):
                setattr(self.control, flag, count > 0)

    def before_step(self, step: int) -> None:
        """Report that the step after `step` steps begins."""
        # The loop has fulfilled the requests of the previous step.
        self.control.should_evaluate = self.control.should_save = False
        if step % self.plan.steps_per_epoch == 0:
            self.call("on_epoch_begin", step)
        self.call("on_step_begin", step)

    def after_step(self, step: int, logs: Mapping[str, float] | None) -> None:
        """Report that step number `step` is done, with `logs` if it completed a record."""
        self.call("on_step_end", step)
        if step % self.plan.steps_per_epoch == 0:
            self.call("on_epoch_end", step)
        if logs is not None and self.callbacks:
            self.state.log_history.append({**logs, "step": step})
            self.call("on_log", step, logs=dict(logs))

    def states(self) -> dict[str, Any]:
        """States and requests of the callbacks, as plain values for a checkpoint; empty without callbacks."""
        if not self.callbacks:
            return {}
        noted = {
            _key(index, callback): callback.state()["attributes"]
            for index, callback in enumerate(self.callbacks)
            if hasattr(callback, "state")
        }
        return {"noted": noted, "asked": {flag: getattr(self.control, flag) for flag in _FLAGS}}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Restore saved `states`; those of callbacks that the run no longer has are ignored."""
        if not self.callbacks or not states:
            return
        for index, callback in enumerate(self.callbacks):
            for name, value in states["noted"].get(_key(index, callback), {}).items():
                setattr(callback, name, value)
        for flag, value in states["asked"].items():
            setattr(self.control, flag, value)


def _key(index: int, callback: Any) -> str:
    return f"{index} {type(callback).__name__}"  # a class may occur twice


def _arguments(accelerator: Accelerator, plan: TrainingPlan, output: Path, metric: str) -> SimpleNamespace:
    """The run's settings under the names of Transformers' `TrainingArguments`."""
    recipe = plan.recipe
    # Not a real `TrainingArguments`: creating one resets the state of Accelerate.
    return SimpleNamespace(
        output_dir=str(output),
        run_name=recipe.name,
        max_steps=plan.total_steps,
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.device_batch_size,
        train_batch_size=plan.device_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=plan.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        logging_strategy=IntervalStrategy.STEPS,
        logging_steps=plan.log_every,
        eval_strategy=IntervalStrategy.STEPS,
        eval_steps=plan.evaluate_every_steps,
        save_strategy=IntervalStrategy.STEPS,
        save_steps=plan.save_every_steps,
        save_total_limit=recipe.keep_last,
        metric_for_best_model=metric,
        greater_is_better=True,
        load_best_model_at_end=True,
        report_to=list(recipe.trackers),
        world_size=accelerator.num_processes,
        process_index=accelerator.process_index,
        local_process_index=accelerator.local_process_index,
        device=accelerator.device,
        recipe=recipe,
    )
