"""Panoptic quality (PQ) over a data set, equal to panopticapi's.

`PanopticQuality` accumulates counts (never images) over batches and processes; `panoptic_quality_from_counts` turns
them into the result. `panoptic_counts` scores one image. Counts are float64 (C, 4): true positives, false positives,
false negatives, summed IoU of the true positives. C classes, H W pixels, P predicted and R reference segments, N runs
of equal (reference, prediction) ids. Source: Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accumulation import ImageMetric, integer_array, label_ids, require_keys, require_same_size


class PanopticQuality(ImageMetric):
    """Panoptic quality over a data set.

    A prediction is what `post_process_panoptic_segmentation` returns: `segmentation` (H, W), a tensor or array of
    segment ids, and `segments_info`, rows with `id` and `label_id`. A reference is the same with `is_crowd` in its
    rows (absent means False). Every id in a map has a row and every row has pixels; -1 is void.

    Segments of one class match where their IoU is above 0.5; pixels that are void in the reference are left out of the
    union. Crowd regions never match and are never missed. An unmatched prediction is forgiven if more than half of it
    lies on void and on the crowd region of its class.

    Args:
        num_labels: number of classes; label ids are 0 .. num_labels - 1.
        stuff_classes: label ids that are stuff; only the `_things` and `_stuff` averages depend on them.
        void_ids: ids that mean void where no row has them. Transformers' Mask2Former, MaskFormer and OneFormer
            processors write void as 0 and number segments from 1: give (-1, 0) for those.
    """

    def __init__(self, num_labels: int, stuff_classes: Iterable[int], void_ids: Sequence[int] = (-1,)) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; give the number of classes, at least 1")
        self.stuff_classes = sorted(set(stuff_classes))
        unknown = [label for label in self.stuff_classes if not 0 <= label < num_labels]
        if unknown:
            raise ValueError(f"stuff_classes {unknown} are not label ids; those are 0..{num_labels - 1}")
        self.num_labels = num_labels
        self.void_ids = tuple(void_ids)
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """The result so far, in [0, 1]; see `panoptic_quality_from_counts`."""
        return panoptic_quality_from_counts(self.counts["panoptic"], self.stuff_classes, self.chosen(self.num_labels))

    def _no_counts(self) -> dict[str, np.ndarray]:
        return {"panoptic": np.zeros((self.num_labels, 4))}

    def _count(self, prediction: Any, reference: Any, name: str, image_id: Hashable) -> dict[str, np.ndarray]:
        return {"panoptic": panoptic_counts(prediction, reference, self.num_labels, self.void_ids, name)}


def panoptic_quality_from_counts(
    counts: np.ndarray, stuff_classes: Iterable[int], classes: np.ndarray | None = None
) -> dict[str, Any]:
    """Panoptic quality from counts (C, 4), of the label ids `classes`; `None`: of all.

    Returns:
        `pq`, `sq`, `rq` in [0, 1], NaN where no class occurs, and `num_classes`, the number of classes averaged: those
        that occur in a reference or in a false positive. The same with `_things` and `_stuff`. `per_class` by label id:
        `pq`, `sq`, `rq` (0.0 for a class that does not occur), the counts `tp`, `fp`, `fn` and the summed `iou`.
    """
    tp, fp, fn, iou = counts.T
    denominator = tp + 0.5 * fp + 0.5 * fn
    labels = np.arange(len(counts)) if classes is None else classes
    occurs = (denominator > 0) & np.isin(np.arange(len(counts)), labels)
    qualities = {
        "pq": np.divide(iou, denominator, out=np.zeros_like(iou), where=occurs),
        "sq": np.divide(iou, tp, out=np.zeros_like(iou), where=tp > 0),
        "rq": np.divide(tp, denominator, out=np.zeros_like(iou), where=occurs),
    }
    is_stuff = np.isin(np.arange(len(counts)), list(stuff_classes))
    result: dict[str, Any] = {}
    for suffix, group in (("", occurs), ("_things", occurs & ~is_stuff), ("_stuff", occurs & is_stuff)):
        for key, values in qualities.items():
            result[key + suffix] = float(values[group].mean()) if group.any() else float("nan")
        result["num_classes" + suffix] = int(group.sum())
    result["per_class"] = {
        label: {key: float(values[label]) for key, values in qualities.items()}
        | {"tp": int(tp[label]), "fp": int(fp[label]), "fn": int(fn[label]), "iou": float(iou[label])}
        for label in labels.tolist()
    }
    return result


def panoptic_counts(
    prediction: Mapping[str, Any],
    reference: Mapping[str, Any],
    num_labels: int,
    void_ids: Sequence[int] = (-1,),
    name: str = "the image",
) -> np.ndarray:
    """(C, 4) float64 counts of one image, see the module; arguments and errors as for `PanopticQuality`."""
    matches = _matches(prediction, reference, num_labels, void_ids, name)
    matched_rows, matched_columns = np.nonzero(matches.matched)
    matched_labels = matches.reference_labels[matched_rows]
    columns = [
        np.bincount(matched_labels, minlength=num_labels),
        np.bincount(matches.prediction_labels[matches.is_false], minlength=num_labels),
        np.bincount(matches.reference_labels[matches.is_missed], minlength=num_labels),
        np.bincount(matched_labels, matches.iou[matched_rows, matched_columns], minlength=num_labels),
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def right_segments(
    prediction: Mapping[str, Any],
    reference: Mapping[str, Any],
    num_labels: int,
    void_ids: Sequence[int] = (-1,),
    name: str = "the image",
) -> tuple[np.ndarray, np.ndarray]:
    """(P,) bool, for each predicted row: whether it is a true positive, and whether it counts at all."""
    matches = _matches(prediction, reference, num_labels, void_ids, name)
    right: np.ndarray = np.asarray(matches.matched.any(0))
    return right, np.asarray(right | matches.is_false)


@dataclass(frozen=True)
class _Matches:
    """How P predicted and R true segments of an image match."""

    matched: np.ndarray  # (R, P) bool
    iou: np.ndarray  # (R, P)
    is_false: np.ndarray  # (P,) bool; what is neither matched nor false lies on void or crowds
    is_missed: np.ndarray  # (R,) bool
    prediction_labels: np.ndarray
    reference_labels: np.ndarray


def _matches(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], num_labels: int, void_ids: Sequence[int], name: str
) -> _Matches:
    prediction_name, reference_name = f"{name}, prediction", f"{name}, reference"
    prediction_map, prediction_rows = _map_and_rows(prediction, prediction_name)
    reference_map, reference_rows = _map_and_rows(reference, reference_name)
    require_same_size(prediction_map.shape, reference_map.shape, name)
    prediction_labels = label_ids(prediction_rows, num_labels, prediction_name)
    reference_labels = label_ids(reference_rows, num_labels, reference_name)

    reference_ids, prediction_ids, lengths = equal_runs(reference_map, prediction_map)
    prediction_index = _row_indices(prediction_ids, prediction_rows, void_ids, prediction_name)
    reference_index = _row_indices(reference_ids, reference_rows, void_ids, reference_name)
    num_columns = len(prediction_rows) + 1
    num_pairs = (len(reference_rows) + 1) * num_columns
    pairs = np.bincount(reference_index * num_columns + prediction_index, lengths, minlength=num_pairs)
    overlap = pairs.reshape(-1, num_columns)  # (R + 1, P + 1) pixels; row 0 and column 0 are void
    reference_areas, prediction_areas = overlap.sum(1)[1:], overlap.sum(0)[1:]
    _reject_empty(prediction_areas, prediction_rows, prediction_name)
    _reject_empty(reference_areas, reference_rows, reference_name)

    is_crowd = np.array([bool(row.get("is_crowd", False)) for row in reference_rows], dtype=bool)
    intersection, on_void = overlap[1:, 1:], overlap[0, 1:]
    # Void is taken off the union, as panopticapi does: nobody knows what lies there.
    iou = intersection / (reference_areas[:, None] + prediction_areas - intersection - on_void)
    # Predictions stay disjoint without their void pixels, so an IoU above 0.5 pairs one with one.
    matched = (iou > 0.5) & (reference_labels[:, None] == prediction_labels) & ~is_crowd[:, None]

    forgiven = on_void.copy()
    # panopticapi keeps one crowd of each class, the last: its dictionary by class is overwritten.
    last_crowd_of_class = {reference_labels[row]: row for row in np.flatnonzero(is_crowd)}
    for label, row in last_crowd_of_class.items():
        forgiven += intersection[row] * (prediction_labels == label)
    is_false = ~matched.any(0) & (forgiven / prediction_areas <= 0.5)
    is_missed = ~matched.any(1) & ~is_crowd
    return _Matches(matched, iou, is_false, is_missed, prediction_labels, reference_labels)


def _map_and_rows(side: Mapping[str, Any], name: str) -> tuple[np.ndarray, Sequence[Mapping[str, Any]]]:
    """(H, W) integer array and rows of a prediction or reference."""
    require_keys(side, name)
    array = integer_array(side["segmentation"], f"{name}: the segmentation")
    # A bool map is valid for integer_array, but here it is one binary mask given instead of an id map.
    if array.dtype.kind == "b":
        raise ValueError(f"{name}: the segmentation is bool; it must hold integer segment ids")
    return array, side["segments_info"]


def equal_runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut two maps (H, W) wherever either changes: values of both and lengths, each (N,)."""
    # Segments are compact, so an image has far fewer runs than pixels: callers look ids up once per run.
    first, second = first.reshape(-1), second.reshape(-1)
    changes = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return first[starts], second[starts], np.diff(starts, append=len(first))


def _row_indices(ids: np.ndarray, rows: Sequence[Mapping[str, Any]], void_ids: Sequence[int], name: str) -> np.ndarray:
    """(N,) index of the row that each id has, counted from 1; 0 for void."""
    row_ids = np.array([row["id"] for row in rows], dtype=np.int64)
    if -1 in row_ids:
        raise ValueError(f"{name}: segments_info has a row of id -1, which means void; number segments from 0")
    order = np.argsort(row_ids, kind="stable")
    # A smallest element in front, as row 0, so that the search below never falls off the left end.
    ordered = np.concatenate([[np.iinfo(np.int64).min], row_ids[order]])
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"{name}: segments_info has several rows of id {repeated[0]}; ids must be unique")
    ids = ids.astype(np.int64)
    position = np.searchsorted(ordered, ids, side="right") - 1
    has_row = ordered[position] == ids
    unknown = ids[~has_row]
    for void_id in void_ids:
        unknown = unknown[unknown != void_id]
    if len(unknown):
        listed = np.unique(unknown)[:5].tolist()
        raise ValueError(
            f"{name}: the segmentation holds ids {listed} that segments_info has no row for; add the rows, or write "
            f"void pixels as {void_ids[0]} (void_ids= changes which ids are void)"
        )
    return np.where(has_row, np.concatenate([[0], order + 1])[position], 0)


def _reject_empty(areas: np.ndarray, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    empty = [row["id"] for row, area in zip(rows, areas, strict=True) if area == 0]
    if empty:
        raise ValueError(
            f"{name}: segments_info has rows of ids {empty[:5]}, of which the segmentation holds no pixel; drop them"
        )
