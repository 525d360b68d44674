"""Instance masks checked and brought to COCO's run-length encoding (RLE).

`instance_masks` reads a prediction or reference in any of its three forms; `check_rles_together` checks a batch of RLEs
in one pass; `decoded_masks` gives binary masks. H W pixels, n masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from ..models.mask_encoding import decode_counts, decode_counts_together, decode_mask, encode_counts
from .accumulation import integer_array, label_ids, require_keys


@dataclass(frozen=True)
class InstanceMasks:
    """The masks of one image.

    Attributes:
        rles: n masks as pycocotools takes them, {"size": [H, W], "counts": bytes}.
        size: (H, W); `None` if there is no mask to tell it.
        areas: (n,) float64 pixels; a row's own `area` where it has one.
        scores: (n,) float64; 1 in references.
        is_crowd: (n,) bool; False in predictions.
    """

    rles: list[dict[str, Any]]
    size: tuple[int, int] | None
    labels: np.ndarray
    areas: np.ndarray
    scores: np.ndarray
    is_crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.rles)


def instance_masks(side: Mapping[str, Any], num_labels: int, name: str, *, is_reference: bool) -> InstanceMasks:
    """Read the masks of one image from `segmentation` and `segments_info`, see `MaskAveragePrecision`.

    Only rows of a reference have `is_crowd` and perhaps `area`, only those of a prediction a `score`. Whatever is
    malformed or does not fit together is a `ValueError` that starts with `name`.
    """
    require_keys(side, name)
    rows = list(side["segments_info"])
    labels = label_ids(rows, num_labels, name)
    rles, size = _encoded(side["segmentation"], rows, name)
    if len(rles) != len(rows):
        raise ValueError(f"{name}: {len(rles)} masks for {len(rows)} rows of segments_info; give one mask for each row")
    areas = coco_masks.area(rles).astype(np.float64) if rles else np.zeros(0)
    scores = np.ones(len(rows))
    if is_reference:
        # COCO's own areas are those of polygons, and decide between small, medium and large as in its evaluator.
        for index, row in enumerate(rows):
            if row.get("area") is not None:
                areas[index] = row["area"]
    else:
        scores = np.array([_score(row, name) for row in rows], dtype=np.float64)
    return InstanceMasks(
        rles=rles,
        size=size,
        labels=labels,
        areas=areas,
        scores=scores,
        is_crowd=np.array([is_reference and bool(row.get("is_crowd", False)) for row in rows], dtype=bool),
    )


class CheckedRles(list):
    """RLE masks whose runs are known to fill their sizes, with counts as bytes."""


def check_rles_together(sides: Sequence[Any]) -> list[Any]:
    """Check the RLE masks of many predictions or references in one pass, faster than one by one.

    Returns them with `CheckedRles` where masks are RLE, or unchanged if any is malformed.
    """
    lists: list[Any] = [side.get("segmentation") if isinstance(side, Mapping) else () for side in sides]
    chosen = [index for index, masks in enumerate(lists) if isinstance(masks, list | tuple) and masks]
    try:
        checked = iter(_checked_rles([rle for index in chosen for rle in lists[index]], "masks") if chosen else [])
    except (ValueError, TypeError, KeyError):
        return list(sides)  # checking each image on its own will name the malformed mask
    together = list(sides)
    for index in chosen:
        together[index] = {**sides[index], "segmentation": CheckedRles(next(checked) for _ in lists[index])}
    return together


def _score(row: Mapping[str, Any], name: str) -> float:
    if "score" not in row:
        raise ValueError(f"{name}: segment {row.get('id')} has no score; average precision ranks predictions by it")
    if not np.isfinite(row["score"]):
        raise ValueError(f"{name}: segment {row.get('id')} has score {row['score']}; scores must be finite")
    return float(row["score"])


def _encoded(
    segmentation: Any, rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[dict[str, Any]], tuple[int, int] | None]:
    """RLEs and size (H, W) of masks in any of the forms."""
    if isinstance(segmentation, list | tuple) and all(isinstance(mask, Mapping) for mask in segmentation):
        is_checked = isinstance(segmentation, CheckedRles) or not segmentation
        rles = list(segmentation) if is_checked else _checked_rles(segmentation, name)
        sizes = {tuple(rle["size"]) for rle in rles}
        if len(sizes) > 1:
            raise ValueError(f"{name}: masks have different sizes {sorted(sizes)}; all must be the image's")
        return rles, next(iter(sizes), None)
    if isinstance(segmentation, list | tuple):
        raise ValueError(
            f"{name}: the segmentation is a list of {type(segmentation[0]).__name__}; give COCO RLE dictionaries, "
            "binary masks (n, height, width), or an id map (height, width)"
        )
    if hasattr(segmentation, "detach"):
        segmentation = segmentation.detach().cpu().numpy()
    masks = np.asarray(segmentation)
    if masks.ndim == 2:
        id_map = integer_array(masks, f"{name}: the segmentation")
        ids = np.array([row["id"] for row in rows], dtype=np.int64)
        masks = id_map == ids[:, None, None]
    if masks.ndim != 3:
        raise ValueError(
            f"{name}: the segmentation has shape {masks.shape}; give (n, height, width) or (height, width)"
        )
    size = (int(masks.shape[1]), int(masks.shape[2]))
    if not len(masks):
        return [], size if min(size) else None
    if masks.dtype != bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError(f"{name}: binary masks hold values other than 0 and 1; threshold them first")
    # pycocotools reads column by column and takes the masks in the last axis.
    return coco_masks.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0))), size


def _checked_rles(rles: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Masks with counts as bytes, whose runs fill their sizes exactly."""
    checked: list[dict[str, Any]] = []
    for index, rle in enumerate(rles):
        missing = [key for key in ("size", "counts") if key not in rle]
        if missing or len(rle["size"]) != 2:
            raise ValueError(f"{name}, mask {index}: an RLE mask has size [height, width] and counts, not {dict(rle)}")
        counts = rle["counts"]
        if not isinstance(counts, str | bytes):
            counts = encode_counts(np.asarray(counts, dtype=np.int64))
        counts = counts.encode("utf-8") if isinstance(counts, str) else bytes(counts)
        checked.append({"size": [int(length) for length in rle["size"]], "counts": counts})
    # pycocotools' C code answers malformed runs with uninitialised memory, or crashes: nothing unchecked may reach it.
    totals, shortest = _run_totals([rle["counts"] for rle in checked], name)
    for index, (rle, total, least) in enumerate(zip(checked, totals, shortest, strict=True)):
        height, width = rle["size"]
        if min(height, width) < 1 or total != height * width or least < 0:
            raise ValueError(
                f"{name}, mask {index}: the runs add up to {total} pixels, shortest {least}, but size {height} x "
                f"{width} needs {height * width} in runs of at least 0: the annotation is damaged, or its size belongs "
                "to another image"
            )
    return checked


def _run_totals(counts: Sequence[bytes], name: str) -> tuple[list[int], list[int]]:
    """Sum and minimum of the run lengths of each mask (n compressed counts)."""
    try:
        runs, sizes = decode_counts_together(counts)
    except ValueError:
        for index, text in enumerate(counts):  # one by one, to say which it is
            try:
                decode_counts(text)
            except ValueError as error:
                raise ValueError(f"{name}, mask {index}: {error}") from error
        raise
    if not sizes.all():
        raise ValueError(f"{name}, mask {sizes.argmin()}: its RLE has empty counts; drop it, or encode it again")
    starts = np.cumsum(sizes) - sizes
    return np.add.reduceat(runs, starts).tolist(), np.minimum.reduceat(runs, starts).tolist()


def decoded_masks(segmentation: Any, rows: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """(n, H, W) bool of masks in any of the forms that `instance_masks` takes; other sizes are refused."""
    rles, found = _encoded(segmentation, rows, "the masks")
    if found and found != size:
        raise ValueError(f"the masks have (height, width) {found}, the image {size}; pass target_sizes=")
    if not rles:
        return np.zeros((0, *size), dtype=bool)
    return np.stack([decode_mask(rle) for rle in rles])
