"""The training loop: any model, on one process or many, through Accelerate.

`train` runs a recipe to its end, resuming from the newest checkpoint, and returns a `TrainingOutcome`. A single step is
in step.py, what differs between models in tasks/, saving and resuming in saving.py, user callbacks in callbacks.py.
The folder `output` receives:

- `model/`: the best weights with configuration, image processor, scores and model card; `results.json`; `curves.png`;
- `held_out.json`: with `val_fraction`, the images that were scored on and not trained on;
- `checkpoints/`: the last ones and the best, for resuming; `history.jsonl` and the logs of trackers;
- `predictions/`: drawn predictions of each evaluation; `failures/`: batches of steps that were not finite.

`check_trackers`, `check_publishing`, `check_published_texts` and `check_keep_best` refuse before the first step what
would fail after the last.
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
from torch import distributed

from ..atomic_files import only_writer, prepare_output_folder, write_json
from ..hub.check import refuse_local_details
from ..hub.push import check_destination, push_to_hub
from ..inference.devices import describe_device
from ..lookup import suggestion
from .callbacks import Callbacks, load_callbacks
from .checkpoints import Checkpoints, identity
from .data_order import StepOrder, TrainingLoader, worker_count
from .derivation import TrainingPlan, derive
from .ema import MovingAverage
from .explanation import memory_advice, starting_block
from .guards import (
    NonFiniteGuard,
    evaluation_advice,
    explained_non_finite_outputs,
    explained_out_of_memory,
    save_failed_step,
)
from .optimizers import build_optimizer, highest_rates, learning_rate_schedule
from .preflight import check_folders
from .recipe import Recipe, cache_folder, output_folder
from .results import Selection, TrainingOutcome, training_in_words, write_results
from .saving import RunParts, RunSaver
from .signals import StopRequested, StopSignals
from .start import WholeModel, build_trained_model, checkpoint_blocks, compile_blocks, merge_adapters
from .step import OptimizerStep, StepOutcome
from .tasks import TrainingTask, own_task_class, task_for
from .tracking import Tracking, memory_mib
from .training_state import random_states, seed_everything, unchanged_random_states

HELD_OUT = "held_out.json"
PROCESS_TIMEOUT = 1800.0  # seconds; generous, as the others wait while the main process writes a checkpoint


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
    """Train a recipe to its end, or until a signal or a callback stops it.

    Args:
        task: supplies model, data and loss; by default the one that the recipe names.
        on_step: called after every step with its number, from 1, and its loss.
        callbacks: called in addition to those of the recipe, such as Transformers' `TrainerCallback`s.
        progress: report progress on stderr.
        process_timeout: seconds after which a process stops waiting for another.

    Raises:
        ValueError: recipe, data, checkpoint and model do not fit, another process trains into the same folder, or
            training has to give up (`TrainingFailed`).
        OSError: something cannot be written; existing checkpoints are unharmed.
    """
    output = output_folder(recipe)
    check_folders(output, cache_folder(recipe))
    check_trackers(recipe.trackers)
    callbacks = [*callbacks, *load_callbacks(recipe.callbacks)]
    # Accelerate's state is global: after an earlier run in this program, another precision would be refused.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=cpu,
        log_with=list(recipe.trackers) or None,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))],
    )
    if accelerator.is_main_process:
        check_publishing(recipe.push_to_hub)
    with StopSignals() as signals, contextlib.ExitStack() as writing:
        run = _Run(recipe, task or task_for(recipe), accelerator, output, signals, callbacks, progress, writing)
        try:
            stopped = run.steps(on_step)
            results = {} if stopped else run.finish()
        finally:
            run.tracking.close()
    return TrainingOutcome(output, run.step, stopped, results, run.unwrapped.eval(), run.processor)


def leave_process_group() -> None:
    """Close the connections to the other processes of a run, as the last thing a process does."""
    # Threads that serve the group while the interpreter shuts down can abort a process that has succeeded.
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def prepare(accelerator: Accelerator, model: Any, plan: TrainingPlan) -> tuple[Any, Any, Any]:
    """Model and optimiser as Accelerate distributes them over the processes, and the learning-rate schedule."""
    optimizer = build_optimizer(model, plan)
    schedule = learning_rate_schedule(optimizer, plan)
    return *accelerator.prepare(model, optimizer), schedule


class _Run:
    """One run, as this process takes part in it."""

    def __init__(
        self,
        recipe: Recipe,
        task: TrainingTask,
        accelerator: Accelerator,
        output: Path,
        signals: StopSignals,
        callbacks: Sequence[Any],
        progress: bool,
        writing: contextlib.ExitStack,
    ) -> None:
        self.recipe, self.task, self.accelerator, self.output, self.signals = recipe, task, accelerator, output, signals
        self.single_process = accelerator.num_processes == 1
        seed_everything(recipe.seed)  # all processes must start from the same initial weights
        self.unwrapped, self.processor = build_trained_model(task)
        self.whole_model = WholeModel(task)
        task.device = accelerator.device
        samples = task.train_samples()
        task.validation_name()  # opens the validation data, so that a wrong path fails now and not after an epoch
        check_keep_best(recipe.keep_best, task.score_names)
        found = task.check_data()
        self.plan: TrainingPlan = derive(recipe, len(samples), accelerator.num_processes, self.unwrapped.config)
        if recipe.push_to_hub is not None:
            check_published_texts(recipe.push_to_hub, task, self.unwrapped, self.processor, self.plan)
        prepare_output_folder(output)
        if accelerator.is_main_process:
            writing.enter_context(only_writer(output))
        held_out = getattr(task, "held_out", None)
        if held_out is not None and accelerator.is_main_process:
            # For whoever scores or continues with other commands: these images have not been trained on.
            write_json(output / HELD_OUT, sorted(held_out.names))
        self.out_of_memory_advice = memory_advice(recipe, self.plan)
        if recipe.gradient_checkpointing:
            checkpoint_blocks(self.unwrapped)
        if recipe.compile:
            compile_blocks(self.unwrapped)
        self.model, self.optimizer, schedule = prepare(accelerator, self.unwrapped, self.plan)
        self.unwrapped = accelerator.unwrap_model(self.model)  # sharding may have replaced it
        self.ema = None if recipe.ema_decay is None else MovingAverage(self.unwrapped, recipe.ema_decay)
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
            model=self.unwrapped,
            processing_class=self.processor,
            optimizer=self.optimizer,
            lr_scheduler=schedule,
        )
        self.guard = NonFiniteGuard()
        parts = RunParts(
            self.model, self.processor, self.optimizer, schedule, self.ema, self.selection, self.guard, self.callbacks
        )
        messages: list[str] = [*task.remarks, *found]  # held back until the progress bar is there
        checkpoints = Checkpoints(output / "checkpoints", recipe.keep_last, messages.append)
        run_identity = identity(
            recipe, len(samples), self.plan.total_steps, task.training_datasets(), own_task_class(task)
        )
        self.saver = RunSaver(accelerator, recipe, checkpoints, run_identity, parts)
        # From here on processes draw different numbers; `resume` overwrites them with the saved states.
        seed_everything(recipe.seed, 0, accelerator.process_index)
        self.step, self.seconds = self.saver.resume(messages.append)
        self.tracking = Tracking(accelerator, self.plan, output, self.step, progress)
        task.progress = progress and accelerator.is_main_process
        self.tracking.say(starting_block(self.plan, task, self.unwrapped, accelerator.device, output, self.step))
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
        """Take the remaining steps; the signal that ended them early, or `None`."""
        total, save_due = self.plan.total_steps, False
        callbacks = self.callbacks
        settings = self.task.before_step(self.unwrapped, self.step, self.plan)
        callbacks.call("on_train_begin", self.step)
        # An interrupted evaluation is made up for: checkpoints are saved before the evaluation of their step.
        evaluation_due = self._due(self.plan.evaluate_every_steps) or (self.step > 0 and callbacks.wants_evaluation)
        if evaluation_due and self.selection.last_step != self.step and self._evaluate():
            return self._stop()
        self.model.train()
        with contextlib.closing(iter(self.loader)) as batches:  # ends the workers however the block is left
            while self.step < total and not self.selection.out_of_patience and not callbacks.should_stop:
                callbacks.before_step(self.step)
                start = time.perf_counter()
                settings.update(highest_rates(self.optimizer))
                micro_batches = next(batches)
                waited = time.perf_counter() - start
                states = random_states()  # for a replay, should this step fail
                with explained_out_of_memory(self.out_of_memory_advice):
                    outcome = self.take_step(micro_batches, self.signals.requested is not None)
                self._settle(outcome, micro_batches, states)
                self.step += 1
                seconds = time.perf_counter() - start
                self.seconds += seconds
                callbacks.after_step(self.step, self.tracking.step(self.step, outcome, seconds, waited, settings))
                if on_step is not None:
                    on_step(self.step, outcome.loss)
                settings = self.task.before_step(self.unwrapped, self.step, self.plan)
                # Several processes stop only by `outcome.stop`, on which they have agreed within the step.
                if outcome.stop or (self.single_process and self.signals.requested):
                    return self._stop()
                if (self._due(self.plan.evaluate_every_steps) or callbacks.wants_evaluation) and self._evaluate():
                    return self._stop()
                save_due |= self._due(self.plan.save_every_steps) or callbacks.control.should_save
                # After a skipped step the weights may be ruined already: the last good checkpoint is worth more.
                if save_due and not self.guard.consecutive:
                    self._save()
                    save_due = False
        return None

    def finish(self) -> dict[str, Any]:
        """Load the best weights into the model and write all results."""
        accelerator = self.accelerator
        self.unwrapped = self.whole_model.of(self.unwrapped)
        self.task.before_step(self.unwrapped, self.plan.total_steps, self.plan)
        best = self.selection.best
        at_end = best is None or best["step"] == self.step
        best_weights = None if at_end else self.saver.best_weights(self.tracking.say)
        if best_weights is not None:
            self.unwrapped.load_state_dict(best_weights)
        elif self.ema is not None:
            self.unwrapped.load_state_dict(self.ema.tensors(), strict=False)  # it has trainable parameters only
        self.callbacks.call("on_train_end", self.step)
        results: dict[str, Any] = {}
        if accelerator.is_main_process:
            measured = {
                "train_seconds": round(self.seconds, 1),
                "pictures_per_second": round(self.step * self.recipe.batch_size / max(self.seconds, 1e-9), 2),
                "peak_memory_mib": round(memory_mib(accelerator.device)),
                "skipped_steps": self.guard.skipped,
                "device": describe_device(accelerator.device),
            }
            model = self.unwrapped = merge_adapters(self.unwrapped).eval()
            results = write_results(self.output, self.task, model, self.processor, self.plan, self.selection, measured)
            if self.recipe.push_to_hub is not None:
                push_to_hub(self.output / "model", self.recipe.push_to_hub)
        accelerator.wait_for_everyone()
        return results

    def _settle(self, outcome: StepOutcome, micro_batches: list[dict[str, Any]], states: dict[str, Any]) -> None:
        """Update the moving average after a good step; count and report a failed one, and save its batch."""
        if outcome.finite and outcome.overflow_scale is None:
            self.guard.passed()
            if self.ema is not None and outcome.updated:
                self.ema.update(self.unwrapped)
            return
        if outcome.overflow_scale is not None and not self.guard.overflowed(outcome.overflow_scale):
            return
        step, folder = self.step + 1, None
        if (
            self.guard.skipped == 0 or self.guard.hopeless
        ):  # one batch for replay is enough; each is as large as a model
            folder = self.output / "failures" / f"step-{step:08d}"
            try:
                save_failed_step(folder, step, self.accelerator, self.task, self.model, micro_batches, states)
            except OSError as error:
                self.tracking.say(f"the batch of step {step} could not be saved for replay: {error}")
        newest = self.saver.newest_step
        self.tracking.say(self.guard.failed(step, outcome.loss, outcome.gradient_norm, folder, newest))

    def _evaluate(self) -> bool:
        """Score the model, or its moving average; whether a signal interrupted that."""
        self.guard.refuse_ruined(self.unwrapped, self.step, self.saver.newest_step)
        self._save()  # first, so that a failure or a signal during the evaluation loses nothing
        average = contextlib.nullcontext() if self.ema is None else self.ema.applied_to(self.unwrapped)
        images: list[Any] = []
        try:
            with (
                # A signal may interrupt at once, as resuming repeats the evaluation; several processes would first
                # have to agree to stop.
                self.signals.interruptible() if self.single_process else contextlib.nullcontext(),
                explained_non_finite_outputs(),
                explained_out_of_memory(evaluation_advice(self.recipe)),
                unchanged_random_states(),
                average,
            ):
                model, device = self.whole_model.of(self.unwrapped).eval(), self.accelerator.device
                self.task.before_step(model, self.step, self.plan)
                metrics = self.task.evaluate(model, self.processor, device, self.recipe.evaluate_limit)
                if self.recipe.draw and self.accelerator.is_main_process:
                    images = self.task.draw(model, self.processor, device, self.recipe.draw)
        except StopRequested:
            return True
        finally:
            self.model.train()
        # Before the score is added: as in `Trainer`, callbacks compare it with the best of the earlier ones.
        self.callbacks.call("on_evaluate", self.step, metrics={f"eval_{key}": value for key, value in metrics.items()})
        name = self.selection.metric
        not_comparable = self.task.not_comparable_yet(self.unwrapped)
        if name not in metrics and name in self.task.score_names:
            # NaN, where the truth of the scored images has nothing to count: training goes on without a score.
            not_comparable = not_comparable or f"{name} is undefined on the validation images"
        is_best = self.selection.add(self.step, metrics, not_comparable)
        self.saver.note_evaluation()
        self.tracking.scores(self.step, metrics, images)
        score = f"{name} {metrics[name]:.4f}" if name in metrics else str(not_comparable)
        self.tracking.say(f"step {self.step}: {score}{', the best so far' if is_best else ''}")
        return False

    def _stop(self) -> str:
        """Save a checkpoint; the name of the signal that asked to stop."""
        self._save()
        name = self.signals.requested or "a signal to another process"
        self.tracking.say(f"{name}: saved at step {self.step}; run the same command again to resume")
        return name

    def _save(self) -> None:
        if self.saver.save(self.step, self.seconds):
            self.callbacks.call("on_save", self.step)

    def _due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.plan.total_steps)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed; "all" stands for those that are installed.

    Raises:
        ValueError: naming the tracker and the remedy.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:  # Accelerate itself ignores a missing tracker without a word
        if name in available or name == "all":
            continue
        if name not in known:
            raise ValueError(f"trackers has {name!r}; {suggestion(name.lower(), [*known, 'all'])}")
        raise ValueError(f"trackers has {name}, which is not installed: pip install {name}, or trackers=[tensorboard]")


def check_publishing(repo_id: str | None) -> None:
    """Refuse to train for a repository that cannot be pushed to, as far as that can be known offline.

    Raises:
        ValueError: `repo_id` is not a valid name, there is no access token, or offline mode is on.
    """
    if repo_id is None:
        return
    try:
        check_destination(repo_id)
    except ValueError as error:
        raise ValueError(f"push_to_hub={repo_id}: {error}") from error


def check_published_texts(repo_id: str, task: TrainingTask, model: Any, processor: Any, plan: TrainingPlan) -> None:
    """Refuse to train for a push that will be refused, as names of data or classes tell about this machine.

    Raises:
        ValueError: naming the text, the line and what stands there.
    """
    # What is published of a run, but for its weights and scores.
    about = training_in_words(plan, Selection(plan.recipe.keep_best or task.headline))
    texts = {
        "config.json": model.config.to_json_string(use_diff=False),
        "preprocessor_config.json": processor.to_json_string(),
        "results.json": "\n".join(task.validation_name().values()),
        "README.md": task.model_card(model, processor, [], about),
    }
    try:
        refuse_local_details(texts, repo_id)
    except ValueError as error:
        raise ValueError(f"push_to_hub={repo_id}: the model could not be published: {error}") from error


def check_keep_best(name: str | None, scores: Sequence[str]) -> None:
    """Refuse a `keep_best` that is not among the scores of the task; no `scores` means that they are not known.

    Raises:
        ValueError: naming the nearest score.
    """
    if name is not None and scores and name not in scores:
        raise ValueError(f"keep_best={name!r} is no score of this task; {suggestion(name.lower(), scores)}")
