"""From augmented samples to a batch, ready to be pinned and moved.

`MaskCollator` makes batches for EoMT, `PointCollator` for ViT-P. On request they leave to the device what takes more
time to copy than to compute: `normalize_pixels` and `binary_masks` do the rest there.

B batch, H W pixels, n segments of an image, N prompts.
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
        image_mean: of the channels, in [0, 1]; the image processor's.
        image_std: of the channels.
        with_loss_mask: add `loss_mask`, which keeps void, crowds and padding out of the loss.
        on_device: leave `pixel_values` uint8, and give `segment_maps` in place of `mask_labels` where masks do not
            overlap; `normalize_pixels` and `binary_masks` finish the batch on the device. Of images that are still
            to be scaled (`MaskAugmentation(scale_later=True)`) there are `crops`, a list of (3, h, w) uint8, and
            `placements` (B, 3) int64 in place of `pixel_values`; `placed_pixels` makes those.
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
        batch: dict[str, Any] = {}
        if self.on_device and all(sample.placement is not None for sample in samples):
            batch["crops"] = [sample.pixels for sample in samples]
            batch["placements"] = torch.tensor([sample.placement for sample in samples])
        else:
            batch["pixel_values"] = _stacked([_placed(sample) for sample in samples])
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
        """Make a batch; images with fewer prompts than others are padded.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `prompts` (B, N, 4) float32, centre x, centre y, width,
            height in [0, 1]; `prompt_mask` (B, N) bool, False for padding and for prompts without a label, so that
            they influence nothing; `labels` (B, N) int64, -100 where that is False.

        Raises:
            ValueError: a sample has no prompts, as its augmentation is not for point classification.
        """
        pixels = _stacked([sample.pixels for sample in samples])
        prompts = [sample.prompts for sample in samples if sample.prompts is not None]
        labels = [sample.prompt_labels for sample in samples if sample.prompt_labels is not None]
        if len(prompts) != len(samples) or len(labels) != len(samples):
            raise ValueError("a sample has no prompts; augment with PointAugmentation")
        padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {
            "pixel_values": pixels if self.on_device else normalize_pixels(pixels, self.image_mean, self.image_std),
            "prompts": pad_sequence(prompts, batch_first=True),
            "prompt_mask": padded_labels != IGNORED,
            "labels": padded_labels,
        }


def placed_pixels(crops: Sequence[Tensor], placements: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale what was cut out of each image, on its device.

    Args:
        crops: B tensors (3, h, w) uint8.
        placements: (B, 3) `Placement` of each, on the CPU, or the device is waited for.
        size: (H, W) of the result, that of `segment_maps`.

    Returns:
        (B, 3, H, W) uint8.
    """
    rows = placements.tolist()
    return _stacked(
        [
            place(crop, Placement(height, width, bool(flip)), size)
            for crop, (height, width, flip) in zip(crops, rows, strict=True)
        ]
    )


def normalize_pixels(
    pixels: Tensor, image_mean: Sequence[float] = IMAGENET_MEAN, image_std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """(B, 3, H, W) uint8 to float32 values of mean 0 and standard deviation 1, on the pixels' device."""
    height, width = pixels.shape[-2:]
    return normalized_batch(list(pixels), (height, width), 1 / 255, image_mean, image_std)


def binary_masks(segment_map: Tensor, num_segments: int) -> Tensor:
    """(n, H, W) bool masks of a map (H, W) of indices 0 .. n - 1, on the map's device."""
    return segment_map == torch.arange(num_segments, dtype=segment_map.dtype, device=segment_map.device)[:, None, None]


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Images (3, H, W) as (B, 3, H, W), their channels last in memory where those of all are."""
    if not all(image.permute(1, 2, 0).is_contiguous() for image in images):
        return torch.stack(list(images))
    # Copied as they lie: a stack of them would turn every pixel.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _placed(sample: AugmentedSample) -> Tensor:
    if sample.placement is None:
        return sample.pixels
    height, width = sample.segment_map.shape
    return place(sample.pixels, sample.placement, (height, width))


def _counted(sample: AugmentedSample) -> Tensor:
    if sample.counted is None:
        return sample.segment_map >= 0
    return sample.counted
