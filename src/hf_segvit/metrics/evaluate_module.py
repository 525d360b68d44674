"""Base class of the modules for the `evaluate` library (the folders in evaluate_modules/).

`CountingMetric` is an `evaluate.Metric` that counts each batch at once with one of this package's metrics, instead of
writing images to a table and reading them at the end. `compute_from_json` and `space_interface` are what a module shows
as a Space of the Hub. Needs `evaluate`, which the rest of the package does not; `space_interface` also needs `gradio`.
"""

from __future__ import annotations

import inspect
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets.utils.filelock import FileLock
from evaluate.utils import parse_readme

from ..atomic_files import replacing
from .accumulation import ImageMetric

_INPUTS = ("predictions", "references", "image_ids")


# Abstract, since `evaluate.load` takes the first concrete class of a script, and scripts import this one.
class CountingMetric(evaluate.Metric, ABC):
    """A metric of `evaluate` that keeps counts, never images.

    With several processes each stores its counts as a small file in `cache_dir` when it computes; process 0 waits for
    the others by `evaluate`'s own locks, merges the files and removes them.

    Args:
        require_image_ids: every image must come with an id; `image_ids` is then one of the `features`.
        **arguments: those of `metric_class` (they may also wait for `compute`) and those of `evaluate.Metric`.
    """

    metric_class: type[ImageMetric]
    filelock: Any  # set by `evaluate`, which has no annotation for it

    def __init__(self, config_name: str | None = None, *, require_image_ids: bool = False, **arguments: Any) -> None:
        of_evaluate = set(inspect.signature(evaluate.EvaluationModule.__init__).parameters) - {"self", "kwargs"}
        self._settings = _plain({name: value for name, value in arguments.items() if name not in of_evaluate})
        self._require_image_ids = require_image_ids
        self._metric: ImageMetric | None = None
        self._stored: Path | None = None
        super().__init__(config_name, **{name: arguments[name] for name in arguments.keys() - self._settings.keys()})
        if require_image_ids:
            # `evaluate.combine` passes on only what is among the features.
            self.info.features = _with_image_ids(self.info.features)
        self._reject_unknown({})
        if not self._missing({}):
            self._new_metric({})  # refuse bad settings now, not after an hour of predictions

    def __len__(self) -> int:
        """Images counted since the last `compute`."""
        return 0 if self._metric is None else self._metric.num_images

    @abstractmethod
    def _info(self) -> evaluate.MetricInfo:
        """What the module is, which inputs it takes and what to cite."""

    def add(self, *, prediction: Any = None, reference: Any = None, image_id: Hashable = None, **kwargs: Any) -> None:
        """Count one image.

        Args:
            image_id: a string or integer that is unique; without it, repeated images go unnoticed.
            **kwargs: the same three under the plural names of the features, as `evaluate.combine` passes them.

        The form of prediction and reference:

        """
        image = {"predictions": prediction, "references": reference, "image_ids": image_id} | kwargs
        self.add_batch(**{name: None if value is None else [value] for name, value in image.items()})

    def add_batch(
        self,
        *,
        predictions: Sequence[Any] | None = None,
        references: Sequence[Any] | None = None,
        image_ids: Sequence[Hashable] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch of images; if any of it is refused, none is counted.

        Predictions and references are given one per image in the same order, image ids as unique strings or integers.
        Their forms:

        """
        if kwargs:
            raise ValueError(
                f"{self.name} does not count {sorted(kwargs)}, only {list(_INPUTS)}; settings of the metric go to "
                "evaluate.load"
            )
        if self._metric is None:
            self._metric = self._new_metric({})
        self._count(self._metric, predictions, references, image_ids)

    def compute(
        self,
        *,
        predictions: Sequence[Any] | None = None,
        references: Sequence[Any] | None = None,
        image_ids: Sequence[Hashable] | None = None,
        **settings: Any,
    ) -> dict[str, Any] | None:
        """The result over all images since the last `compute`, which are forgotten; `None` on processes other than 0.

        Args:
            predictions: a last batch, or all images at once, see `add_batch`; the same for references and image_ids.
            **settings: arguments of the metric that `evaluate.load` was not given; only if nothing was added before.

        """
        settings = _plain(settings)
        # A new metric is not stored on self: if counting fails, the settings of this call must not outlive it.
        metric = self._metric if self._metric is not None and len(self) else self._new_metric(settings)
        if len(self) and self._complete(settings) != self._complete({}):
            raise ValueError(
                f"{self.name} has counted {len(self)} images by other settings than {settings}; give settings to "
                "evaluate.load when images are added before compute"
            )
        if predictions is not None or references is not None:
            self._count(metric, predictions, references, image_ids)
        try:
            self._gather(metric, self._complete(settings))
        finally:
            self._metric = None
        if self.process_id > 0:
            return None
        if not metric.num_images:
            raise ValueError(f"{self.name} has counted no image; call add or add_batch, or give compute some images")
        return metric.compute()

    def _compute(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        image_ids: Sequence[Hashable] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The result over these images alone; images added before are neither counted nor forgotten."""
        metric = self._new_metric(_plain(settings))
        metric.add_batch(predictions=predictions, references=references, image_ids=image_ids)
        return metric.compute()

    def _count(self, metric: ImageMetric, predictions: Any, references: Any, image_ids: Any) -> None:
        inputs = dict(zip(_INPUTS, (predictions, references, image_ids), strict=True))
        needed = _INPUTS if self._require_image_ids else _INPUTS[:2]
        missing = [name for name in needed if inputs[name] is None]
        if missing:
            raise ValueError(f"{self.name} was given no {' and no '.join(missing)}; give {list(needed)} together")
        if image_ids is not None:
            inputs["image_ids"] = [_plain_id(image_id, index) for index, image_id in enumerate(image_ids)]
        self._meet()
        metric.add_batch(**inputs)

    def _new_metric(self, settings: dict[str, Any]) -> ImageMetric:
        self._reject_unknown(settings)
        missing = self._missing(settings)
        if missing:
            example = ", ".join(f"{name}=..." for name in missing)
            raise ValueError(f"{self.name} needs {missing}; give evaluate.load(..., {example})")
        return self.metric_class(**self._settings | settings)

    def _reject_unknown(self, settings: dict[str, Any]) -> None:
        parameters = inspect.signature(self.metric_class).parameters
        unknown = sorted((self._settings | settings).keys() - parameters.keys())
        if unknown:
            raise ValueError(f"{self.name} has no settings {unknown}; it has {list(parameters)}")

    def _missing(self, settings: dict[str, Any]) -> list[str]:
        """Required arguments of the metric that neither `evaluate.load` nor `settings` gave."""
        parameters = inspect.signature(self.metric_class).parameters.values()
        given = self._settings | settings
        return [each.name for each in parameters if each.default is each.empty and each.name not in given]

    def _complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All arguments of the metric, defaults included."""
        parameters = inspect.signature(self.metric_class).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        return _plain(defaults) | self._settings | settings

    def _meet(self) -> None:
        """Wait for the other processes before the first image of a round, holding the lock of this one's file."""
        if self.num_process == 1 or self.filelock is not None:
            return
        if self._stored is not None:
            self._wait_until_taken(self._stored)
        try:
            if self.process_id == 0:
                name = f"{self.experiment_id}-{self.num_process}-rdv.lock"
                self.rendez_vous_lock = FileLock(str(Path(self.data_dir) / name))
                self.rendez_vous_lock.acquire(timeout=self.timeout)
            # evaluate waits one second here, too short if process 0 is still releasing the locks of the last round.
            self.cache_file_name, self.filelock = self._create_cache_file(timeout=self.timeout)
            _counts_path(self.cache_file_name).unlink(missing_ok=True)  # left by a run that crashed
            if self.process_id == 0:
                self._check_all_processes_locks()
            else:
                self._check_rendez_vous()
        except TimeoutError as error:
            raise ValueError(
                f"another evaluation holds the locks of {self.experiment_id!r} in {self.data_dir}; give evaluate.load "
                "another experiment_id= or cache_dir="
            ) from error
        except BaseException:
            self._release()
            raise
        finally:
            if self.rendez_vous_lock is not None:
                self.rendez_vous_lock.release()

    def _gather(self, metric: ImageMetric, settings: dict[str, Any]) -> None:
        """Store the counts of this process or, as process 0, add those of all others."""
        if self.num_process == 1:
            return
        self._meet()  # processes without any image have not yet
        locks, paths = [self.filelock], [_counts_path(self.cache_file_name)]
        try:
            if self.process_id > 0:
                _store(paths[0], metric, settings)
                self._stored = paths[0]
                return
            files, locks = self._get_all_cache_files()
            paths = [_counts_path(file) for file in files]
            for path in paths[1:]:
                metric.merge(_load(path, settings))
        finally:
            if self.process_id == 0:
                for path in paths:
                    path.unlink(missing_ok=True)
            # The lock of process 0 goes first: a fast process in the next round must not mistake it for that round's.
            for lock in locks:
                lock.release()
            self._release()

    def _release(self) -> None:
        if self.filelock is not None:
            self.filelock.release()
        self.cache_file_name = self.filelock = None

    def _wait_until_taken(self, path: Path) -> None:
        deadline = time.monotonic() + self.timeout
        while path.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process 0 has not read {path} of the last round within {self.timeout} s; call compute on every "
                    "process in every round, or give evaluate.load a longer timeout="
                )
            time.sleep(0.02)
        self._stored = None


def compute_from_json(module: str | Path, predictions: str, references: str, settings: str) -> str:
    """The result of a module, with predictions and references (lists) and settings (an object) all in JSON.

    Raises:
        ValueError: an argument is not JSON, or the metric refuses it.
    """
    values: dict[str, Any] = {}
    for name, text in (("predictions", predictions), ("references", references), ("settings", settings)):
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the {name} are not JSON: {error}") from error
    # Settings never go to evaluate.load: a visitor of a Space must not choose where it writes.
    result = evaluate.load(str(module)).compute(**values.pop("settings"), **values)
    return json.dumps(result, indent=2)


def space_interface(module: Path, *, predictions: list[Any], references: list[Any], **settings: Any) -> Any:
    """A gradio page for the script `module`, which shows the given example at first."""
    # Our own page, since `evaluate`'s widget takes no maps; imported here as only Spaces have gradio.
    import gradio

    def compute(predictions: str, references: str, settings: str) -> str:
        try:
            return compute_from_json(module, predictions, references, settings)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    example = {"predictions": predictions, "references": references, "settings": settings}
    return gradio.Interface(
        fn=compute,
        inputs=[gradio.Code(json.dumps(value), language="json", label=name) for name, value in example.items()],
        outputs=gradio.Code(language="json", label="result"),
        title=module.stem.replace("_", " ").capitalize(),
        article=parse_readme(module.with_name("README.md")),
        flagging_mode="never",
    )


def _with_image_ids(features: Any) -> Any:
    if isinstance(features, list):
        return [_with_image_ids(choice) for choice in features]
    return datasets.Features({**features, "image_ids": datasets.Value("string")})


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, which processes can compare; iterators, readable only once, become lists."""
    return json.loads(json.dumps(settings, default=lambda value: getattr(value, "tolist", lambda: list(value))()))


def _plain_id(image_id: Any, index: int) -> str | int:
    """An image id as JSON holds it, so that it is the same in all processes."""
    if isinstance(image_id, np.integer):
        image_id = int(image_id)
    if not isinstance(image_id, str | int):
        raise ValueError(
            f"image {index}: the image id {image_id!r} is a {type(image_id).__name__}; give a string or an integer"
        )
    return image_id


def _counts_path(cache_file: str) -> Path:
    return Path(cache_file).with_suffix(".npz")


def _store(path: Path, metric: ImageMetric, settings: dict[str, Any]) -> None:
    state = metric.state_dict()
    about = {"settings": settings, "num_images": state["num_images"], "image_ids": state["image_ids"]}
    with replacing(path) as partial:
        counts = {f"counts_{name}": array for name, array in state["counts"].items()}
        np.savez(partial, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **counts)


def _load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"there are no counts in {path}: its process ended before it computed; see its log, run again")
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        counts = {name.removeprefix("counts_"): arrays[name] for name in arrays.files if name != "about"}
    if about["settings"] != settings:
        raise ValueError(
            f"{path} was counted with the settings {about['settings']}, process 0 has {settings}; give all processes "
            "the same"
        )
    return {"counts": counts, "num_images": about["num_images"], "image_ids": about["image_ids"]}
