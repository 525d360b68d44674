"""Collate augmented samples into batches.

`MaskCollator` makes batches for EoMT, `PointCollator` for ViT-P. With `on_device` they leave to the device what takes
longer to copy than to compute: `placed_pixels`, `normalize_pixels` and `binary_masks` finish the batch there.

B batch, H W pixels, h w of a crop, n segments of an image, N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.image_geometry import normalized_batch
from .augmentation import place
from .entries import AugmentedSample, Placement
from .prompts import IGNORED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class MaskCollator:
    """Batches for mask classification.

    Attributes:
        image_mean, image_std: per channel, in [0, 1], as in the image processor.
        with_loss_mask: add `loss_mask`, which excludes void, crowds and padding from the loss.
        on_device: leave `pixel_values` uint8, and return `segment_maps` (B, H, W) instead of `mask_labels` unless
            masks overlap. Images that are not scaled yet (`MaskAugmentation(scale_later=True)`) come as `crops`, a list
            of (3, h, w) uint8, and `placements` (B, 3) int64 instead of `pixel_values`.
    """

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    with_loss_mask: bool = False
    on_device: bool = False

    def __call__(self, samples: Sequence[AugmentedSample]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `mask_labels`, a list of B (n, H, W) bool; `class_labels`,
            a list of B (n,) int64; `loss_mask` (B, H, W) bool if asked for; and `outlier_map` (B, H, W) int8, as
            `MaskCriterion` takes it, if objects are pasted.
        """
        batch: dict[str, Any] = {}
        if self.on_device and all(sample.placement is not None for sample in samples):
            batch["crops"] = [sample.pixels for sample in samples]
            batch["placements"] = torch.tensor([sample.placement for sample in samples])
        else:
            batch["pixel_values"] = _stacked([_placed(sample) for sample in samples])
        if not self.on_device:
            batch["pixel_values"] = normalize_pixels(batch["pixel_values"], self.image_mean, self.image_std)
        # n masks of a byte per pixel take n times as long to copy to the device as the map that they follow from.
        if self.on_device and all(sample.masks is None for sample in samples):
            batch["segment_maps"] = torch.stack([sample.segment_map for sample in samples])
        else:
            batch["mask_labels"] = [
                binary_masks(sample.segment_map, len(sample.labels)) if sample.masks is None else sample.masks
                for sample in samples
            ]
        batch["class_labels"] = [sample.labels for sample in samples]
        outliers = [sample.outliers for sample in samples]
        if any(each is not None for each in outliers):
            batch["outlier_map"] = torch.stack([_outlier_map(sample) for sample in samples])
        if self.with_loss_mask:
            batch["loss_mask"] = torch.stack(
                [sample.segment_map >= 0 if sample.counted is None else sample.counted for sample in samples]
            )
        return batch


@dataclass
class PointCollator:
    """Batches for point classification; `on_device` leaves `pixel_values` uint8 for `normalize_pixels`."""

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    on_device: bool = False

    def __call__(self, samples: Sequence[AugmentedSample]) -> dict[str, Tensor]:
        """Make a batch; images with fewer prompts than others are padded.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `prompts` (B, N, 4) float32, centre x, centre y, width,
            height in [0, 1]; `prompt_mask` (B, N) bool, False for padding and for prompts without a label; `labels`
            (B, N) int64, -100 where `prompt_mask` is False.
        """
        pixels = _stacked([sample.pixels for sample in samples])
        prompts = [sample.prompts for sample in samples if sample.prompts is not None]
        labels = [sample.prompt_labels for sample in samples if sample.prompt_labels is not None]
        if len(prompts) != len(samples) or len(labels) != len(samples):
            raise ValueError("a sample has no prompts; augment with PointAugmentation")
        padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        # Prompts without a label are masked like padding, so that they do not influence the others through attention.
        return {
            "pixel_values": pixels if self.on_device else normalize_pixels(pixels, self.image_mean, self.image_std),
            "prompts": pad_sequence(prompts, batch_first=True),
            "prompt_mask": padded_labels != IGNORED,
            "labels": padded_labels,
        }


def placed_pixels(crops: Sequence[Tensor], placements: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale B crops (3, h, w) uint8 on their device into images (B, 3, H, W) of `size`.

    Args:
        placements: (B, 3), a `Placement` per row; on the CPU, since reading them from the device would stall it.
    """
    rows = [Placement(height, width, bool(flip)) for height, width, flip in placements.tolist()]
    return _stacked([place(crop, placement, size) for crop, placement in zip(crops, rows, strict=True)])


def normalize_pixels(
    pixels: Tensor, image_mean: Sequence[float] = IMAGENET_MEAN, image_std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Normalise (B, 3, H, W) uint8 to float32 by mean and standard deviation, on the pixels' device."""
    height, width = pixels.shape[-2:]
    return normalized_batch(list(pixels), (height, width), 1 / 255, image_mean, image_std)


def binary_masks(segment_map: Tensor, num_segments: int) -> Tensor:
    """(n, H, W) bool masks of a map (H, W) of indices 0 to n - 1, on the map's device."""
    return segment_map == torch.arange(num_segments, dtype=segment_map.dtype, device=segment_map.device)[:, None, None]


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, H, W) to (B, 3, H, W), channels last in memory if all of them are."""
    if not all(image.permute(1, 2, 0).is_contiguous() for image in images):
        return torch.stack(list(images))
    # Stacked in their memory order: torch.stack on (3, H, W) views would transpose every pixel.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _outlier_map(sample: AugmentedSample) -> Tensor:
    """(H, W) int8: 1 on pasted objects, 0 on other pixels that count, -1 on void."""
    known = sample.segment_map >= 0 if sample.counted is None else sample.counted
    values = known.to(torch.int8) - 1
    return values if sample.outliers is None else values.masked_fill(sample.outliers, 1)


def _placed(sample: AugmentedSample) -> Tensor:
    if sample.placement is None:
        return sample.pixels
    height, width = sample.segment_map.shape
    return place(sample.pixels, sample.placement, (height, width))
