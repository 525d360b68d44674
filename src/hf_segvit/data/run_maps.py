"""Maps of ids as runs of equal ids, and how outlines are painted into them.

A photograph has millions of pixels but only some ten thousand runs, so that segments are painted, looked up and cached
as runs; pixels are written for the part that is asked for, by `RunMap.cut`. H W pixels, n ids or masks, r runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.mask_encoding import decode_counts
from .class_lists import VOID

Indices = tuple[np.ndarray, np.ndarray]  # rows (h,) and columns (w,) of a map, in any order


@dataclass(frozen=True)
class RunMap:
    """A map of ids as the runs of equal ids along its rows, or along its columns as COCO's run lengths are."""

    shape: tuple[int, int]  # (H, W)
    ids: np.ndarray  # (n,) int32, ascending, without void
    indices: np.ndarray  # (r,) int16 index into `ids`, -1 for void; int32 if there are more ids
    lengths: np.ndarray  # (r,) pixels of each run; they add up to H * W
    by_columns: bool = False

    @classmethod
    def of(cls, id_map: np.ndarray) -> RunMap:
        """The runs of a map (H, W)."""
        flat = np.ascontiguousarray(id_map).reshape(-1)
        starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        return cls._of_values((id_map.shape[0], id_map.shape[1]), flat[starts], np.diff(starts, append=len(flat)))

    @classmethod
    def painted(cls, layers: Iterable[tuple[np.ndarray, int]], size: tuple[int, int], ground: int = VOID) -> RunMap:
        """Paint masks on a ground, later ones on top.

        Args:
            layers: for each mask its run lengths by columns, of outside and inside in turn, and its id, which may be
                void.
            size: (H, W).
            ground: id of pixels that no mask covers.
        """
        # All masks are cut at the edges of all, so that each is a set of whole pieces: pixels are never touched.
        spans = [(*_inside(runs), value) for runs, value in layers]
        edges = [np.array([0, size[0] * size[1]]), *(edge for starts, stops, _ in spans for edge in (starts, stops))]
        bounds = np.unique(np.concatenate(edges))
        values = np.full(len(bounds) - 1, ground, dtype=np.int64)
        for starts, stops, value in spans:
            if not len(starts):
                continue
            first, last = np.searchsorted(bounds, starts), np.searchsorted(bounds, stops)
            change = np.zeros(last[-1] - first[0] + 1, dtype=np.int8)
            change[first - first[0]] += 1
            change[last - first[0]] -= 1
            values[first[0] : last[-1]][np.cumsum(change[:-1], dtype=np.int8) > 0] = value
        starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
        lengths = np.diff(bounds[starts], append=bounds[-1])
        return cls._of_values(size, values[starts], lengths, by_columns=True)

    @classmethod
    def _of_values(
        cls, shape: tuple[int, int], values: np.ndarray, lengths: np.ndarray, by_columns: bool = False
    ) -> RunMap:
        ids = np.unique(values[values != VOID])
        indices = np.where(values == VOID, -1, np.searchsorted(ids, values))
        kind = np.int16 if len(ids) <= np.iinfo(np.int16).max else np.int32
        return cls(shape, ids.astype(np.int32), indices.astype(kind), lengths, by_columns)

    def unrolled(self, values: np.ndarray) -> np.ndarray:
        """The map (H, W) with `values` (n + 1,) in place of the ids, the last one for void."""
        pixels = np.repeat(values[self.indices], self.lengths)
        return pixels.reshape(self.shape[::-1]).T if self.by_columns else pixels.reshape(self.shape)

    def cut(self, values: np.ndarray, indices: Indices) -> np.ndarray:
        """`unrolled(values)` at the crossings of rows and columns (h, w); only lines between these are unrolled."""
        across, along = indices[::-1] if self.by_columns else indices
        low, lines = _lines(values[self.indices], np.cumsum(self.lengths, dtype=np.int64), across, self._line_length)
        cut = cut_values(lines, (across - low, along))
        return cut.T if self.by_columns else cut

    @property
    def _line_length(self) -> int:
        return self.shape[0] if self.by_columns else self.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The map (H, W) of ids, with void -1."""
        id_map = self.unrolled(np.append(self.ids, np.int32(VOID)))
        return id_map if dtype is None else id_map.astype(dtype, copy=False)


@dataclass(frozen=True)
class RunMasks:
    """Masks (n, H, W) that may overlap, as run lengths by columns."""

    size: tuple[int, int]
    runs: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.runs)

    def cut(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """The masks that are not empty at the crossings of rows and columns, (m, h, w) bool, and which (n,) these are.

        Equal to `masks[:, rows][:, :, columns]` of the decoded masks, of which only the columns in between are made.
        """
        rows, columns = indices
        height = self.size[0]
        cuts: list[np.ndarray] = []
        present = np.zeros(len(self), dtype=bool)
        for number, runs in enumerate(self.runs):
            starts, stops = _inside(runs)
            # Most masks lie outside of a small crop, which their columns alone tell.
            if not len(starts) or starts[0] // height > columns.max() or (stops[-1] - 1) // height < columns.min():
                continue
            inside = np.arange(len(runs)) % 2 == 1
            low, lines = _lines(inside, np.cumsum(runs), columns, height)
            cut = cut_values(lines, (columns - low, rows)).T
            if cut.any():
                present[number] = True
                cuts.append(cut)
        shape = (0, len(rows), len(columns))
        return (np.stack(cuts) if cuts else np.zeros(shape, dtype=bool)), present


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """Run lengths by columns, of outside and inside in turn, of an encoded mask; `ValueError` if they do not fit."""
    counts = rle["counts"]
    runs = decode_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
    height, width = (int(length) for length in rle["size"])
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"the runs of an RLE mask add up to {runs.sum()} pixels, shortest {runs.min(initial=0)}, but its size "
            f"{height} x {width} needs {height * width} in runs of at least 0: the annotation is damaged, or its "
            "size belongs to another image"
        )
    return runs


def cut_values(values: np.ndarray, indices: Indices) -> np.ndarray:
    """Values (..., H, W) at the crossings of rows and columns."""
    rows, columns = indices
    # Copying whole rows is fast, picking columns is slow: pick them in whichever has fewer rows, source or result.
    low, high = rows.min(), rows.max() + 1
    if high - low < len(rows):
        return values[..., low:high, :].take(columns, -1).take(rows - low, -2)
    return values.take(rows, -2).take(columns, -1)


def _inside(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs inside of a mask start and stop, without empty ones."""
    edges = np.cumsum(runs)
    edges = edges[: len(edges) // 2 * 2]
    starts, stops = edges[::2], edges[1::2]
    kept = starts < stops
    return starts[kept], stops[kept]


def _lines(values: np.ndarray, stops: np.ndarray, wanted: np.ndarray, length: int) -> tuple[int, np.ndarray]:
    """The first of the wanted lines of `length` pixels, and all lines up to the last, from runs that end at `stops`."""
    low, high = int(wanted.min()), int(wanted.max()) + 1
    first, last = np.searchsorted(stops, [low * length, high * length - 1], side="right")
    lengths = np.diff(np.clip(stops[first : last + 1], None, high * length), prepend=low * length)
    return low, np.repeat(values[first : last + 1], lengths).reshape(high - low, length)
