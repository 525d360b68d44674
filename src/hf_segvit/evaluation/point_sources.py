"""Which points of a picture a point classifier is scored at, with the true class of each.

- `RandomPoints`: all classes of the picture equally often, each of their pixels equally likely, as in training.
- `InteriorPoints`: the innermost pixel of every true segment, what a perfect mask generator would ask about.
- `MaximumPoints`: the highest-valued point of every mask that a generator proposes, and the generator's own opinion.

H W pixels, N points, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor

from ..data.augmentation import sample_generator
from ..data.entries import decode_entry
from ..data.prompts import IGNORED, draw_points
from ..models.mask_points import points_from_masks
from .predicting import Predictor


@dataclass(frozen=True)
class LabelledPoints:
    """Points of a picture.

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
        """Points of the picture at place `index` of the data set."""
        segment_map, labels = labelled_segments(entry)
        label_map = np.append(labels, -1)[segment_map]
        return LabelledPoints(*draw_points(label_map, self.num_points, sample_generator(self.seed, 0, index)))


@dataclass(frozen=True)
class InteriorPoints:
    """The innermost pixel of every segment."""

    def __call__(self, entry: Mapping[str, Any], index: int) -> LabelledPoints:
        """Points of a picture."""
        segment_map, labels = labelled_segments(entry)
        points, point_labels = [], []
        for place, window in enumerate(find_objects(segment_map + 1)):
            if window is None:
                continue
            # The picture's border counts as one of the segment.
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
        """Points of a picture; the truth of a point is the class of the pixel that it lies in.

        Raises:
            ValueError: the generator cuts pictures into windows.
        """
        segment_map, labels = labelled_segments(entry)
        image = entry["image"]
        picture = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
        inputs = self.generator.inputs([picture]).to(self.generator.device)
        outputs = self.generator.model(**inputs)
        class_logits, mask_logits = outputs.class_queries_logits.float(), outputs.masks_queries_logits.float()
        if len(mask_logits) != 1:
            raise ValueError(
                f"image {entry.get('image_id')!r}: the generator cuts it into {len(mask_logits)} windows; give one "
                "that sees whole pictures (task panoptic or instance)"
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
    """(1, 2) height and width of the picture in cells of the masks; `None` where it fills them."""
    input_size = torch.tensor(inputs["pixel_values"].shape[-2:], dtype=torch.float32)
    if inputs.get("content_sizes") is not None:
        content = torch.as_tensor(inputs["content_sizes"], dtype=torch.float32).cpu()
    elif inputs.get("pixel_mask") is not None:
        mask = inputs["pixel_mask"][0].bool().cpu()
        content = torch.tensor([[int(mask.any(1).sum()), int(mask.any(0).sum())]], dtype=torch.float32)
    else:
        return None
    return content * torch.tensor(mask_logits.shape[-2:], dtype=torch.float32) / input_size
