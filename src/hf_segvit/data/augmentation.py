"""Augment training images: the augmented data set and EoMT's augmentation.

- `AugmentedDataset`: entries of a reader, augmented when they are asked for.
- `augmentation`: the published recipes by name, or a class of your own. ViT-P's `PointAugmentation` is in prompts.py.
- `MaskAugmentation`: EoMT's colour jitter (color_changes.py), flip, scale jitter, crop and pad.
- `place` scales a crop into the training image, in the worker or later on the device.

An id map stays one integer channel until the batch is made (collation.py). H W pixels of the entry or the training
image, h w of the crop, n segments.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from ..lookup import import_object, is_import_path, suggestion
from .color_changes import jitter_colors
from .entries import AugmentedSample, EncodedEntry, EntryReader, Placement, decode_for_training, encode_entry
from .prompts import PointAugmentation
from .run_maps import Indices


class Augmentation(Protocol):
    """Turns an entry of a reader into a training sample."""

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment one entry, with random numbers from this generator only."""


class AugmentedDataset(Dataset):
    """A data set whose samples are augmented when they are asked for, by epoch and index.

    For a given seed `dataset[epoch, index]` is always the same sample, regardless of workers and of the order of
    access. A plain index refers to the epoch last given to `set_epoch`, for loaders that know nothing of epochs.

    Args:
        cache: folder that keeps id maps in a form that is faster to read (about 3 kB per image of COCO), see
            `MapCache`. Other runs can use it too.
    """

    def __init__(
        self, dataset: Any, augmentation: Augmentation, seed: int = 0, cache: str | os.PathLike[str] | None = None
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; give a number of at least 0")
        self.dataset, self.augmentation, self.seed = decode_for_training(dataset, cache), augmentation, seed
        self._entries = EntryReader.of(self.dataset)
        # In shared memory: persistent workers have their own copy of everything else and would miss the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of samples that are asked for by index alone."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of samples that are asked for by index alone."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> AugmentedSample:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        return self._sample(epoch, int(index) % len(self))

    def name(self, index: int) -> str:
        """Index, image id and file of a sample, for error messages."""
        try:
            # Undecoded: the name is wanted when decoding has failed.
            row = self.dataset.with_format(None)[index] if hasattr(self.dataset, "with_format") else {}
        except (KeyError, IndexError, OSError, ValueError):
            row = {}
        location = row.get("image")
        words = [f"sample {index}"]
        if "image_id" in row:
            words.append(f"image {row['image_id']!r}")
        if isinstance(location, dict) and location.get("member"):
            words.append(str(location["member"]))
        return ", ".join(words)

    def _sample(self, epoch: int, index: int) -> AugmentedSample:
        return self.augmentation(self._entries[index], sample_generator(self.seed, epoch, index))


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch: the same in every process and worker, and on every machine."""
    return np.random.default_rng([seed, epoch, index])


def augmentation(name: str, size: int | tuple[int, int], /, **overrides: Any) -> Augmentation:
    """The augmentation of a published recipe, or one of your own.

    Args:
        name: one of `AUGMENTATIONS`; or "package.module:Class" of an `Augmentation`, which is called with
            (height, width) and the overrides.
        size: (height, width) of the training images, or one number for both.
        overrides: settings that differ from the recipe's, see `MaskAugmentation` and `PointAugmentation`.

    Raises:
        ValueError: there is no such recipe, class or setting.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if is_import_path(name):
        factory = import_object(name, "augmentation")
        # Bound first, so that only a wrong signature becomes this error, and not a TypeError inside the user's code.
        try:
            inspect.signature(factory).bind((height, width), **overrides)
        except TypeError as error:
            raise ValueError(f"augmentation={name} does not take (height, width) and {overrides}: {error}") from error
        custom = factory((height, width), **overrides)
        if not callable(custom):
            raise ValueError(f"augmentation={name} has no method __call__(entry, generator); add it")
        return custom
    if name not in AUGMENTATIONS:
        remedy = suggestion(name, AUGMENTATIONS)
        raise ValueError(f"there is no augmentation {name!r}; {remedy}, or give package.module:Class")
    factory = PointAugmentation if name.startswith("vit_p") else MaskAugmentation
    _check_settings(factory, overrides)
    return factory((height, width), **{**AUGMENTATIONS[name], **overrides})


def _check_settings(factory: Any, settings: Mapping[str, Any]) -> None:
    """Refuse settings that an augmentation lacks, and values of another type than its default."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    del defaults["size"]
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"augmentation_options has no key {name!r}; {suggestion(name, defaults)}")
        if not _is_like(value, defaults[name]):
            raise ValueError(
                f"augmentation_options.{name}={str(value)[:100]} does not fit; give a value such as the default, "
                f"{list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]!r}"
            )


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        pairs = isinstance(value, list | tuple) and len(value) == len(default)
        return pairs and all(_is_like(one, other) for one, other in zip(value, default, strict=True))
    # `True` is an int to isinstance, and would stand for 1.
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


# EoMT: the official configurations. ViT-P: the paper's data sets; images of COCO are not cropped.
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "eomt_coco_panoptic": {"scale_range": (0.1, 2.0), "color_jitter": False},
    "eomt_coco_instance": {"scale_range": (0.1, 2.0), "color_jitter": False, "void_counts": True},
    "eomt_ade20k_panoptic": {"scale_range": (0.1, 2.0), "color_jitter": True},
    "eomt_semantic": {"scale_range": (0.5, 2.0), "color_jitter": True},
    "vit_p": {"crop": True},
    "vit_p_coco": {"crop": False},
}


@dataclass(frozen=True)
class Crop:
    """A crop (top, left, height, width in pixels of the original), the size it is scaled to, and whether to flip it."""

    top: int
    left: int
    height: int
    width: int
    new_height: int
    new_width: int
    flip: bool


_LARGEST_SCALE, _MOST_TRIES = 100, 1000


class MaskAugmentation:
    """Random flip, scale and crop, as in EoMT's training.

    Args:
        size: (height, width) of the result.
        scale_range: smallest and largest scale, relative to the scale at which the image just fits into `size`.
        max_tries: crops to draw until one shows a segment; after that an empty crop is accepted.
        scale_later: return the crop unscaled, with its `placement`, for `MaskCollator(on_device=True)` and
            `placed_pixels`; saves the workers a fifth of their time.
        void_counts: pixels without a segment are background and count in the loss, as in instance segmentation;
            otherwise `counted` excludes them.
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
        if not 0 < scale_range[0] <= scale_range[1] <= _LARGEST_SCALE:
            raise ValueError(
                f"scale_range is {scale_range}; give (smallest, largest), such as (0.1, 2.0), up to {_LARGEST_SCALE}"
            )
        if not 0 <= flip_probability <= 1 or not 1 <= max_tries <= _MOST_TRIES:
            raise ValueError(
                f"flip_probability is {flip_probability} and max_tries {max_tries}; give one in [0, 1] and 1 to "
                f"{_MOST_TRIES}"
            )
        self.size, self.scale_range, self.color_jitter = size, scale_range, color_jitter
        self.flip_probability, self.max_tries, self.void_counts = flip_probability, max_tries, void_counts
        self.scale_later = scale_later

    def __call__(self, entry: Mapping[str, Any], generator: np.random.Generator) -> AugmentedSample:
        """Augment an entry of a reader, see `decode_entry`."""
        encoded = encode_entry(entry)
        for _ in range(self.max_tries):
            # Only the map is cut to judge a crop; the image, which takes longer, is scaled once one is chosen.
            crop = self.draw(encoded.runs.shape, generator)
            indices = _indices(crop)
            segment_map = encoded.runs.cut(encoded.values, indices)
            if not len(encoded.labels) or segment_map.max() >= 0:
                break
        window = (slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width))
        if self.color_jitter:
            pixels = jitter_colors(encoded.pixels, generator, window)
        else:
            pixels = encoded.pixels[:, *window]
        return self._sample(entry.get("image_id"), pixels, encoded, crop, indices, segment_map)

    def draw(self, size: tuple[int, ...], generator: np.random.Generator) -> Crop:
        """Draw a crop of an image (H, W)."""
        # The official code scales the whole image and then crops it. Cropping first draws the same crops but scales
        # only what is kept, at twice the size a quarter of the work; crops then start at whole pixels of the original.
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
        cropped: Tensor,
        encoded: EncodedEntry,
        crop: Crop,
        indices: Indices,
        segment_map: np.ndarray,
    ) -> AugmentedSample:
        placement = Placement(crop.new_height, crop.new_width, crop.flip)
        # Otherwise the map that is returned tells which pixels count. It cannot where void counts but crowds (-2)
        # do not, nor where masks overlap and it is empty.
        counted = None
        if self.void_counts or encoded.masks is not None:
            counted = segment_map >= (-1 if self.void_counts else 0)
        if encoded.masks is None:
            segment_map, present = renumbered(segment_map, len(encoded.labels))
            masks = None
        else:
            cut, present = encoded.masks.cut(indices)
            masks = torch.from_numpy(_padded(cut, self.size, fill=False))
            segment_map = np.full_like(segment_map, -1)
        return AugmentedSample(
            image_id=image_id,
            # A copy, as a view would carry the whole image from the worker to the main process.
            pixels=cropped.clone() if self.scale_later else place(cropped, placement, self.size),
            segment_map=torch.from_numpy(_padded(segment_map, self.size, fill=-1)),
            labels=torch.from_numpy(encoded.labels[present]),
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


def _indices(crop: Crop) -> Indices:
    """Row (new_height,) and column (new_width,) of the original under the centre of each pixel of the result."""
    rows = crop.top + (2 * np.arange(crop.new_height) + 1) * crop.height // (2 * crop.new_height)
    columns = crop.left + (2 * np.arange(crop.new_width) + 1) * crop.width // (2 * crop.new_width)
    return rows, columns[::-1] if crop.flip else columns


def renumbered(segment_map: np.ndarray, num_segments: int) -> tuple[np.ndarray, np.ndarray]:
    """The map with its visible segments renumbered from 0 and -1 elsewhere, and which are visible (num_segments,)."""
    flat = segment_map.reshape(-1)
    # Ids are looked up once per run of equal values: there are far fewer runs than pixels.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values = np.maximum(flat[starts], -1)  # crowds become void: they are no targets
    present = np.zeros(num_segments + 1, dtype=bool)
    present[values] = True  # -1, void, marks the last item
    present = present[:-1]
    table = np.full(num_segments + 1, -1, dtype=segment_map.dtype)
    table[:-1][present] = np.arange(present.sum())
    return np.repeat(table[values], np.diff(starts, append=len(flat))).reshape(segment_map.shape), present


def _padded(values: np.ndarray, size: tuple[int, int], fill: int | bool) -> np.ndarray:
    """Values (..., h, w) padded on the right and at the bottom to `size`."""
    if values.shape[-2:] == size:
        return np.ascontiguousarray(values)
    padded = np.full((*values.shape[:-2], *size), fill, dtype=values.dtype)
    padded[..., : values.shape[-2], : values.shape[-1]] = values
    return padded


def place(crop: Tensor, placement: Placement, size: tuple[int, int]) -> Tensor:
    """Scale a crop (C, h, w) uint8 bilinearly, flip it, and pad it on the right and at the bottom with black.

    Devices other than CPUs may round differently, by at most 1. The result (C, H, W) is channels last in memory.
    """
    # With channels last in memory a CPU needs three fifths of the time for the same values.
    crop = crop.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    scaled = functional.resize(crop, [placement.height, placement.width], antialias=True)[0]
    if placement.flip:
        scaled = scaled.flip(-1)
    if (placement.height, placement.width) == size:
        return scaled
    padded = torch.zeros((*size, crop.shape[1]), dtype=torch.uint8, device=crop.device).permute(2, 0, 1)
    padded[:, : placement.height, : placement.width] = scaled
    return padded
