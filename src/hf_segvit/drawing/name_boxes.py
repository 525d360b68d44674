"""Names of segments written into an image, each at the innermost point of its segment, without hiding one another.

`draw_labels` does it. Small segments are labelled first, as they have the fewest places; a segment that its box would
hide gets the box beside it, and a line to it. A label that finds no free place is left out.

H W pixels, R segments, K candidate places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Measure = tuple[int, tuple[int, int, int, int]]  # area and (x, y, width, height) of a segment, in pixels

MAX_CELLS = 128  # segments are looked at on a grid of at most so many cells a side: places need no more precision
MAX_CANDIDATES = 400


def draw_labels(
    drawing: Image.Image,
    index: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    measures: Sequence[Measure] | None = None,
) -> None:
    """Write the labels of all segments into a drawing.

    Args:
        drawing: RGB, changed in place.
        index: (H, W) number of each pixel's segment, counted from 1; 0 is void. A segment may have no pixel.
        texts: R labels; one that is wider than the image is cut.
        colors: R colours, of the boxes.
        measures: of the R segments, where they are known.
    """
    height, width = index.shape
    # Crowded images get smaller letters, none below the 10 pixels that the bundled font needs to be read.
    size = max(10, round(min(height, width) / (30 if len(texts) <= 20 else 40)))
    font = ImageFont.load_default(size)
    padding = max(1, round(size / 4))
    if measures is None:
        windows = ndimage.find_objects(index, len(texts))
        areas = np.bincount(index.ravel(), minlength=len(texts) + 1)[1:]
    else:
        windows = [(slice(y, y + rows), slice(x, x + columns)) for _, (x, y, columns, rows) in measures]
        areas = np.array([area for area, _ in measures], dtype=np.int64)
    placed: dict[int, np.ndarray] = {}
    anchors: dict[int, tuple[float, float]] = {}
    fitted = {}
    for number in sorted(np.flatnonzero(areas).tolist(), key=lambda number: (areas[number], number)):
        fitted[number] = _fitted(texts[number], font, width - 2 * padding)
        box_size = np.array([font.getlength(fitted[number]) + 2 * padding, size + 2 * padding])
        inside = _inner_points(index, number + 1, windows[number])
        beside = _places_around(windows[number], box_size)
        hides_segment = box_size.prod() > 0.5 * areas[number]
        centers = np.concatenate([beside, inside] if hides_segment else [inside, beside])
        place = _free_box(centers, box_size, np.array([width, height]), [*placed.values()])
        if place is None:
            continue
        placed[number] = place
        anchors[number] = (float(inside[0, 0]), float(inside[0, 1]))

    canvas = ImageDraw.Draw(drawing)
    for number, (x0, y0, x1, y1) in placed.items():
        x, y = anchors[number]
        # Boxes can be larger than a tiny image, with their middle outside of it.
        middle_y, middle_x = min(int((y0 + y1) / 2), height - 1), min(int((x0 + x1) / 2), width - 1)
        if not (x0 <= x <= x1 and y0 <= y <= y1) and index[middle_y, middle_x] != number + 1:
            canvas.line((x, y, (x0 + x1) / 2, (y0 + y1) / 2), fill=colors[number], width=max(1, size // 8))
    for number, (x0, y0, x1, y1) in placed.items():
        luminance = np.dot(colors[number], (0.299, 0.587, 0.114))
        box = (round(x0), round(y0), round(x1), round(y1))
        canvas.rounded_rectangle(box, radius=padding, fill=colors[number], outline=(30, 30, 30))
        ink = "black" if luminance > 120 else "white"
        canvas.text(((x0 + x1) / 2, (y0 + y1) / 2), fitted[number], fill=ink, font=font, anchor="mm")


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut at its end until it is no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _inner_points(index: np.ndarray, number: int, window: tuple[slice, slice]) -> np.ndarray:
    """(K, 2) x, y of pixels of a segment, innermost first."""
    rows, columns = window
    step = max(1, -(-max(rows.stop - rows.start, columns.stop - columns.start) // MAX_CELLS))
    # A frame of background, since the edge of the image is an edge of the segment too.
    mask = np.pad(index[rows, columns][::step, ::step] == number, 1)
    if not mask.any():  # thinner than a step
        return np.array([[(columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2]])
    depth = ndimage.distance_transform_edt(mask)
    y, x = np.nonzero(mask)
    deepest = np.argsort(-depth[y, x], kind="stable")
    if len(deepest) > MAX_CANDIDATES:
        # The innermost, then an even choice of the others: neighbours of a taken place are taken too.
        deepest = deepest[np.linspace(0, len(deepest) - 1, MAX_CANDIDATES).astype(int)]
    return np.stack([columns.start + (x[deepest] - 1) * step, rows.start + (y[deepest] - 1) * step], axis=1) + 0.5


def _places_around(window: tuple[slice, slice], box_size: np.ndarray) -> np.ndarray:
    """(K, 2) x, y of box centres around a segment's bounding box, nearest first."""
    rows, columns = window
    middle = np.array([(columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2])
    extent = np.array([columns.stop - columns.start, rows.stop - rows.start])
    # Touching the bounding box, then one box further off, and so on; more steps up and down, as boxes are flat.
    x, y = ((extent[axis] + box_size[axis]) / 2 + box_size[axis] * np.arange(5) for axis in (0, 1))
    offsets = [(dx, dy) for dx in (0, *x[:2], *-x[:2]) for dy in (0, *-y, *y) if dx or dy]
    return middle + sorted(offsets, key=lambda offset: np.hypot(*offset))


def _free_box(
    centers: np.ndarray, box_size: np.ndarray, image_size: np.ndarray, placed: Sequence[np.ndarray]
) -> np.ndarray | None:
    """(4,) x0, y0, x1, y1 inside the image: the first candidate that hides no placed box, if there is one."""
    low = np.clip(centers - box_size / 2, 0, np.maximum(image_size - 1 - box_size, 0))
    high, taken = low + box_size, np.array(placed).reshape(-1, 1, 4)
    # One pixel is left free between boxes.
    sides = np.minimum(high, taken[..., 2:]) - np.maximum(low, taken[..., :2]) + 1
    free = np.flatnonzero(~(sides > 0).all(axis=2).any(axis=0))
    return np.concatenate([low[free[0]], high[free[0]]]) if len(free) else None
