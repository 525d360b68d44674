"""What an evaluation counts while it runs: the metric of the task, others on request, and a score for each image.

`EvaluationCounts` feeds all metrics with the same answers; its state can be stored, sent to another process and merged.
`VariantCounts` are those of several answers to the same images, `PointCounts` those of a point classifier. `METRICS`
says which metrics there may be beside the task's own.

Counts on disk, so that an interrupted evaluation goes on where it stopped.

`PartialResults` is a folder of small files, one for each chunk of images that was counted. A file is written whole or
not at all and never changed, so that any number of processes may write at once, and the next run may have another
number of them. A file tells what was evaluated; those of another model, data set or setting are an error.
"""

from __future__ import annotations

import json
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..atomic_files import replacing
from ..metrics.accumulation import merge_across_processes
from ..metrics.point_accuracy import PointAccuracy
from .oracle import OracleClassification
from .tasks import EvaluationTask, MaskedAnswer

MAIN, ORACLE = "main", "oracle"
# By name: what else can be counted. Results have the name before theirs, such as `oracle_pq`.
METRICS: dict[str, Callable[[EvaluationTask], Any]] = {
    ORACLE: lambda task: OracleClassification(task.new_metric()),
    "boundary": lambda task: task.new_boundary_metric(),
}


class EvaluationCounts:
    """Counts of a task, and the scores of the images that they are of.

    Args:
        task: what is evaluated.
        more: names in `METRICS`, counted beside the task's own metric.

    Raises:
        ValueError: there is no such metric, or the task has none of its kind.

    Attributes:
        metrics: by name; the task's own is `MAIN`.
        images: [place in the data set, image id, score] of each image.
    """

    def __init__(self, task: EvaluationTask, more: Sequence[str] = ()) -> None:
        unknown = [name for name in more if name not in METRICS]
        if unknown:
            raise ValueError(f"there is no metric {unknown[0]!r}; choose among {', '.join(METRICS)}")
        self.task, self.single = task, task.new_metric()
        self.metrics: dict[str, Any] = {MAIN: task.new_metric(), **{name: METRICS[name](task) for name in more}}
        self.images: list[list[Any]] = []

    def count(self, index: int, entry: Mapping[str, Any], answer: Any) -> None:
        """Count the answer, perhaps a `MaskedAnswer`, to the image at a place of the data set."""
        image_id, reference = entry["image_id"], self.task.reference(entry)
        given, masks = (answer.answer, answer.masks) if isinstance(answer, MaskedAnswer) else (answer, answer)
        about = {"references": [reference], "image_ids": [image_id]}
        self.single.reset()
        self.single.add_batch(predictions=[given], **about)
        self.metrics[MAIN].merge(self.single)
        for name, metric in self.metrics.items():
            if name != MAIN:
                metric.add_batch(predictions=[masks if name == ORACLE else given], **about)
        self.images.append([index, image_id, self.task.image_score(self.single)])

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, as plain objects and arrays."""
        return {
            "metrics": {name: metric.state_dict() for name, metric in self.metrics.items()},
            "pictures": self.images,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""
        for name, metric in self.metrics.items():
            metric.merge(state["metrics"][name])
        self.images.extend(state["pictures"])

    def reset(self) -> None:
        """Forget everything."""
        for metric in self.metrics.values():
            metric.reset()
        self.images = []

    def merge_across_processes(self) -> None:
        """Make every process of the run hold what all have counted; all must call it."""
        for metric in self.metrics.values():
            merge_across_processes(metric)
        self.images = list(gather_object(self.images))


class VariantCounts:
    """Counts of several variants of a model, which all answer the same images.

    Args:
        task: what is evaluated.
        variants: their names.
        more: names in `METRICS`, counted for each.

    Attributes:
        counts: `EvaluationCounts` by name.
    """

    def __init__(self, task: EvaluationTask, variants: Sequence[str], more: Sequence[str] = ()) -> None:
        self.counts = {name: EvaluationCounts(task, more) for name in variants}

    @property
    def images(self) -> list[list[Any]]:
        """[place in the data set, image id, score] of each image, with the score of the first variant."""
        return next(iter(self.counts.values())).images

    def count(self, index: int, entry: Mapping[str, Any], answers: Sequence[Any]) -> None:
        """Count the variants' answers to the image at a place of the data set."""
        for counts, answer in zip(self.counts.values(), answers, strict=True):
            counts.count(index, entry, answer)

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, as plain objects and arrays."""
        states = {name: counts.state_dict() for name, counts in self.counts.items()}
        return {"variants": states, "pictures": self.images}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""
        for name, counts in self.counts.items():
            counts.merge(state["variants"][name])

    def reset(self) -> None:
        """Forget everything."""
        for counts in self.counts.values():
            counts.reset()

    def merge_across_processes(self) -> None:
        """Make every process of the run hold what all have counted; all must call it."""
        for counts in self.counts.values():
            counts.merge_across_processes()


class PointCounts:
    """Counts of a point classifier and, where the points are a generator's, of that generator's own classes.

    Args:
        num_labels: classes of the data set.

    Attributes:
        own: of the classifier.
        rival: of the generator, from its probabilities.
        images: [place in the data set, image id, top-1] of each image.
    """

    def __init__(self, num_labels: int) -> None:
        self.own, self.single = PointAccuracy(num_labels), PointAccuracy(num_labels)
        self.rival = PointAccuracy(num_labels, probabilities=True)
        self.images: list[list[Any]] = []

    def count(self, index: int, image_id: Any, answer: Any, rival: Any, labels: Any) -> None:
        """Count the points of the image at a place of the data set.

        Args:
            index: the place.
            image_id: the image's name.
            answer: (N, C) logits.
            rival: (N, C) probabilities of the generator, or `None`.
            labels: (N,) the truth.
        """
        self.single.reset()
        self.single.add_batch(predictions=[answer], references=[labels], image_ids=[image_id])
        self.own.merge(self.single)
        if rival is not None:
            self.rival.add_batch(predictions=[rival], references=[labels], image_ids=[image_id])
        self.images.append([index, image_id, float(self.single.compute()["top_1"])])

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, as plain objects and arrays."""
        return {"own": self.own.state_dict(), "rival": self.rival.state_dict(), "pictures": self.images}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""
        self.own.merge(state["own"])
        self.rival.merge(state["rival"])
        self.images.extend(state["pictures"])

    def reset(self) -> None:
        """Forget everything."""
        self.own.reset()
        self.rival.reset()
        self.images = []

    def merge_across_processes(self) -> None:
        """Make every process of the run hold what all have counted; all must call it."""
        merge_across_processes(self.own)
        merge_across_processes(self.rival)
        self.images = list(gather_object(self.images))


_PATTERN = "counts-*.npz"


class PartialResults:
    """The chunks of one evaluation.

    Args:
        folder: where they are; it is made if need be.
        about: what is evaluated, and how.

    Raises:
        ValueError: the folder holds chunks of something else; the message names what differs.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._paths():
            found = _read(path)[0]["about"]
            different = sorted(key for key in {*found, *self.about} if found.get(key) != self.about.get(key))
            if different:
                changes = ", ".join(f"{key} {found.get(key)!r} != {self.about.get(key)!r}" for key in different)
                raise ValueError(
                    f"{folder} holds parts of another evaluation ({changes}); choose another --output, or delete it"
                )

    def read(self) -> list[dict[str, Any]]:
        """The states that were saved."""
        return [_read(path)[1] for path in self._paths()]

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state: nested dictionaries with string keys, of arrays and of what JSON can hold."""
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps({"about": self.about, "state": _without_arrays(state, "", arrays)})
        with replacing(self.folder / f"counts-{uuid.uuid4().hex}.npz") as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **{"json": np.array(text)}, **arrays)  # type: ignore[arg-type]

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN))


def delete_partial_results(folder: Path) -> None:
    """Delete all chunks, once the result is written."""
    for path in folder.glob(_PATTERN):
        path.unlink()
    folder.rmdir()


def _without_arrays(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with arrays moved to `arrays` under their paths."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(entry, f"{path}/{key}", arrays) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        arrays[f"array{path}"] = value
        return {"array": f"array{path}"}
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if list(value) == ["array"]:
        return arrays[value["array"]]
    return {key: _with_arrays(entry, arrays) for key, entry in value.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON part of a file, and its state."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = json.loads(str(arrays["json"]))
            return content, _with_arrays(content["state"], arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and its images are evaluated again") from error
