"""What every metric here shares: books of counts that fill batch by batch and merge across processes.

`ImageMetric` is the base class: a metric says how it counts one image and how counts add up; the base class checks
the batch, refuses an image that was counted before, and turns the books into plain objects that can be stored or sent.
`Metric` is what an evaluation needs of any metric. `merge_across_processes` sums the books of all processes of a run
through Accelerate.

H W pixels, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object


class ImageMetric(ABC):
    """A metric over a data set that keeps counts, never images: feed batches, merge processes, compute."""

    # Books to keep apart before they are summed up; many where a sum copies all that there is.
    _max_parts = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        self._parts = [self._no_counts()]
        self.num_images = 0
        self.image_ids: set[Hashable] = set()

    @property
    def counts(self) -> dict[str, np.ndarray]:
        """The books so far."""
        if len(self._parts) > 1:
            self._parts = [self._sum(self._parts)]
        return self._parts[0]

    def add_batch(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        image_ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Count a batch; on an error nothing of the batch is counted.

        Args:
            predictions: one per image, see the class.
            references: as many, in the same order and at the same (H, W).
            image_ids: as many names, all of them new to this metric; without them nothing is checked.

        Raises:
            ValueError: lengths or sizes differ, an image id was seen before, or a prediction or reference cannot be
                counted; the message names the image's place in the batch, and its id.
        """
        lengths = {"predictions": len(predictions), "references": len(references)}
        if image_ids is not None:
            lengths["image_ids"] = len(image_ids)
            self._reject_repeated(image_ids)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a batch needs one entry per image in each list, but their lengths are {lengths}")
        predictions, references = self._prepared(predictions), self._prepared(references)
        batch = [self._no_counts()]
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            name = f"image {index}" if image_ids is None else f"image {index} (id {image_ids[index]!r})"
            key = self.num_images + index if image_ids is None else image_ids[index]
            batch.append(self._count(prediction, reference, name, key))
        self._add(self._sum(batch), len(predictions), image_ids or ())

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated, as plain objects and arrays that can be sent between processes or stored."""
        counts = {name: value.copy() for name, value in self.counts.items()}
        return {"counts": counts, "num_images": self.num_images, "image_ids": list(self.image_ids)}

    def merge(self, other: ImageMetric | Mapping[str, Any]) -> None:
        """Add what another process counted: its metric, or that metric's `state_dict()`.

        Raises:
            ValueError: the books do not belong to the same kind of metric, or both saw the same image id.
        """
        state = other.state_dict() if isinstance(other, ImageMetric) else other
        counts = {name: np.asarray(value) for name, value in state["counts"].items()}
        empty = self._no_counts()
        # Empty books without rows grow by rows; all others keep their shape.
        theirs, ours = (
            {name: value.shape[not len(empty.get(name, ())) :] for name, value in books.items()}
            for books in (counts, empty)
        )
        if theirs != ours:
            raise ValueError(f"cannot merge counts of shapes {theirs} into counts of {ours}: the metrics differ")
        self._reject_repeated(state["image_ids"])
        self._add(counts, int(state["num_images"]), state["image_ids"])

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The result so far. Nothing is reset."""

    def _prepared(self, sides: Sequence[Any]) -> Sequence[Any]:
        """The predictions or references of a batch, after what is quicker to do for all of them at once."""
        return sides

    @abstractmethod
    def _no_counts(self) -> dict[str, np.ndarray]:
        """Empty books: an array for each name."""

    @abstractmethod
    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        """The books of one image; errors start with `name`."""

    def _sum(self, books: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Several books in one."""
        return {name: np.sum([book[name] for book in books], axis=0) for name in books[0]}

    def _add(self, counts: dict[str, np.ndarray], num_images: int, image_ids: Sequence[Hashable]) -> None:
        self._parts.append(counts)
        if len(self._parts) > self._max_parts:
            self._parts = [self._sum(self._parts)]
        self.num_images += num_images
        self.image_ids.update(image_ids)

    def _reject_repeated(self, image_ids: Sequence[Hashable]) -> None:
        seen: set[Hashable] = set()
        for image_id in image_ids:
            if image_id in self.image_ids or image_id in seen:
                raise ValueError(
                    f"image id {image_id!r} was counted already, and each image counts once; shard the evaluation "
                    "without padding, or drop the repeated samples"
                )
            seen.add(image_id)


class Metric(Protocol):
    """What an evaluation needs of a metric; `ImageMetric` has it, and whatever else has these methods will do.

    A metric of one's own, for `evaluate(..., metrics=[Class])` and `hf-segvit evaluate --metrics package.module:Class`,
    is a class that is called as `Class(id2label=..., stuff_classes=...)`: names by label id, and the label ids that are
    stuff, of the data set. It is fed what the task's own metric is fed, one image at a time. The least work is to
    derive from `ImageMetric` and write `__init__`, `_no_counts`, `_count` and `compute`.
    """

    def reset(self) -> None:
        """Forget everything that was added."""

    def add_batch(
        self, *, predictions: Sequence[Any], references: Sequence[Any], image_ids: Sequence[Hashable]
    ) -> None:
        """Count images; predictions and references have the forms that the metric of the task describes."""

    def compute(self) -> dict[str, Any]:
        """Values by name, numbers in [0, 1] shown in percent; of an empty metric the same names, with NaN.

        No other metric of the evaluation may have one of these names, but for `per_class`, which is left out.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated: nested dictionaries with string keys, of arrays and of what JSON can hold."""

    def merge(self, other: Any) -> None:
        """Add the `state_dict()` of another, from another process or from disk."""


METRIC_METHODS = ("reset", "add_batch", "compute", "state_dict", "merge")


def merge_across_processes(metric: Metric) -> None:
    """Make a metric hold what all processes of the run have counted; every process must call it.

    Alone, it changes nothing. An image that two processes counted, as samplers that pad their shards make happen, is
    an error if the batches came with image ids.

    Raises:
        ValueError: two processes counted the same image id.
    """
    states = gather_object([metric.state_dict()])
    metric.reset()
    for state in states:
        metric.merge(state)


def integer_array(values: Any, what: str) -> np.ndarray:
    """An (H, W) map of integers, from a tensor or array.

    Raises:
        ValueError: it has other dimensions, or values that are no integers; the message starts with `what`.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{what} has shape {array.shape}; it must be (height, width)")
    if array.dtype.kind == "f" and np.array_equal(array, np.rint(array)):
        # Transformers' processors return float32 where they found nothing.
        array = array.astype(np.int64)
    if array.dtype.kind not in "biu":
        raise ValueError(f"{what} is {array.dtype}; it must hold integers")
    return array
