"""Shared memory in which data workers hand over batches, used again and again.

PyTorch's way makes a file in shared memory for every tensor of a batch, passes it through a socket, and maps it anew in
the process that trains; with four images a batch that takes as much processor time as decoding them. Here the memory is
there before the workers start and only positions are sent. A buffer is free again when the last tensor of its batch is
gone, so nothing is copied a second time, and whoever keeps a batch keeps its values.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

CAPACITY = 2**26  # bytes of a buffer; address space only, until a batch of that size is written
_ALIGNMENT = 64  # bytes; of a cache line, and more than any type needs

_buffers_by_number: weakref.WeakValueDictionary[int, BatchBuffers] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class BatchBuffers:
    """A `collate_fn` that writes what another one returns into buffers that the workers share with this process.

    For one iteration of one loader. Batches that are larger than a buffer, or for which none is free, travel in
    PyTorch's way. Without workers the batch is left alone.

    Args:
        collate: makes a batch: tensors in mappings, lists and tuples of any depth, and other values.
        per_worker: buffers of each worker: two batches are read ahead, and the others may be in use.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], num_workers: int, per_worker: int = 4, capacity: int = CAPACITY
    ) -> None:
        self.collate, self.per_worker, self.capacity = collate, per_worker, capacity
        self.number, self.process = next(_numbers), os.getpid()
        # Anonymous memory is inherited by workers that are forked, and unlike /dev/shm not limited by a container.
        self._memory = mmap.mmap(-1, max(num_workers * per_worker, 1) * capacity)
        # A byte per buffer: its worker sets it before it writes, this process clears it. So no lock is needed.
        self._taken = np.frombuffer(mmap.mmap(-1, max(num_workers * per_worker, 1)), dtype=np.uint8)
        _buffers_by_number[self.number] = self

    @classmethod
    def around(cls, collate: Callable[[list[Any]], Any], num_workers: int, per_worker: int = 4) -> Any:
        """The buffers, or `collate` itself where workers could not share them."""
        if not num_workers or multiprocessing.get_start_method() != "fork":
            return collate
        try:
            return cls(collate, num_workers, per_worker)
        except OSError:  # no address space to spare: PyTorch's way needs none in advance
            return collate

    def __call__(self, samples: list[Any]) -> Any:
        """The batch, in a buffer of this worker if it fits."""
        batch, worker = self.collate(samples), get_worker_info()
        return batch if worker is None else self._stored(batch, worker.id)

    def _stored(self, batch: Any, worker: int) -> Any:
        own = range(worker * self.per_worker, (worker + 1) * self.per_worker)
        buffer = next((number for number in own if not self._taken[number]), None)
        tensors: list[tuple[Tensor, _Place]] = []
        places, size = _placed(batch, tensors, 0)
        if buffer is None or size > self.capacity:
            return batch
        self._taken[buffer] = 1
        flat = torch.from_numpy(self._bytes(buffer, size))
        for tensor, place in tensors:
            place.view(flat).copy_(tensor)
        return _StoredBatch(self.number, buffer, size, places)

    def restored(self, buffer: int, size: int, places: Any) -> Any:
        """The batch of a buffer, whose tensors hold the buffer as long as any of them lives."""
        held = self._bytes(buffer, size).view(_Held)
        release = weakref.finalize(held, self._release, buffer)
        release.atexit = False
        return _tensors_at(places, torch.from_numpy(held))

    def _release(self, buffer: int) -> None:
        # A process that is forked later inherits the tensors, and may drop its own while this one still reads them.
        if os.getpid() == self.process:
            self._taken[buffer] = 0

    def _bytes(self, buffer: int, size: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, size, buffer * self.capacity)


class _Held(np.ndarray):
    """The bytes of a batch in use; the storage of its tensors refers to it."""


@dataclass(frozen=True)
class _Place:
    """A tensor in a buffer."""

    start: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        stop = self.start + self.dtype.itemsize * int(np.prod(self.size))
        return flat[self.start : stop].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class _StoredBatch:
    """What is sent in place of a batch: unpickling it gives the batch."""

    number: int
    buffer: int
    size: int
    places: Any

    def __reduce__(self) -> Any:
        return _restored, (self.number, self.buffer, self.size, self.places)


def _restored(number: int, buffer: int, size: int, places: Any) -> Any:
    return _buffers_by_number[number].restored(buffer, size, places)


def _placed(value: Any, tensors: list[tuple[Tensor, _Place]], start: int) -> tuple[Any, int]:
    """A batch with places instead of tensors, which are listed, and the bytes needed so far."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        # The order of a channels-last tensor is kept; a view into a larger tensor becomes dense.
        stride = torch.empty_like(value, device="meta").stride()
        place = _Place(start, value.dtype, tuple(value.shape), stride)
        tensors.append((value, place))
        return place, start + -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
    if type(value) is dict:
        replaced: dict[Any, Any] = {}
        for key, entry in value.items():
            replaced[key], start = _placed(entry, tensors, start)
        return replaced, start
    if type(value) in (list, tuple):
        entries = []
        for entry in value:
            replacement, start = _placed(entry, tensors, start)
            entries.append(replacement)
        return type(value)(entries), start
    return value, start


def _tensors_at(places: Any, flat: Tensor) -> Any:
    """A batch with tensors in the buffer `flat` (size,) uint8 instead of places."""
    if isinstance(places, _Place):
        return places.view(flat)
    if isinstance(places, Mapping):
        return {key: _tensors_at(entry, flat) for key, entry in places.items()}
    if type(places) in (list, tuple):
        return type(places)(_tensors_at(entry, flat) for entry in places)
    return places
