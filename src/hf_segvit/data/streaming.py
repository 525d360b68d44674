"""Train from a stream, for data that is larger than the disk.

`StreamedDataset` augments the entries of an iterable, such as `datasets.load_dataset(..., streaming=True)`, and shares
them among processes and workers without repetition. `LabelMapEntry` turns the usual columns of a Hub data set (image
and label map) into an entry of our readers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from .augmentation import Augmentation, AugmentedSample, sample_generator
from .decoding import semantic_segments


@dataclass(frozen=True)
class LabelMapEntry:
    """Makes an entry of our readers from a row with an image and a label map, for semantic segmentation."""

    image: str = "image"  # names of columns
    annotation: str = "annotation"
    image_id: str | None = None  # `None`: a digest of the pixels is the id
    ignore_index: int | None = 255  # label of void
    do_reduce_labels: bool = False  # labels count from 1 and 0 is void, as in ADE20K's files

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a row; a `ValueError` if a column is missing or the label map has several channels."""
        missing = [name for name in (self.image, self.annotation) if name not in row]
        if missing:
            raise ValueError(f"the stream has no column {missing}, only {sorted(row)}; name its columns")
        label_map = np.array(row[self.annotation], dtype=np.int32)
        if label_map.ndim != 2:
            raise ValueError(f"column {self.annotation!r} has shape {label_map.shape}; a label map has one channel")
        if self.ignore_index is not None:
            label_map[label_map == self.ignore_index] = -1
        if self.do_reduce_labels:
            label_map = np.where(label_map > 0, label_map - 1, -1).astype(np.int32)
        # Random numbers are drawn by image id, so that every image needs its own.
        image_id = row[self.image_id] if self.image_id else _digest(np.asarray(row[self.image]).tobytes())
        return {
            "image": row[self.image],
            "image_id": image_id,
            "segment_map": label_map,
            "segments": semantic_segments(label_map),
        }


class StreamedDataset(IterableDataset):
    """Augmented samples of a stream, in its order; shuffle it first (`IterableDataset.shuffle` of `datasets`).

    A sample depends only on the seed, the epoch and its `image_id`, not on its position in the stream or the worker.

    Args:
        entries: a stream of `datasets` is split by its files; of any other, each worker skips the rows of the others.
        to_entry: turns a row into an entry of our readers, such as `LabelMapEntry`; `None`: it already is one.
        num_processes: processes that share the stream.
        process_index: which of them this is.
    """

    def __init__(
        self,
        entries: Iterable[Any],
        augmentation: Augmentation,
        *,
        to_entry: Callable[[Any], Mapping[str, Any]] | None = None,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        if seed < 0 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"seed is {seed} and process_index {process_index} of {num_processes}; give a seed of at least 0 and "
                "an index below num_processes"
            )
        self.augmentation, self.to_entry, self.seed = augmentation, to_entry, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.is_split = isinstance(entries, datasets.IterableDataset)
        self.entries = split_dataset_by_node(entries, process_index, num_processes) if self.is_split else entries
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by persistent workers too

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which random numbers depend, and the order if the stream is shuffled."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[AugmentedSample]:
        epoch = int(self._epoch)
        if isinstance(self.entries, datasets.IterableDataset):
            self.entries.set_epoch(epoch)
        for row in self._own_rows():
            entry = row if self.to_entry is None else self.to_entry(row)
            generator = sample_generator(self.seed, epoch, _digest(str(entry["image_id"]).encode()))
            yield self.augmentation(entry, generator)

    def _own_rows(self) -> Iterator[Any]:
        if self.is_split:  # `datasets` gives each worker its own files
            yield from self.entries
            return
        worker = get_worker_info()
        num_workers, worker_index = (worker.num_workers, worker.id) if worker else (1, 0)
        num_readers = self.num_processes * num_workers
        reader_index = self.process_index * num_workers + worker_index
        for index, row in enumerate(self.entries):
            if index % num_readers == reader_index:
                yield row


def _digest(content: bytes) -> int:
    # Python's own hash of text differs between processes; seven bytes fit into int64.
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
