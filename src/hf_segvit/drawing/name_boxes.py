"""Write names on drawings: in boxes that do not overlap, and in a legend.

- `label_segments` writes each name inside of its segment, where there is room; others belong into the legend.
- `label_marks` writes names beside small marks, such as points, with a line to each.
- `legend` is a strip of colours and names, to go below a drawing.

H W pixels, R segments, K candidate positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .colors import Color, ink_on
from .fonts import Font, font_of

Measure = tuple[int, tuple[int, int, int, int]]  # area and (x, y, width, height) of a segment, in pixels

MAX_CELLS = 128  # a segment is sampled on a grid of at most so many cells a side; positions need no more precision
MAX_LABELS = 500  # the largest segments get one; among more, none would be found
MAX_CANDIDATES = 400  # positions tried inside a segment; bounds the time for crowded images
MAX_SHARE = 0.4  # of a segment that its label may hide
MIN_COVERAGE = 0.8  # of a label that must lie on its segment, or a reader would take it for the neighbour's
MAX_LEGEND_ROWS = 12
_EDGE = (30, 30, 30)  # of boxes


def label_segments(
    drawing: Image.Image,
    index: np.ndarray,
    texts: Sequence[Sequence[str]],
    colors: Sequence[Color],
    measures: Sequence[Measure] | None = None,
) -> set[int]:
    """Write the names of segments inside of them, in place; return the numbers, from 0, of the segments named.

    Args:
        index: (H, W) number of each pixel's segment, counted from 1; 0 is void. A segment may have no pixels.
        texts: for each of the R segments what may be written, the first that has room: name and score, then the name.
        colors: R colours for the boxes.
        measures: areas and bounding boxes of the R segments, if known.
    """
    size = letter_size(drawing, len(texts))
    if measures is None:
        windows = ndimage.find_objects(index, len(texts))
        areas = np.bincount(index.ravel(), minlength=len(texts) + 1)[1:]
    else:
        windows = [(slice(y, y + rows), slice(x, x + columns)) for _, (x, y, columns, rows) in measures]
        areas = np.array([area for area, _ in measures], dtype=np.int64)
    smallest = (size + 2 * _padding(size)) * size  # of any box, so that most small segments cost nothing
    large = np.flatnonzero(areas * MAX_SHARE >= smallest).tolist()
    largest = sorted(large, key=lambda number: (-areas[number], number))[:MAX_LABELS]
    boxes: dict[int, tuple[np.ndarray, str, Font]] = {}
    # Small segments first, as they have the fewest positions to choose from.
    for number in sorted(largest, key=lambda number: (areas[number], number)):
        candidates = _InnerPoints(index, number + 1, windows[number])
        for text in texts[number]:
            font = font_of(text, size)
            box_size = np.array([font.getlength(text), size]) + 2 * _padding(size)
            if box_size.prod() > MAX_SHARE * areas[number]:
                continue
            centers, others = candidates.with_room(box_size), [box for box, _, _ in boxes.values()]
            box = _free_box(centers, box_size, drawing.size, others)
            if box is not None:
                boxes[number] = box, text, font
                break
    for number, (box, text, font) in boxes.items():
        _draw_box(drawing, box, text, colors[number], font)
    return {*boxes}


def label_marks(drawing: Image.Image, index: np.ndarray, texts: Sequence[str], colors: Sequence[Color]) -> None:
    """Write a text beside each mark, in place, with a line to it; one that finds no free position is left out.

    Args:
        index: (H, W) number of each pixel's mark, counted from 1; 0 is none.
        texts: R texts; one that is wider than the image is cut.
        colors: R colours for the boxes.
    """
    size = letter_size(drawing, len(texts))
    windows = ndimage.find_objects(index, len(texts))
    visible = [number for number in range(len(texts)) if windows[number] is not None]
    boxes: dict[int, tuple[np.ndarray, str, Font]] = {}
    for number in visible[:MAX_LABELS]:
        font = font_of(texts[number] + "…", size)
        text = _fitted(texts[number], font, drawing.width - 2 * _padding(size))
        box_size = np.array([font.getlength(text), size]) + 2 * _padding(size)
        centers = _centers_around(windows[number], box_size)
        box = _free_box(centers, box_size, drawing.size, [box for box, _, _ in boxes.values()])
        if box is not None:
            boxes[number] = box, text, font
    canvas = ImageDraw.Draw(drawing)
    # All lines before all boxes, so that no line crosses a name.
    for number, ((x0, y0, x1, y1), _, _) in boxes.items():
        rows, columns = windows[number]
        x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
        if not (x0 <= x <= x1 and y0 <= y <= y1):
            canvas.line((x, y, (x0 + x1) / 2, (y0 + y1) / 2), fill=colors[number], width=max(1, size // 8))
    for number, (box, text, font) in boxes.items():
        _draw_box(drawing, box, text, colors[number], font)


def legend(width: int, entries: Mapping[str, Color], size: int) -> Image.Image:
    """A white strip of the given width with colours and names in rows, as many as fit; the rest is counted.

    Args:
        entries: colour by name, in order.
        size: height of the letters in pixels.
    """
    padding = _padding(size)
    rows: list[list[tuple[str, Color | None, Font, float]]] = [[]]
    x: float = padding
    for number, (name, color) in enumerate(entries.items()):
        font = font_of(name + "…", size)
        text = _fitted(name, font, width - 4 * padding - size)
        length = size + padding + font.getlength(text) + 3 * padding
        if rows[-1] and x + length > width:
            if len(rows) == MAX_LEGEND_ROWS:
                rest = f"… and {len(entries) - number + len(rows[-1])} more"
                rows[-1] = [(rest, None, font_of(rest, size), padding)]
                break
            rows.append([])
            x = padding
        rows[-1].append((text, color, font, round(x)))
        x += length
    line = size + 2 * padding
    strip = Image.new("RGB", (width, line * len(rows) + 2 * padding), "white")
    canvas = ImageDraw.Draw(strip)
    for row, cells in enumerate(rows):
        y = padding + row * line + line / 2
        for text, shown, font, x in cells:
            if shown is not None:
                square = (x, round(y - size / 2), x + size, round(y + size / 2))
                canvas.rectangle(square, fill=shown, outline=_EDGE)
                x += size + padding
            canvas.text((x, y), text, fill="black", font=font, anchor="lm")
    return strip


def letter_size(drawing: Image.Image, num_labels: int) -> int:
    """Height of letters in pixels: smaller in crowded images, never below the 10 that the bundled font needs."""
    return max(10, round(min(drawing.size) / (30 if num_labels <= 20 else 40)))


def _padding(size: int) -> int:
    return max(1, round(size / 4))


def _draw_box(drawing: Image.Image, box: np.ndarray, text: str, color: Color, font: Font) -> None:
    x0, y0, x1, y1 = box
    canvas = ImageDraw.Draw(drawing)
    corners = (round(x0), round(y0), round(x1), round(y1))
    canvas.rounded_rectangle(corners, radius=max(1, round((y1 - y0) / 6)), fill=color, outline=_EDGE)
    canvas.text(((x0 + x1) / 2, (y0 + y1) / 2), text, fill=ink_on(color), font=font, anchor="mm")


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


class _InnerPoints:
    """Pixels of a segment, innermost first, and which of them have room for a box around them."""

    def __init__(self, index: np.ndarray, number: int, window: tuple[slice, slice]) -> None:
        rows, columns = window
        self.step = step = max(1, -(-max(rows.stop - rows.start, columns.stop - columns.start) // MAX_CELLS))
        # A frame of background, since the edge of the image is an edge of the segment too.
        mask = np.pad(index[rows, columns][::step, ::step] == number, 1)
        y, x = np.nonzero(mask)
        deepest = np.argsort(-ndimage.distance_transform_edt(mask)[y, x], kind="stable") if len(y) else y
        if len(deepest) > MAX_CANDIDATES:
            # An even choice from the innermost on, not the first ones, whose neighbours are mostly as occupied as they.
            deepest = deepest[np.linspace(0, len(deepest) - 1, MAX_CANDIDATES).astype(int)]
        self.y, self.x = y[deepest], x[deepest]
        self.corner = np.array([columns.start - step + 0.5, rows.start - step + 0.5])
        self.sums = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))  # of the cells above and left

    def with_room(self, box_size: np.ndarray) -> np.ndarray:
        """(K, 2) x, y of pixel centres around which a box of this (width, height) lies mostly on the segment."""
        half_width, half_height = (round(extent / 2 / self.step) for extent in box_size)
        height, width = (extent - 1 for extent in self.sums.shape)
        top, bottom = np.maximum(self.y - half_height, 0), np.minimum(self.y + half_height + 1, height)
        left, right = np.maximum(self.x - half_width, 0), np.minimum(self.x + half_width + 1, width)
        covered = self.sums[bottom, right] - self.sums[top, right] - self.sums[bottom, left] + self.sums[top, left]
        has_room = covered >= MIN_COVERAGE * (2 * half_width + 1) * (2 * half_height + 1)
        return self.corner + self.step * np.stack([self.x, self.y], axis=1)[has_room]


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
    centers: np.ndarray, box_size: np.ndarray, image_size: tuple[int, int], boxes: Sequence[np.ndarray]
) -> np.ndarray | None:
    """(4,) x0, y0, x1, y1 inside the image of the first candidate that overlaps no box, or None."""
    low = np.clip(centers - box_size / 2, 0, np.maximum(np.array(image_size) - 1 - box_size, 0))
    high, others = low + box_size, np.array(boxes).reshape(-1, 1, 4)
    # One pixel stays free between boxes.
    sides = np.minimum(high, others[..., 2:]) - np.maximum(low, others[..., :2]) + 1
    free = np.flatnonzero(~(sides > 0).all(axis=2).any(axis=0))
    return np.concatenate([low[free[0]], high[free[0]]]) if len(free) else None
