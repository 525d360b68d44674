"""Evaluation of a point classifier: top-1, top-5, by class, and calibration, at points of one's choice.

`evaluate_points` runs it, `PointPredictor` asks the model. Which points there are is in point_sources.py, what is
computed in `metrics/point_accuracy.py`. The loop, also over processes and after an interruption, is counting_loop.py's.

N points, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..metrics.point_accuracy import PointAccuracy
from .counting import PointCounts
from .counting_loop import CHUNK_SIZE, count_pictures, rgb_picture
from .label_matching import match_labels
from .point_sources import InteriorPoints, LabelledPoints, MaximumPoints, RandomPoints, reordered_scores
from .predicting import Predictor
from .running import EvaluationResult, PictureScore

PointSource = Callable[[Mapping[str, Any], int], LabelledPoints]
POINT_KINDS = ("random", "interior", "maximum")


class PointPredictor:
    """A point classifier with its image processor.

    Args:
        model: a `ViTPForPointClassification`.
        processor: the image processor that belongs to it.
        device: where to compute.
    """

    def __init__(self, model: Any, processor: Any, device: str | torch.device = "cpu") -> None:
        self.model, self.processor, self.device = model.eval().to(device), processor, torch.device(device)
        self.id2label: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], points: Sequence[Tensor]) -> list[Tensor]:
        """Classify points of pictures, all in one forward pass.

        Args:
            pictures: RGB.
            points: for each picture (N, 2) x, y in [0, 1]; N may differ, and be 0.

        Returns:
            For each picture (N, C) float32 logits, on the CPU.
        """
        answers = [torch.zeros(0, len(self.id2label)) for _ in pictures]
        asked = [index for index, located in enumerate(points) if len(located)]
        if not asked:
            return answers
        inputs = self.processor([pictures[index] for index in asked], return_tensors="pt")
        prompts = pad_sequence([self._prompts(pictures[index], points[index]) for index in asked], batch_first=True)
        counts = torch.tensor([len(points[index]) for index in asked])
        prompt_mask = torch.arange(prompts.shape[1]) < counts[:, None]
        arguments = {"pixel_values": inputs["pixel_values"], "prompts": prompts, "prompt_mask": prompt_mask}
        logits = self.model(**{name: value.to(self.device) for name, value in arguments.items()}).logits.float().cpu()
        for place, index in enumerate(asked):
            answers[index] = logits[place, : len(points[index])]
        return answers

    def _prompts(self, picture: Image.Image, points: Tensor) -> Tensor:
        if self.model.config.point_origin == "corner":  # to such a model, a pixel is where its upper left corner is
            points = (points - 0.5 / torch.tensor([picture.width, picture.height])).clamp(min=0)
        return torch.cat([points, torch.zeros_like(points)], dim=1)


def point_source(
    kind: str,
    id2label: Mapping[int, str],
    *,
    num_points: int = 200,
    seed: int = 0,
    generator: Predictor | None = None,
) -> PointSource:
    """The points of a kind.

    Args:
        kind: one of `POINT_KINDS`; see point_sources.py.
        id2label: the data set's classes.
        num_points: of a picture, for random points.
        seed: of random points.
        generator: that proposes masks, for "maximum".

    Raises:
        ValueError: there is no such kind, or "maximum" without a generator, or a generator of other classes.
    """
    if kind not in POINT_KINDS:
        raise ValueError(f"there are no points of kind {kind!r}; choose one of {', '.join(POINT_KINDS)}")
    if kind == "random":
        return RandomPoints(num_points, seed)
    if kind == "interior":
        return InteriorPoints()
    if generator is None:
        raise ValueError('points of kind "maximum" lie in the masks of a generator; name a segmentation model')
    return MaximumPoints(generator, match_labels(generator.id2label, id2label).table)


def evaluate_points(
    predictor: PointPredictor,
    dataset: Any,
    id2label: Mapping[int, str],
    points: PointSource,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    partial_folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> EvaluationResult:
    """Evaluate a point classifier; every process of the run must call it, and all get the same result.

    Args:
        predictor: the model.
        dataset: entries of our readers, each with an `image_id` of its own.
        id2label: the data set's classes.
        points: where to ask, from `point_source`.
        batch_size: pictures at a time.
        num_workers: processes that read pictures.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            result is returned: the caller deletes them once it has written that.
        about: what is evaluated, the points included; counts in the folder of something else are an error.
        chunk_size: pictures to count before counts are saved.
        progress: show a progress bar.

    Returns:
        Metrics of `PointAccuracy`; where the points are those of a generator also `generator_...`, the same of its own
        classes. The score of a picture is its top-1.

    Raises:
        ValueError: model and data set have different classes, a picture cannot be read or counted, or the folder holds
            another evaluation.
    """
    labels = match_labels(predictor.id2label, id2label)

    def count_batch(counts: PointCounts, batch: list[tuple[int, Any]]) -> None:
        located = [found or points(entry, index) for index, (entry, found) in batch]
        pictures = [rgb_picture(entry) for _, (entry, _) in batch]
        answers = predictor(pictures, [one.points for one in located])
        for (index, (entry, _)), one, answer in zip(batch, located, answers, strict=True):
            if labels.table is not None:
                answer = reordered_scores(answer, labels.table)
            counts.count(index, entry["image_id"], answer, one.rival, one.labels)

    counts = count_pictures(
        _Pointed(dataset, None if isinstance(points, MaximumPoints) else points),
        lambda: PointCounts(len(id2label)),
        count_batch,
        batch_size=batch_size,
        num_workers=num_workers,
        partial_folder=partial_folder,
        about=about,
        chunk_size=chunk_size,
        progress=progress,
    )
    scores = [PictureScore(*picture) for picture in counts.pictures]
    notes = [labels.warning] if labels.warning else []
    return _result(counts.own, counts.rival, id2label, scores, notes)


class _Pointed(Dataset):
    """Entries of a data set and, where a worker can tell, the points."""

    def __init__(self, dataset: Any, points: PointSource | None) -> None:
        self.dataset, self.points = dataset, points

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, LabelledPoints | None]:
        entry = self.dataset[index]
        return entry, self.points(entry, index) if self.points is not None else None


def _result(
    metric: PointAccuracy,
    rival: PointAccuracy,
    id2label: Mapping[int, str],
    scores: list[PictureScore],
    notes: list[str],
) -> EvaluationResult:
    computed = metric.compute()
    per_class = computed.pop("per_class")
    if rival.num_images:
        others = rival.compute()
        computed |= {f"generator_{name}": value for name, value in others.items() if isinstance(value, float)}
    rows = []
    for label, values in per_class.items():
        if not values["points"]:
            continue
        wrong = metric.counts["confusion"][label].copy()
        wrong[label] = 0
        rows.append(
            {
                "label_id": label,
                "label": id2label[label],
                "loss": (1 - values["top_1"]) / computed["num_classes"],
                **{name: values[name] for name in ("top_1", "top_5", "points")},
                "mostly taken for": id2label[int(wrong.argmax())] if wrong.any() else None,
            }
        )
    rows.sort(key=lambda row: (-row["loss"], -row["points"], row["label_id"]))
    scores.sort(key=lambda picture: (math.isnan(picture.score), picture.score, picture.index))
    return EvaluationResult("points", metric.num_images, computed, rows, scores, notes)
