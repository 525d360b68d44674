"""The log of a run: progress bar, Accelerate's trackers, `history.jsonl`.

`Tracking` collects the numbers of each step and records their means every `log_every` steps: loss and its parts,
learning rates, annealing, throughput, time spent waiting for data, and memory. Throughput is that of the steps alone,
without evaluating and saving. `read_history` and `curves` prepare the records for plotting.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..atomic_files import naming_full_disk, replacing
from ..drawing.segments import contact_sheet
from .derivation import TrainingPlan
from .step import StepOutcome

HISTORY = "history.jsonl"
# Groups of curves without noise, which are plotted as they are and not smoothed.
EXACT_CURVES = ("learning rate", "annealing", "memory in MiB", "score")
_WARMUP_STEPS = 10  # in which workers start and caches fill
_NO_CURVES = ("step", "seconds per step", "share of time waiting for data")


class Tracking:
    """The log of a run that starts or resumes at `start_step`.

    With `progress` there is a progress bar on stderr or, if that is no terminal, a line for each record.
    """

    def __init__(
        self, accelerator: Accelerator, plan: TrainingPlan, folder: Path, start_step: int, progress: bool
    ) -> None:
        self.accelerator, self.plan = accelerator, plan
        self.path = folder / HISTORY
        self.progress = progress and accelerator.is_main_process
        if accelerator.is_main_process:
            self._drop_records_after(start_step)
        if plan.recipe.trackers:
            accepted = (bool, int, float, str)  # by trackers; everything else becomes text
            settings = plan.recipe.to_dict().items()
            config = {name: value if isinstance(value, accepted) else str(value) for name, value in settings}
            # The run by the name of its folder; without, these would invent one.
            named = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
            accelerator.init_trackers("logs", init_kwargs=named)
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":  # its table of settings would appear as a second run
                    text = "\n".join(f"    {name}: {value}" for name, value in config.items())
                    tracker.writer.add_text("recipe", text, start_step)
                else:
                    tracker.store_init_configuration(config)
        terminal = self.progress and sys.stderr.isatty()
        self._bar = tqdm(
            total=plan.total_steps, initial=start_step, unit="step", disable=not terminal, dynamic_ncols=True
        )
        self._lines = self.progress and not terminal
        self._start = time.perf_counter()
        self._start_step = start_step
        self._told_waiting = False
        self._begin_window()

    def step(
        self, step: int, outcome: StepOutcome, seconds: float, waited: float, settings: Mapping[str, float]
    ) -> dict[str, float] | None:
        """Add a step; every process calls it. The means, if this step completes a record.

        Args:
            step: its number, from 1.
            seconds: duration of the step, of which `waited` were spent waiting for data.
            settings: learning rates, annealing and the like in this step.
        """
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        if outcome.finite and outcome.overflow_scale is None:  # a skipped step would turn the means into NaN
            self._count += 1
            self._loss += outcome.loss
            self._norm += outcome.gradient_norm
            for name, part in outcome.parts.items():
                self._parts[name] = self._parts[name] + part if name in self._parts else part
        self._bar.update()
        if self._count and (step % self.plan.log_every == 0 or step == self.plan.total_steps):
            return self._record(step, settings)
        return None

    def scores(self, step: int, metrics: Mapping[str, float], images: Sequence[Image.Image] = ()) -> None:
        """Record an evaluation; drawn predictions go to the trackers and the folder `predictions`."""
        self._write(step, {f"score/{name}": value for name, value in metrics.items()})
        if not images or not self.accelerator.is_main_process:
            return
        folder = self.path.parent / "predictions"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"step-{step:08d}.png") as partial:
            contact_sheet([[image] for image in images]).save(partial)
        for tracker in self.accelerator.trackers:
            if not hasattr(tracker, "log_images"):
                continue
            if tracker.name == "tensorboard":
                for index, image in enumerate(images):  # a tag each: those of one tag must have one size
                    pixels = np.asarray(image)[None]
                    tracker.log_images({f"predictions/{index}": pixels}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"predictions": list(images)}, step=step)

    def say(self, text: str) -> None:
        """Print a line on the main process, above the progress bar if there is one."""
        if self.progress:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def _begin_window(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._count, self._loss, self._norm = 0, 0.0, 0.0
        self._parts: dict[str, Tensor] = {}

    def _record(self, step: int, settings: Mapping[str, float]) -> dict[str, float]:
        seconds = self._seconds / self._steps
        values = {"loss": self._loss / self._count, "gradient norm": self._norm / self._count}
        if self._parts:
            # Stacked: one reduction and one wait for the device, however many parts there are.
            means = self.accelerator.reduce(torch.stack(list(self._parts.values())) / self._count, "mean")
            values.update(zip(self._parts, means.tolist(), strict=True))
        values.update(settings)
        values["images per second"] = self.plan.recipe.batch_size / seconds
        values["seconds per step"] = seconds
        values["share of time waiting for data"] = self._waited / self._seconds
        values["memory in MiB"] = memory_mib(self.accelerator.device)
        self._write(step, values)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if self._lines:
            # By wall-clock time since the start, which has evaluations and saving in it.
            left = (time.perf_counter() - self._start) / (step - self._start_step) * (self.plan.total_steps - step)
            self.say(
                f"step {step}/{self.plan.total_steps}: loss {values['loss']:.3f}, "
                f"{values['images per second']:.1f} images/s, {_duration(left)} left"
            )
        self._tell_waiting(values["share of time waiting for data"], step)
        self._begin_window()
        return values

    def _tell_waiting(self, share: float, step: int) -> None:
        """Say once when more than half of the time is waiting for data; the first steps wait for the workers."""
        if share <= 0.5 or self._told_waiting or step <= self._start_step + max(self.plan.log_every, _WARMUP_STEPS):
            return
        self._told_waiting = True
        self.say(
            f"WARNING: {share:.0%} of the time is waiting for data; give more workers (num_workers=), smaller image "
            "files, or cache=true"
        )

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with naming_full_disk(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)

    def _drop_records_after(self, step: int) -> None:
        # The steps after the checkpoint are repeated: without this, curves would have two points for each of them.
        rows = [row for row in read_history(self.path) if row["step"] <= step] if step else []
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; damaged lines, such as one that an interruption cut off, are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) < 2**53:
            rows.append(row)
    return rows


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) pairs by curve name, as `plot_curves` takes them."""
    history: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            # Not what a damaged file may hold: true, or an integer beyond any float.
            if name not in _NO_CURVES and type(value) in (int, float) and not abs(value) > 1e300:
                history.setdefault(name, []).append((row["step"], value))
    return history


def memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU, or on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
