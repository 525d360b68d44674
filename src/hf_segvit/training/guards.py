"""What may go wrong in a step, told so that it can be mended: values that are not finite, and memory that runs out.

`NonFiniteGuard` counts the steps that were skipped because loss or gradient was NaN or infinite, and stops training
when there are too many (replay.py keeps and repeats them). With fp16 some are normal, until its scale is found.
`explained_out_of_memory` turns PyTorch's error into one that says what to change, for an evaluation what
`evaluation_advice` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .recipe import Recipe

MAX_CONSECUTIVE, MAX_SKIPPED = 3, 20
# The scale of fp16 begins with 65536 and is halved by each overflow. A gradient that overflows without being scaled up
# at all would do so without fp16 too, or needs more range than fp16 has.
MAX_OVERFLOWS, SMALLEST_SCALE = 30, 1.0


class TrainingFailed(ValueError):
    """Training cannot go on; the message says why and what to do."""


class NonFiniteGuard:
    """Skips steps whose loss or gradient is not finite, but not too many of them.

    Args:
        max_consecutive: skipped steps in a row after which training stops.
        max_skipped: skipped steps in all after which it stops.

    Attributes:
        consecutive: skipped steps in a row, up to now.
        skipped: skipped steps in all, without those that fp16 needed to find its scale.
        overflows: overflows of fp16 in a row, up to now.
        hopeless: no scale of fp16 helps, so that `failed` ends training at once.
    """

    def __init__(self, max_consecutive: int = MAX_CONSECUTIVE, max_skipped: int = MAX_SKIPPED) -> None:
        self.max_consecutive, self.max_skipped = max_consecutive, max_skipped
        self.consecutive = self.skipped = self.overflows = 0
        self.hopeless = False

    def passed(self) -> None:
        """A step was fine."""
        self.consecutive = self.overflows = 0

    def overflowed(self, scale: float) -> bool:
        """A gradient overflowed in fp16, so that its step was skipped.

        Args:
            scale: of the loss, after it was lowered for that.

        Returns:
            Whether that is no longer the search for the right scale, but a step that failed.
        """
        self.overflows += 1
        self.hopeless = scale < SMALLEST_SCALE or self.overflows >= MAX_OVERFLOWS
        return self.hopeless

    def failed(
        self, step: int, loss: float, gradient_norm: float, place: Path | None, newest: int | None = None
    ) -> str:
        """A step has to be skipped.

        Args:
            step: its number, from 1.
            loss: of the step.
            gradient_norm: of the step.
            place: where the batch was saved.
            newest: step of the newest checkpoint.

        Returns:
            A line for people.

        Raises:
            TrainingFailed: there were too many such steps.
        """
        self.skipped += 1
        self.consecutive += 1
        saved = f"; its batch is in {place}, run `hf-segvit train --replay {place}`" if place else ""
        text = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}; the step was skipped{saved}"
        if self.hopeless:
            how_often = f"{self.overflows} times in a row, however low the scale of fp16"
        elif self.consecutive >= self.max_consecutive:
            how_often = f"{self.consecutive} times in a row"
        elif self.skipped >= self.max_skipped:
            how_often = f"{self.skipped} times"
        else:
            return text
        remains = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
        raise TrainingFailed(
            f"{text}. That was {how_often}, so training stops. Lower learning_rate, raise warmup_steps, or use "
            f"precision=bf16 in place of fp16; {remains}"
        )


def evaluation_advice(recipe: Recipe) -> list[str]:
    """What to change where memory runs out in an evaluation; the checkpoint of its step is there already."""
    # Only points are asked for many pictures at a time, and as many as are trained on.
    fewer = ["a smaller device_batch_size"] if recipe.task == "points" and recipe.device_batch_size != 1 else []
    return [*fewer, "smaller pictures in val_data", "a device with more memory, on which the same command goes on"]


@contextmanager
def explained_out_of_memory(advice: Sequence[str]) -> Iterator[None]:
    """Say what to change where memory runs out in the block.

    Args:
        advice: what to change, in the order of trying.

    Raises:
        TrainingFailed: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        remedy = "; ".join(advice) or "use a smaller model or image_size"
        raise TrainingFailed(f"out of memory ({str(error).splitlines()[0]}); try: {remedy}") from error
