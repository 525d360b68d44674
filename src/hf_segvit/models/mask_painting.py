"""Binary masks at the size of the answer, kept in tiles, and the maps painted from them.

In here: `measure` (binarise upsampled masks; their areas and mean probabilities), then what can be made of the result:
`paint_ids` (one id map), `paint_masks` (a bool map each), `encode_masks` (COCO's run-length encoding); then
`count_labels` and `look_up` for label maps of any kind. Only `encode_masks` copies from the device to the host.

Shapes: K masks, P (query, class) pairs of which several may share a mask, H W pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .mask_encoding import encode_mask
from .mask_resampling import ROUNDING, MaskTiles, Size, tile_members

_RLE_CHUNK = 16  # masks that are expanded to full size at a time on their way to RLE


@dataclass(frozen=True)
class MeasuredMasks:
    """Binarised masks: for each strip of a tile where it lies, the indices (k,) of its masks, and their pixels."""

    size: Size
    strips: list[tuple[slice, slice, Tensor, Tensor]]  # the last one (rows, k, columns)
    areas: Tensor  # (K,) pixels inside
    means: Tensor  # (K,) mean probability inside


def measure(tiles: MaskTiles, mask_threshold: float) -> MeasuredMasks:
    """Binarise K masks; only tiles that a mask may reach into are computed, which is exact."""
    masks = tiles.masks
    count = masks.shape[1]
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
    return MeasuredMasks(tiles.size, binarised, areas, totals / (areas + 1e-6))


def paint_ids(masks: MeasuredMasks, mask_of_pair: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Paint the kept ones of P pairs in the order of rising scores; all without a word to the host.

    Returns:
        (H, W) int32 id map, and which pairs (P,) are visible in it.
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
    """Masks `chosen` (n) of K at full size, (n, H, W) bool."""
    maps = torch.zeros((len(chosen), *masks.size), dtype=torch.bool, device=masks.areas.device)
    wanted = torch.tensor(chosen, dtype=torch.int64)
    everywhere = wanted.to(maps.device, non_blocking=True)
    for rows, columns, members, inside in masks.strips:
        if len(members) == len(masks.areas):
            maps[:, rows, columns] = inside[:, everywhere].transpose(0, 1)
            continue
        for number, position in (wanted[:, None] == members).nonzero().tolist():
            maps[number, rows, columns] = inside[:, position]
    return maps


def encode_masks(masks: MeasuredMasks, chosen: list[int]) -> list[dict[str, Any]]:
    """COCO's RLE of masks `chosen` (n) of K."""
    chunks = [chosen[start : start + _RLE_CHUNK] for start in range(0, len(chosen), _RLE_CHUNK)]
    return [encode_mask(mask) for chunk in chunks for mask in paint_masks(masks, chunk).cpu().numpy()]


def count_labels(labels: Tensor, count: int) -> Tensor:
    """Pixels of each label in [0, count), (count,) int64; one pass, and no sync on an accelerator."""
    labels = labels.flatten()
    if labels.device.type == "cpu":
        return torch.bincount(labels, minlength=count)
    return torch.zeros(count, dtype=torch.int64, device=labels.device).scatter_add_(
        0, labels.long(), torch.ones_like(labels, dtype=torch.int64)
    )


def look_up(labels: Tensor, ids: Tensor) -> Tensor:
    """Replace labels (H, W) int32 by the ids (n,) int32 that stand for them."""
    return ids.to(labels.device, non_blocking=True).index_select(0, labels.flatten()).view_as(labels)
