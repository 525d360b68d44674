"""COCO's compressed run-length encoding of binary masks, without pycocotools.

In here: `encode_mask`, `decode_mask`, and those for the run lengths alone. A mask is read column by column, as
alternating runs of 0 and 1 that start with 0; from the fourth on, each run is stored as the difference to the one two
before it; a number becomes characters of 5 bits, low bits first, sign extended, plus 32 if more follow, plus 48.
Format: `maskApi.c` of the COCO API; results equal pycocotools' byte for byte.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BITS, _MORE, _OFFSET = 5, 32, 48


def encode_mask(mask: np.ndarray, frame: tuple[int, int] | None = None, top: int = 0, left: int = 0) -> dict[str, Any]:
    """Encode a mask (H, W), non-zero inside, as {"size": [H, W], "counts": str}, ready for JSON.

    Args:
        mask: the whole mask, or with a `frame` a part of it; nothing of the frame's size is allocated.
        frame: size (H, W) of the whole mask.
        top: row of the part's upper left pixel in the frame.
        left: its column.
    """
    height, width = frame or mask.shape
    edges = _run_edges(mask.astype(bool, copy=False), height) + (left * height + top)
    runs = np.diff(edges, prepend=0)
    # No run of zero pixels at the end: pycocotools writes none.
    if not edges.size or edges[-1] != height * width:
        runs = np.append(runs, height * width - (edges[-1] if edges.size else 0))
    return {"size": [height, width], "counts": encode_counts(runs)}


def _run_edges(mask: np.ndarray, height: int) -> np.ndarray:
    """Positions in the columns of a frame where a mask (H, W) in its corner starts and stops, alternating."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return rows
    # Only the bounding box is transposed: that is the slow part, and the rest of a large image is empty.
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    padded = np.zeros((right - left, bottom - top + 2), bool)
    padded[:, 1:-1] = mask[top:bottom, left:right].T
    column, row = (padded[:, 1:] != padded[:, :-1]).nonzero()
    edges = (column + left) * height + row + top
    # A run that reaches the bottom continues if the next column starts inside.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    return np.delete(edges, np.concatenate([joined, joined + 1]))


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Decode a binary mask to (H, W) bool, in column order in memory.

    `rle` is {"size": [H, W], "counts": ...} with counts as str or bytes (compressed) or a list of run lengths, the form
    in which COCO's crowd annotations are stored; a ValueError if they do not fit the size.
    """
    height, width = (int(length) for length in rle["size"])
    counts = rle["counts"]
    runs = decode_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"the runs of an RLE mask add up to {runs.sum()} pixels, shortest {runs.min(initial=0)}, but its size "
            f"{height} x {width} needs {height * width} in runs of at least 0: the annotation is damaged, or its "
            "size belongs to another image"
        )
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def encode_counts(runs: np.ndarray | Sequence[int]) -> str:
    """Compress run lengths (n,) of 0 and 1 in turn."""
    numbers = np.array(runs, np.int64)
    numbers[3:] -= np.asarray(runs, np.int64)[1:-2]
    # All numbers at once, one digit of each per round; a number is finished when only its sign is left.
    digits, present = [], []
    unfinished = np.ones(len(numbers), bool)
    while unfinished.any():
        digit = numbers & 31
        numbers = numbers >> _BITS
        more = numbers != np.where(digit & 16, -1, 0)
        digits.append(digit + np.where(more, _MORE, 0) + _OFFSET)
        present.append(unfinished)
        unfinished = unfinished & more
    if not digits:
        return ""
    return np.stack(digits, 1)[np.stack(present, 1)].astype(np.uint8).tobytes().decode("ascii")


def decode_counts(counts: str | bytes) -> np.ndarray:
    """Run lengths (n,) int64 of compressed counts; a ValueError if they are malformed."""
    return decode_counts_together([counts.encode("utf-8") if isinstance(counts, str) else counts])[0]


def decode_counts_together(counts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths of many masks in one pass, which is faster than one by one; errors do not name the mask.

    Returns (n,) int64 run lengths of all masks, one after another, and (masks,) int64 the number of runs of each.
    """
    lengths = np.array([len(text) for text in counts], np.int64)
    raw = b"".join(counts)
    characters = np.frombuffer(raw, np.uint8).astype(np.int64) - _OFFSET
    if not len(characters):
        return characters, np.zeros(len(counts), np.int64)
    is_final = characters & _MORE == 0
    ends = np.cumsum(lengths)
    wrong = np.flatnonzero((characters < 0) | (characters > 63))
    if wrong.size or not is_final[ends[lengths > 0] - 1].all():
        reason = f"byte {wrong[0]} is {raw[wrong[0]]:#04x}" if wrong.size else "the last number is cut off"
        raise ValueError(f"malformed counts of an RLE mask ({reason}): {raw[:40]!r}; the annotation is damaged")
    final = np.flatnonzero(is_final)
    first = np.append(0, final[:-1] + 1)
    digits = final - first + 1
    if digits.max() > 12:  # 13 digits of 5 bits do not fit into an int64
        raise ValueError(f"malformed counts of an RLE mask (a number of {digits.max()} digits): {raw[:40]!r}")
    shift = (np.arange(len(characters)) - np.repeat(first, digits)) * _BITS
    numbers = np.add.reduceat((characters & 31) << shift, first)
    numbers -= np.where(characters[final] & 16, np.int64(1) << (digits * _BITS), 0)

    stops = np.append(0, np.cumsum(is_final))[ends]
    sizes = np.diff(stops, prepend=0)
    starts = np.repeat(stops - sizes, sizes)  # for each number, where its mask's numbers start
    index = np.arange(len(numbers)) - starts
    runs = np.where(index == 0, numbers, 0)
    # From the fourth on, a number is the difference to the one two before it, so odd and even ones are two separate
    # cumulative sums. The sums run over all masks; what came before a mask is subtracted.
    for is_chained in (index % 2 == 1, (index % 2 == 0) & (index > 0)):
        sums = np.cumsum(np.where(is_chained, numbers, 0))
        before = np.append(0, sums)[starts]
        runs[is_chained] = (sums - before)[is_chained]
    return runs, sizes
