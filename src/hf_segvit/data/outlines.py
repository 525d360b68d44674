"""Outlines of masks as polygons, exact or simplified to a stated error.

`mask_polygons` follows the edges of pixels, so that polygons that are not simplified cover exactly the mask's pixels;
coordinates are those of COCO: pixel (0, 0) spans 0 to 1. `joined` makes one polygon of several parts and of holes, by
bridges of no width, for formats that know neither. H W pixels, N points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Polygon:
    """A connected part of a mask: rings (N, 2) of x, y around it, clockwise on the screen, and around its holes."""

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


def mask_polygons(mask: np.ndarray, tolerance: float = 0.0) -> list[Polygon]:
    """The parts of a mask (H, W), whose pixels touch by their sides, the largest first.

    Args:
        tolerance: most pixels that a point of the exact outline may lie from the simplified one; parts and holes that
            it would flatten to nothing are left out.
    """
    rings = _rings(np.asarray(mask, dtype=bool))
    exact = [(ring, _area(ring)) for ring in rings]
    # Simplified rings are sorted to their exteriors by the exact ones, where "inside" is certain.
    exteriors = sorted(((ring, area) for ring, area in exact if area > 0), key=lambda pair: -pair[1])
    holes: list[list[np.ndarray]] = [[] for _ in exteriors]
    for ring, area in exact:
        if area < 0:
            # The smallest exterior around a point just inside of the hole's own edge.
            around = [index for index, (outer, size) in enumerate(exteriors) if size > -area and _is_in(ring, outer)]
            holes[around[-1]].append(ring)
    polygons = []
    for (ring, _), inner in zip(exteriors, holes, strict=True):
        exterior = simplified(ring, tolerance)
        if len(exterior) < 3:
            continue
        kept = (simplified(hole, tolerance) for hole in inner)
        polygons.append(Polygon(exterior, tuple(hole for hole in kept if len(hole) >= 3)))
    return polygons


def joined(polygons: Sequence[Polygon]) -> np.ndarray:
    """One closed ring (N, 2) around all parts and holes, joined where they are nearest by bridges of no width."""
    rings = [ring for polygon in polygons for ring in (polygon.exterior, *polygon.holes)]
    if not rings:
        return np.zeros((0, 2))
    whole = rings[0]
    for ring in rings[1:]:
        distances = ((whole[:, None] - ring[None]) ** 2).sum(-1)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        turned = np.concatenate([ring[there:], ring[: there + 1]])
        whole = np.concatenate([whole[: here + 1], turned, whole[here:]])
    return whole


def simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A closed ring (N, 2) with fewer points, by Douglas and Peucker's rule; none of the others is further away."""
    if tolerance <= 0 or len(ring) < 4:
        return ring
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    points = np.concatenate([ring, ring[:1]])
    kept = np.zeros(len(points), bool)
    kept[[0, far, len(ring)]] = True
    spans = [(0, far), (far, len(ring))]
    while spans:
        start, stop = spans.pop()
        if stop - start < 2:
            continue
        between = points[start + 1 : stop]
        line = points[stop] - points[start]
        offset = between - points[start]
        length = float(line @ line)
        # To the segment, not to the endless line, as a ring may turn back.
        along = np.clip(offset @ line / length, 0, 1)[:, None] * line if length else 0
        distances = ((offset - along) ** 2).sum(1)
        worst = int(distances.argmax())
        if distances[worst] > tolerance**2:
            middle = start + 1 + worst
            kept[middle] = True
            spans += [(start, middle), (middle, stop)]
    return ring[kept[:-1]]


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """Exact rings of corners (N, 2) float64; clockwise on the screen around parts, the other way around holes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return []
    top, left = rows[0], columns[0]
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    # The pixels up left, up right, down left and down right of each vertex of the grid.
    up_left, up_right, down_left, down_right = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    falling = up_left & down_right & ~up_right & ~down_left
    rising = up_right & down_left & ~up_left & ~down_right
    is_corner = (up_left ^ up_right ^ down_left ^ down_right) | falling | rising
    y, x = is_corner.nonzero()
    # Where two pixels meet at a corner only, two rings pass: the vertex counts twice.
    twice = (falling | rising)[y, x]
    index = np.repeat(np.arange(len(y)), np.where(twice, 2, 1))
    y, x = y[index], x[index]
    second = np.append(False, index[1:] == index[:-1])
    # Corners of a row are ends of horizontal edges, in pairs; those of a column of vertical ones.
    across = np.empty(len(y), np.int64)
    across[0::2], across[1::2] = np.arange(1, len(y), 2), np.arange(0, len(y), 2)
    # The first of a double vertex ends the edge from the left; in a falling pair it belongs to the pixel up left and
    # goes up, in a rising one to the pixel down left and goes down.
    goes_down_first = rising[y, x]
    order = np.lexsort((second ^ goes_down_first, y, x))
    along = np.empty(len(y), np.int64)
    along[order[0::2]], along[order[1::2]] = order[1::2], order[0::2]
    rings = []
    visited = np.zeros(len(y), bool)
    across_list, along_list = across.tolist(), along.tolist()
    for start in range(len(y)):
        if visited[start]:
            continue
        ring, corner = [], start
        while not visited[corner]:
            partner = across_list[corner]
            visited[corner] = visited[partner] = True
            ring += [corner, partner]
            corner = along_list[partner]
        points = np.stack([x[ring], y[ring]], 1).astype(np.float64)
        # Along the first edge, what lies to the right of the way must be inside.
        first, second_point = ring[0], ring[1]
        rightwards = x[second_point] > x[first]
        column = min(x[first], x[second_point])
        below = bool(inside[y[first] + 1, column + 1])
        if rightwards != below:
            points = points[::-1]
        rings.append(points + np.array([left, top]))
    return rings


def _area(ring: np.ndarray) -> float:
    """Signed area, positive if clockwise on the screen."""
    x, y = ring[:, 0], ring[:, 1]
    return 0.5 * float(x @ np.roll(y, -1) - np.roll(x, -1) @ y)


def _is_in(hole: np.ndarray, exterior: np.ndarray) -> bool:
    """Whether a hole lies in an exterior, both exact."""
    # Half a pixel inside of the hole's topmost edge, so that the point lies on no ring.
    top = hole[:, 1].min()
    corners = hole[hole[:, 1] == top]
    x, y = corners[:, 0].min() + 0.5, top + 0.5
    start, stop = exterior, np.roll(exterior, -1, 0)
    vertical = (start[:, 0] == stop[:, 0]) & (start[:, 0] > x)
    low, high = np.minimum(start[:, 1], stop[:, 1]), np.maximum(start[:, 1], stop[:, 1])
    return bool((vertical & (low < y) & (y < high)).sum() % 2)
