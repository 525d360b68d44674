"""From augmented samples to a batch, ready to be pinned and moved.

`MaskCollator` makes batches for EoMT, `PointCollator` for ViT-P. On request they leave to the device what takes more
time to copy than to compute: `normalize_pixels` and `binary_masks` do the rest there.

B batch, H W pixels, n segments of a picture, N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .augmentation import AugmentedSample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class MaskCollator:
    """Batches for mask classification.

    Attributes:
        image_mean: of the channels, in [0, 1]; the image processor's.
        image_std: of the channels.
        with_loss_mask: add `loss_mask`, which keeps void, crowds and padding out of the loss.
        on_device: leave `pixel_values` uint8, and give `segment_maps` in place of `mask_labels` where masks do not
            overlap; `normalize_pixels` and `binary_masks` finish the batch on the device.
    """

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    with_loss_mask: bool = False
    on_device: bool = False

    def __call__(self, samples: Sequence[AugmentedSample]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `mask_labels`, a list of B (n, H, W) bool; `class_labels`,
            a list of B (n,) int64; and `loss_mask` (B, H, W) bool if asked for.
        """
        batch: dict[str, Any] = {"pixel_values": torch.stack([sample.pixels for sample in samples])}
        if not self.on_device:
            batch["pixel_values"] = normalize_pixels(batch["pixel_values"], self.image_mean, self.image_std)
        if self.on_device and all(sample.masks is None for sample in samples):
            batch["segment_maps"] = torch.stack([sample.segment_map for sample in samples])
        else:
            batch["mask_labels"] = [
                binary_masks(sample.segment_map, len(sample.labels)) if sample.masks is None else sample.masks
                for sample in samples
            ]
        batch["class_labels"] = [sample.labels for sample in samples]
        if self.with_loss_mask:
            batch["loss_mask"] = torch.stack([_counted(sample) for sample in samples])
        return batch


@dataclass
class PointCollator:
    """Batches for point classification.

    Attributes:
        image_mean: of the channels, in [0, 1]; the image processor's.
        image_std: of the channels.
        on_device: leave `pixel_values` uint8; `normalize_pixels` finishes them on the device.
    """

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    on_device: bool = False

    def __call__(self, samples: Sequence[AugmentedSample]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `prompts` (B, N, 4) float32, x, y, 0, 0 in [0, 1]; `labels`
            (B, N) int64, -100 where a point has none.

        Raises:
            ValueError: a sample has no points, as its augmentation is not for point classification.
        """
        pixels = torch.stack([sample.pixels for sample in samples])
        points = [sample.points for sample in samples if sample.points is not None]
        labels = [sample.point_labels for sample in samples if sample.point_labels is not None]
        if len(points) != len(samples) or len(labels) != len(samples):
            raise ValueError("a sample has no points; augment with PointAugmentation")
        located = torch.stack(points)
        return {
            "pixel_values": pixels if self.on_device else normalize_pixels(pixels, self.image_mean, self.image_std),
            "prompts": torch.cat([located, torch.zeros_like(located)], dim=-1),
            "labels": torch.stack(labels),
        }


def normalize_pixels(
    pixels: Tensor, image_mean: Sequence[float] = IMAGENET_MEAN, image_std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """(B, 3, H, W) uint8 to float32 values of mean 0 and standard deviation 1, on the pixels' device."""
    mean = torch.tensor(image_mean, device=pixels.device).mul(255).reshape(-1, 1, 1)
    std = torch.tensor(image_std, device=pixels.device).mul(255).reshape(-1, 1, 1)
    return pixels.to(torch.float32).sub_(mean).div_(std)


def binary_masks(segment_map: Tensor, num_segments: int) -> Tensor:
    """(n, H, W) bool masks of a map (H, W) of places 0 .. n - 1, on the map's device."""
    return segment_map == torch.arange(num_segments, dtype=segment_map.dtype, device=segment_map.device)[:, None, None]


def _counted(sample: AugmentedSample) -> Tensor:
    if sample.counted is None:
        return torch.ones(sample.pixels.shape[1:], dtype=torch.bool)
    return sample.counted
