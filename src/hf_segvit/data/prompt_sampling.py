"""Prompts for point classification drawn from a labelled picture: points in its segments, or boxes around them.

`PromptSampling` says how; calling it draws. All classes of a picture are equally likely, however large they are: first
a class is drawn from those present, then one of its segments or pixels. `draw_points` and `draw_boxes` are the two
ways; `PROMPT_SOURCES` names where labels may come from.

H W pixels, N prompts, n segments. A prompt is centre x, centre y, width, height in [0, 1]; a point has no width and no
height. Source of the rule: the ViT-P paper's training points; boxes as its pre-training describes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PROMPT_SOURCES = {
    "mask": "points in the segments, any pixel of a class being as likely as any other",
    "coarse": "points in the insides of the segments, as if they had been labelled coarsely",
    "box": "boxes around the segments, and points anywhere in such boxes",
}
IGNORED = -100  # label of a prompt that has none


@dataclass(frozen=True)
class PromptSampling:
    """How prompts are drawn.

    Attributes:
        num_prompts: N.
        source: one of `PROMPT_SOURCES`.
        instance_aware: after the class draw one of its segments, so that small things are asked as often as large
            ones. Boxes are always drawn so.
        box_share: of the prompts from boxes that are the box itself; the others are points anywhere in it.

    Raises:
        ValueError: an attribute is out of its range.
    """

    num_prompts: int = 200
    source: str = "mask"
    instance_aware: bool = False
    box_share: float = 0.5

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"the number of points is {self.num_prompts}; draw at least 1 from a picture")
        if self.source not in PROMPT_SOURCES:
            raise ValueError(f"there is no source of points {self.source!r}; choose one of {', '.join(PROMPT_SOURCES)}")
        if not 0 <= self.box_share <= 1:
            raise ValueError(f"box_share is {self.box_share}; give the share of prompts that are boxes, in [0, 1]")

    def __call__(
        self, segment_map: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw from one picture.

        Args:
            segment_map: (H, W) places in `labels`, negative where void.
            labels: (n,) label ids of the segments.
            generator: of the random numbers.

        Returns:
            (N, 4) float32 prompts and (N,) int64 labels; `IGNORED` where all is void.
        """
        if self.source == "box":
            boxes, present = segment_boxes(segment_map)
            return draw_boxes(boxes, labels[present], self.num_prompts, generator, self.box_share)
        if self.instance_aware:
            points, point_labels = draw_points(segment_map, self.num_prompts, generator, labels)
        else:
            label_map = np.append(labels, -1)[np.maximum(segment_map, -1)]
            points, point_labels = draw_points(label_map, self.num_prompts, generator)
        return torch.cat([points, torch.zeros_like(points)], dim=1), point_labels


def draw_points(
    region_map: np.ndarray,
    num_points: int,
    generator: np.random.Generator,
    region_labels: Sequence[int] | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw points with their classes, all classes of the map being equally likely.

    Args:
        region_map: (H, W) label ids, or places in `region_labels`; negative where void.
        num_points: N.
        generator: of the random numbers.
        region_labels: label ids of the regions; all regions of a class are equally likely.

    Returns:
        (N, 2) float32 x, y of pixel centres in [0, 1], and (N,) int64 labels; `IGNORED` and the middle of the picture
        where all is void.
    """
    flat = region_map.reshape(-1)
    places = np.flatnonzero(flat >= 0)
    if not len(places):
        return torch.full((num_points, 2), 0.5), torch.full((num_points,), IGNORED)
    # Pixels in the order of their regions: a region is a range, one of its pixels a number in that range.
    places = places[np.argsort(flat[places], kind="stable")]
    regions, starts, areas = np.unique(flat[places], return_index=True, return_counts=True)
    labels = regions if region_labels is None else np.asarray(region_labels)[regions]
    drawn = _draw_balanced(labels, num_points, generator)
    chosen = places[starts[drawn] + (generator.random(num_points) * areas[drawn]).astype(np.int64)]
    rows, columns = np.divmod(chosen, region_map.shape[1])
    points = np.stack([(columns + 0.5) / region_map.shape[1], (rows + 0.5) / region_map.shape[0]], axis=1)
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels[drawn].astype(np.int64))


def draw_boxes(
    boxes: np.ndarray,
    labels: np.ndarray,
    num_prompts: int,
    generator: np.random.Generator,
    box_share: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Draw boxes, or points anywhere in them, all classes being equally likely, and all boxes of a class.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in [0, 1].
        labels: (n,) label ids.
        num_prompts: N.
        generator: of the random numbers.
        box_share: probability of a box rather than a point.

    Returns:
        (N, 4) float32 prompts and (N,) int64 labels; `IGNORED` and the middle of the picture without any box.
    """
    if not len(boxes):
        middle = torch.tensor([0.5, 0.5, 0.0, 0.0])
        return middle.repeat(num_prompts, 1), torch.full((num_prompts,), IGNORED)
    drawn = _draw_balanced(labels, num_prompts, generator)
    corner, size = boxes[drawn, :2], boxes[drawn, 2:] - boxes[drawn, :2]
    within = generator.random((num_prompts, 2))
    is_box = generator.random((num_prompts, 1)) < box_share
    centers = corner + size * np.where(is_box, 0.5, within)
    prompts = np.concatenate([centers, np.where(is_box, size, 0.0)], axis=1)
    return torch.from_numpy(prompts.astype(np.float32)), torch.from_numpy(labels[drawn].astype(np.int64))


def segment_boxes(segment_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes around the segments of a map (H, W), negative where void.

    Returns:
        (m, 4) float64 x0, y0, x1, y1 of the outer edges, in [0, 1], and (m,) the segments, of those that the map shows.
    """
    height, width = segment_map.shape
    flat = segment_map.reshape(-1)
    places = np.flatnonzero(flat >= 0)
    places = places[np.argsort(flat[places], kind="stable")]
    segments, starts = np.unique(flat[places], return_index=True)
    if not len(segments):
        return np.zeros((0, 4)), segments
    rows, columns = np.divmod(places, width)
    lowest = [np.minimum.reduceat(values, starts) for values in (columns, rows)]
    highest = [np.maximum.reduceat(values, starts) + 1 for values in (columns, rows)]
    return np.stack([*lowest, *highest], axis=1) / np.array([width, height, width, height]), segments


def mask_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`segment_boxes` of masks (n, H, W) that may overlap; the second result are the masks that are not empty."""
    columns, rows = np.asarray(masks.any(1)), np.asarray(masks.any(2))
    present = np.flatnonzero(columns.sum(1))
    bounds = []
    for occupied in (columns[present], rows[present]):
        length = occupied.shape[1]
        bounds.append((occupied.argmax(1) / length, 1 - occupied[:, ::-1].argmax(1) / length))
    (x0, x1), (y0, y1) = bounds
    return np.stack([x0, y0, x1, y1], axis=1), present


def _draw_balanced(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Places in `labels` (n,): a class first, then one of its places."""
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    classes = generator.integers(len(starts), size=count)
    return order[starts[classes] + (generator.random(count) * sizes[classes]).astype(np.int64)]
