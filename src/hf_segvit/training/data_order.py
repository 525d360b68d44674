"""The order of training samples, and the loader that follows it.

`StepOrder` derives the samples of every step from seed and step alone: epochs are permutations of the data set, joined
without a gap. Each process takes its share of the global batch. So a run resumes in mid-epoch without reading earlier
samples, with any number of workers and another number of processes. `TrainingLoader` reads ahead, across epochs.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .batch_buffers import BatchBuffers
from .tasks import TrainingSamples

Key = tuple[int, int]  # epoch and index of a sample


@dataclass(frozen=True)
class StepOrder:
    """The samples of every step; `batch_size` counts those of all processes and micro-batches."""

    num_samples: int
    batch_size: int
    seed: int

    def step_samples(self, step: int) -> list[Key]:
        """The `batch_size` keys of a step, counted from 0, in order."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        positions = (divmod(number, self.num_samples) for number in numbers)
        return [(epoch, int(_permutation(self.num_samples, self.seed, epoch)[at])) for epoch, at in positions]

    def micro_batches(self, step: int, process: int, num_processes: int, num_micro_batches: int) -> list[list[Key]]:
        """The micro-batches of a process in a step: process p has the p-th share of the global batch."""
        keys = self.step_samples(step)
        size = self.batch_size // (num_processes * num_micro_batches)
        share = keys[process * size * num_micro_batches : (process + 1) * size * num_micro_batches]
        return [share[start : start + size] for start in range(0, len(share), size)]


@functools.lru_cache(maxsize=4)  # consecutive steps share an epoch, or two where it ends
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class TrainingLoader:
    """The micro-batches of one process, from `start_step` on, read ahead by workers.

    Args:
        process: index of this process among `num_processes`.
        num_micro_batches: per process and step.
        num_workers: processes that read samples; 0 reads in this one.
        pin_memory: so that copies to a GPU need not wait.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        order: StepOrder,
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        start_step: int,
        total_steps: int,
        process: int = 0,
        num_processes: int = 1,
        num_micro_batches: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.num_micro_batches, self.num_workers, self.pin_memory = num_micro_batches, num_workers, pin_memory
        self.collate, self.seed = collate, order.seed
        self._dataset = _WatchedSamples(samples, num_workers)
        self._batches = _MicroBatches(order, start_step, total_steps, process, num_processes, num_micro_batches)

    def __iter__(self) -> Generator[list[dict[str, Any]]]:
        """The micro-batches of each step in turn.

        Raises:
            ValueError: a sample cannot be read, or a worker died; the message names the image.
        """
        loader: DataLoader = DataLoader(
            self._dataset,
            batch_sampler=self._batches,
            # Two batches of a worker are read ahead; those of this step and of the one before may be in use.
            collate_fn=BatchBuffers.around(
                self.collate, self.num_workers, 2 + -(-2 * self.num_micro_batches // max(self.num_workers, 1))
            ),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_signals_to_parent,
            # Its own generator: otherwise, starting the workers would advance the one that the model draws from.
            generator=torch.Generator().manual_seed(self.seed),
        )
        batches = iter(loader)
        while True:
            step: list[dict[str, Any]] = []
            try:
                for _ in range(self.num_micro_batches):
                    step.append(next(batches))
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):  # PyTorch has no exception class for a dead worker
                    raise
                raise ValueError(self._dataset.explain_death(str(error))) from error
            yield step


def worker_count(num_workers: int | None, num_processes: int, device: torch.device) -> int:
    """Number of data workers per training process: as requested, else by the number of CPU cores."""
    if num_workers is not None:
        return num_workers
    cores = (os.cpu_count() or 1) // num_processes
    if device.type == "cpu":
        return min(2, cores // 4)  # the model itself needs the cores
    return min(8, cores)


def _leave_signals_to_parent(worker: int) -> None:
    """Let a worker ignore Ctrl-C, and any SIGTERM that its parent did not send."""
    # Both signals reach the whole process group, but the parent still needs the batches of the step that it finishes,
    # and of one more while several processes agree to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which the worker inherited
    # DataLoader ends its workers by SIGTERM, so that one must still work; only `sigwaitinfo` tells who sent a signal.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_signal_of_parent, daemon=True).start()


def _exit_on_signal_of_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class _MicroBatches:
    """The batch sampler: the keys of each micro-batch in turn."""

    order: StepOrder
    start_step: int
    total_steps: int
    process: int
    num_processes: int
    num_micro_batches: int

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.order.micro_batches(step, self.process, self.num_processes, self.num_micro_batches)


class _WatchedSamples(Dataset):
    """The samples, with errors that name the image, also where a worker is killed."""

    def __init__(self, samples: TrainingSamples, num_workers: int) -> None:
        self.samples = samples
        # A killed worker cannot report anything, so each notes (process id, index) in shared memory before it reads.
        # After reading, the index is stored as -1 - index.
        self._reading = torch.full((max(num_workers, 1), 2), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            self._reading[worker.id] = torch.tensor([os.getpid(), index])
        try:
            return self.samples[key]
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.samples.name(index)} cannot be read for training (epoch {epoch}): {type(error).__name__}: "
                f"{error}; `hf-segvit check-data` finds all such images"
            ) from error
        finally:
            if worker is not None:
                self._reading[worker.id] = torch.tensor([os.getpid(), -1 - index])

    def explain_death(self, message: str) -> str:
        """An error message naming the images that the workers were reading when one of them died."""
        last_read = {pid: index for pid, index in self._reading.tolist() if pid > 0}
        busy = {pid: index for pid, index in last_read.items() if index >= 0}
        # PyTorch's message has the process id of the dead worker; without a match, any busy one may be meant.
        dead = {pid: index for pid, index in busy.items() if str(pid) in message} or busy
        idle = {pid: -1 - index for pid, index in last_read.items() if str(pid) in message and index < 0}
        if dead:
            when = "while it read " + " or ".join(self.samples.name(index) for index in dead.values())
        elif idle:
            when = "after it had read " + " or ".join(self.samples.name(index) for index in idle.values())
        else:
            when = "before it read an image"
        return (
            f"a worker that reads images was killed {when} ({message.splitlines()[0]}); usually memory ran out: "
            "lower num_workers, or check that image"
        )
