"""Augmentation of training pictures: a data set that augments, and the recipes of the papers by name.

- `AugmentedDataset`: any data set of our readers, each sample changed by an augmentation. Sample i of epoch e is always
  the same under a seed, whatever the number of workers or the order of asking.
- `augmentation`: the recipes; `MaskAugmentation` (EoMT, mask_augmentation.py) and `PointAugmentation` (ViT-P,
  point_augmentation.py) are what they are made of.
- `AugmentedSample`: what comes out; collation.py makes batches of it.

An id map stays one integer channel until the batch is made. H W pixels, n segments, N prompts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .placement import Placement
from .quick_entries import quick_entries


@dataclass
class AugmentedSample:
    """One training picture.

    Attributes:
        image_id: the picture's name in its data set.
        pixels: (3, H, W) uint8; with a `placement` (3, h, w), what was cut out.
        segment_map: (H, W) int8 or int16, place of each pixel's segment in `labels`; -1 where there is none.
        labels: (n,) int64 label ids.
        counted: (H, W) bool, False where pixels are void, a crowd or padding; `None`: where `segment_map`
            has no segment.
        masks: (n, H, W) bool where masks may overlap and the map cannot hold them; otherwise `None`.
        placement: how `pixels` are still to be scaled; `None`: they are finished.
        prompts: (N, 4) float32 centre x, centre y, width, height in [0, 1], for point classification.
        prompt_labels: (N,) int64, -100 where a prompt has none.
    """

    image_id: Any
    pixels: Tensor
    segment_map: Tensor
    labels: Tensor
    counted: Tensor | None = None
    masks: Tensor | None = None
    placement: Placement | None = None
    prompts: Tensor | None = None
    prompt_labels: Tensor | None = None


class Augmentation(Protocol):
    """What turns an entry of a reader into a training sample."""

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment one entry with random numbers of this generator alone."""


class AugmentedDataset(Dataset):
    """A data set whose samples are augmented when they are asked for.

    Call `set_epoch` before each epoch; workers that live longer than an epoch follow.

    Args:
        dataset: entries of our readers.
        augmentation: what to do with them.
        seed: of all randomness.
        cache: folder that keeps id maps in a form that is quicker to read, see `MapCache`; some 3 kB a picture of
            COCO. It serves as long as the files are the same, also other runs; `None` keeps none.

    Raises:
        ValueError: the seed is negative, or the folder cannot be written to.
    """

    def __init__(
        self, dataset: Any, augmentation: Augmentation, seed: int = 0, cache: str | os.PathLike[str] | None = None
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; give a number of at least 0")
        self.dataset, self.augmentation, self.seed = quick_entries(dataset, cache), augmentation, seed
        # In shared memory, as workers that persist have their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose random numbers are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other random numbers than in the epochs before."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> AugmentedSample:
        return self.augmentation(self.dataset[index], sample_generator(self.seed, self.epoch, index))


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of sample `index` in an epoch: the same on every process, worker and machine."""
    return np.random.default_rng([seed, epoch, index])


def augmentation(name: str, size: int | tuple[int, int], **overrides: Any) -> Augmentation:
    """The augmentation of a published recipe.

    Args:
        name: one of `AUGMENTATIONS`.
        size: (height, width) of the training pictures, or one number for both.
        overrides: other settings than the recipe's, see `MaskAugmentation` and `PointAugmentation`.

    Raises:
        ValueError: there is no such recipe; the message lists those there are.
    """
    from .mask_augmentation import MaskAugmentation
    from .point_augmentation import PointAugmentation

    if name not in AUGMENTATIONS:
        raise ValueError(f"there is no augmentation {name!r}; choose one of {', '.join(AUGMENTATIONS)}")
    settings = {**AUGMENTATIONS[name], **overrides}
    height, width = (size, size) if isinstance(size, int) else size
    return (PointAugmentation if name.startswith("vit_p") else MaskAugmentation)((height, width), **settings)


# EoMT: the official configurations. ViT-P: the paper's data sets; those of COCO are not cropped.
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "eomt_coco_panoptic": {"scale_range": (0.1, 2.0), "color_jitter": False},
    "eomt_coco_instance": {"scale_range": (0.1, 2.0), "color_jitter": False, "void_counts": True},
    "eomt_ade20k_panoptic": {"scale_range": (0.1, 2.0), "color_jitter": True},
    "eomt_semantic": {"scale_range": (0.5, 2.0), "color_jitter": True},
    "vit_p": {"crop": True},
    "vit_p_coco": {"crop": False},
}
