"""BRAVO's tree: anomaly masks of SMIYC and synobjs, or the 19 classes of Cityscapes.

A split is a subset of the challenge. By default classes are known and anomaly (invalid pixels); with
`annotations=semantic` they are those of Cityscapes, and invalid pixels are void. The names of files are in
../bravo_files.py. The public data set has no ground truth, so that there is nothing to read without masks of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...metrics.bravo import NUM_CLASSES, SUBSETS
from ..archives import Location, location_name
from ..bravo_files import BravoImage, bravo_images
from ..class_lists import ANOMALY_CLASSES, VOID
from ..decoding import Segments, semantic_segments
from ..label_tables import label_table
from ..mask_files import read_index_map, relabel
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "BRAVO: anomaly masks, or with annotations=semantic the classes of Cityscapes"
TASKS = ("semantic",)
LAYOUT = (
    "bravo_SMIYC, bravo_synobjs, bravo_ACDC/fog and others, with the ground truth beside the images "
    "(NAME_gt_labelTrainIds.png, NAME_gt_invIds.png and their like), which only the challenge's server has"
)

_KINDS = ("semantic", "anomaly")
_VOID_VALUE = 255


def splits(path: str, wanted: Sequence[str] = (), annotations: str = "anomaly") -> list[str]:
    """Subsets that are scored on this kind of annotation and have masks."""
    found = {image.subset for image in _images(path, annotations)}
    return [subset for subset in SUBSETS if subset in found]


def read(path: str, split: str, task: str, problems: ProblemList, annotations: str = "anomaly") -> Reading:
    """Read one subset.

    Args:
        annotations: "anomaly" or "semantic".
    """
    rows = [
        {"image": image.image, "image_id": image.name, "segment_map": [image.labels, image.invalid], "segments": None}
        for image in _images(path, annotations)
        if image.subset == split
    ]
    if annotations == "anomaly":
        return Reading(InvalidMasks(False), list(ANOMALY_CLASSES), [0, 1], rows)
    table = label_table("cityscapes")
    return Reading(InvalidMasks(True), list(table.id2label.values()), table.stuff_classes, rows)


@dataclass(frozen=True)
class InvalidMasks:
    """Semantic maps from labels with void pixels and a mask of invalid ones."""

    semantic: bool

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`."""
        labels, invalid = (read_index_map(location) for location in maps)
        if labels.shape != invalid.shape:
            raise ValueError(f"{location_name(maps[1])}: {invalid.shape}, but the labels are {labels.shape}")
        if self.semantic:
            known = {value: value for value in range(NUM_CLASSES)} | {_VOID_VALUE: VOID}
            segment_map = relabel(labels, known, location_name(maps[0]), "it must hold train ids 0 to 18, and 255")
            segment_map[invalid != 0] = VOID
        else:
            segment_map = np.where(labels == _VOID_VALUE, VOID, invalid != 0).astype(np.int32)
        return segment_map, semantic_segments(segment_map)


def _images(path: str, annotations: str) -> list[BravoImage]:
    """Images with masks in subsets that are scored on this kind."""
    if annotations not in _KINDS:
        raise ValueError(f"annotations is {annotations!r}; choose semantic or anomaly")
    kind = _KINDS.index(annotations)
    return [
        image
        for image in bravo_images(path)
        if image.labels is not None and image.invalid is not None and SUBSETS[image.subset][kind]
    ]
