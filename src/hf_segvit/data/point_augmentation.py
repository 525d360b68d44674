"""ViT-P's training augmentation: crop, rotation, flip; then points drawn from the classes that are in the picture.

`PointAugmentation` follows the official code but for two of its mistakes: corners that a rotation uncovers are void,
not class 0, and pictures are interpolated, not taken from the nearest pixel. Points are balanced between the classes of
a picture: first a class is drawn from those present, then one of its pixels. H W pixels, N points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from .augmentation import AugmentedSample
from .entry_decoding import decode_entry


class PointAugmentation:
    """Random crop, rotation and flip, and random points, as ViT-P is trained.

    Args:
        size: (height, width) of the result; the picture is squeezed to it.
        num_points: N, drawn with replacement.
        crop: cut out 0.5 to 1 of the picture's area, at an aspect ratio changed by 3/4 to 4/3.
        max_rotation: largest turn in degrees, to either side.
        flip_probability: of mirroring left and right.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        num_points: int = 200,
        crop: bool = True,
        max_rotation: float = 60.0,
        flip_probability: float = 0.5,
    ) -> None:
        if min(size) < 1 or num_points < 1:
            raise ValueError(f"size is {size} and num_points {num_points}; all must be at least 1")
        if max_rotation < 0 or not 0 <= flip_probability <= 1:
            raise ValueError(
                f"max_rotation is {max_rotation} and flip_probability {flip_probability}; give at least 0 and one in "
                "[0, 1]"
            )
        self.size, self.num_points, self.crop = size, num_points, crop
        self.max_rotation, self.flip_probability = max_rotation, flip_probability

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry of a reader, see `decode_entry`; without any segment there are labels of -100 only."""
        decoded = decode_entry(entry)
        if decoded.masks is not None:
            raise ValueError(
                f"image {entry.get('image_id')!r} has segments that may overlap, so that a point has no one class; "
                "read the data set with task panoptic or semantic"
            )
        # Points are drawn from classes, not segments.
        table = np.concatenate([[-1, -1], decoded.labels]).astype(np.int32)
        label_map = torch.from_numpy(table[decoded.segment_map + 2])[None]
        pixels, labels = self._transformed(decoded.pixels, label_map, generator)
        if not bool((labels >= 0).any()):  # the crop shows void alone
            pixels, labels = self._squeezed(decoded.pixels, label_map)
        points, point_labels = draw_points(labels[0].numpy(), self.num_points, generator)
        return AugmentedSample(
            image_id=entry.get("image_id"),
            pixels=pixels,
            segment_map=torch.full(self.size, -1, dtype=torch.int16),
            labels=torch.zeros(0, dtype=torch.int64),
            points=points,
            point_labels=point_labels,
        )

    def _transformed(self, pixels: Tensor, label_map: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.crop:
            box = draw_crop(pixels.shape[1:], generator)
            pixels = functional.resized_crop(pixels, *box, size=list(self.size), antialias=True)
            label_map = functional.resized_crop(
                label_map, *box, size=list(self.size), interpolation=InterpolationMode.NEAREST_EXACT
            )
        angle = float(generator.uniform(-self.max_rotation, self.max_rotation))
        if angle:
            pixels = functional.rotate(pixels, angle, interpolation=InterpolationMode.BILINEAR, fill=[0.0])
            # Rotation computes in floating point, which holds labels exactly.
            label_map = functional.rotate(label_map, angle, interpolation=InterpolationMode.NEAREST, fill=[-1.0])
        if generator.random() < self.flip_probability:
            pixels, label_map = functional.horizontal_flip(pixels), functional.horizontal_flip(label_map)
        return self._squeezed(pixels, label_map)

    def _squeezed(self, pixels: Tensor, label_map: Tensor) -> tuple[Tensor, Tensor]:
        # The labels keep their size: points are relative, and a finer map places them better.
        return functional.resize(pixels, list(self.size), antialias=True), label_map


def draw_crop(size: tuple[int, ...] | torch.Size, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with 0.5 to 1 of the area, at an aspect ratio of 3/4 to 4/3.

    As torchvision's RandomResizedCrop: ten tries, then the largest crop in the middle whose ratio is allowed.
    """
    height, width = size[-2], size[-1]
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


def draw_points(label_map: np.ndarray, num_points: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw points with their classes, all classes of the map being equally likely.

    Args:
        label_map: (H, W) label ids, negative where void.
        num_points: N.
        generator: of the random numbers.

    Returns:
        (N, 2) float32 x, y of pixel centres in [0, 1], and (N,) int64 labels; -100 and the middle of the picture where
        all is void.
    """
    flat = label_map.reshape(-1)
    places = np.flatnonzero(flat >= 0)
    if not len(places):
        return torch.full((num_points, 2), 0.5), torch.full((num_points,), -100)
    # Pixels in the order of their classes: a class is a range, one of its pixels a number in that range.
    places = places[np.argsort(flat[places], kind="stable")]
    classes, starts, areas = np.unique(flat[places], return_index=True, return_counts=True)
    drawn = generator.integers(len(classes), size=num_points)
    chosen = places[starts[drawn] + (generator.random(num_points) * areas[drawn]).astype(np.int64)]
    rows, columns = np.divmod(chosen, label_map.shape[1])
    points = np.stack([(columns + 0.5) / label_map.shape[1], (rows + 0.5) / label_map.shape[0]], axis=1)
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(classes[drawn].astype(np.int64))
