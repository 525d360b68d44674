"""Base class of the metrics: counts that add up over batches and processes.

A subclass of `ImageMetric` counts one image; the base class checks the batch, refuses repeated images, and makes the
counts storable. `Metric` is the protocol that an evaluation needs. `merge_across_processes` sums the counts of all
processes through Accelerate. The functions at the end are checks that several metrics share. H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object


class ImageMetric(ABC):
    """A metric over a data set that keeps counts, never images."""

    # Label ids that results are about; `None`: all. The others are counted too, since pixels of a class may be taken
    # for theirs, and the counts stay the same whatever is asked of them.
    classes: Sequence[int] | None = None
    # How many sets of counts wait before they are summed. Subclasses whose sum copies all earlier counts raise it,
    # since summing after every batch would then take quadratic time.
    _max_unsummed = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        self._unsummed = [self._no_counts()]
        self.num_images = 0
        self.image_ids: set[Hashable] = set()

    @property
    def counts(self) -> dict[str, np.ndarray]:
        """The counts so far."""
        if len(self._unsummed) > 1:
            self._unsummed = [self._sum(self._unsummed)]
        return self._unsummed[0]

    def chosen(self, num_labels: int) -> np.ndarray:
        """Label ids that results are about, ascending."""
        return np.arange(num_labels) if self.classes is None else np.unique(np.asarray(self.classes, np.int64))

    def add_batch(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        image_ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Count a batch; if any image of it is refused, none is counted.

        Predictions and references, one per image in the same order and at the same (H, W), have the forms that the
        subclass describes. Image ids are unique over the data set; without them, repeated images go unnoticed.

        Raises:
            ValueError: lengths or sizes differ, an image id was seen before, or an image cannot be counted.
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
            # Errors name the position in the batch too: without ids it is all that the user can look up.
            name = f"image {index}" if image_ids is None else f"image {index} (id {image_ids[index]!r})"
            key = self.num_images + index if image_ids is None else image_ids[index]
            batch.append(self._count(prediction, reference, name, key))
        # Added only now, so that an error above leaves the metric as it was.
        self._add(self._sum(batch), len(predictions), image_ids or ())

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated, as plain objects and arrays that can be stored or sent."""
        counts = {name: value.copy() for name, value in self.counts.items()}
        return {"counts": counts, "num_images": self.num_images, "image_ids": list(self.image_ids)}

    def merge(self, other: ImageMetric | Mapping[str, Any]) -> None:
        """Add what another process counted (its metric or `state_dict()`); the metrics must be alike and share no image
        id.
        """
        state = other.state_dict() if isinstance(other, ImageMetric) else other
        counts = {name: np.asarray(value) for name, value in state["counts"].items()}
        empty = self._no_counts()
        # Counts that start without rows grow by rows, so their first dimension says nothing; others keep their shape.
        theirs, ours = (
            {name: value.shape[not len(empty.get(name, ())) :] for name, value in arrays.items()}
            for arrays in (counts, empty)
        )
        if theirs != ours:
            raise ValueError(f"cannot merge counts of shapes {theirs} into counts of {ours}: the metrics differ")
        self._reject_repeated(state["image_ids"])
        self._add(counts, int(state["num_images"]), state["image_ids"])

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The result so far; nothing is reset."""

    def _prepared(self, sides: Sequence[Any]) -> Sequence[Any]:
        """Hook for work that is faster for a whole batch of predictions or references than one by one."""
        return sides

    @abstractmethod
    def _no_counts(self) -> dict[str, np.ndarray]:
        """Counts of no image: an array for each name."""

    @abstractmethod
    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        """The counts of one image; error messages start with `name`."""

    def _sum(self, counts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """One set of counts from several."""
        return {name: np.sum([each[name] for each in counts], axis=0) for name in counts[0]}

    def _add(self, counts: dict[str, np.ndarray], num_images: int, image_ids: Sequence[Hashable]) -> None:
        self._unsummed.append(counts)
        if len(self._unsummed) > self._max_unsummed:
            self._unsummed = [self._sum(self._unsummed)]
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
    """What an evaluation needs of a metric; `ImageMetric` provides it, but any class with these methods will do.

    Your own metric, for `evaluate(..., metrics=[Class])` and `hf-segvit evaluate --metrics package.module:Class`, is
    constructed as `Class(id2label=..., stuff_classes=...)` with the data set's label names and stuff label ids. The
    shortest way is to derive from `ImageMetric` and write `__init__`, `_no_counts`, `_count` and `compute`.
    """

    def reset(self) -> None:
        """Forget everything that was added."""

    def add_batch(
        self, *, predictions: Sequence[Any], references: Sequence[Any], image_ids: Sequence[Hashable]
    ) -> None:
        """Count images, one at a time, in the forms that the task's own metric describes."""

    def compute(self) -> dict[str, Any]:
        """Values by name, unique in the evaluation except `per_class`, which is left out; NaN if it is empty."""

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated: nested dictionaries with string keys, of arrays and JSON values."""

    def merge(self, other: Any) -> None:
        """Add another metric's `state_dict()`, from another process or from disk."""


# For a check by name: a Protocol that is checked at run time would not say which method is missing.
METRIC_METHODS = ("reset", "add_batch", "compute", "state_dict", "merge")


def merge_across_processes(metric: Metric) -> None:
    """Make a metric hold what all processes have counted, each image once; every process must call it."""
    # Every process gets all states, its own among them: without the reset its own would count twice.
    states = gather_object([metric.state_dict()])
    metric.reset()
    for state in states:
        metric.merge(state)


def integer_array(values: Any, what: str) -> np.ndarray:
    """An (H, W) array of integers from a tensor or array; errors start with `what`."""
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


def require_keys(side: Mapping[str, Any], name: str) -> None:
    """Refuse a prediction or reference without a map or masks, or without rows."""
    missing = [key for key in ("segmentation", "segments_info") if key not in side]
    if missing:
        raise ValueError(f"{name}: there is no {missing} among its keys {sorted(side)}; give both")


def label_ids(rows: Sequence[Mapping[str, Any]], num_labels: int, name: str) -> np.ndarray:
    """(rows,) int64 label ids of `segments_info`; ids outside [0, num_labels) are refused."""
    for row in rows:
        if not 0 <= row["label_id"] < num_labels:
            raise ValueError(
                f"{name}: segment {row.get('id')} has label_id {row['label_id']}, outside 0..{num_labels - 1}; map the "
                "data set's category ids to label ids first, or give the right num_labels"
            )
    return np.array([row["label_id"] for row in rows], dtype=np.int64)


def require_same_size(predicted: tuple[int, ...], true: tuple[int, ...], name: str) -> None:
    """Refuse a prediction whose (H, W) is not the reference's."""
    # Never resized here: interpolated ids or labels would be silently wrong.
    if predicted != true:
        raise ValueError(
            f"{name}: the prediction has (height, width) {predicted} but the reference {true}; pass target_sizes= to "
            "the post-processing"
        )
