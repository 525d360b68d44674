"""Training from a stream: data that is larger than the disk, read once an epoch and in its own order.

`StreamedDataset` augments the entries of an iterable, such as `datasets.load_dataset(..., streaming=True)`, and shares
them between processes and workers without repeating one. `LabelMapEntry` turns the usual columns of a Hub data set
(image and label map) into an entry of our readers.
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
    """From a row with an image and a label map to an entry of our readers, for semantic segmentation.

    Attributes:
        image: name of the image's column.
        annotation: name of the label map's column: one channel, a label at each pixel.
        image_id: name of the column of ids; `None`: a digest of the pixels, so that every image has its own.
        ignore_index: label of void.
        do_reduce_labels: labels count from 1 and 0 is void, as in ADE20K's files.
    """

    image: str = "image"
    annotation: str = "annotation"
    image_id: str | None = None
    ignore_index: int | None = 255
    do_reduce_labels: bool = False

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a row.

        Raises:
            ValueError: a column is missing, or the label map has several channels.
        """
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
        image_id = row[self.image_id] if self.image_id else _digest(np.asarray(row[self.image]).tobytes())
        return {
            "image": row[self.image],
            "image_id": image_id,
            "segment_map": label_map,
            "segments": semantic_segments(label_map),
        }


class StreamedDataset(IterableDataset):
    """Augmented samples of a stream.

    What is drawn for an image depends on the seed, the epoch and its `image_id` alone, not on where in the stream it
    comes or which worker reads it. Shuffle the stream before (`IterableDataset.shuffle` of `datasets`): its order is
    kept.

    Args:
        entries: the stream. One of `datasets` is split by its files; of others, each worker skips what is not its own.
        augmentation: what to do with an entry.
        to_entry: turns a row into an entry of our readers, such as `LabelMapEntry`; `None`: it is one.
        seed: of all randomness.
        num_processes: processes that share the stream.
        process_index: which of them this is.

    Raises:
        ValueError: the seed is negative, or there is no such process.
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
                f"seed is {seed} and process_index {process_index} of {num_processes}; give a seed of at least 0 and a "
                "process that there is"
            )
        self.augmentation, self.to_entry, self.seed = augmentation, to_entry, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.is_split = isinstance(entries, datasets.IterableDataset)
        self.entries = split_dataset_by_node(entries, process_index, num_processes) if self.is_split else entries
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other random numbers, and another order if the stream is shuffled, than in the epochs before."""
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
        if self.is_split:  # `datasets` gives each worker files of its own
            yield from self.entries
            return
        worker = get_worker_info()
        num_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shares, share = self.num_processes * num_workers, self.process_index * num_workers + number
        for index, row in enumerate(self.entries):
            if index % shares == share:
                yield row


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
