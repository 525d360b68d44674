"""ViT-P's training augmentation: crop, rotation, flip; then prompts drawn from what is in the picture.

`PointAugmentation` follows the official code but for its mistakes: corners that a rotation uncovers are void, not class
0; boxes are where their objects are, not at the origin; pictures are interpolated, not taken from the nearest pixel.
Which prompts are drawn is in prompt_sampling.py. H W pixels, N prompts, n segments.
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
from .coarse_labels import COARSE_MARGIN, coarse_segment_map
from .entry_decoding import DecodedEntry, decode_entry
from .prompt_sampling import PromptSampling, draw_boxes, mask_boxes


class PointAugmentation:
    """Random crop, rotation and flip, and random prompts, as ViT-P is trained.

    Args:
        size: (height, width) of the result; the picture is squeezed to it.
        num_points: N, drawn with replacement.
        source: of the prompts, one of `prompt_sampling.PROMPT_SOURCES`: "mask", "coarse" or "box".
        instance_aware: draw a segment of the class before a pixel of the segment.
        box_share: with source "box", the share of prompts that are boxes; the others are points anywhere in them.
        coarse_margin: with source "coarse", how far labels stay from borders; see `coarse_segment_map`.
        crop: cut out 0.5 to 1 of the picture's area, at an aspect ratio changed by 3/4 to 4/3.
        max_rotation: largest turn in degrees, to either side. Boxes of masks that may overlap are not turned, as they
            would no longer be tight.
        flip_probability: of mirroring left and right.

    Raises:
        ValueError: an argument is out of its range.
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
        if max_rotation < 0 or not 0 <= flip_probability <= 1:
            raise ValueError(
                f"max_rotation is {max_rotation} and flip_probability {flip_probability}; give at least 0 and one in "
                "[0, 1]"
            )
        self.size, self.crop, self.coarse_margin = size, crop, coarse_margin
        self.max_rotation, self.flip_probability = max_rotation, flip_probability
        self.sampling = PromptSampling(num_points, source, instance_aware, box_share)

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry of a reader, see `decode_entry`; without any segment there are labels of -100 only.

        Raises:
            ValueError: its segments may overlap, and points are drawn from masks.
        """
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
        places = torch.from_numpy(segment_map.astype(np.int32))[None]
        pixels, transformed = self._transformed(decoded.pixels, places, generator)
        if not bool((transformed >= 0).any()):  # the crop shows void alone
            pixels, transformed = self._squeezed(decoded.pixels), places
        return pixels, *self.sampling(transformed[0].numpy(), decoded.labels, generator)

    def _from_masks(self, decoded: DecodedEntry, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of masks that may overlap."""
        pixels, masks = decoded.pixels, decoded.masks
        assert masks is not None  # see __call__
        if self.crop:
            top, left, height, width = draw_crop(pixels.shape[1:], generator)
            cut = masks[:, top : top + height, left : left + width]
            if cut.any():
                pixels, masks = pixels[:, top : top + height, left : left + width], cut
        boxes, present = mask_boxes(masks)
        pixels = self._squeezed(pixels)
        if generator.random() < self.flip_probability:
            pixels = functional.horizontal_flip(pixels)
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        sampling = self.sampling
        labels = decoded.labels[present]
        return pixels, *draw_boxes(boxes, labels, sampling.num_prompts, generator, sampling.box_share)

    def _transformed(self, pixels: Tensor, places: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.crop:
            box = draw_crop(pixels.shape[1:], generator)
            pixels = functional.resized_crop(pixels, *box, size=list(self.size), antialias=True)
            places = functional.resized_crop(
                places, *box, size=list(self.size), interpolation=InterpolationMode.NEAREST_EXACT
            )
        angle = float(generator.uniform(-self.max_rotation, self.max_rotation))
        if angle:
            pixels = functional.rotate(pixels, angle, interpolation=InterpolationMode.BILINEAR, fill=[0.0])
            # Rotation computes in floating point, which holds places exactly.
            places = functional.rotate(places, angle, interpolation=InterpolationMode.NEAREST, fill=[-1.0])
        if generator.random() < self.flip_probability:
            pixels, places = functional.horizontal_flip(pixels), functional.horizontal_flip(places)
        return self._squeezed(pixels), places

    def _squeezed(self, pixels: Tensor) -> Tensor:
        # The segments keep their size: prompts are relative, and a finer map places them better.
        return functional.resize(pixels, list(self.size), antialias=True)


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
