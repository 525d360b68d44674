"""Evaluate a point classifier: top-1, top-5, by class, and calibration.

`evaluate_points` runs it; metrics/point_accuracy.py computes the scores. The points, with their true classes, are
`RandomPoints`, `InteriorPoints` or `MaximumPoints`, chosen by `point_source`. H W pixels, N points, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor
from torch.utils.data import Dataset

from ..data.augmentation import sample_generator
from ..data.entries import decode_entry
from ..data.prompts import IGNORED, draw_points
from ..inference.point_classifier import PointClassifier
from ..inference.segmenter import NonFiniteOutputs, Segmenter
from ..lookup import suggestion
from ..metrics.point_accuracy import PointAccuracy
from ..models.image_decoding import to_pixels
from ..models.image_values import AS_STORED
from ..models.label_spaces import match_labels
from ..models.mask_points import points_from_masks
from .calibration import PointCalibration
from .counts import MAIN, VariantCounts
from .evaluate import EvaluationResult, EvaluationSettings, count_images
from .tasks import EvaluationTask, mostly_taken_for


@dataclass(frozen=True)
class LabelledPoints:
    """Points of an image.

    Attributes:
        points: (N, 2) float32 x, y in [0, 1].
        labels: (N,) int64 true label ids, `IGNORED` where void.
        rival: (N, C) class probabilities of the generator whose masks these are, if any.
    """

    points: Tensor
    labels: Tensor
    rival: Tensor | None = None


@dataclass(frozen=True)
class RandomPoints:
    """Random points, the same ones at every call: all classes equally often, as in training."""

    num_points: int = 200
    seed: int = 0

    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of the image at this index of the data set."""
        segment_map, labels = labelled_segments(entry)
        label_map = np.append(labels, -1)[segment_map]  # index -1, void, reads the entry appended
        return LabelledPoints(*draw_points(label_map, self.num_points, sample_generator(self.seed, 0, index)))


@dataclass(frozen=True)
class InteriorPoints:
    """The innermost pixel of every true segment, what a perfect mask generator would ask about."""

    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of an image."""
        segment_map, labels = labelled_segments(entry)
        points, point_labels = [], []
        for segment, window in enumerate(find_objects(segment_map + 1)):
            if window is None:
                continue
            # Padded, so that the edge of the image counts as an edge of the segment.
            depth = distance_transform_edt(np.pad(segment_map[window] == segment, 1))[1:-1, 1:-1]
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            points.append((window[1].start + column + 0.5, window[0].start + row + 0.5))  # centre of the pixel
            point_labels.append(labels[segment])
        size = segment_map.shape[::-1]
        located = torch.tensor(np.array(points).reshape(-1, 2) / size, dtype=torch.float32)
        return LabelledPoints(located, torch.tensor(point_labels, dtype=torch.int64))


class MaximumPoints:
    """The highest-valued point of each mask that a generator is sure of.

    Args:
        label_table: (C,) the data set's label id of each of the generator's classes; `None` if they are the same.
        threshold: probability that the generator's class must have.
    """

    def __init__(self, generator: Segmenter, label_table: np.ndarray | None = None, threshold: float = 0.5) -> None:
        self.generator, self.label_table, self.threshold = generator, label_table, threshold

    @torch.inference_mode()
    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of an image, with the class of the pixel that each lies in; windows of an image are refused."""
        segment_map, labels = labelled_segments(entry)
        (asked,) = self.generator.ask([to_pixels(entry["image"], settings=self.generator.image_settings)])
        inputs, outputs = asked.views[0].inputs, asked.views[0].outputs
        class_logits, mask_logits = outputs.class_queries_logits.float(), outputs.masks_queries_logits.float()
        # A point is looked up on the grid of the whole image, which windows do not share.
        if len(mask_logits) != 1:
            raise ValueError(
                f"image {entry.get('image_id')!r}: the generator cuts it into {len(mask_logits)} windows; give one "
                "that sees whole images (task panoptic or instance)"
            )
        probabilities = class_logits[0].softmax(-1)
        kept = (probabilities[:, :-1].amax(-1) >= self.threshold) & (
            probabilities.argmax(-1) < class_logits.shape[-1] - 1
        )
        content = _content_cells(inputs, mask_logits)
        points = points_from_masks(mask_logits[:, kept], content_sizes=content)[0].cpu()
        # Renormalised without no-object, as ViT-P has no such class either.
        class_probabilities = class_logits[0, kept, :-1].softmax(-1).cpu()
        if self.label_table is not None:
            class_probabilities = reordered_scores(class_probabilities, self.label_table)
        height, width = segment_map.shape
        columns = (points[:, 0] * width).long().clamp(max=width - 1)  # a coordinate may be exactly 1
        rows = (points[:, 1] * height).long().clamp(max=height - 1)
        true = np.append(labels, IGNORED)[segment_map[rows.numpy(), columns.numpy()]]
        return LabelledPoints(points, torch.from_numpy(true), class_probabilities)


def labelled_segments(entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) indices of segments, -1 where void or a crowd, and (n,) label ids; overlapping segments are refused."""
    decoded = decode_entry(entry)
    if decoded.masks is not None:
        raise ValueError(
            f"image {entry.get('image_id')!r} has segments that may overlap, so that a point has no one class; read "
            "the data set with task panoptic or semantic"
        )
    return np.maximum(decoded.segment_map, -1).astype(np.int64), decoded.labels


def reordered_scores(scores: Tensor, table: np.ndarray) -> Tensor:
    """Scores (N, C) by the data set's label ids."""
    reordered = torch.empty_like(scores)
    reordered[:, torch.from_numpy(table)] = scores
    return reordered


def _content_cells(inputs: Mapping[str, Any], mask_logits: Tensor) -> Tensor | None:
    """(1, 2) height and width of the image in cells of the mask logits; `None` if it fills them."""
    input_size = torch.tensor(inputs["pixel_values"].shape[-2:], dtype=torch.float32)
    if inputs.get("content_sizes") is not None:
        content = torch.as_tensor(inputs["content_sizes"], dtype=torch.float32).cpu()
    elif inputs.get("pixel_mask") is not None:
        mask = inputs["pixel_mask"][0].bool().cpu()
        content = torch.tensor([[int(mask.any(1).sum()), int(mask.any(0).sum())]], dtype=torch.float32)
    else:
        return None
    return content * torch.tensor(mask_logits.shape[-2:], dtype=torch.float32) / input_size


PointSource = Callable[[Mapping[str, Any], int], LabelledPoints]
POINT_KINDS = ("random", "interior", "maximum")


def point_source(
    kind: str,
    id2label: Mapping[int, str],
    *,
    num_points: int = 200,
    seed: int = 0,
    generator: Segmenter | None = None,
) -> PointSource:
    """The points of a kind, one of `POINT_KINDS`; `num_points` and `seed` are for random ones.

    Raises:
        ValueError: there is no such kind, or "maximum" has no generator, or one of other classes.
    """
    if kind not in POINT_KINDS:
        raise ValueError(f"there are no points of kind {kind!r}; {suggestion(kind, POINT_KINDS)}")
    if kind == "random":
        return RandomPoints(num_points, seed)
    if kind == "interior":
        return InteriorPoints()
    if generator is None:
        raise ValueError('points of kind "maximum" lie in the masks of a generator; name a segmentation model')
    return MaximumPoints(generator, match_labels(generator.id2label, id2label).table)


class PointTask(EvaluationTask):
    """Accuracy at points."""

    name = "points"
    headline = "top_1"
    columns = ("top_1", "top_5", "points", "mostly taken for")

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def new_metric(self) -> PointAccuracy:
        """An empty metric."""
        return PointAccuracy(self.num_labels)

    def new_calibration(self) -> PointCalibration:
        """An empty metric of how well probabilities are calibrated."""
        return PointCalibration(self.num_labels)

    def image_score(self, metric: PointAccuracy) -> float:
        """Top-1."""
        return float(metric.compute()["top_1"])

    def row(self, label: int, values: Mapping[str, Any], metric: PointAccuracy) -> dict[str, Any]:
        """The columns of a class."""
        columns = {name: values[name] for name in ("top_1", "top_5", "points")}
        return {**columns, "mostly taken for": mostly_taken_for(label, metric)}


GENERATOR = "generator"


def evaluate_points(
    classifier: PointClassifier, dataset: Any, id2label: Mapping[int, str], points: PointSource, **settings: Any
) -> EvaluationResult:
    """Evaluate a point classifier at `points` from `point_source`; other arguments and errors as for `evaluate`.

    `about` should name the points. Further metrics get logits (N, C) and label ids (N,), as `PointAccuracy` does. For
    points of a generator, metrics `generator_...` score its own classes. The score of an image is its top-1.
    """
    labels = match_labels(classifier.id2label, id2label)
    by_generator = isinstance(points, MaximumPoints)

    def count_batch(counts: VariantCounts, batch: list[tuple[int, Any]]) -> None:
        labelled = [known or points(entry, index) for index, (entry, known) in batch]
        images = [to_pixels(e["image"], f"image {e['image_id']!r}", AS_STORED) for _, (e, _) in batch]
        try:
            answers = classifier(images, [each.points for each in labelled])
        except NonFiniteOutputs as error:
            names = ", ".join(str(entry["image_id"]) for _, (entry, _) in batch)
            raise NonFiniteOutputs(f"image {names}: {error}") from error
        for (index, (entry, _)), truth, answer in zip(batch, labelled, answers, strict=True):
            if labels.table is not None:
                answer = reordered_scores(answer, labels.table)
            counts.counts[MAIN].count(index, entry["image_id"], truth.labels, answer, {GENERATOR: truth.rival})

    def generators() -> dict[str, PointAccuracy]:
        return {GENERATOR: PointAccuracy(len(id2label), probabilities=True)} if by_generator else {}

    return count_images(
        PointTask(len(id2label)),
        # Readers cannot run a model, so points of a generator are found in count_batch.
        _Pointed(dataset, None if by_generator else points),
        id2label,
        count_batch,
        EvaluationSettings(**settings),
        further=generators,
        notes=[labels.warning],
    )[MAIN]


class _Pointed(Dataset):
    """Entries of a data set with their points, or `None` where those need a model."""

    def __init__(self, dataset: Any, points: PointSource | None) -> None:
        self.dataset, self.points = dataset, points

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, LabelledPoints | None]:
        entry = self.dataset[index]
        return entry, self.points(entry, index) if self.points is not None else None
