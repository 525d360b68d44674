"""From query logits to panoptic and instance segments.

In here: `panoptic_segments`, then `instance_segments`, by the rules of the official EoMT evaluation; semantic maps are
in `semantic_segments.py`. Queries are filtered by class score before anything is upsampled; the rest is upsampled tile
by tile (`mask_resampling.py`). An accelerator is synchronised once per batch (class logits) and once per image.

Shapes: B images, Q queries, C classes without no-object (which is index C), K kept masks, P (query, class) pairs of
which several may share a mask, h w mask cells, H W pixels. Id maps are int32 on the device of the logits: void -1, ids
from 0 in the order of the queries.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .confidence import calibrated
from .image_geometry import Size
from .mask_encoding import encode_mask
from .mask_resampling import ROUNDING, MaskTiles, code_of_largest, image_sizes, tile_members, tiled_masks


def panoptic_segments(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    target_sizes: Sequence[Size] | Tensor | None,
    *,
    input_size: Size,
    content_sizes: Sequence[Size] | Tensor | None = None,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    stuff_classes: Collection[int] = (),
    temperature: float | None = None,
) -> list[dict[str, Any]]:
    """Segments that do not overlap: things one by one, the stuff of a class as one.

    A query is kept if its best class is an object's and more probable than `threshold`. A pixel goes to the query with
    the largest class probability x mask probability if the latter reaches `mask_threshold`, else to none. A segment is
    dropped if no pixel went to it, or if the pixels where its product was largest, below the mask threshold or not,
    are fewer than `overlap_mask_area_threshold` x those of its own mask. Stuff joins the first segment of its class.

    Args:
        class_queries_logits: (B, Q, C+1), no-object last.
        masks_queries_logits: (B, Q, h, w).
        target_sizes: (height, width) of each result; None: the input size, padding included.
        input_size: (height, width) of the padded model input.
        content_sizes: (height, width) of each image within the input, at its top left; None if it fills the input.
        temperature: calibrates the scores that are returned, and not what is compared with a threshold or with other
            queries, so that the segments are the same; see `calibrated`.

    Returns:
        For each image `segmentation` (H, W) int32 and `segments_info`, a row per segment: `id`, `label_id`, `was_fused`
        (its class is in `stuff_classes`) and `score`, the class probability of its first query.
    """
    # All later shapes depend on the class logits; they are small, so the host gets them once for the whole batch.
    scores, labels = class_queries_logits.detach().float().cpu().softmax(-1).max(-1)
    kept = (labels != class_queries_logits.shape[-1] - 1) & (scores > threshold)
    results = []
    for image, sizes in enumerate(image_sizes(len(kept), target_sizes, input_size, content_sizes)):
        queries = kept[image].nonzero()[:, 0]
        if not len(queries):
            void = torch.full(sizes[1], -1, dtype=torch.int32, device=masks_queries_logits.device)
            results.append({"segmentation": void, "segments_info": []})
            continue
        tiles = tiled_masks(masks_queries_logits[image], queries, input_size, *sizes)
        winners, mask_areas = _assign_pixels(tiles, scores[image, queries], mask_threshold)
        # Codes fall with the query, from 2K; an odd one is a pixel inside the mask, the even one below it is outside.
        won_areas = count_labels(winners, 2 * len(queries) + 2)[2:].view(-1, 2).flip(0)
        ids, rows = _panoptic_rows(
            labels[image, queries].tolist(),
            calibrated(scores[image, queries], temperature).tolist(),
            torch.column_stack([mask_areas, won_areas]).tolist(),
            overlap_mask_area_threshold,
            set(stuff_classes),
        )
        id_of_code = torch.tensor([-1, -1] + [value for id_ in reversed(ids) for value in (-1, id_)], dtype=torch.int32)
        results.append({"segmentation": look_up(winners, id_of_code), "segments_info": rows})
    return results


def _assign_pixels(tiles: MaskTiles, scores: Tensor, mask_threshold: float) -> tuple[Tensor, Tensor]:
    """Let K masks compete for the pixels; `scores` (K,) are on the CPU.

    Returns (H, W) int32 codes of the winners, 2 * (K - k), plus 1 where the probability reaches the mask threshold, and
    the (K,) int64 areas of the masks by themselves.
    """
    device, count = tiles.masks.device, len(scores)
    winners = torch.empty(tiles.size, dtype=torch.int32, device=device)
    areas = torch.zeros(count, dtype=torch.int64, device=device)
    weights = scores.to(device, non_blocking=True)[:, None]
    # The first query has the largest code, so that of equal products the maximum of codes is that of an argmax.
    codes = torch.arange(2 * count, 0, -2, dtype=torch.int32, device=device)[:, None]
    plan: Iterable[tuple[int, Tensor]] = repeat((0, torch.arange(count, device=device)), len(tiles))
    if tiles.prunable:
        plan = _contests(tiles, weights[..., None], mask_threshold, areas)
    for (rows, columns), (only_code, members) in zip(tiles, plan, strict=True):
        if only_code:
            winners[rows.pixels, columns.pixels] = only_code
            continue
        for row_pixels, logits in tiles.values(rows, columns, members):
            probabilities = logits.sigmoid_()
            inside = probabilities >= mask_threshold
            areas.index_add_(0, members, inside.sum((0, 2)))
            products = probabilities.mul_(weights[members])
            winners[row_pixels, columns.pixels] = code_of_largest(products, inside + codes[members])
    return winners, areas


def _contests(tiles: MaskTiles, weights: Tensor, mask_threshold: float, areas: Tensor) -> list[tuple[int, Tensor]]:
    """For each tile, the one code that `winners` has all over it, or 0 and the masks (k,) to compare.

    `areas` (K,) gains the pixels of masks that cover a tile in which they are not compared.
    """
    lower, upper = (bound.sigmoid_() for bound in tiles.bounds())
    # Also right where products underflow: all are 0 then, and the first query must win as it does in an argmax.
    may_win = upper * weights * (1 + ROUNDING) >= (lower * weights).amax(0)
    covering = lower >= mask_threshold + ROUNDING
    crossing = (upper >= mask_threshold - ROUNDING) & ~covering
    # With an outline in the tile there is an area to count, even where only one mask can win.
    decided = (may_win.sum(0) == 1) & ~crossing.any(0)
    compared = (may_win | crossing) & ~decided
    areas += ((covering & ~compared) * tiles.areas).sum((1, 2))
    winner = may_win.int().argmax(0)
    code = 2 * (len(weights) - winner) + covering.gather(0, winner[None])[0]
    return list(zip((code * decided).flatten().tolist(), tile_members(compared), strict=True))


def _panoptic_rows(
    labels: list[int], scores: list[float], areas: list[list[int]], overlap_threshold: float, stuff: set[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """An id for each of K queries, -1 for those dropped, and `segments_info`.

    `areas` has for each query the pixels of its mask, those where it was largest but below the mask threshold, and
    those it won.
    """
    ids: list[int] = []
    rows: list[dict[str, Any]] = []
    stuff_ids: dict[int, int] = {}
    for label, score, (mask_area, largest_below, won_area) in zip(labels, scores, areas, strict=True):
        if won_area == 0 or (won_area + largest_below) / mask_area < overlap_threshold:
            ids.append(-1)
            continue
        # After the check: a dropped query of a stuff class must not become the segment that others join.
        ids.append(stuff_ids.get(label, len(rows)))
        if label in stuff_ids:
            continue
        if label in stuff:
            stuff_ids[label] = len(rows)
        rows.append(_row(len(rows), label, label in stuff, score))
    return ids, rows


def _row(segment_id: int, label: int, fused: bool, score: float) -> dict[str, Any]:
    return {"id": segment_id, "label_id": label, "was_fused": fused, "score": round(score, 6)}


def instance_segments(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    target_sizes: Sequence[Size] | Tensor | None,
    *,
    input_size: Size,
    content_sizes: Sequence[Size] | Tensor | None = None,
    num_instances: int = 100,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    return_binary_maps: bool = False,
    return_coco_annotation: bool = False,
    temperature: float | None = None,
) -> list[dict[str, Any]]:
    """Objects, each with a class, a score and a mask; masks may overlap.

    The `num_instances` most probable (query, class) pairs are candidates. A mask is where the mask probability exceeds
    `mask_threshold`; its score is the class probability x the mean mask probability inside. Candidates with an empty
    mask or a score below `threshold` are dropped; there is no non-maximum suppression. Logits, sizes and temperature
    are those of `panoptic_segments`.

    Returns:
        For each image `segmentation` and `segments_info`, a row per instance: `id`, `label_id`, `was_fused` (False)
        and `score`. `segmentation` is an (H, W) int32 id map, painted in the order of rising scores (of equals, the
        later query is on top), and instances that end up hidden have no row. With `return_binary_maps` it is
        (n, H, W) bool, with `return_coco_annotation` a list of n dicts {"size": [H, W], "counts": str}: both keep
        overlaps and follow the order of the rows.
    """
    if return_binary_maps and return_coco_annotation:
        raise ValueError("return_binary_maps and return_coco_annotation exclude each other; ask for one of them")
    probabilities = class_queries_logits.detach().float().cpu().softmax(-1)[..., :-1]
    num_classes = probabilities.shape[-1]
    results = []
    for image, sizes in enumerate(image_sizes(len(probabilities), target_sizes, input_size, content_sizes)):
        best, pairs = probabilities[image].flatten().topk(min(num_instances, probabilities[image].numel()))
        # A mean inside cannot exceed 1, so a class probability below the threshold is a score below it.
        best, pairs = best[best >= threshold], pairs[best >= threshold]
        pairs, order = pairs.sort()  # ids follow the queries, not the scores
        # Pairs of one query share its mask, which is upsampled once.
        queries, mask_of_pair = (pairs // num_classes).unique(return_inverse=True)
        measured = measure(tiled_masks(masks_queries_logits[image], queries, input_size, *sizes), mask_threshold)
        # Copies to an accelerator are asynchronous everywhere, or each would wait for all work before it.
        owner = mask_of_pair.to(measured.means.device, non_blocking=True)
        scores = best[order].to(measured.means.device, non_blocking=True) * measured.means[owner]
        kept = (scores >= threshold) & (measured.areas[owner] > 0)
        segmentation: Any = None
        if not (return_binary_maps or return_coco_annotation):
            segmentation, kept = paint_ids(measured, owner, scores, kept)
        # The one synchronisation per image: scores and flags in a single copy.
        rows = [
            (pair % num_classes, score, mask)
            for pair, mask, score, keep in zip(
                pairs.tolist(),
                mask_of_pair.tolist(),
                *torch.stack([calibrated(scores, temperature), kept.to(scores)]).tolist(),
                strict=True,
            )
            if keep
        ]
        masks = [mask for _, _, mask in rows]
        if return_binary_maps:
            segmentation = paint_masks(measured, masks)
        elif return_coco_annotation:
            segmentation = encode_masks(measured, masks)
        segments_info = [_row(number, label, False, score) for number, (label, score, _) in enumerate(rows)]
        results.append({"segmentation": segmentation, "segments_info": segments_info})
    return results


_RLE_CHUNK = 16  # masks at full size at a time while they are encoded, which bounds the memory


@dataclass(frozen=True)
class MeasuredMasks:
    """Binarised masks: each strip of a tile with its rows, columns, the indices (k,) of its masks, and their pixels."""

    size: Size
    strips: list[tuple[slice, slice, Tensor, Tensor]]  # pixels are (rows, k, columns) bool
    areas: Tensor  # (K,) pixels inside
    means: Tensor  # (K,) mean probability inside


def measure(tiles: MaskTiles, mask_threshold: float) -> MeasuredMasks:
    """Binarise K masks; only tiles that a mask may reach into are computed, which is exact."""
    masks = tiles.masks
    count = masks.shape[1]
    # Sums over millions of pixels lose digits in float32; Apple's GPUs have nothing better.
    precise = torch.float32 if masks.device.type == "mps" else torch.float64
    areas = torch.zeros(count, dtype=precise, device=masks.device)
    totals = torch.zeros_like(areas)
    plan: Iterable[Tensor] = repeat(torch.arange(count, device=masks.device), len(tiles))
    if tiles.prunable:
        plan = tile_members(tiles.bounds()[1].sigmoid_() >= mask_threshold - ROUNDING)
    binarised = []
    for (rows, columns), members in zip(tiles, plan, strict=True):
        if not len(members):
            continue
        for row_pixels, logits in tiles.values(rows, columns, members):
            probabilities = logits.sigmoid_()
            inside = probabilities > mask_threshold
            areas.index_add_(0, members, inside.sum((0, 2), dtype=precise))
            totals.index_add_(0, members, probabilities.mul_(inside).sum((0, 2), dtype=precise))
            binarised.append((row_pixels, columns.pixels, members, inside))
    # The official evaluation's 1e-6, which keeps empty masks from dividing by zero.
    return MeasuredMasks(tiles.size, binarised, areas, totals / (areas + 1e-6))


def paint_ids(masks: MeasuredMasks, mask_of_pair: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Paint the kept ones of P pairs in the order of rising scores, without synchronising the device.

    Returns the (H, W) int32 id map, and which pairs (P,) are visible in it.
    """
    device = scores.device
    # Ranks from 1, 0 for what is not painted: then the topmost mask of a pixel is a maximum over the masks.
    order = scores.masked_fill(~kept, -1).argsort(stable=True)
    ranks = torch.zeros(len(scores), dtype=torch.int32, device=device)
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.int32, device=device)
    ranks *= kept
    rank_of_mask = torch.zeros(len(masks.areas), dtype=torch.int32, device=device)
    rank_of_mask.scatter_reduce_(0, mask_of_pair, ranks, "amax")
    painted = torch.zeros(masks.size, dtype=torch.int32, device=device)
    for rows, columns, members, inside in masks.strips:
        painted[rows, columns] = (inside * rank_of_mask[members][:, None]).amax(1)
    visible = (count_labels(painted, len(scores) + 1)[ranks] > 0) & kept
    ids = torch.full((len(scores) + 1,), -1, dtype=torch.int32, device=device)
    ids[ranks.long()] = torch.where(visible, visible.cumsum(0) - 1, -1).int()
    return look_up(painted, ids), visible


def paint_masks(masks: MeasuredMasks, chosen: list[int]) -> Tensor:
    """The `chosen` n of K masks at full size, (n, H, W) bool."""
    maps = torch.zeros((len(chosen), *masks.size), dtype=torch.bool, device=masks.areas.device)
    wanted = torch.tensor(chosen, dtype=torch.int64)
    everywhere = wanted.to(maps.device, non_blocking=True)
    for rows, columns, members, inside in masks.strips:
        if len(members) == len(masks.areas):
            maps[:, rows, columns] = inside[:, everywhere].transpose(0, 1)
            continue
        # Only on a CPU do tiles hold a subset of the masks, so reading the indices costs no synchronisation.
        for number, position in (wanted[:, None] == members).nonzero().tolist():
            maps[number, rows, columns] = inside[:, position]
    return maps


def encode_masks(masks: MeasuredMasks, chosen: list[int]) -> list[dict[str, Any]]:
    """COCO's RLE of the `chosen` n of K masks; the only step that copies masks to the host."""
    chunks = [chosen[start : start + _RLE_CHUNK] for start in range(0, len(chosen), _RLE_CHUNK)]
    return [encode_mask(mask) for chunk in chunks for mask in paint_masks(masks, chunk).cpu().numpy()]


def count_labels(labels: Tensor, count: int) -> Tensor:
    """Pixels of each label in [0, count), (count,) int64."""
    labels = labels.flatten()
    if labels.device.type == "cpu":
        return torch.bincount(labels, minlength=count)
    # On an accelerator `bincount` synchronises to size its result.
    return torch.zeros(count, dtype=torch.int64, device=labels.device).scatter_add_(
        0, labels.long(), torch.ones_like(labels, dtype=torch.int64)
    )


def look_up(labels: Tensor, ids: Tensor) -> Tensor:
    """Replace labels (H, W) int32 by their ids, of a table (n,) int32."""
    return ids.to(labels.device, non_blocking=True).index_select(0, labels.flatten()).view_as(labels)
