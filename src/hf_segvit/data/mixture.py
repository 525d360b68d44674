"""One training set made of several: each gives its share of an epoch, with an augmentation of its own.

ViT-P is trained with fine and coarse labels together: few images of the one, many of the other. `MixedDataset` mixes
them so that the share of each in an epoch is what was asked for, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .augmentation import Augmentation, AugmentedDataset, AugmentedSample, sample_generator


@dataclass(frozen=True)
class MixturePart:
    """One of the data sets.

    Attributes:
        dataset: entries of our readers.
        augmentation: what to do with them.
        share: of the samples of an epoch, relative to the shares of the other parts.
    """

    dataset: Any
    augmentation: Augmentation
    share: float = 1.0


class MixedDataset(AugmentedDataset):
    """Samples of several data sets; see `AugmentedDataset`, which it can stand for.

    The samples of a part lie next to one another, so a sampler must shuffle. A part goes through all its images, in
    an order drawn anew each time, before it shows one again; where it is left at the end of an epoch the next goes on.

    Args:
        parts: the data sets.
        length: samples of an epoch; by default as many as the parts have together.
        seed: of all randomness.

    Raises:
        ValueError: there is no part, a part is empty, or a share is not positive.
    """

    def __init__(self, parts: Sequence[MixturePart], length: int | None = None, seed: int = 0) -> None:
        if not parts or any(not len(part.dataset) or not part.share > 0 for part in parts):
            facts = [f"{len(part.dataset)} images with share {part.share}" for part in parts]
            raise ValueError(f"a mixture needs parts with images and positive shares, not {facts}")
        super().__init__([part.dataset for part in parts], parts[0].augmentation, seed)
        self.parts = list(parts)
        self.length = sum(len(part.dataset) for part in parts) if length is None else length
        shares = np.array([part.share for part in parts], dtype=np.float64)
        # Ends of the parts; each part is within a sample of its share.
        self.ends = np.rint(np.cumsum(shares) / shares.sum() * self.length).astype(np.int64)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """The sample in words, for errors; which image it is changes with the epoch."""
        number, _ = self._part_of(index)
        return f"sample {index}, of part {number} of the mixture"

    def _sample(self, epoch: int, index: int) -> AugmentedSample:
        number, start = self._part_of(index)
        part = self.parts[number]
        turn, position = divmod(epoch * (int(self.ends[number]) - start) + index - start, len(part.dataset))
        order = np.random.default_rng([self.seed, number, turn]).permutation(len(part.dataset))
        # The generator is the sample's, not the image's, as an epoch may show an image twice.
        return part.augmentation(part.dataset[int(order[position])], sample_generator(self.seed, epoch, index))

    def _part_of(self, index: int) -> tuple[int, int]:
        """Number of the part that a sample is of, and the part's first sample."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, int(self.ends[number - 1]) if number else 0
