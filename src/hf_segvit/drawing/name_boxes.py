"""Draw the names of segments in boxes that do not overlap.

`draw_labels` puts each name at the innermost point of its segment. If the box would hide the segment, it goes beside
it, with a line to it. A name that finds no free position is left out.

H W pixels, R segments, K candidate positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .fonts import Font, font_of

Measure = tuple[int, tuple[int, int, int, int]]  # area and (x, y, width, height) of a segment, in pixels

MAX_CELLS = 128  # a segment is sampled on a grid of at most so many cells a side; positions need no more precision
MAX_LABELS = 500  # the largest segments get one; among more, none would be found
MAX_CANDIDATES = 400  # positions tried inside a segment; bounds the time for crowded images


def draw_labels(
    drawing: Image.Image,
    index: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    measures: Sequence[Measure] | None = None,
) -> None:
    """Write the labels of all segments into an RGB drawing, in place.

    Args:
        index: (H, W) number of each pixel's segment, counted from 1; 0 is void. A segment may have no pixels.
        texts: R labels; one that is wider than the image is cut.
        colors: R colours for the boxes.
        measures: areas and bounding boxes of the R segments, if known.
    """
    height, width = index.shape
    # Crowded images get smaller letters, none below the 10 pixels that the bundled font needs to be read.
    size = max(10, round(min(height, width) / (30 if len(texts) <= 20 else 40)))
    padding = max(1, round(size / 4))
    if measures is None:
        windows = ndimage.find_objects(index, len(texts))
        areas = np.bincount(index.ravel(), minlength=len(texts) + 1)[1:]
    else:
        windows = [(slice(y, y + rows), slice(x, x + columns)) for _, (x, y, columns, rows) in measures]
        areas = np.array([area for area, _ in measures], dtype=np.int64)
    boxes: dict[int, np.ndarray] = {}
    anchors: dict[int, tuple[float, float]] = {}
    fitted = {}
    fonts = {}
    largest = sorted(np.flatnonzero(areas).tolist(), key=lambda number: (-areas[number], number))[:MAX_LABELS]
    # Small segments first, as they have the fewest positions to choose from.
    for number in sorted(largest, key=lambda number: (areas[number], number)):
        fonts[number] = font = font_of(texts[number] + "…", size)
        fitted[number] = _fitted(texts[number], font, width - 2 * padding)
        box_size = np.array([font.getlength(fitted[number]) + 2 * padding, size + 2 * padding])
        inside = _inner_points(index, number + 1, windows[number])
        beside = _centers_around(windows[number], box_size)
        hides_segment = box_size.prod() > 0.5 * areas[number]
        centers = np.concatenate([beside, inside] if hides_segment else [inside, beside])
        box = _free_box(centers, box_size, np.array([width, height]), [*boxes.values()])
        if box is not None:
            boxes[number] = box
            anchors[number] = (float(inside[0, 0]), float(inside[0, 1]))

    canvas = ImageDraw.Draw(drawing)
    # All lines before all boxes, so that no line crosses a name.
    for number, (x0, y0, x1, y1) in boxes.items():
        x, y = anchors[number]
        # Boxes can be larger than a tiny image, with their centre outside it.
        middle_y, middle_x = min(int((y0 + y1) / 2), height - 1), min(int((x0 + x1) / 2), width - 1)
        if not (x0 <= x <= x1 and y0 <= y <= y1) and index[middle_y, middle_x] != number + 1:
            canvas.line((x, y, (x0 + x1) / 2, (y0 + y1) / 2), fill=colors[number], width=max(1, size // 8))
    for number, (x0, y0, x1, y1) in boxes.items():
        luminance = np.dot(colors[number], (0.299, 0.587, 0.114))  # luma of ITU-R BT.601
        corners = (round(x0), round(y0), round(x1), round(y1))
        canvas.rounded_rectangle(corners, radius=padding, fill=colors[number], outline=(30, 30, 30))
        ink = "black" if luminance > 120 else "white"
        canvas.text(((x0 + x1) / 2, (y0 + y1) / 2), fitted[number], fill=ink, font=fonts[number], anchor="mm")


def _fitted(text: str, font: Font, width: float) -> str:
    """The text, cut at its end until it is no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    # By halves, as each measure takes time in proportion to the text.
    fits, too_long = 1, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if font.getlength(text[:middle] + "…") <= width else (fits, middle)
    return text[:fits].rstrip() + "…"


def _inner_points(index: np.ndarray, number: int, window: tuple[slice, slice]) -> np.ndarray:
    """(K, 2) x, y of pixel centres in a segment, innermost first."""
    rows, columns = window
    step = max(1, -(-max(rows.stop - rows.start, columns.stop - columns.start) // MAX_CELLS))
    # A frame of background, since the edge of the image is an edge of the segment too.
    mask = np.pad(index[rows, columns][::step, ::step] == number, 1)
    if not mask.any():  # thinner than a step, so the grid missed it
        return np.array([[(columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2]])
    depth = ndimage.distance_transform_edt(mask)
    y, x = np.nonzero(mask)
    deepest = np.argsort(-depth[y, x], kind="stable")
    if len(deepest) > MAX_CANDIDATES:
        # An even choice from the innermost on, not the first ones, whose neighbours are mostly as occupied as they are.
        deepest = deepest[np.linspace(0, len(deepest) - 1, MAX_CANDIDATES).astype(int)]
    return np.stack([columns.start + (x[deepest] - 1) * step, rows.start + (y[deepest] - 1) * step], axis=1) + 0.5


def _centers_around(window: tuple[slice, slice], box_size: np.ndarray) -> np.ndarray:
    """(K, 2) x, y of box centres around a segment's bounding box, nearest first."""
    rows, columns = window
    middle = np.array([(columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2])
    extent = np.array([columns.stop - columns.start, rows.stop - rows.start])
    # Touching the bounding box, then one box further away, and so on; more steps vertically, as boxes are flat.
    x, y = ((extent[axis] + box_size[axis]) / 2 + box_size[axis] * np.arange(5) for axis in (0, 1))
    offsets = [(dx, dy) for dx in (0, *x[:2], *-x[:2]) for dy in (0, *-y, *y) if dx or dy]
    return middle + sorted(offsets, key=lambda offset: np.hypot(*offset))


def _free_box(
    centers: np.ndarray, box_size: np.ndarray, image_size: np.ndarray, boxes: Sequence[np.ndarray]
) -> np.ndarray | None:
    """(4,) x0, y0, x1, y1 inside the image of the first candidate that overlaps no box, or None."""
    low = np.clip(centers - box_size / 2, 0, np.maximum(image_size - 1 - box_size, 0))
    high, others = low + box_size, np.array(boxes).reshape(-1, 1, 4)
    # One pixel stays free between boxes.
    sides = np.minimum(high, others[..., 2:]) - np.maximum(low, others[..., :2]) + 1
    free = np.flatnonzero(~(sides > 0).all(axis=2).any(axis=0))
    return np.concatenate([low[free[0]], high[free[0]]]) if len(free) else None
