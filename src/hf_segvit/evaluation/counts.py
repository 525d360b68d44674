"""Counts of a running evaluation, in memory and on disk.

`EvaluationCounts` feeds the task's metric and further ones (`further_metrics`) with the same answers, and scores each
image. `VariantCounts` holds those of several answers to the same images. `PartialResults` is a folder of small files,
one for each chunk of images, from which an interrupted evaluation resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..atomic_files import replacing
from ..lookup import suggestion
from ..metrics.accumulation import ImageMetric, Metric, merge_across_processes
from .oracle import OracleClassification
from .tasks import EvaluationTask

MAIN, ORACLE, CALIBRATION = "main", "oracle", "calibration"
# Further metrics by name; their values get it as a prefix, such as `oracle_pq`.
METRICS: dict[str, Callable[[EvaluationTask], Metric]] = {
    ORACLE: lambda task: OracleClassification(_of_classes(task, task.new_metric())),
    "boundary": lambda task: _of_classes(task, task.new_boundary_metric()),
    CALIBRATION: lambda task: task.new_calibration(),
}


def _of_classes(task: EvaluationTask, metric: Any) -> Any:
    """The metric, about the classes that the task scores."""
    metric.classes = task.classes
    return metric


def further_metrics(
    task: EvaluationTask,
    names: Sequence[str],
    classes: Sequence[type],
    id2label: Mapping[int, str],
    stuff_classes: Sequence[int],
) -> dict[str, Metric]:
    """Empty metrics beside the task's own, by name; the name of a user's class is its import path.

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
    """The name of a class as users write it: "package.module:Name"."""
    return f"{cls.__module__}:{cls.__qualname__}"


class EvaluationCounts:
    """Counts of a task and the score of each image counted.

    Attributes:
        metrics: by name; the task's own is `MAIN`.
        images: [index in the data set, image id, score] of each image.
    """

    def __init__(self, task: EvaluationTask, further: Mapping[str, Metric]) -> None:
        self.task, self.single = task, _of_classes(task, task.new_metric())
        self.metrics: dict[str, Any] = {MAIN: _of_classes(task, task.new_metric()), **further}
        self.images: list[list[Any]] = []
        self.values()  # raises if names clash: before hours of counting, not after

    def count(self, index: int, image_id: Any, reference: Any, answer: Any, others: Mapping[str, Any]) -> None:
        """Count the answer to one image; metrics named in `others` get that instead of the answer."""
        inputs = {"references": [reference], "image_ids": [image_id]}
        # Counted alone first, for the score of this image; merging is cheaper than counting twice.
        self.single.reset()
        self.single.add_batch(predictions=[answer], **inputs)
        self.metrics[MAIN].merge(self.single)
        for name, metric in self.metrics.items():
            if name != MAIN:
                metric.add_batch(predictions=[others.get(name, answer)], **inputs)
        self.images.append([index, image_id, self.task.image_score(self.single)])

    def values(self) -> dict[str, Any]:
        """What the metrics compute, without `per_class`; a name clash is a `ValueError`."""
        values: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            computed = {key: value for key, value in metric.compute().items() if key != "per_class"}
            if name != MAIN and ":" not in name:  # users' classes choose the names of their values themselves
                computed = {
                    f"{name}_{key.removeprefix(f'{name}_')}": value
                    for key, value in computed.items()
                    if isinstance(value, float)
                }
            if clashes := sorted(computed.keys() & values):
                raise ValueError(
                    f"the metric {name} has a value {clashes[0]!r}, and so has another metric; give it another name"
                )
            # Plain numbers, since JSON rejects most of NumPy's and the report looks for float.
            values |= {key: value.item() if isinstance(value, np.generic) else value for key, value in computed.items()}
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, as plain objects and arrays."""
        metrics = {name: metric.state_dict() for name, metric in self.metrics.items()}
        return {"metrics": metrics, "pictures": self.images}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""
        for name, metric in self.metrics.items():
            metric.merge(state["metrics"][name])
        self.images.extend(state["pictures"])

    def check_images(self, known: Collection[tuple[int, str]], num_images: int) -> None:
        """Raise `ValueError` unless all rows of `images` are sound, not `known`, and those that each metric counted."""
        indices, ids = {index for index, _ in known}, {image_id for _, image_id in known}
        for index, image_id, score in self.images:
            own_id = json.dumps(image_id)
            if type(index) is not int or not 0 <= index < num_images or index in indices or own_id in ids:
                raise ValueError(f"it has image {index!r}, which is unknown or was counted already")
            if type(score) is not float:
                raise ValueError(f"the score of image {index} is {score!r}")
            indices.add(index)
            ids.add(own_id)
        for name, metric in self.metrics.items():
            if isinstance(metric, ImageMetric) and metric.image_ids != {image_id for _, image_id, _ in self.images}:
                raise ValueError(f"the metric {name} counted other images than it says")

    def reset(self) -> None:
        """Forget everything."""
        for metric in self.metrics.values():
            metric.reset()
        self.images = []

    def merge_across_processes(self) -> None:
        """Make every process hold what all have counted; all must call it."""
        for metric in self.metrics.values():
            merge_across_processes(metric)
        self.images = list(gather_object(self.images))


class VariantCounts:
    """`EvaluationCounts` by name, of several variants of a model that answer the same images."""

    def __init__(self, counts: Mapping[str, EvaluationCounts]) -> None:
        self.counts = dict(counts)

    @property
    def images(self) -> list[list[Any]]:
        """[index in the data set, image id, score] of each image, scored by the first variant."""
        return next(iter(self.counts.values())).images

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, as plain objects and arrays."""
        states = {name: counts.state_dict() for name, counts in self.counts.items()}
        return {"variants": states, "pictures": self.images}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state_dict()`."""
        for name, counts in self.counts.items():
            counts.merge(state["variants"][name])

    def merge_stored(self, state: Mapping[str, Any], empty: VariantCounts, num_images: int) -> None:
        """Add a `state_dict()` from disk, wholly or not at all.

        Args:
            empty: counts of the same variants, as a trial.
            num_images: size of the data set.

        Raises:
            Exception: of any kind, as it is not such a state, or has images that were counted already.
        """
        empty.merge(state)
        known = {(index, json.dumps(image_id)) for index, image_id, _ in self.images}
        for counts in empty.counts.values():
            counts.check_images(known, num_images)
            counts.values()  # raises if arrays are not those of the metric
        self.merge(state)

    def reset(self) -> None:
        """Forget everything."""
        for counts in self.counts.values():
            counts.reset()

    def merge_across_processes(self) -> None:
        """Make every process hold what all have counted; all must call it."""
        for counts in self.counts.values():
            counts.merge_across_processes()


_PATTERN = "counts-*.npz"
_DAMAGED = ".damaged"


class PartialResults:
    """The chunks of one evaluation in a folder, which is created if needed.

    `about` identifies the evaluation: chunks of another model, data set or setting in the folder are a `ValueError`
    that names the differences. A file's name has the hash of its content, so that any damage is noticed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))  # tuples become lists, as in the files
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, accept: Callable[[dict[str, Any]], None], report: Callable[[str], None]) -> None:
        """Pass each saved state to `accept`.

        A file that is damaged, or whose state `accept` refuses with any error, is renamed and reported. Only one
        process may call this.
        """
        for path in sorted(self.folder.glob(_PATTERN)):
            # A file may hold anything, and zip, zlib, NumPy and JSON each raise errors of their own.
            try:
                stored, state = _read(path)
            except Exception as error:
                self._set_aside(path, error, report)
                continue
            self._refuse_another(stored)
            try:
                accept(state)
            except Exception as error:
                self._set_aside(path, error, report)

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state: nested dictionaries with string keys, of arrays and JSON values."""
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps({"about": self.about, "state": _without_arrays(state, "", arrays)})
        content = io.BytesIO()
        np.savez_compressed(content, **{"json": np.array(text)}, **arrays)  # type: ignore[arg-type]
        # A new file with a unique name, written whole and never changed: any number of processes may write at once, and
        # a resumed run may have another number of them.
        path = self.folder / f"counts-{hashlib.sha256(content.getbuffer()).hexdigest()}.npz"
        with replacing(path) as partial:
            partial.write_bytes(content.getbuffer())

    def _refuse_another(self, stored: Mapping[str, Any]) -> None:
        different = sorted(key for key in {*stored, *self.about} if stored.get(key) != self.about.get(key))
        if different:
            changes = ", ".join(f"{key} {stored.get(key)!r} != {self.about.get(key)!r}" for key in different)
            raise ValueError(
                f"{self.folder} holds parts of another evaluation ({changes}); choose another --output, or delete it"
            )

    def _set_aside(self, path: Path, error: Exception, report: Callable[[str], None]) -> None:
        aside = path.with_name(path.name + _DAMAGED)
        path.rename(aside)
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        report(f"{path} is damaged ({reason}); it is now {aside.name}, and its images are evaluated again")


def delete_partial_results(folder: Path) -> None:
    """Delete all chunks, once the result is written, and what killed processes have left; other files stay."""
    ours = re.compile(rf"counts-.*\.npz({re.escape(_DAMAGED)})?|\.[0-9a-f]{{8}}\.partial\.npz")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink()
    with contextlib.suppress(OSError):  # it holds files of somebody else
        folder.rmdir()


def _without_arrays(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with its arrays moved to `arrays`, under their paths."""
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
    """What a file is about, and the state in it; any error if it is damaged."""
    if not path.is_file():  # a pipe would wait forever
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        if f"counts-{hashlib.file_digest(file, 'sha256').hexdigest()}.npz" != path.name:
            raise ValueError("its content is not what was written")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            content = json.loads(str(arrays["json"]))
            if not isinstance(content["about"], dict):
                raise ValueError("it does not say what it is about")
            return content["about"], _with_arrays(content["state"], arrays)
