"""The models of a page, loaded when they are first asked for, few at a time.

Models are named by the user and shown by short names. Loading is serialised, and the model that was asked for least
recently makes room. All tasks of a model, and what a ViT-P makes of it, share one set of weights.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..inference.devices import pick_device
from ..inference.loading import is_exported, is_fused, join_models
from ..inference.point_classifier import PointClassifier
from ..inference.segmenter import Segmenter
from ..lookup import suggestion
from ..models.image_processing_eomt import TASKS


class ModelCache:
    """Segmentation models by short name, and a ViT-P that classifies points and relabels their segments.

    Args:
        sources: folders or Hub ids of the models; the first is the default.
        classifier: folder or Hub id of the ViT-P.
        keep: the most models in memory at a time, besides the ViT-P.
        label_mismatch: as for `load_fused_model`.
        settings: further arguments of `Segmenter.from_pretrained` and `PointClassifier.from_pretrained`: `device`,
            `dtype`, `runtime`, `threads`, `allow_native_code`.

    Raises:
        ValueError: no model is named.
    """

    def __init__(
        self,
        sources: Sequence[str],
        classifier: str | None = None,
        *,
        keep: int = 2,
        label_mismatch: str = "error",
        **settings: Any,
    ) -> None:
        if not sources:
            raise ValueError("there is no model to offer; name at least one")
        self.sources = dict(zip(short_names(sources), sources, strict=True))
        self.classifier, self.keep, self.label_mismatch, self.settings = classifier, keep, label_mismatch, settings
        self._segmenters: OrderedDict[str, dict[tuple[str, bool], Segmenter]] = OrderedDict()  # by (task, relabelled)
        self._point_classifier: PointClassifier | None = None
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The short names, the default first."""
        return list(self.sources)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory, that asked for last at the end."""
        return list(self._segmenters)

    def segmenter(self, name: str | None = None, task: str | None = None, relabel: bool = False) -> Segmenter:
        """A model for a task.

        Args:
            name: a short name; `None`: the first model.
            task: `None`: what the model was trained for.
            relabel: let the ViT-P correct the labels; a fused checkpoint does that by itself.

        Raises:
            ValueError: there is no such model, it cannot be loaded, or it cannot do the task or be joined.
        """
        name = self._known(name)
        with self._lock:
            tasks = self._loaded(name)
            own = next(iter(tasks.values()))
            task = task or own.task
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}; {suggestion(task, TASKS)}")
            relabel = relabel and not is_fused(own.model)
            if (task, relabel) not in tasks:
                joined = next((each for (_, is_joined), each in tasks.items() if is_joined), None)
                pair = (own.model, own.processor)
                if relabel:
                    pair = self._joined(name, own) if joined is None else (joined.model, joined.processor)
                tasks[task, relabel] = Segmenter(*pair, task=task, device=own.device)
            return tasks[task, relabel]

    def point_classifier(self, name: str | None = None) -> PointClassifier:
        """The ViT-P that answers for points: the one named for all models, else that of a fused model.

        Raises:
            ValueError: there is none, or it cannot be loaded.
        """
        with self._lock:
            if self.classifier is None:
                own = self.segmenter(name)
                if not self.has_points(name):
                    raise ValueError("no ViT-P is offered here, which classifying points needs (--classifier)")
                return PointClassifier(own.model.classifier, own.processor.classifier, own.device)
            if self._point_classifier is None:
                settings = {**self.settings, "device": _device(self.classifier, self.settings.get("device"))}
                self._point_classifier = PointClassifier.from_pretrained(self.classifier, **settings)
            return self._point_classifier

    def has_points(self, name: str | None = None) -> bool:
        """Whether points can be classified beside this model; loads it unless a ViT-P is named for all."""
        return self.classifier is not None or hasattr(self.segmenter(name).model, "classifier")

    def can_relabel(self, name: str | None = None) -> bool:
        """Whether `segmenter` can also show what a ViT-P changes."""
        own = self.segmenter(name)
        exported = is_exported(self.sources[self._known(name)])
        return not exported and (self.classifier is not None or is_fused(own.model))

    def tasks(self, name: str | None = None) -> list[str]:
        """The tasks that a model can do, its own first."""
        own = self.segmenter(name)
        served = [task for task in TASKS if hasattr(own.processor, f"post_process_{task}_segmentation")]
        return sorted(served, key=lambda task: task != own.task)

    def _known(self, name: str | None) -> str:
        if name is None:
            return self.names[0]
        if name not in self.sources:
            raise ValueError(f"there is no model {name!r} here; {suggestion(name, self.names)}")
        return name

    def _loaded(self, name: str) -> dict[tuple[str, bool], Segmenter]:
        """The segmenters of a model, the one of its own task first; loads it, and makes room for it before."""
        if name not in self._segmenters:
            source = self.sources[name]
            while len(self._segmenters) >= self.keep:
                self._segmenters.popitem(last=False)
            _free()
            settings = {**self.settings, "device": _device(source, self.settings.get("device"))}
            own = Segmenter.from_pretrained(source, **settings)
            self._segmenters[name] = {(own.task, False): own}
        self._segmenters.move_to_end(name)
        return self._segmenters[name]

    def _joined(self, name: str, own: Segmenter) -> tuple[Any, Any]:
        if self.classifier is None:
            raise ValueError("no ViT-P is offered here, which relabelling needs (--classifier)")
        if is_exported(self.sources[name]) or is_exported(self.classifier):
            raise ValueError(f"{name}: an exported model's labels are fixed; join it with the ViT-P before the export")
        points = self.point_classifier()
        return join_models(
            (own.model, own.processor), (points.model, points.processor), label_mismatch=self.label_mismatch
        )


def short_names(sources: Sequence[str]) -> list[str]:
    """Names to show: Hub ids whole, folders by their last part, or by as many parts as it takes to tell them apart.

    Raises:
        ValueError: two are the same.
    """
    paths = [Path(source).expanduser() for source in sources]
    parts = [path.resolve().parts if path.exists() else (str(path),) for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(source for source, each in zip(sources, parts, strict=True) if parts.count(each) > 1)
        raise ValueError(f"the model {twice} is named twice; name each once")
    # The folder of a run's model is called "model" in every run.
    counts = [2 if each[-1] == "model" else 1 for each in parts]

    def names() -> list[str]:
        return ["/".join(each[-count:]) for each, count in zip(parts, counts, strict=True)]

    while len(set(found := names())) < len(found):
        for index, name in enumerate(found):
            counts[index] += found.count(name) > 1
    return found


def _device(source: str, device: str | None) -> Any:
    """The device of a model; an exported one's runtime has devices of its own."""
    return device if is_exported(source) else pick_device(device)


def _free() -> None:
    """Give the memory of dropped models back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
