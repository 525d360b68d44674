"""EoMT's training augmentation: colour jitter, flip, scale jitter, pad, crop; segments outside the crop are dropped.

The official code scales the whole picture and then crops it. `MaskAugmentation` draws the same crop but scales only
what lies inside it, which at twice the size is a quarter of the work; crops then start at whole pixels of the original.
Labels take the value under each new pixel's centre. H W pixels of the entry, n segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .augmentation import AugmentedSample
from .color_jitter import jitter_colors
from .entry_decoding import DecodedEntry, decode_entry
from .placement import Placement, place


@dataclass(frozen=True)
class Crop:
    """What is cut out (top, left, height and width in pixels of the original), and how large it becomes."""

    top: int
    left: int
    height: int
    width: int
    new_height: int
    new_width: int
    flip: bool


class MaskAugmentation:
    """Random flip, scale and crop, as EoMT is trained.

    The scale is relative to the largest at which the picture still fits into `size`. Where a crop shows no segment of a
    picture that has some, another one is drawn, `max_tries` times; pictures without segments are fine.

    Args:
        size: (height, width) of the result.
        scale_range: smallest and largest scale; 0.1 to 2 for panoptic and instance, 0.5 to 2 for semantic recipes.
        color_jitter: change colours first, see color_jitter.py.
        flip_probability: of mirroring left and right.
        max_tries: crops to draw before one without segments is taken.
        scale_later: leave the picture as it was cut out, with its `placement`; `MaskCollator(on_device=True)` passes
            both on, and `placed_pixels` scales there. That spares the workers a fifth of their time.
        void_counts: pixels of no segment are background, known to belong to no class, as in instance segmentation. If
            not, `counted` leaves them out.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale_range: tuple[float, float] = (0.1, 2.0),
        color_jitter: bool = False,
        flip_probability: float = 0.5,
        max_tries: int = 10,
        void_counts: bool = False,
        scale_later: bool = False,
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"size is {size}; give (height, width) of at least one pixel each")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range is {scale_range}; give (smallest, largest), such as (0.1, 2.0)")
        if not 0 <= flip_probability <= 1 or max_tries < 1:
            raise ValueError(
                f"flip_probability is {flip_probability} and max_tries {max_tries}; give one in [0, 1] and at least 1"
            )
        self.size, self.scale_range, self.color_jitter = size, scale_range, color_jitter
        self.flip_probability, self.max_tries, self.void_counts = flip_probability, max_tries, void_counts
        self.scale_later = scale_later

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry of a reader, see `decode_entry`."""
        decoded = decode_entry(entry)
        for _ in range(self.max_tries):
            # The crop is judged by its labels; the picture is scaled once one is chosen.
            crop = self.draw(decoded.segment_map.shape, generator)
            places = _places(crop)
            segment_map = _cut(decoded.segment_map, places)
            if not len(decoded.labels) or segment_map.max() >= 0:
                break
        pixels = jitter_colors(decoded.pixels, generator) if self.color_jitter else decoded.pixels
        return self._sample(entry.get("image_id"), pixels, decoded, crop, places, segment_map)

    def draw(self, size: tuple[int, ...], generator: np.random.Generator) -> Crop:
        """Draw a crop of a picture (H, W)."""
        fit = min(target / length for target, length in zip(self.size, size, strict=True))
        scale = fit * generator.uniform(*self.scale_range)
        flip = bool(generator.random() < self.flip_probability)
        (top, height, new_height), (left, width, new_width) = (
            _draw_extent(length, max(1, int(length * scale)), target, generator)
            for length, target in zip(size, self.size, strict=True)
        )
        return Crop(top, left, height, width, new_height, new_width, flip)

    def _sample(
        self,
        image_id: Any,
        pixels: torch.Tensor,
        decoded: DecodedEntry,
        crop: Crop,
        places: tuple[np.ndarray, np.ndarray],
        segment_map: np.ndarray,
    ) -> AugmentedSample:
        part = pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        placement = Placement(crop.new_height, crop.new_width, crop.flip)
        told_apart = self.void_counts or decoded.masks is not None  # void from crowds, or mask from mask
        counted = segment_map >= (-1 if self.void_counts else 0) if told_apart else None
        if decoded.masks is None:
            segment_map, present = _renumbered(segment_map, len(decoded.labels))
            masks = None
        else:
            cut = _cut(decoded.masks, places)
            present = np.asarray(cut.any((1, 2)))
            masks = torch.from_numpy(_padded(cut[present], self.size, fill=False))
            segment_map = np.full_like(segment_map, -1)
        return AugmentedSample(
            image_id=image_id,
            # A copy, or the whole picture would travel with its crop.
            pixels=part.clone() if self.scale_later else place(part, placement, self.size),
            segment_map=torch.from_numpy(_padded(segment_map, self.size, fill=-1)),
            labels=torch.from_numpy(decoded.labels[present]),
            counted=None if counted is None else torch.from_numpy(_padded(counted, self.size, fill=False)),
            masks=masks,
            placement=placement if self.scale_later else None,
        )


def _draw_extent(length: int, scaled: int, target: int, generator: np.random.Generator) -> tuple[int, int, int]:
    """Start and length of a crop in the original, and its length in the result, along one side."""
    if scaled <= target:
        return 0, length, scaled
    inside = min(length, max(1, round(target * length / scaled)))
    return int(generator.integers(length - inside + 1)), inside, target


def _places(crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Row (new_height,) and column (new_width,) of the original under the centre of each pixel of the result."""
    rows = crop.top + (2 * np.arange(crop.new_height) + 1) * crop.height // (2 * crop.new_height)
    columns = crop.left + (2 * np.arange(crop.new_width) + 1) * crop.width // (2 * crop.new_width)
    return rows, columns[::-1] if crop.flip else columns


def _cut(values: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Values (..., H, W) at the crossings of rows and columns."""
    rows, columns = places
    # Whole rows are copied quickly, single pixels are not: columns are taken of as few rows as possible.
    low, high = rows.min(), rows.max() + 1
    if high - low < len(rows):
        return values[..., low:high, :].take(columns, -1).take(rows - low, -2)
    return values.take(rows, -2).take(columns, -1)


def _renumbered(segment_map: np.ndarray, num_segments: int) -> tuple[np.ndarray, np.ndarray]:
    """The map with the segments that it shows numbered anew and -1 elsewhere, and which those are (num_segments,)."""
    flat = segment_map.reshape(-1)
    # Looked up once for each run of equal values, of which there are far fewer than pixels.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values = np.maximum(flat[starts], -1)  # crowds are void by now
    present = np.zeros(num_segments + 1, dtype=bool)
    present[values] = True  # of void, the last
    present = present[:-1]
    table = np.full(num_segments + 1, -1, dtype=segment_map.dtype)
    table[:-1][present] = np.arange(present.sum())
    return np.repeat(table[values], np.diff(starts, append=len(flat))).reshape(segment_map.shape), present


def _padded(values: np.ndarray, size: tuple[int, int], fill: int | bool) -> np.ndarray:
    """Values (..., h, w) padded right and below to `size`."""
    if values.shape[-2:] == size:
        return np.ascontiguousarray(values)
    padded = np.full((*values.shape[:-2], *size), fill, dtype=values.dtype)
    padded[..., : values.shape[-2], : values.shape[-1]] = values
    return padded
