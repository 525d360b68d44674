"""The training loop: one for every model, on one process or many, through Accelerate.

`train` runs a recipe to its end, or from its newest checkpoint, and returns a `TrainingOutcome`. What a step is, is in
step.py; what a model needs, in tasks/; how a run is saved and resumed, in saving.py; code of one's own that is told of
all that, in callbacks.py. The folder `output` receives:

- `model/`: the best weights with configuration, image processor, scores and model card; `results.json`; `curves.png`;
- `checkpoints/`: the last and the best, to go on from; `history.jsonl` and the trackers' logs;
- `predictions/`: images of what the model saw at each evaluation; `failures/`: steps that were not finite.

`check_trackers`, `check_publishing` and `check_keep_best` refuse, before the first step, what would fail after the
last: trackers that are not installed, a repository that cannot be pushed to, a score that the task has not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..atomic_files import prepare_output_folder
from ..hub.push import check_destination, push_to_hub
from ..inference.devices import describe_device
from ..lookup import suggestion
from .callbacks import Callbacks, load_callbacks
from .checkpoints import Checkpoints, identity
from .data_order import StepOrder, TrainingLoader, worker_count
from .derivation import TrainingPlan, derive
from .ema import MovingAverage
from .explanation import memory_advice
from .guards import NonFiniteGuard, evaluation_advice, explained_out_of_memory, save_failed_step
from .optimizers import build_optimizer, highest_rates, learning_rate_schedule
from .recipe import Recipe, output_folder
from .results import Selection, TrainingOutcome, write_results
from .saving import RunParts, RunSaver
from .signals import StopRequested, StopSignals
from .start import WholeModel, build_trained_model, checkpoint_blocks, compile_blocks, merge_adapters
from .step import OptimizerStep, StepOutcome
from .tasks import TrainingTask, task_for
from .tracking import Tracking, memory_mib
from .training_state import random_states, seed_everything, unchanged_random_states

PROCESS_TIMEOUT = 1800.0  # seconds that a process waits for the others


def train(
    recipe: Recipe,
    *,
    task: TrainingTask | None = None,
    cpu: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    process_timeout: float = PROCESS_TIMEOUT,
) -> TrainingOutcome:
    """Train by a recipe.

    Args:
        recipe: what to train, on what, and how.
        task: supplies model, data and loss; by default the one of the recipe's model.
        cpu: compute on the CPU even where there is a GPU.
        on_step: called after every step with its number, from 1, and its loss.
        callbacks: called besides those of the recipe, such as Transformers' `TrainerCallback`s; see callbacks.py.
        progress: tell on stderr how it goes.
        process_timeout: seconds after which a process gives up waiting for another.

    Raises:
        ValueError: recipe, data, checkpoint or model do not go together, or training cannot go on (`TrainingFailed`).
        OSError: something cannot be written; the checkpoints that were there are unharmed.
    """
    output = output_folder(recipe)
    check_trackers(recipe.trackers)
    callbacks = [*callbacks, *load_callbacks(recipe.callbacks)]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()  # of an earlier training in this program
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=cpu,
        log_with=list(recipe.trackers) or None,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))],
    )
    if accelerator.is_main_process:
        check_publishing(recipe.push_to_hub)
    with StopSignals() as signals:
        run = _Run(recipe, task or task_for(recipe), accelerator, output, signals, callbacks, progress)
        try:
            stopped = run.steps(on_step)
            results = {} if stopped else run.finish()
        finally:
            run.tracking.close()
    return TrainingOutcome(output, run.step, stopped, results, run.core.eval(), run.processor)


def prepare(accelerator: Accelerator, model: Any, plan: TrainingPlan) -> tuple[Any, Any, Any]:
    """Model and optimiser, spread over the processes as these were launched, and the schedule of the learning rates."""
    optimizer = build_optimizer(model, plan)
    schedule = learning_rate_schedule(optimizer, plan)
    return *accelerator.prepare(model, optimizer), schedule


class _Run:
    """A training run on this process."""

    def __init__(
        self,
        recipe: Recipe,
        task: TrainingTask,
        accelerator: Accelerator,
        output: Path,
        signals: StopSignals,
        callbacks: Sequence[Any],
        progress: bool,
    ) -> None:
        self.recipe, self.task, self.accelerator, self.output, self.signals = recipe, task, accelerator, output, signals
        seed_everything(recipe.seed)  # the same initial weights on all processes
        self.core, self.processor = build_trained_model(task)
        self.whole = WholeModel(task)
        task.device = accelerator.device
        samples = task.train_samples()
        task.validation_name()  # reads the validation data: better now than after an epoch
        check_keep_best(recipe.keep_best, task.score_names)
        self.plan: TrainingPlan = derive(recipe, len(samples), accelerator.num_processes, self.core.config)
        prepare_output_folder(output)
        self.advice = memory_advice(recipe, self.plan)
        if recipe.gradient_checkpointing:
            checkpoint_blocks(self.core)
        if recipe.compile:
            compile_blocks(self.core)
        self.model, self.optimizer, schedule = prepare(accelerator, self.core, self.plan)
        self.core = accelerator.unwrap_model(self.model)
        self.ema = None if recipe.ema_decay is None else MovingAverage(self.core, recipe.ema_decay)
        self.take_step = OptimizerStep(
            accelerator, task, self.model, self.processor, self.optimizer, schedule, recipe.max_grad_norm
        )

        self.selection = Selection(recipe.keep_best or task.headline, recipe.patience)
        self.callbacks = Callbacks(
            callbacks,
            accelerator,
            self.plan,
            output,
            self.selection,
            model=self.core,
            processing_class=self.processor,
            optimizer=self.optimizer,
            lr_scheduler=schedule,
        )
        self.guard = NonFiniteGuard()
        messages: list[str] = list(task.remarks)
        self.saver = RunSaver(
            accelerator,
            recipe,
            Checkpoints(output / "checkpoints", recipe.keep_last, messages.append),
            identity(recipe, len(samples), self.plan.total_steps, task.training_datasets()),
            RunParts(
                self.model,
                self.processor,
                self.optimizer,
                schedule,
                self.ema,
                self.selection,
                self.guard,
                self.callbacks,
            ),
        )
        seed_everything(recipe.seed, 0, accelerator.process_index)
        self.step, self.seconds = self.saver.resume(messages.append)
        self.tracking = Tracking(accelerator, self.plan, output, self.step, progress)
        for message in messages:
            self.tracking.say(message)
        self.loader = TrainingLoader(
            samples,
            StepOrder(len(samples), recipe.batch_size, recipe.seed),
            task.collator(self.processor, accelerator.device),
            start_step=self.step,
            total_steps=self.plan.total_steps,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_micro_batches=self.plan.accumulation_steps,
            num_workers=worker_count(recipe.num_workers, accelerator.num_processes, accelerator.device),
            pin_memory=accelerator.device.type == "cuda",
        )
        self.callbacks.objects["train_dataloader"] = self.loader

    def steps(self, on_step: Callable[[int, float], None] | None) -> str | None:
        """All steps from where the run is; the signal that ended it early, or `None`."""
        total, save_due = self.plan.total_steps, False
        callbacks = self.callbacks
        settings = self.task.before_step(self.core, self.step, self.plan)
        callbacks.call("on_train_begin", self.step)
        evaluation_due = self._due(self.plan.evaluate_every_steps) or (self.step > 0 and callbacks.wants_evaluation)
        if evaluation_due and self.selection.last_step != self.step and self._evaluate():
            return self._stop()
        self.model.train()
        alone = self.accelerator.num_processes == 1  # many have to agree, and do so in each step
        with contextlib.closing(iter(self.loader)) as batches:  # whose workers end with the block
            while self.step < total and not self.selection.out_of_patience and not callbacks.should_stop:
                callbacks.before_step(self.step)
                start = time.perf_counter()
                settings.update(highest_rates(self.optimizer))
                micro_batches = next(batches)
                waited = time.perf_counter() - start
                states = random_states()
                with explained_out_of_memory(self.advice):
                    outcome = self.take_step(micro_batches, self.signals.requested is not None)
                self._settle(outcome, micro_batches, states)
                self.step += 1
                seconds = time.perf_counter() - start
                self.seconds += seconds
                callbacks.after_step(self.step, self.tracking.step(self.step, outcome, seconds, waited, settings))
                if on_step is not None:
                    on_step(self.step, outcome.loss)
                settings = self.task.before_step(self.core, self.step, self.plan)
                if outcome.stop or (alone and self.signals.requested):
                    return self._stop()
                if (self._due(self.plan.evaluate_every_steps) or callbacks.wants_evaluation) and self._evaluate():
                    return self._stop()
                save_due |= self._due(self.plan.save_every_steps) or callbacks.wants_save
                if save_due and not self.guard.consecutive:  # what may end in a failure is better not gone on from
                    self._save()
                    save_due = False
        return None

    def finish(self) -> dict[str, Any]:
        """Put the best weights into the model and write all results."""
        accelerator = self.accelerator
        self.core = self.whole.of(self.core)
        self.task.before_step(self.core, self.plan.total_steps, self.plan)
        best = self.selection.best
        chosen = None if best is None or best["step"] == self.step else self.saver.best_weights(self.tracking.say)
        if chosen is not None:
            self.core.load_state_dict(chosen)
        elif self.ema is not None:
            self.core.load_state_dict(self.ema.tensors(), strict=False)
        self.callbacks.call("on_train_end", self.step)
        results: dict[str, Any] = {}
        if accelerator.is_main_process:
            facts = {
                "train_seconds": round(self.seconds, 1),
                "pictures_per_second": round(self.step * self.recipe.batch_size / max(self.seconds, 1e-9), 2),
                "peak_memory_mib": round(memory_mib(accelerator.device)),
                "skipped_steps": self.guard.skipped,
                "device": describe_device(accelerator.device),
            }
            self.core = merge_adapters(self.core).eval()
            results = write_results(self.output, self.task, self.core, self.processor, self.plan, self.selection, facts)
            if self.recipe.push_to_hub is not None:
                push_to_hub(self.output / "model", self.recipe.push_to_hub)
        accelerator.wait_for_everyone()
        return results

    def _settle(self, outcome: StepOutcome, micro_batches: list[dict[str, Any]], states: dict[str, Any]) -> None:
        """What follows from a step: the average moves on; or it failed, and is kept with the random states before."""
        if outcome.finite and outcome.overflow_scale is None:
            self.guard.passed()
            if self.ema is not None and outcome.updated:
                self.ema.update(self.core)
            return
        if outcome.overflow_scale is not None and not self.guard.overflowed(outcome.overflow_scale):
            return
        step, place = self.step + 1, None
        if self.guard.skipped == 0 or self.guard.hopeless:
            place = self.output / "failures" / f"step-{step:08d}"
            try:
                save_failed_step(place, step, self.accelerator, self.task, self.model, micro_batches, states)
            except OSError as error:
                self.tracking.say(f"the batch of step {step} could not be saved for replay: {error}")
        newest = self.saver.newest_step
        self.tracking.say(self.guard.failed(step, outcome.loss, outcome.gradient_norm, place, newest))

    def _evaluate(self) -> bool:
        """Score the model, or its moving average; whether it was asked to stop in the middle."""
        self._save()  # whatever happens here, nothing is lost
        average = contextlib.nullcontext() if self.ema is None else self.ema.applied_to(self.core)
        alone = self.accelerator.num_processes == 1
        images: list[Any] = []
        try:
            # A stop need not wait for the evaluation: it is done again. Many processes would have to agree on it.
            with (
                self.signals.interruptible() if alone else contextlib.nullcontext(),
                explained_out_of_memory(evaluation_advice(self.recipe)),
                unchanged_random_states(),
                average,
            ):
                model, device = self.whole.of(self.core).eval(), self.accelerator.device
                self.task.before_step(model, self.step, self.plan)
                metrics = self.task.evaluate(model, self.processor, device, self.recipe.evaluate_limit)
                if self.recipe.draw and self.accelerator.is_main_process:
                    images = self.task.draw(model, self.processor, device, self.recipe.draw)
        except StopRequested:
            return True
        finally:
            self.model.train()
        # Before the score counts: as in `Trainer`, callbacks compare it with the best of those before.
        self.callbacks.call("on_evaluate", self.step, metrics={f"eval_{key}": value for key, value in metrics.items()})
        is_best = self.selection.add(self.step, metrics, self.task.not_comparable_yet(self.core))
        self.saver.note_evaluation()
        self.tracking.scores(self.step, metrics, images)
        name = self.selection.metric
        remark = ", the best so far" if is_best else ""
        self.tracking.say(f"step {self.step}: {name} {metrics[name]:.4f}{remark}")
        return False

    def _stop(self) -> str:
        """Save where the run is; the name of the signal."""
        self._save()
        name = self.signals.requested or "a signal to another process"
        self.tracking.say(f"{name}: saved at step {self.step}; the same command goes on from there")
        return name

    def _save(self) -> None:
        if self.saver.save(self.step, self.seconds):
            self.callbacks.call("on_save", self.step)

    def _due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.plan.total_steps)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there: Accelerate passes over them without a word.

    Args:
        names: of a recipe; "all" stands for those that are installed.

    Raises:
        ValueError: one is unknown or not installed; the message says what to do.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name in available or name == "all":
            continue
        if name not in known:
            raise ValueError(f"trackers has {name!r}; {suggestion(name.lower(), [*known, 'all'])}")
        raise ValueError(f"trackers has {name}, which is not installed: pip install {name}, or trackers=[tensorboard]")


def check_publishing(repo_id: str | None) -> None:
    """Refuse to train for a repository that cannot be pushed to, as far as that shows without the network.

    Args:
        repo_id: `push_to_hub` of a recipe.

    Raises:
        ValueError: it is no repository's name, there is no access token, or offline mode is on.
    """
    if repo_id is None:
        return
    try:
        check_destination(repo_id)
    except ValueError as error:
        raise ValueError(f"push_to_hub={repo_id}: {error}") from error


def check_keep_best(name: str | None, scores: Sequence[str]) -> None:
    """Refuse a score that the task has not.

    Args:
        name: `keep_best` of a recipe; `None` is the task's headline.
        scores: names that the task may give; none where that is not known.

    Raises:
        ValueError: it is none of them.
    """
    if name is not None and scores and name not in scores:
        raise ValueError(f"keep_best={name!r} is no score of this task; {suggestion(name.lower(), scores)}")
