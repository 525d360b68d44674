"""What an evaluation counts while it runs, also on disk, so that an interrupted one goes on where it stopped.

`EvaluationCounts` feeds the metric of a task and further ones with the same answers, and scores each image; its state
can be stored, sent to another process and merged. `VariantCounts` are those of several answers to the same images.
`further_metrics` makes what is counted beside the task's own metric: by name from `METRICS`, or a user's classes.

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
from ..lookup import suggestion
from ..metrics.accumulation import Metric, merge_across_processes
from .oracle import OracleClassification
from .tasks import EvaluationTask

MAIN, ORACLE = "main", "oracle"
# By name: what else can be counted. Results have the name before theirs, such as `oracle_pq`.
METRICS: dict[str, Callable[[EvaluationTask], Metric]] = {
    ORACLE: lambda task: OracleClassification(task.new_metric()),
    "boundary": lambda task: task.new_boundary_metric(),
}


def further_metrics(
    task: EvaluationTask,
    names: Sequence[str],
    classes: Sequence[type],
    id2label: Mapping[int, str],
    stuff_classes: Sequence[int],
) -> dict[str, Metric]:
    """Empty metrics beside the task's own, by name; a user's class has its import path as name.

    Raises:
        ValueError: there is no such metric, the task has none of its kind, or a class is given twice.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; {suggestion(unknown[0], METRICS)}")
    metrics = {name: METRICS[name](task) for name in names}
    for cls in classes:
        name = import_path(cls)
        if name in metrics:
            raise ValueError(f"metric {name} is given twice; leave one of them out")
        metrics[name] = cls(id2label=dict(id2label), stuff_classes=list(stuff_classes))
    return metrics


def import_path(cls: type) -> str:
    """What a class is called where it is named: "package.module:Name"."""
    return f"{cls.__module__}:{cls.__qualname__}"


class EvaluationCounts:
    """Counts of a task, and the scores of the images that they are of.

    Args:
        task: what is evaluated.
        further: empty metrics that are counted beside the task's own, by name.

    Raises:
        ValueError: two metrics have values of the same name.

    Attributes:
        metrics: by name; the task's own is `MAIN`.
        images: [index in the data set, image id, score] of each image.
    """

    def __init__(self, task: EvaluationTask, further: Mapping[str, Metric]) -> None:
        self.task, self.single = task, task.new_metric()
        self.metrics: dict[str, Any] = {MAIN: task.new_metric(), **further}
        self.images: list[list[Any]] = []
        self.values()  # so that a clash of names is told before hours of counting, not after

    def count(self, index: int, image_id: Any, reference: Any, answer: Any, others: Mapping[str, Any]) -> None:
        """Count the answer to the image at an index of the data set.

        `others` is what single metrics get in place of the answer, by name.
        """
        about = {"references": [reference], "image_ids": [image_id]}
        self.single.reset()
        self.single.add_batch(predictions=[answer], **about)
        self.metrics[MAIN].merge(self.single)
        for name, metric in self.metrics.items():
            if name != MAIN:
                metric.add_batch(predictions=[others.get(name, answer)], **about)
        self.images.append([index, image_id, self.task.image_score(self.single)])

    def values(self) -> dict[str, Any]:
        """What the metrics compute, but for `per_class`; those with a plain name have it before theirs.

        Raises:
            ValueError: two metrics have values of the same name.
        """
        values: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            found = {key: value for key, value in metric.compute().items() if key != "per_class"}
            if name != MAIN and ":" not in name:
                found = {
                    f"{name}_{key.removeprefix(f'{name}_')}": value
                    for key, value in found.items()
                    if isinstance(value, float)
                }
            if clashes := sorted(found.keys() & values):
                raise ValueError(
                    f"the metric {name} has a value {clashes[0]!r}, and so has another metric; give it another name"
                )
            # NumPy's numbers are not all known to JSON, and not all of them are floats to a report.
            values |= {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}
        return values

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
    """Counts of several variants of a model, which all answer the same images: `EvaluationCounts` by name."""

    def __init__(self, counts: Mapping[str, EvaluationCounts]) -> None:
        self.counts = dict(counts)

    @property
    def images(self) -> list[list[Any]]:
        """[index in the data set, image id, score] of each image, with the score of the first variant."""
        return next(iter(self.counts.values())).images

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
