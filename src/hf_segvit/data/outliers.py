"""Paste objects of other data into training images, as outliers to reject.

`OutlierObjects` draws objects from a folder of cut-outs with transparency, or from the things of a data set, such as
COCO or generated scenes. `OutlierPasting` pastes them after another augmentation: their pixels are void for the masks,
and `outliers` of the sample. Objects on Cityscapes that are no Cityscapes class are the outliers of RbA (Nayal et al.,
ICCV 2023) and Mask2Anomaly (Rai et al., ICCV 2023). H W pixels of the training image, h w of an object.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..models.image_claims import checked_claims
from .archives import Location, location_name, read_location
from .augmentation import Augmentation, renumbered
from .entries import AugmentedSample, decode_entry, decode_for_training
from .folders import DataFolder
from .reading import available_tasks, describe, load_segmentation_dataset

_CUT_OUTS = (".png", ".webp", ".tif", ".tiff", ".gif")  # formats with transparency
_FEWEST_PIXELS = 64  # of an object: fewer show nothing
_MOST_TRIES = 20


class OutlierObjects:
    """Objects to paste.

    Args:
        source: folder or zip archive of images whose transparency cuts out an object each, or FORMAT:PATH of a data set
            with objects.
        split: of the data set; by default the first.
        known: names of classes that are no outliers, which a data set is read without.

    Raises:
        ValueError: the source cannot be read, or has no object to paste.
    """

    def __init__(self, source: str, split: str | None = None, known: Collection[str] = ()) -> None:
        self.source = source
        self.files: list[Location] = []
        self.dataset: Any = None
        self.labels = frozenset[int]()
        if ":" not in source or source[1:3] == ":\\":
            self.files = list(DataFolder(source).files("", suffixes=_CUT_OUTS).values())
            if not self.files:
                raise ValueError(
                    f"{source}: holds no cut-outs; give PNGs with transparency, or FORMAT:PATH of a data set"
                )
            return
        task = next((name for name in ("instance", "panoptic") if name in available_tasks(source)), None)
        if task is None:
            raise ValueError(f"{source}: semantic maps tell no objects apart; give data with objects to paste")
        dataset = load_segmentation_dataset(source, split=split, task=task)
        facts = describe(dataset)
        excluded = {name.casefold() for name in known}
        self.labels = frozenset(
            label
            for label, name in facts.id2label.items()
            if name.casefold() not in excluded and (task == "instance" or label not in facts.stuff_classes)
        )
        if not self.labels:
            raise ValueError(f"{source}: all of its things are classes that are learnt; give data with other objects")
        self.dataset = decode_for_training(dataset)

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor] | None:
        """Pixels (3, h, w) uint8 and mask (h, w) bool of an object; `None` if several images show none."""
        for _ in range(_MOST_TRIES):
            number = int(generator.integers(len(self.files) or len(self.dataset)))
            found = self._cut_out(self.files[number]) if self.files else self._object(number, generator)
            if found is not None:
                return found
        return None

    def _cut_out(self, location: Location) -> tuple[Tensor, Tensor] | None:
        name, content = location_name(location), read_location(location)
        checked_claims(content, name)
        try:
            image = Image.open(BytesIO(content))
            has_alpha = "A" in image.mode or "transparency" in image.info
            rgba = np.array(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{name}: cannot be read as an image ({error}); remove it from the cut-outs") from error
        if not has_alpha:
            raise ValueError(f"{name}: has no transparency, so that nothing is cut out; save it with an alpha channel")
        return _cropped(torch.from_numpy(rgba[..., :3]).permute(2, 0, 1), rgba[..., 3] >= 128)

    def _object(self, number: int, generator: np.random.Generator) -> tuple[Tensor, Tensor] | None:
        decoded = decode_entry(self.dataset[number])
        chosen = [index for index, label in enumerate(decoded.labels.tolist()) if label in self.labels]
        if not chosen or decoded.pixels.shape[0] != 3:
            return None
        index = chosen[int(generator.integers(len(chosen)))]
        return _cropped(decoded.pixels, decoded.segment_map == index if decoded.masks is None else decoded.masks[index])


def _cropped(pixels: Tensor, mask: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """The part of an image that an object is in."""
    if mask.sum() < _FEWEST_PIXELS:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return pixels[:, *window], torch.from_numpy(np.ascontiguousarray(mask[window]))


class OutlierPasting:
    """An augmentation, and after it objects pasted at random.

    Args:
        augmentation: gives finished samples, not such as are scaled later.
        probability: share of the images that get objects; 0.2 is RbA's.
        max_objects: an image gets 1 to as many.
        scale_range: longer side of an object, relative to the shorter side of what is labelled.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        objects: OutlierObjects,
        probability: float = 0.2,
        max_objects: int = 1,
        scale_range: tuple[float, float] = (0.1, 0.5),
    ) -> None:
        if not 0 < scale_range[0] <= scale_range[1] <= 1:
            raise ValueError(f"scale_range is {scale_range}; give (smallest, largest), above 0 and at most 1")
        self.augmentation, self.objects, self.probability = augmentation, objects, probability
        self.max_objects, self.scale_range = max_objects, scale_range

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry; the pasted pixels are `outliers` of the sample."""
        sample = self.augmentation(entry, generator)
        if sample.placement is not None or sample.pixels.shape[0] != 3:
            raise ValueError("outliers are pasted into finished images of 3 channels; leave them out of the recipe")
        outliers = torch.zeros(sample.segment_map.shape, dtype=torch.bool)
        labelled = sample.segment_map >= 0 if sample.masks is None else sample.masks.any(0)
        if generator.random() < self.probability and labelled.any():
            pixels = sample.pixels.clone()
            for _ in range(int(generator.integers(1, self.max_objects + 1))):
                if (drawn := self.objects.draw(generator)) is not None:
                    self._paste(*drawn, pixels, outliers, labelled, generator)
            sample = replace(sample, pixels=pixels)
        return _without_pixels(replace(sample, outliers=outliers))

    def _paste(
        self,
        drawn: Tensor,
        mask: Tensor,
        pixels: Tensor,
        outliers: Tensor,
        labelled: Tensor,
        generator: np.random.Generator,
    ) -> None:
        """Paste one object into `pixels` (3, H, W) and `outliers` (H, W), its centre inside of what is labelled."""
        rows, columns = (torch.nonzero(labelled.any(axis))[:, 0].tolist() for axis in (1, 0))
        extent = min(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        scale = generator.uniform(*self.scale_range) * extent / max(mask.shape)
        size = [max(1, round(length * scale)) for length in mask.shape]
        drawn = functional.resize(drawn, size, antialias=True)
        mask = functional.resize(mask[None].float(), size, antialias=True)[0] >= 0.5
        centre = [int(generator.integers(line[0], line[-1] + 1)) for line in (rows, columns)]
        inside, onto = [], []
        for position, length, limits in zip(centre, size, (rows, columns), strict=True):
            start = position - length // 2
            # Cut off at the edge of what is labelled: behind it is padding.
            first, last = max(start, limits[0]), min(start + length, limits[-1] + 1)
            inside.append(slice(first - start, last - start))
            onto.append(slice(first, last))
        mask = mask[*inside]
        view = pixels[:, *onto]
        view[:, mask] = drawn[:, *inside][:, mask]
        outliers[*onto] |= mask


def _without_pixels(sample: AugmentedSample) -> AugmentedSample:
    """The sample without the pixels of its outliers in any segment, and without segments that have none left."""
    outliers = sample.outliers
    assert outliers is not None
    if not outliers.any():
        return sample
    counted = None if sample.counted is None else sample.counted & ~outliers
    if sample.masks is not None:
        masks = sample.masks & ~outliers
        kept = masks.flatten(1).any(1)
        return replace(sample, masks=masks[kept], labels=sample.labels[kept], counted=counted)
    segment_map, present = renumbered(sample.segment_map.masked_fill(outliers, -1).numpy(), len(sample.labels))
    labels = sample.labels[torch.from_numpy(present)]
    return replace(sample, segment_map=torch.from_numpy(segment_map), labels=labels, counted=counted)
