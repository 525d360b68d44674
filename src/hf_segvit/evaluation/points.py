"""Evaluation of a point classifier: top-1, top-5, by class, and calibration, at points of one's choice.

`evaluate_points` runs it, `PointPredictor` asks the model. Which points there are is in point_sources.py, what is
computed in `metrics/point_accuracy.py`. The loop, also over processes and after an interruption, is counting_loop.py's.

N points, C classes.

Which points of an image a point classifier is scored at, with the true class of each.

- `RandomPoints`: all classes of the image equally often, each of their pixels equally likely, as in training.
- `InteriorPoints`: the innermost pixel of every true segment, what a perfect mask generator would ask about.
- `MaximumPoints`: the highest-valued point of every mask that a generator proposes, and the generator's own opinion.

H W pixels, N points, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data.augmentation import sample_generator
from ..data.entries import decode_entry
from ..data.prompts import IGNORED, draw_points
from ..metrics.point_accuracy import PointAccuracy
from ..models.label_spaces import match_labels
from ..models.mask_points import points_from_masks
from .counts import PointCounts
from .evaluate import CHUNK_SIZE, EvaluationResult, ImageScore, count_images, rgb_image
from .predictor import Predictor


@dataclass(frozen=True)
class LabelledPoints:
    """Points of an image.

    Attributes:
        points: (N, 2) float32 x, y in [0, 1].
        labels: (N,) int64 true label ids, `IGNORED` where void.
        rival: (N, C) class probabilities of the generator whose masks these are; `None` where there is none.
    """

    points: Tensor
    labels: Tensor
    rival: Tensor | None = None


@dataclass(frozen=True)
class RandomPoints:
    """Random points, the same ones at every call.

    Attributes:
        num_points: N.
        seed: of the random numbers.
    """

    num_points: int = 200
    seed: int = 0

    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of the image at place `index` of the data set."""
        segment_map, labels = labelled_segments(entry)
        label_map = np.append(labels, -1)[segment_map]
        return LabelledPoints(*draw_points(label_map, self.num_points, sample_generator(self.seed, 0, index)))


@dataclass(frozen=True)
class InteriorPoints:
    """The innermost pixel of every segment."""

    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of an image."""
        segment_map, labels = labelled_segments(entry)
        points, point_labels = [], []
        for place, window in enumerate(find_objects(segment_map + 1)):
            if window is None:
                continue
            # The image's border counts as one of the segment.
            depth = distance_transform_edt(np.pad(segment_map[window] == place, 1))[1:-1, 1:-1]
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            points.append((window[1].start + column + 0.5, window[0].start + row + 0.5))
            point_labels.append(labels[place])
        size = segment_map.shape[::-1]
        located = torch.tensor(np.array(points).reshape(-1, 2) / size, dtype=torch.float32)
        return LabelledPoints(located, torch.tensor(point_labels, dtype=torch.int64))


class MaximumPoints:
    """The highest-valued point of each mask that a generator is sure of.

    Args:
        generator: any model for universal segmentation.
        label_table: (C,) the data set's label id of each of the generator's classes; `None` where they are the same.
        threshold: probability that the generator's class must have.
    """

    def __init__(self, generator: Predictor, label_table: np.ndarray | None = None, threshold: float = 0.5) -> None:
        self.generator, self.label_table, self.threshold = generator, label_table, threshold

    @torch.inference_mode()
    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of an image; the truth of a point is the class of the pixel that it lies in.

        Raises:
            ValueError: the generator cuts images into windows.
        """
        segment_map, labels = labelled_segments(entry)
        image = entry["image"]
        rgb = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
        inputs = self.generator.inputs([rgb]).to(self.generator.device)
        outputs = self.generator.model(**inputs)
        class_logits, mask_logits = outputs.class_queries_logits.float(), outputs.masks_queries_logits.float()
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
        opinions = class_logits[0, kept, :-1].softmax(-1).cpu()
        if self.label_table is not None:
            opinions = reordered_scores(opinions, self.label_table)
        height, width = segment_map.shape
        columns = (points[:, 0] * width).long().clamp(max=width - 1)
        rows = (points[:, 1] * height).long().clamp(max=height - 1)
        true = np.append(labels, IGNORED)[segment_map[rows.numpy(), columns.numpy()]]
        return LabelledPoints(points, torch.from_numpy(true), opinions)


def labelled_segments(entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) places of segments, -1 where void or a crowd, and (n,) their label ids.

    Raises:
        ValueError: segments may overlap, so that a point has no one class.
    """
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
    """(1, 2) height and width of the image in cells of the masks; `None` where it fills them."""
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
    def __call__(self, images: Sequence[Image.Image], points: Sequence[Tensor]) -> list[Tensor]:
        """Classify points of images, all in one forward pass.

        Args:
            images: RGB.
            points: for each image (N, 2) x, y in [0, 1]; N may differ, and be 0.

        Returns:
            For each image (N, C) float32 logits, on the CPU.
        """
        answers = [torch.zeros(0, len(self.id2label)) for _ in images]
        asked = [index for index, located in enumerate(points) if len(located)]
        if not asked:
            return answers
        inputs = self.processor([images[index] for index in asked], return_tensors="pt")
        prompts = pad_sequence([self._prompts(images[index], points[index]) for index in asked], batch_first=True)
        counts = torch.tensor([len(points[index]) for index in asked])
        prompt_mask = torch.arange(prompts.shape[1]) < counts[:, None]
        arguments = {"pixel_values": inputs["pixel_values"], "prompts": prompts, "prompt_mask": prompt_mask}
        logits = self.model(**{name: value.to(self.device) for name, value in arguments.items()}).logits.float().cpu()
        for place, index in enumerate(asked):
            answers[index] = logits[place, : len(points[index])]
        return answers

    def _prompts(self, image: Image.Image, points: Tensor) -> Tensor:
        if self.model.config.point_origin == "corner":  # to such a model, a pixel is where its upper left corner is
            points = (points - 0.5 / torch.tensor([image.width, image.height])).clamp(min=0)
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
        num_points: of an image, for random points.
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
        batch_size: images at a time.
        num_workers: processes that read images.
        partial_folder: keep counts here, and go on from those that are there; `None` keeps none. They stay when the
            result is returned: the caller deletes them once it has written that.
        about: what is evaluated, the points included; counts in the folder of something else are an error.
        chunk_size: images to count before counts are saved.
        progress: show a progress bar.

    Returns:
        Metrics of `PointAccuracy`; where the points are those of a generator also `generator_...`, the same of its own
        classes. The score of an image is its top-1.

    Raises:
        ValueError: model and data set have different classes, an image cannot be read or counted, or the folder holds
            another evaluation.
    """
    labels = match_labels(predictor.id2label, id2label)

    def count_batch(counts: PointCounts, batch: list[tuple[int, Any]]) -> None:
        located = [found or points(entry, index) for index, (entry, found) in batch]
        images = [rgb_image(entry) for _, (entry, _) in batch]
        answers = predictor(images, [one.points for one in located])
        for (index, (entry, _)), one, answer in zip(batch, located, answers, strict=True):
            if labels.table is not None:
                answer = reordered_scores(answer, labels.table)
            counts.count(index, entry["image_id"], answer, one.rival, one.labels)

    counts = count_images(
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
    scores = [ImageScore(*image) for image in counts.images]
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
    scores: list[ImageScore],
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
    scores.sort(key=lambda image: (math.isnan(image.score), image.score, image.index))
    return EvaluationResult("points", metric.num_images, computed, rows, scores, notes)
