"""Which samples each step trains on, and the loader that brings them.

The order follows from seed and step alone: samples come in rounds, each a permutation of the whole data set, one after
the other without a gap, and `StepOrder` says which of them make up the global batch of a step. Every process takes its
part. So a run goes on in the middle of an epoch without reading what came before, with any number of workers, and with
another number of processes too. `TrainingLoader` reads ahead, across rounds.
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

from .tasks import TrainingSamples

Key = tuple[int, int]  # epoch and index of a sample


@dataclass(frozen=True)
class StepOrder:
    """The samples of every step.

    Attributes:
        num_samples: length of the data set.
        batch_size: samples of a step, over all processes and micro-batches.
        seed: of the permutations.
    """

    num_samples: int
    batch_size: int
    seed: int

    def step_samples(self, step: int) -> list[Key]:
        """The `batch_size` keys of a step, from 0, in order."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        positions = (divmod(number, self.num_samples) for number in numbers)
        return [(epoch, int(_permutation(self.num_samples, self.seed, epoch)[at])) for epoch, at in positions]

    def micro_batches(self, step: int, process: int, num_processes: int, num_micro_batches: int) -> list[list[Key]]:
        """The micro-batches of a process in a step: process p has the p-th part of the global batch."""
        keys = self.step_samples(step)
        size = self.batch_size // (num_processes * num_micro_batches)
        mine = keys[process * size * num_micro_batches : (process + 1) * size * num_micro_batches]
        return [mine[start : start + size] for start in range(0, len(mine), size)]


@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class TrainingLoader:
    """Micro-batches in the order of training, read ahead by workers.

    Args:
        samples: of the task.
        order: of the steps.
        collate: makes a batch of a list of samples.
        start_step: step whose micro-batches come first.
        total_steps: steps of the whole training.
        process: number of this process.
        num_processes: of all.
        num_micro_batches: of a process in a step.
        num_workers: processes that read; 0 reads here.
        pin_memory: for copies to a GPU that do not wait.
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
        self.num_micro_batches = num_micro_batches
        self._dataset = _WatchedSamples(samples, num_workers)
        self._loader: DataLoader = DataLoader(
            self._dataset,
            batch_sampler=_MicroBatches(order, start_step, total_steps, process, num_processes, num_micro_batches),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_parent,
            # Else starting workers would draw from the random numbers of the model.
            generator=torch.Generator().manual_seed(order.seed),
        )

    def __iter__(self) -> Generator[list[dict[str, Any]]]:
        """For each step from `start_step` on, its micro-batches.

        Raises:
            ValueError: a sample cannot be read, or a worker died; the message names the image.
        """
        batches = iter(self._loader)
        while True:
            step: list[dict[str, Any]] = []
            try:
                for _ in range(self.num_micro_batches):
                    step.append(next(batches))
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ValueError(self._dataset.last_words(str(error))) from error
            yield step


def worker_count(num_workers: int | None, num_processes: int, device: torch.device) -> int:
    """Processes that read images for each process that trains: as asked for, or what the machine has."""
    if num_workers is not None:
        return num_workers
    cores = (os.cpu_count() or 1) // num_processes
    if device.type == "cpu":
        return min(2, cores // 4)  # the model needs the cores
    return min(8, cores)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach the whole group of processes.

    The parent still needs the batches of the step that it finishes, and of another where it waits for other parents to
    agree. Its own SIGTERM is how it ends a worker, and the only one that does, where the system tells who sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_the_parents_signal, daemon=True).start()


def _end_with_the_parents_signal() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class _MicroBatches:
    """The batch sampler: keys of one micro-batch after the other."""

    order: StepOrder
    start_step: int
    total_steps: int
    process: int
    num_processes: int
    num_micro_batches: int

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.order.micro_batches(step, self.process, self.num_processes, self.num_micro_batches)


class _WatchedSamples(Dataset):
    """The samples, with errors that name the image. Workers note what they read: one that is killed says nothing."""

    def __init__(self, samples: TrainingSamples, num_workers: int) -> None:
        self.samples = samples
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

    def last_words(self, message: str) -> str:
        """Which images the workers were at when one of them died."""
        reading = {pid: index for pid, index in self._reading.tolist() if pid > 0}
        busy = {pid: index for pid, index in reading.items() if index >= 0}
        dead = {pid: index for pid, index in busy.items() if str(pid) in message} or busy
        last = {pid: -1 - index for pid, index in reading.items() if str(pid) in message and index < 0}
        if dead:
            where = "while it read " + " or ".join(self.samples.name(index) for index in dead.values())
        elif last:
            where = "after it had read " + " or ".join(self.samples.name(index) for index in last.values())
        else:
            where = "before it read an image"
        return (
            f"a worker that reads images was killed {where} ({message.splitlines()[0]}); most often memory ran out: "
            "lower num_workers, or look at that image"
        )
