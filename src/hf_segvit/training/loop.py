"""The training loop: one for every model, on one process or many, through Accelerate.

`train` runs a recipe to its end, or from its newest checkpoint, and returns a `TrainingOutcome`. What a step is, is in
optimizer_step.py; what a model needs, in tasks/; what is saved, in checkpoints.py. The folder `output` receives:

- `model/`: the best weights with configuration, image processor, scores and model card; `results.json`; `curves.png`;
- `checkpoints/`: the last and the best, to go on from; `history.jsonl` and the trackers' logs;
- `predictions/`: pictures of what the model saw at each evaluation; `failures/`: steps that were not finite.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object

from ..atomic_files import prepare_output_folder, replacing
from ..devices import describe_device
from ..visualize import contact_sheet
from .adapters import merge_adapters
from .checkpoints import Checkpoints, TrainingState, read
from .data_order import StepOrder, TrainingLoader
from .derivation import TrainingPlan, derive
from .ema import MovingAverage
from .explanation import memory_advice
from .guards import NonFiniteGuard, explained_out_of_memory
from .optimizer_step import OptimizerStep, StepOutcome
from .parameter_groups import build_optimizer
from .random_states import random_states, restore_random_states, seed_everything, unchanged_random_states
from .recipe import Recipe
from .replay import save_for_replay
from .results import write_results
from .resuming import identity, refuse_other_run
from .schedules import learning_rate_schedule
from .selection import Selection
from .signals import StopRequested, StopSignals
from .tasks import TrainingTask, task_for
from .tracking import Tracking, memory_mib
from .trained_model import build_trained_model

PROCESS_TIMEOUT = 1800.0  # seconds that a process waits for the others


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


def train(
    recipe: Recipe,
    *,
    task: TrainingTask | None = None,
    cpu: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
    process_timeout: float = PROCESS_TIMEOUT,
) -> TrainingOutcome:
    """Train by a recipe.

    Args:
        recipe: what to train, on what, and how.
        task: supplies model, data and loss; by default the one of the recipe's model.
        cpu: compute on the CPU even where there is a GPU.
        on_step: called after every step with its number, from 1, and its loss.
        progress: tell on stderr how it goes.
        process_timeout: seconds after which a process gives up waiting for another.

    Raises:
        ValueError: recipe, data, checkpoint or model do not go together, or training cannot go on (`TrainingFailed`).
        OSError: something cannot be written; the checkpoints that were there are unharmed.
    """
    output = output_folder(recipe)
    prepare_output_folder(output)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()  # of an earlier training in this program
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=cpu,
        log_with=list(recipe.trackers) or None,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))],
    )
    with StopSignals() as signals:
        run = _Run(recipe, task or task_for(recipe), accelerator, output, signals, progress)
        try:
            stopped = run.steps(on_step)
            results = {} if stopped else run.finish()
        finally:
            run.tracking.close()
    return TrainingOutcome(output, run.step, stopped, results, run.core.eval(), run.processor)


def output_folder(recipe: Recipe) -> Path:
    """Where a recipe writes to."""
    return Path(recipe.output or Path("runs") / recipe.name)


class _Run:
    """A training run on this process."""

    def __init__(
        self,
        recipe: Recipe,
        task: TrainingTask,
        accelerator: Accelerator,
        output: Path,
        signals: StopSignals,
        progress: bool,
    ) -> None:
        self.recipe, self.task, self.accelerator, self.output, self.signals = recipe, task, accelerator, output, signals
        seed_everything(recipe.seed)  # the same initial weights on all processes
        self.core, self.processor = build_trained_model(task)
        samples = task.train_samples()
        task.validation_name()  # reads the validation data: better now than after an epoch
        self.plan: TrainingPlan = derive(recipe, len(samples), accelerator.num_processes, self.core.config)
        self.advice = memory_advice(recipe, self.plan)
        if recipe.gradient_checkpointing:
            self.core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.compile:
            compile_blocks(self.core)
        optimizer = build_optimizer(self.core, self.plan)
        self.schedule = learning_rate_schedule(optimizer, self.plan)
        self.model, self.optimizer = accelerator.prepare(self.core, optimizer)
        self.core = accelerator.unwrap_model(self.model)
        self.ema = None if recipe.ema_decay is None else MovingAverage(self.core, recipe.ema_decay)
        self.take_step = OptimizerStep(
            accelerator, task, self.model, self.processor, self.optimizer, self.schedule, recipe.max_grad_norm
        )

        self.identity = identity(recipe, len(samples), self.plan.total_steps)
        self.selection = Selection(recipe.keep_best or task.headline, recipe.patience)
        self.guard = NonFiniteGuard()
        self.step, self.saved_step, self.seconds = 0, -1, 0.0
        messages: list[str] = []
        self.checkpoints = Checkpoints(output / "checkpoints", recipe.keep_last, messages.append)
        seed_everything(recipe.seed, 0, accelerator.process_index)
        self._resume(messages)
        self.tracking = Tracking(accelerator, self.plan, output, self.step, progress)
        for message in messages:
            self.tracking.say(message)
        order = StepOrder(len(samples), recipe.batch_size, recipe.seed)
        self.loader = TrainingLoader(
            samples,
            order,
            task.collator(self.processor, accelerator.device),
            start_step=self.step,
            total_steps=self.plan.total_steps,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_micro_batches=self.plan.accumulation_steps,
            num_workers=_num_workers(recipe, accelerator),
            pin_memory=accelerator.device.type == "cuda",
        )

    def steps(self, on_step: Callable[[int, float], None] | None) -> str | None:
        """All steps from where the run is; the signal that ended it early, or `None`."""
        total = self.plan.total_steps
        settings = self.task.before_step(self.core, self.step, self.plan)
        if self._due(self.plan.evaluate_every_steps) and self.selection.last_step != self.step and self._evaluate():
            return self._stop()
        self.model.train()
        alone = self.accelerator.num_processes == 1  # many have to agree, and do so in each step
        with contextlib.closing(iter(self.loader)) as batches:  # whose workers end with the block
            while self.step < total and not self.selection.out_of_patience:
                start = time.perf_counter()
                settings.update(self._learning_rates())
                try:
                    micro_batches = next(batches)
                except ValueError:
                    if alone and self.signals.requested:  # by a signal to all processes, workers included
                        return self._stop()
                    raise
                waited = time.perf_counter() - start
                outcome = self._one_step(micro_batches)
                self.step += 1
                self.seconds += time.perf_counter() - start
                if outcome.finite:
                    norm, parts = outcome.gradient_norm, outcome.parts
                    self.tracking.step(self.step, outcome.loss, norm, parts, waited, settings)
                if on_step is not None:
                    on_step(self.step, outcome.loss)
                settings = self.task.before_step(self.core, self.step, self.plan)
                if outcome.stop or (alone and self.signals.requested):
                    return self._stop()
                if self._due(self.plan.evaluate_every_steps) and self._evaluate():
                    return self._stop()
                if self._due(self.plan.save_every_steps) and self.saved_step != self.step:
                    self._save()
        return None

    def finish(self) -> dict[str, Any]:
        """Put the best weights into the model and write all results."""
        accelerator = self.accelerator
        self.task.before_step(self.core, self.plan.total_steps, self.plan)
        best = self.selection.best
        if best is not None and best["step"] != self.step:
            state = read(self.checkpoints.path(best["step"]))
            self.core.load_state_dict(state.model | (state.ema or {}))
        elif self.ema is not None:
            self.core.load_state_dict(self.ema.tensors(), strict=False)
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
                from ..hub import push_to_hub

                push_to_hub(self.output / "model", self.recipe.push_to_hub)
        accelerator.wait_for_everyone()
        return results

    def _one_step(self, micro_batches: list[dict[str, Any]]) -> StepOutcome:
        before = random_states()
        with explained_out_of_memory(self.advice):
            outcome = self.take_step(micro_batches, self.signals.requested is not None)
        if outcome.finite:
            self.guard.passed()
            if self.ema is not None and outcome.updated:
                self.ema.update(self.core)
            return outcome
        place = self.output / "failures" / f"step-{self.step + 1:08d}"
        first = self.guard.skipped == 0
        if first:
            self._save_failure(place, micro_batches, before)
        text = self.guard.failed(self.step + 1, outcome.loss, outcome.gradient_norm, place if first else None)
        self.tracking.say(text)
        return outcome

    def _save_failure(self, place: Path, micro_batches: list[dict[str, Any]], before: Mapping[str, Any]) -> None:
        normalizers = self.task.normalizers(self.core, micro_batches, self.accelerator.device)
        facts: dict[str, Any] = {"recipe": self.recipe.to_dict(), "step": self.step + 1}
        probabilities = getattr(self.core.config, "masked_attention_probabilities", None)
        if probabilities is not None:
            facts["masked_attention_probabilities"] = list(probabilities)
        index = self.accelerator.process_index
        weights = self.core.state_dict() if index == 0 else None
        try:
            save_for_replay(place, index, micro_batches, normalizers, before, weights, facts)
        except OSError as error:
            self.tracking.say(f"the batch of step {self.step + 1} could not be saved for replay: {error}")

    def _evaluate(self) -> bool:
        """Score the model, or its moving average; whether it was asked to stop in the middle."""
        average = contextlib.nullcontext() if self.ema is None else self.ema.applied_to(self.core)
        alone = self.accelerator.num_processes == 1
        images: list[Any] = []
        try:
            # A stop need not wait for the evaluation: it is done again. Many processes would have to agree on it.
            with (
                self.signals.interruptible() if alone else contextlib.nullcontext(),
                unchanged_random_states(),
                average,
            ):
                self.core.eval()
                device = self.accelerator.device
                metrics = self.task.evaluate(self.core, self.processor, device, self.recipe.evaluate_limit)
                if self.recipe.draw and self.accelerator.is_main_process:
                    images = self.task.draw(self.core, self.processor, device, self.recipe.draw)
        except StopRequested:
            return True
        finally:
            self.model.train()
        is_best = self.selection.add(self.step, metrics, self.task.not_comparable_yet(self.core))
        if images:
            self._write_predictions(images)
        self.tracking.scores(self.step, metrics, images)
        name = self.selection.metric
        remark = ", the best so far" if is_best else ""
        self.tracking.say(f"step {self.step}: {name} {metrics[name]:.4f}{remark}")
        if is_best:
            self._save()
        return False

    def _write_predictions(self, images: list[Any]) -> None:
        folder = self.output / "predictions"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"step-{self.step:08d}.png") as partial:
            contact_sheet([[image] for image in images]).save(partial)

    def _stop(self) -> str:
        """Save where the run is; the name of the signal."""
        if self.saved_step != self.step:
            self._save()
        name = self.signals.requested or "a signal to another process"
        self.tracking.say(f"{name}: saved at step {self.step}; the same command goes on from there")
        return name

    def _due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.plan.total_steps)

    def _learning_rates(self) -> dict[str, float]:
        """The highest of each role."""
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            name = f"learning rate/{group['role']}"
            rates[name] = max(rates.get(name, 0.0), group["lr"])
        return rates

    def _save(self) -> None:
        accelerator = self.accelerator
        states = gather_object([random_states()])
        model = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            optimizer = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            if accelerator.scaler is not None:
                optimizer["scaler"] = accelerator.scaler.state_dict()
            progress = {
                "identity": self.identity,
                "selection": self.selection.state(),
                "skipped_steps": self.guard.skipped,
                "seconds": self.seconds,
                "ema_steps": 0 if self.ema is None else self.ema.steps,
            }
            average = None if self.ema is None else self.ema.tensors()
            state = TrainingState(self.step, model, average, optimizer, states, progress)
            best = self.selection.best
            self.checkpoints.save(state, self._save_settings, None if best is None else best["step"])
        self.saved_step = self.step
        accelerator.wait_for_everyone()

    def _save_settings(self, folder: Path) -> None:
        self.core.config.architectures = [type(getattr(self.core, "base_model", self.core)).__name__]
        self.core.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _resume(self, messages: list[str]) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        newest: list[Any] = [None]
        if self.accelerator.is_main_process:
            if not self.recipe.resume and self.checkpoints.steps():
                raise ValueError(
                    f"{self.checkpoints.folder} holds checkpoints of an earlier run; delete them or give another "
                    "output= to begin anew, or go on with resume=true"
                )
            newest = [self.checkpoints.newest_valid()]
        broadcast_object_list(newest)
        if newest[0] is None:
            return
        path: Path = newest[0]
        state = read(path)
        refuse_other_run(state.progress["identity"], self.identity, path)
        self.core.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer["optimizer"])
        self.schedule.load_state_dict(state.optimizer["schedule"])
        if self.accelerator.scaler is not None and "scaler" in state.optimizer:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        if self.ema is not None and state.ema is not None:
            self.ema.restore(state.ema, state.progress["ema_steps"])
        self.selection.restore(state.progress["selection"])
        self.guard.skipped = state.progress["skipped_steps"]
        self.step = self.saved_step = state.step
        self.seconds = state.progress["seconds"]
        messages.append(f"going on from {path}")
        if len(state.random_states) == self.accelerator.num_processes:
            restore_random_states(state.random_states[self.accelerator.process_index])
        else:
            seed_everything(self.recipe.seed, self.step, self.accelerator.process_index)
            messages.append(
                f"there were {len(state.random_states)} processes and are {self.accelerator.num_processes} now: the "
                "batches are the same, but what is drawn at random in the model is not"
            )


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks in place: a fraction of the time that the whole model takes, and about as fast.

    What changes from step to step, such as annealing, stays outside, so that nothing is compiled again for it.
    """
    repeated = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in repeated:
            module.compile()


def _num_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    if recipe.num_workers is not None:
        return recipe.num_workers
    cores = (os.cpu_count() or 1) // accelerator.num_processes
    if accelerator.device.type == "cpu":
        return min(2, cores // 4)  # the model needs the cores
    return min(8, cores)
