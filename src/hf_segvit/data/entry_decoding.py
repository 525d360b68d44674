"""From an entry of a reader to tensors: the picture, and its segments as one channel of small integers.

A reader numbers segments as its files do, with gaps up to 2**24. `decode_entry` replaces the numbers by places in a
list of labels, so that everything behind works with int8 (int16 where a picture has many segments) and needs no search.

H W pixels, n segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.mask_encoding import decode_mask
from .run_maps import RunMap

CROWD = -2  # in a segment map: pixels of a crowd, which is no training target
MANY = 100  # segments whose places no longer go into int8, with room for sums


@dataclass
class DecodedEntry:
    """One picture and its segments.

    Attributes:
        pixels: (3, H, W) uint8, a view whose channels lie next to one another in memory.
        segment_map: (H, W) int8, or int16 from `MANY` segments on, place of each pixel's segment in `labels`; -1 void,
            `CROWD` crowds.
        labels: (n,) int64 label ids of all segments but crowds.
        masks: (n, H, W) bool where the segments came as masks that may overlap; otherwise `None`.
    """

    pixels: Tensor
    segment_map: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


def decode_entry(entry: Mapping[str, Any]) -> DecodedEntry:
    """Decode an entry.

    Args:
        entry: `image` (Pillow, (H, W, 3) uint8, or a tensor (3, H, W) uint8), `image_id`, `segment_map` ((H, W), or a
            `RunMap`; `None` where every segment has an `rle`) and `segments`.

    Raises:
        ValueError: sizes differ, or the map holds ids that `segments` has no row for.
    """
    name = f"image {entry.get('image_id')!r}"
    image = entry["image"]
    if isinstance(image, Tensor):
        pixels = image
    else:
        picture = image.convert("RGB") if isinstance(image, Image.Image) else image
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
    size = (pixels.shape[1], pixels.shape[2])
    rows = [row for row in entry["segments"] if not row["is_crowd"]]
    crowds = [row for row in entry["segments"] if row["is_crowd"]]
    labels = np.array([row["label_id"] for row in rows], dtype=np.int64)
    if any(row.get("rle") is not None for row in entry["segments"]):
        masks = np.stack([_mask(row, size, name) for row in rows]) if rows else np.zeros((0, *size), dtype=bool)
        segment_map = np.full(size, -1, dtype=np.int16)
        for row in crowds:
            segment_map[_mask(row, size, name)] = CROWD
        segment_map[masks.any(0)] = 0
        return DecodedEntry(pixels, segment_map, labels, masks)
    id_map = entry["segment_map"] if isinstance(entry["segment_map"], RunMap) else np.asarray(entry["segment_map"])
    if id_map.shape != size:
        raise ValueError(f"{name} is {size[0]} x {size[1]} but its segment map {id_map.shape} (height x width)")
    values = {row["id"]: place for place, row in enumerate(rows)} | {row["id"]: CROWD for row in crowds}
    # Half the bytes are cut, renumbered and copied in two thirds of the time.
    dtype = np.int8 if len(rows) < MANY else np.int16
    return DecodedEntry(pixels, replace_ids(id_map, values, name, dtype), labels, None)


def replace_ids(
    id_map: np.ndarray | RunMap, values: Mapping[int, int], name: str = "the image", dtype: Any = np.int16
) -> np.ndarray:
    """Replace the ids of a map (H, W) by other numbers; -1 stays.

    Returns:
        (H, W) of `dtype`.

    Raises:
        ValueError: the map holds another id.
    """
    # Segments are compact, so a picture has far fewer runs of equal ids than pixels: ids are looked up once per run.
    runs = id_map if isinstance(id_map, RunMap) else RunMap.of(id_map)
    table = {-1: -1, **values}
    found = runs.ids.tolist()
    strangers = [value for value in found if value not in table]
    if strangers:
        raise ValueError(f"{name}: its map holds ids {strangers[:5]} that segments has no row for; add the rows")
    return runs.unrolled(np.array([table[value] for value in [*found, -1]], dtype=dtype))


def _mask(row: Mapping[str, Any], size: tuple[int, int], name: str) -> np.ndarray:
    if row.get("rle") is None:
        raise ValueError(f"{name}: segment {row['id']} has no rle while others have; give all or none")
    if tuple(int(length) for length in row["rle"]["size"]) != size:
        raise ValueError(f"{name} is {size[0]} x {size[1]} but the mask of segment {row['id']} is {row['rle']['size']}")
    return decode_mask(row["rle"])
