"""Pair images with label PNGs and read the maps.

`LabelMaps` is the mask reader of all semantic formats; `numbered_segments` splits label maps by a second map that
numbers objects; `pair_rows` finds the maps of each image by name. H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from .archives import Location, location_name
from .class_lists import VOID, ClassList
from .decoding import Segments, semantic_segments
from .mask_files import present_values, read_index_map, relabel
from .problems import ProblemList


@dataclass(frozen=True)
class LabelMaps:
    """Semantic maps: one PNG whose values stand for classes."""

    labels: Mapping[int, int]  # label id by value in the file, -1 for void
    remedy: str  # against other values, for error messages

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; a segment's id is its label id."""
        segment_map = relabel(read_index_map(maps[0]), self.labels, location_name(maps[0]), self.remedy)
        return segment_map, semantic_segments(segment_map)


def numbered_segments(labels: np.ndarray, numbers: np.ndarray, classes: ClassList) -> tuple[np.ndarray, Segments]:
    """Segments from a label map and a map that numbers objects.

    Args:
        labels: (H, W) int32 label ids, -1 for void.
        numbers: (H, W) int32, from 1 in each thing class, 0 for a crowd; ignored outside of things.

    Returns:
        (H, W) int32 ids and the rows of segments.
    """
    # Objects get number * classes + label, so that label and crowd can be read off an id; stuff and crowds keep the
    # label alone.
    count = len(classes.names)
    ids = np.where(np.isin(labels, list(classes.things)), numbers * count + labels, labels)
    rows = [
        {"id": value, "label_id": value % count, "is_crowd": value < count and value in classes.things}
        for value in present_values(ids)
        if value != VOID
    ]
    return ids, rows


def pair_rows(
    images: Mapping[str, Location], maps: Sequence[Mapping[str, Location]], problems: ProblemList
) -> list[dict[str, Any]]:
    """Rows of the table for all images that have every map.

    Args:
        images: by the name that image and map share.
        maps: for each kind of map, its files by the same name.
        problems: collects images without a map and maps without an image.
    """
    hint = ""
    for files in maps:
        unused = sorted(set(files) - set(images))
        hint = hint or _name_hint(set(images) - set(files), unused)
        for name in unused:
            problems.warn(location_name(files[name]), name, "the mask has no image of the same name; it is not used")
    rows = []
    for name, image in images.items():
        if all(name in files for files in maps):
            locations = [files[name] for files in maps]
            rows.append({"image": image, "image_id": name, "segment_map": locations, "segments": None})
        else:
            problems.error(
                location_name(image),
                name,
                f"the image has no mask of the same name; {hint or 'add it, or remove it'}",
            )
    return rows


def _name_hint(images: Set[str], masks: Sequence[str]) -> str:
    """A remedy if most masks are named like an image plus one ending, as some tools save them; otherwise ""."""
    endings = Counter[str]()
    for mask in masks:
        # The longest prefix that is an image: "a_1_mask" belongs to "a_1" rather than to "a".
        cut = next((cut for cut in range(len(mask) - 1, 0, -1) if mask[:cut] in images), 0)
        endings[mask[cut:] if cut else ""] += 1
    ending, count = max(endings.items(), key=lambda item: item[1], default=("", 0))
    return (
        f"masks seem to end in {ending!r}: rename them like their images" if ending and 2 * count > len(masks) else ""
    )
