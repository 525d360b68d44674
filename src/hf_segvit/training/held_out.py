"""Hold out a part of the training images to score on, for folders without splits (`val_fraction` of a recipe).

`hold_out` decides by the names of the images and the seed alone, so every process and every resumed run gets the same
part. Frames of a sequence and copies of an image look alike: where names tell which belong together, whole groups are
held out, or scores would be those of images that training has all but seen.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..data.archives import location_name
from ..data.class_checks import object_counts
from ..data.reading import metadata

_FEWEST_GROUPS = 4  # with fewer, names tell no groups but one data set
_LARGEST_GROUP = 0.5  # of all images; a larger one is the common prefix of a camera, such as IMG_


@dataclass(frozen=True)
class HeldOut:
    """Names of the images that are not trained on, and how they were chosen, in words."""

    names: frozenset[str]
    explanation: str


def hold_out(dataset: Any, fraction: float, seed: int) -> HeldOut:
    """Choose the images to hold out.

    Raises:
        ValueError: there are too few images to have some in both parts.
    """
    names = image_names(dataset)
    if len(names) < 2:
        raise ValueError(f"val_fraction={fraction} needs two images at least, and there is {len(names)}")
    target = min(len(names) - 1, max(1, round(fraction * len(names))))
    groups = _groups(names)
    if groups is not None:
        chosen, taken = set[str](), list[str]()
        for group in sorted(groups, key=lambda group: _rank(group, seed)):
            # A large group may overshoot by half, or the share would no longer be the one that was asked for.
            if len(taken) < target and len(taken) + len(groups[group]) <= max(target * 1.5, target + 1):
                chosen.add(group)
                taken += groups[group]
        # Names such as cat_1 and dog_1 are groups, too, and would take a whole class out of the training.
        if taken and not _takes_a_class(dataset, names, set(taken)):
            how = f"{len(chosen)} of {len(groups)} groups of names that belong together"
            return HeldOut(frozenset(taken), _words(len(taken), len(names), fraction, seed, how))
    taken = sorted(names, key=lambda name: _rank(name, seed))[:target]
    return HeldOut(frozenset(taken), _words(target, len(names), fraction, seed, "single images"))


def image_names(dataset: Any) -> list[str]:
    """A name for each row: its file, or its id where the image is in a table."""
    feature = dataset.features.get("image")
    if isinstance(feature, dict) and {"archive", "member"} <= feature.keys():
        return [location_name(image) for image in metadata(dataset)["image"]]
    return [str(image_id) for image_id in metadata(dataset)["image_id"]]


def _groups(names: Sequence[str]) -> dict[str, list[str]] | None:
    """Names by group, if they tell groups: copies of Roboflow, or sequences of numbered frames and folders of them."""
    by_copy = _by(names, lambda path: path.name.partition(".rf.")[0] if ".rf." in path.name else path.name)
    if len(by_copy) < len(names):
        return by_copy if len(by_copy) > 1 else None
    by_sequence = _by(names, lambda path: re.sub(r"[\W_]*\d*$", "", path.stem))
    together = sum(len(group) for group in by_sequence.values() if len(group) > 1)
    largest = max(map(len, by_sequence.values()))
    tells = len(by_sequence) >= _FEWEST_GROUPS and 2 * together >= len(names) and largest <= _LARGEST_GROUP * len(names)
    return by_sequence if tells else None


def _by(names: Sequence[str], key: Any) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        groups[f"{path.parent}/{key(path)}"].append(name)
    return dict(groups)


def _takes_a_class(dataset: Any, names: Sequence[str], taken: set[str]) -> bool:
    """Whether a class is left with held-out objects only, as far as the table shows objects."""
    parts = [[index for index, name in enumerate(names) if (name in taken) is held] for held in (False, True)]
    kept, held = (object_counts(dataset.select(part)) for part in parts)
    return kept is not None and held is not None and not held.keys() <= kept.keys()


def _rank(name: str, seed: int) -> str:
    # Not by a list's order, which changes with the files around: a hash stays that of the name. The folder is left out,
    # as the same data may lie elsewhere tomorrow.
    return hashlib.sha256(f"{seed}:{'/'.join(PurePosixPath(name).parts[-2:])}".encode()).hexdigest()


def _words(count: int, total: int, fraction: float, seed: int, how: str) -> str:
    return f"{count} of {total} training images are held out (val_fraction={fraction:g}): {how}, by seed {seed}"
