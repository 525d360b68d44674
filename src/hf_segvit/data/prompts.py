"""Augment training images for ViT-P and draw prompts from their segments.

- `coarse_segment_map` makes coarse labels of fine ones, to try training with coarse labels on any data.
- `PointAugmentation`: crop, rotation and flip, then prompts, as in the official code except for its faults.
- `PromptSampling` draws prompts, by `draw_points` in segments or `draw_boxes` around them. As in the ViT-P paper, all
  classes of an image are equally likely: first a class is drawn, then one of its segments or pixels.

A prompt is centre x, centre y, width, height in [0, 1]; a point has zero width and height. H W pixels, N prompts, n
segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from .entries import AugmentedSample, DecodedEntry, decode_entry

COARSE_MARGIN = 0.03  # share of the image's short side


def coarse_segment_map(segment_map: np.ndarray, margin: float = COARSE_MARGIN, void: int = -1) -> np.ndarray:
    """Set pixels of a map (H, W) to void where they are near another segment or void; thin segments vanish.

    Args:
        margin: distance along rows and columns, as a share of the short side; at least one pixel.

    Raises:
        ValueError: the margin is not in (0, 0.5).
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"the margin of coarse labels is {margin}; give a share of the short side in (0, 0.5)")
    # As Cityscapes' coarse annotators, who drew polygons well inside of each segment, so that no labelled pixel is
    # wrong. A window with one value lies inside a segment; "nearest" keeps the image's own border from counting.
    side = 2 * max(1, round(margin * min(segment_map.shape))) + 1
    lowest, highest = (extreme(segment_map, size=side, mode="nearest") for extreme in (minimum_filter, maximum_filter))
    return np.where(lowest == highest, segment_map, void).astype(segment_map.dtype)


class PointAugmentation:
    """Random crop, rotation and flip, and random prompts, as in ViT-P's training.

    Args:
        size: (height, width) of the result, whatever the aspect ratio of the image.
        num_points: N, drawn with replacement.
        source, instance_aware, box_share: see `PromptSampling`.
        coarse_margin: with source "coarse", see `coarse_segment_map`.
        crop: take 0.5 to 1 of the image's area, at an aspect ratio of 3/4 to 4/3.
        max_rotation: in degrees, to either side; not for masks that may overlap.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        num_points: int = 200,
        source: str = "mask",
        instance_aware: bool = False,
        box_share: float = 0.5,
        coarse_margin: float = COARSE_MARGIN,
        crop: bool = True,
        max_rotation: float = 60.0,
        flip_probability: float = 0.5,
    ) -> None:
        if min(size) < 1 or num_points < 1:
            raise ValueError(f"size is {size} and num_points {num_points}; all must be at least 1")
        if not 0 <= max_rotation <= 180 or not 0 <= flip_probability <= 1:
            raise ValueError(
                f"max_rotation is {max_rotation} and flip_probability {flip_probability}; give 0 to 180 degrees and "
                "one in [0, 1]"
            )
        self.size, self.crop, self.coarse_margin = size, crop, coarse_margin
        self.max_rotation, self.flip_probability = max_rotation, flip_probability
        self.sampling = PromptSampling(num_points, source, instance_aware, box_share)

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry of a reader, see `decode_entry`; without any segment all labels are -100."""
        decoded = decode_entry(entry)
        if decoded.masks is not None and self.sampling.source != "box":
            raise ValueError(
                f"image {entry.get('image_id')!r} has segments that may overlap, so that a point has no one class; "
                'read the data set with task panoptic or semantic, or draw from boxes (source "box")'
            )
        draw = self._from_map if decoded.masks is None else self._from_masks
        pixels, prompts, labels = draw(decoded, generator)
        return AugmentedSample(
            image_id=entry.get("image_id"),
            pixels=pixels,
            segment_map=torch.full(self.size, -1, dtype=torch.int16),
            labels=torch.zeros(0, dtype=torch.int64),
            prompts=prompts,
            prompt_labels=labels,
        )

    def _from_map(self, decoded: DecodedEntry, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        segment_map = np.maximum(decoded.segment_map, -1)  # crowds are void
        if self.sampling.source == "coarse":
            segment_map = coarse_segment_map(segment_map, self.coarse_margin)
        indices = torch.from_numpy(segment_map.astype(np.int32))[None]
        pixels, transformed = self._transformed(decoded.pixels, indices, generator)
        if not bool((transformed >= 0).any()):  # only void is left: use the whole image instead
            pixels, transformed = self._squeezed(decoded.pixels), indices
        return pixels, *self.sampling(transformed[0].numpy(), decoded.labels, generator)

    def _from_masks(self, decoded: DecodedEntry, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of masks that may overlap."""
        pixels, masks = decoded.pixels, decoded.masks
        assert masks is not None  # see __call__
        if self.crop:
            top, left, height, width = draw_crop(pixels.shape[1:], generator)
            cropped = masks[:, top : top + height, left : left + width]
            if cropped.any():
                pixels, masks = pixels[:, top : top + height, left : left + width], cropped
        # Not rotated: turned boxes would no longer be tight.
        boxes, present = mask_boxes(masks)
        pixels = self._squeezed(pixels)
        if generator.random() < self.flip_probability:
            pixels = functional.horizontal_flip(pixels)
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        num_prompts, box_share = self.sampling.num_prompts, self.sampling.box_share
        return pixels, *draw_boxes(boxes, decoded.labels[present], num_prompts, generator, box_share)

    def _transformed(self, pixels: Tensor, indices: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.crop:
            box = draw_crop(pixels.shape[1:], generator)
            pixels = functional.resized_crop(pixels, *box, size=list(self.size), antialias=True)
            indices = functional.resized_crop(
                indices, *box, size=list(self.size), interpolation=InterpolationMode.NEAREST_EXACT
            )
        angle = float(generator.uniform(-self.max_rotation, self.max_rotation))
        if angle:
            # Unlike the official code: images are interpolated, and uncovered corners become void rather than class 0.
            # Rotation computes in floating point, which holds indices exactly.
            pixels = functional.rotate(pixels, angle, interpolation=InterpolationMode.BILINEAR, fill=[0.0])
            indices = functional.rotate(indices, angle, interpolation=InterpolationMode.NEAREST, fill=[-1.0])
        if generator.random() < self.flip_probability:
            pixels, indices = functional.horizontal_flip(pixels), functional.horizontal_flip(indices)
        return self._squeezed(pixels), indices

    def _squeezed(self, pixels: Tensor) -> Tensor:
        # The segments keep their size: prompts are relative, and a finer map locates them better.
        return functional.resize(pixels, list(self.size), antialias=True)


def draw_crop(size: tuple[int, ...] | torch.Size, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with 0.5 to 1 of the area, at an aspect ratio of 3/4 to 4/3."""
    height, width = size[-2], size[-1]
    # As torchvision's RandomResizedCrop, which draws from the global generator: ten tries, then the largest crop in
    # the middle whose ratio is allowed.
    for _ in range(10):
        area = height * width * generator.uniform(0.5, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(1, round(width * 4 / 3)))
    crop_width = min(width, max(1, round(height * 4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


PROMPT_SOURCES = {
    "mask": "points in the segments, all pixels of a class being equally likely",
    "coarse": "points well inside of the segments, as if these had been labelled coarsely",
    "box": "boxes around the segments, and points anywhere in such boxes",
}
IGNORED = -100  # label of a prompt without a class; cross entropy's default `ignore_index`


@dataclass(frozen=True)
class PromptSampling:
    """Draws the prompts of one image."""

    num_prompts: int = 200  # N
    source: str = "mask"  # one of `PROMPT_SOURCES`
    # A segment of the class is drawn before a pixel of it, so that small things are as frequent as large ones. Always
    # so for boxes.
    instance_aware: bool = False
    box_share: float = 0.5  # with source "box", share of prompts that are boxes; the others are points inside them

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"the number of points is {self.num_prompts}; draw at least 1 from an image")
        if self.source not in PROMPT_SOURCES:
            raise ValueError(f"there is no source of points {self.source!r}; choose one of {', '.join(PROMPT_SOURCES)}")
        if not 0 <= self.box_share <= 1:
            raise ValueError(f"box_share is {self.box_share}; give the share of prompts that are boxes, in [0, 1]")

    def __call__(
        self, segment_map: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw (N, 4) float32 prompts and (N,) int64 labels from a map (H, W) of indices into `labels` (n,)."""
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
    """Draw points and their labels, all classes of the map being equally likely.

    Args:
        region_map: (H, W) label ids, or indices into `region_labels`; negative for void.
        region_labels: label ids of the regions; all regions of a class are equally likely.

    Returns:
        (N, 2) float32 x, y of pixel centres in [0, 1], and (N,) int64 labels. If everything is void, they are the
        middle of the image and `IGNORED`.
    """
    positions, regions, starts = _sorted_regions(region_map)
    if not len(positions):
        return torch.full((num_points, 2), 0.5), torch.full((num_points,), IGNORED)
    areas = np.diff(starts, append=len(positions))
    labels = regions if region_labels is None else np.asarray(region_labels)[regions]
    drawn = _draw_balanced(labels, num_points, generator)
    chosen = positions[starts[drawn] + (generator.random(num_points) * areas[drawn]).astype(np.int64)]
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
        box_share: probability of a box rather than a point.

    Returns:
        (N, 4) float32 prompts and (N,) int64 labels. Without any box, they are the middle of the image and `IGNORED`.
    """
    if not len(boxes):
        middle = torch.tensor([0.5, 0.5, 0.0, 0.0])
        return middle.repeat(num_prompts, 1), torch.full((num_prompts,), IGNORED)
    drawn = _draw_balanced(labels, num_prompts, generator)
    corner, size = boxes[drawn, :2], boxes[drawn, 2:] - boxes[drawn, :2]
    within = generator.random((num_prompts, 2))
    is_box = generator.random((num_prompts, 1)) < box_share
    # A box lies where its object is; the official code puts all boxes at the origin.
    centers = corner + size * np.where(is_box, 0.5, within)
    prompts = np.concatenate([centers, np.where(is_box, size, 0.0)], axis=1)
    return torch.from_numpy(prompts.astype(np.float32)), torch.from_numpy(labels[drawn].astype(np.int64))


def segment_boxes(segment_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (m, 4) float64 of the outer edges, x0, y0, x1, y1 in [0, 1], and the m segments that a map (H, W) shows."""
    height, width = segment_map.shape
    positions, segments, starts = _sorted_regions(segment_map)
    if not len(segments):
        return np.zeros((0, 4)), segments
    rows, columns = np.divmod(positions, width)
    lowest = [np.minimum.reduceat(values, starts) for values in (columns, rows)]
    highest = [np.maximum.reduceat(values, starts) + 1 for values in (columns, rows)]
    return np.stack([*lowest, *highest], axis=1) / np.array([width, height, width, height]), segments


def _sorted_regions(region_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions of the pixels that are not void, sorted by region; the regions; the first position of each."""
    flat = region_map.reshape(-1)
    positions = np.flatnonzero(flat >= 0)
    # Sorted, a region is a range, so that all regions are handled at once rather than by one scan each.
    positions = positions[np.argsort(flat[positions], kind="stable")]
    regions, starts = np.unique(flat[positions], return_index=True)
    return positions, regions, starts


def mask_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`segment_boxes` of masks (n, H, W) that may overlap, and the indices of those that are not empty."""
    columns, rows = np.asarray(masks.any(1)), np.asarray(masks.any(2))
    present = np.flatnonzero(columns.sum(1))
    bounds = []
    for occupied in (columns[present], rows[present]):
        length = occupied.shape[1]
        bounds.append((occupied.argmax(1) / length, 1 - occupied[:, ::-1].argmax(1) / length))
    (x0, x1), (y0, y1) = bounds
    return np.stack([x0, y0, x1, y1], axis=1), present


def _draw_balanced(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `count` indices into `labels` (n,): a class first, then one of its members."""
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    classes = generator.integers(len(starts), size=count)
    return order[starts[classes] + (generator.random(count) * sizes[classes]).astype(np.int64)]
