"""A contact sheet of samples with their masks drawn, as they are and augmented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..drawing.segments import contact_sheet, draw_segments
from ..models.mask_encoding import decode_mask
from .augmentation import AugmentedSample, augmentation, sample_generator
from .mask_files import VOID

_COLUMNS = 4
_PANEL = (480, 360)  # width, height
_MOST_ENLARGED = 8


def sample_sheet(
    samples: Sequence[tuple[dict[str, Any], Mapping[int, str]]], recipe: str | None = None, size: int = 640
) -> Image.Image:
    """Draw samples on one sheet.

    Args:
        samples: decoded samples of a reader, with their class names.
        recipe: draw each sample augmented by it as well, see `augmentation`.
        size: of the augmented pictures.

    Raises:
        ValueError: there is no sample, or no such recipe.
    """
    if recipe is None:
        panels = [_drawn(sample, names) for sample, names in samples]
        titles = [str(sample["image_id"]) for sample, _ in samples]
        rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
        captions = ["   |   ".join(titles[start : start + _COLUMNS]) for start in range(0, len(titles), _COLUMNS)]
        return contact_sheet(rows, row_titles=captions, panel_size=_PANEL)
    augment = augmentation(recipe, size)
    rows, captions = [], []
    for number, (sample, names) in enumerate(samples):
        changed = [augment(sample, sample_generator(0, epoch, number)) for epoch in range(_COLUMNS - 1)]
        rows.append([_drawn(sample, names), *(_drawn_augmented(one, names) for one in changed)])
        captions.append(str(sample["image_id"]))
    return contact_sheet(rows, ["as read", *[recipe] * (_COLUMNS - 1)], row_titles=captions, panel_size=_PANEL)


def _drawn(sample: Mapping[str, Any], id2label: Mapping[int, str]) -> Image.Image:
    segment_map, rows = sample["segment_map"], sample["segments"]
    if segment_map is None:
        # Largest first, so that small objects stay visible.
        masks = sorted(((decode_mask(row["rle"]), row) for row in rows), key=lambda pair: -int(pair[0].sum()))
        segment_map = np.full(masks[0][0].shape, VOID, dtype=np.int64)
        for mask, row in masks:
            segment_map[mask] = row["id"]
    picture = sample["image"]
    # Small pictures are enlarged before labels are written on them, so that these do not cover all.
    scale = max(1, math.ceil(min(_PANEL[0] / picture.width, _PANEL[1] / picture.height)))
    crowds = {row["label_id"] for row in rows if row["is_crowd"]}
    # Crowds are named as such: they are no training targets.
    names = {**id2label, **{label + len(id2label): f"{id2label[label]} (crowd)" for label in crowds}}
    marked = [{**row, "label_id": row["label_id"] + len(id2label) * row["is_crowd"]} for row in rows]
    return draw_segments(picture, segment_map, marked, names, scale=min(scale, _MOST_ENLARGED))


def _drawn_augmented(sample: AugmentedSample, id2label: Mapping[int, str]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(sample.pixels.permute(1, 2, 0).numpy()))
    labels = sample.labels.tolist()
    rows = [{"id": place, "label_id": label} for place, label in enumerate(labels)]
    segment_map = sample.segment_map.numpy().astype(np.int64)
    if sample.masks is not None:
        segment_map = np.full(segment_map.shape, VOID, dtype=np.int64)
        for place, mask in sorted(enumerate(sample.masks.numpy()), key=lambda pair: -int(pair[1].sum())):
            segment_map[mask] = place
    segment_map[segment_map < 0] = VOID
    return draw_segments(picture, segment_map, rows, id2label)
