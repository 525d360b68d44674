"""Polygons and run-length masks of annotations: checked first, then drawn.

The C code of pycocotools crashes on far coordinates and returns uninitialised memory for short runs, so nothing reaches
it unchecked. `polygon_fault` and `rle_fault` say what is wrong; `draw_polygons` gives the mask that COCO's tools draw.
H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..models.mask_encoding import decode_counts, encode_counts


def polygon_fault(polygon: Any, size: tuple[int, int]) -> str:
    """What is wrong with a polygon.

    Args:
        polygon: x, y, x, y, ... in pixels.
        size: (H, W) of the picture.

    Returns:
        What is wrong, or "" for a polygon that can be drawn. Points may lie outside of the picture by its own size at
        most: annotation tools overshoot a little, and the drawing is cut off at the picture's edge.
    """
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        return "a polygon is a flat list of numbers x, y, x, y, ..."
    if points.ndim != 1:
        return "a polygon is a flat list of numbers x, y, x, y, ..."
    if len(points) < 6 or len(points) % 2:
        return f"a polygon of {len(points)} numbers; it takes at least 3 points of x and y"
    if not np.isfinite(points).all():
        return "a polygon with a coordinate that is NaN or infinite"
    height, width = size
    low, high = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    if low[0] < -width or low[1] < -height or high[0] > 2 * width or high[1] > 2 * height:
        return (
            f"a polygon that reaches from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}), far outside of the "
            f"picture of {width} x {height} pixels"
        )
    return ""


def rle_fault(rle: Any, size: tuple[int, int]) -> str:
    """What is wrong with a run-length mask, {"size": [H, W], "counts": str or list of ints}; "" if nothing is."""
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        return "an RLE mask needs `size` and `counts`"
    try:
        stated = tuple(int(length) for length in rle["size"])
    except (TypeError, ValueError, OverflowError):
        return f"an RLE mask whose size is {rle['size']!r}; it must be [height, width]"
    if stated != size:
        note = "; height and width are swapped" if stated == size[::-1] else ""
        return f"an RLE mask of size {list(stated)} for a picture of {list(size)} (height, width){note}"
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return str(error)
    elif isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        runs = np.array(counts, dtype=np.int64) if max(map(abs, counts), default=0) < 2**62 else np.array([-1])
    else:
        return "an RLE mask whose counts are neither text nor a list of whole numbers"
    if not len(runs):
        return "an RLE mask with no counts"
    # Each run is bounded before they are summed, as the sum of huge ones could wrap around.
    if runs.min() < 0 or runs.max() > size[0] * size[1] or runs.sum() != size[0] * size[1]:
        return f"an RLE mask whose runs do not add up to the picture's {size[0]} * {size[1]} pixels"
    return ""


def compressed_counts(counts: str | bytes | Sequence[int]) -> str:
    """Counts of a faultless mask as compressed text."""
    if isinstance(counts, bytes):
        return counts.decode("ascii")
    return counts if isinstance(counts, str) else encode_counts(counts)


def draw_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    """The union of polygons as COCO's own tools draw it.

    Args:
        polygons: faultless ones, x, y, x, y, ... in pixels.
        size: (H, W) of the picture.

    Returns:
        {"size": [H, W], "counts": str}.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    drawn = coco_mask.frPyObjects([np.asarray(polygon, dtype=np.float64).tolist() for polygon in polygons], *size)
    merged = coco_mask.merge(drawn) if len(drawn) > 1 else drawn[0]
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}
