"""Mix several data sets into one training set.

Each data set has its own augmentation and a fixed share of every epoch, whatever its size: ViT-P is trained with fine
and coarse labels together, few images of the one and many of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .augmentation import Augmentation, AugmentedDataset, AugmentedSample, sample_generator


@dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture."""

    dataset: Any  # entries of a reader
    augmentation: Augmentation
    share: float = 1.0  # of the samples of an epoch, relative to the other parts


class MixedDataset(AugmentedDataset):
    """An `AugmentedDataset` of samples from several data sets.

    The samples of a part are adjacent, so the sampler must shuffle. A part shows all its images, in random order,
    before it repeats one, and continues in the next epoch where it stopped.

    Args:
        length: samples per epoch; by default as many as the parts have images.

    Raises:
        ValueError: there is no part, a part is empty, or a share is not positive.
    """

    def __init__(self, parts: Sequence[MixturePart], length: int | None = None, seed: int = 0) -> None:
        if not parts or any(not len(part.dataset) or not part.share > 0 for part in parts):
            given = [f"{len(part.dataset)} images with share {part.share}" for part in parts]
            raise ValueError(f"a mixture needs parts with images and positive shares, not {given}")
        super().__init__([part.dataset for part in parts], parts[0].augmentation, seed)
        self.parts = list(parts)
        self.length = sum(len(part.dataset) for part in parts) if length is None else length
        shares = np.array([part.share for part in parts], dtype=np.float64)
        # Rounding the cumulative ends, not the lengths, keeps each part within one sample of its share.
        self.ends = np.rint(np.cumsum(shares) / shares.sum() * self.length).astype(np.int64)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Index and part of a sample, for error messages; which image it shows depends on the epoch."""
        number, _ = self._part_of(index)
        return f"sample {index}, of part {number} of the mixture"

    def _sample(self, epoch: int, index: int) -> AugmentedSample:
        number, start = self._part_of(index)
        part = self.parts[number]
        # Samples of this part are counted through all epochs; each pass over its images has its own order.
        turn, position = divmod(epoch * (int(self.ends[number]) - start) + index - start, len(part.dataset))
        order = np.random.default_rng([self.seed, number, turn]).permutation(len(part.dataset))
        # Seeded by the sample, not the image: an epoch may show an image twice.
        return part.augmentation(part.dataset[int(order[position])], sample_generator(self.seed, epoch, index))

    def _part_of(self, index: int) -> tuple[int, int]:
        """Index of the part that a sample belongs to, and the part's first sample."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, int(self.ends[number - 1]) if number else 0
