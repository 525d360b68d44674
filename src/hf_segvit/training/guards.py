"""What may go wrong in a step, told so that it can be mended: values that are not finite, and memory that runs out.

`NonFiniteGuard` counts the steps that were skipped because loss or gradient was NaN or infinite, and stops training
when there are too many (replay.py keeps and repeats them). `explained_out_of_memory` turns PyTorch's error into one
that says what to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

MAX_CONSECUTIVE, MAX_SKIPPED = 3, 20


class TrainingFailed(ValueError):
    """Training cannot go on; the message says why and what to do."""


class NonFiniteGuard:
    """Skips steps whose loss or gradient is not finite, but not too many of them.

    Args:
        max_consecutive: skipped steps in a row after which training stops.
        max_skipped: skipped steps in all after which it stops.
    """

    def __init__(self, max_consecutive: int = MAX_CONSECUTIVE, max_skipped: int = MAX_SKIPPED) -> None:
        self.max_consecutive, self.max_skipped = max_consecutive, max_skipped
        self.consecutive = self.skipped = 0

    def passed(self) -> None:
        """A step was fine."""
        self.consecutive = 0

    def failed(self, step: int, loss: float, gradient_norm: float, place: Path | None) -> str:
        """A step has to be skipped.

        Args:
            step: its number, from 1.
            loss: of the step.
            gradient_norm: of the step.
            place: where the batch was saved.

        Returns:
            A line for people.

        Raises:
            TrainingFailed: there were too many such steps.
        """
        self.skipped += 1
        self.consecutive += 1
        saved = f"; its batch is in {place}, run `hf-segvit train --replay {place}`" if place else ""
        text = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}; the step was skipped{saved}"
        if self.consecutive >= self.max_consecutive or self.skipped >= self.max_skipped:
            how_often = f"{self.consecutive} times in a row" if self.consecutive > 1 else f"{self.skipped} times"
            raise TrainingFailed(
                f"{text}. That was {how_often}, so training stops. Lower learning_rate, raise warmup_steps, or use "
                "precision=bf16 in place of fp16; the last checkpoint is from before it"
            )
        return text


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
