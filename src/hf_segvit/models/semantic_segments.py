"""From query logits to semantic maps: a class for every pixel.

In here: `semantic_segments` for images padded to the input and `semantic_segments_from_windows` for images cut into
overlapping windows. A pixel's score for a class is the sum over queries of class probability x mask probability,
without no-object; it is computed at the input's resolution, averaged where windows overlap, and interpolated to the
target size (official EoMT evaluation). That happens in tiles, so memory does not grow with the image; on a CPU, classes
that cannot win anywhere in a tile are left out of it. Confidences (confidence.py) are computed tile by tile, too.
`semantic_segments_from_logits` is for models that classify pixels.

Shapes: B images, N windows, Q queries, C classes without no-object (which is index C), h w mask cells, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .confidence import Confidence, pixel_confidences, refuse_nan
from .image_geometry import Size, window_axis
from .mask_resampling import (
    AxisBlock,
    as_size,
    axis_block,
    axis_blocks,
    code_of_largest,
    finite_masks,
    image_sizes,
    matmul,
    resample,
    serial_sigmoid_,
    tiles_per_axis,
    widened,
)

_ROUNDING = 1e-4  # relative error of sums over hundreds of queries in float32, generously


@dataclass(frozen=True)
class _Window:
    """A model input: its (row, column) offset in the scaled image, and the predictions for it."""

    offset: tuple[int, int]
    size: Size
    class_probabilities: Tensor  # (C, Q)
    masks: Tensor  # (h, Q, w)


def semantic_segments(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    target_sizes: Sequence[Size] | Tensor | None,
    *,
    input_size: Size | None = None,
    content_sizes: Sequence[Size] | Tensor | None = None,
    return_segmentation_scores: bool = False,
    confidences: Sequence[Confidence] = (),
) -> list[Any]:
    """Semantic maps of images that fill their input, or were padded to it.

    Args:
        class_queries_logits: (B, Q, C+1), no-object last.
        masks_queries_logits: (B, Q, h, w).
        target_sizes: (height, width) of each result; None: the input size, padding included.
        input_size: (height, width) of the model input, where scores are computed; None computes them on the cells of
            the masks, which is faster and coarser.
        content_sizes: (height, width) of each image within the input, at its top left; None if it fills the input.
        confidences: which ones to compute.

    Returns:
        For each image the (H, W) int64 map of classes; with scores, pairs of that and (C, H, W) float32. With
        confidences, triples of map, scores (`None` if not asked for) and (H, W) float32 confidences by name.
    """
    height, width = input_size or masks_queries_logits.shape[-2:]
    sizes = image_sizes(len(class_queries_logits), target_sizes, (height, width), content_sizes)
    probabilities = _class_probabilities(class_queries_logits)
    return [
        _classify(
            [_Window((0, 0), (height, width), probabilities[index], _masks(masks_queries_logits[index]))],
            *image,
            return_segmentation_scores,
            confidences,
        )
        for index, image in enumerate(sizes)
    ]


def semantic_segments_from_windows(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    windows: Sequence[Sequence[int]] | Tensor,
    image_sizes: Sequence[Size] | Tensor,
    target_sizes: Sequence[Size] | Tensor | None,
    *,
    window_size: Size | int,
    return_segmentation_scores: bool = False,
    confidences: Sequence[Confidence] = (),
) -> list[Any]:
    """Semantic maps, as by `semantic_segments`, of images that were scaled and cut into N windows along one axis.

    Args:
        windows: rows (image, start, end), one for each prediction; see `image_geometry.windows_of`.
        image_sizes: (height, width) of each scaled image.
        target_sizes: (height, width) of each result; None: the size of the scaled images.
        window_size: (height, width) of a window, or its side.
    """
    height, width = (window_size, window_size) if isinstance(window_size, int) else window_size
    if len(windows) != len(class_queries_logits):
        raise ValueError(
            f"{len(windows)} windows for {len(class_queries_logits)} predictions: pass the model's outputs for all "
            "windows, in their order"
        )
    scaled = [as_size(size) for size in image_sizes]
    targets = scaled if target_sizes is None else [as_size(size) for size in target_sizes]
    if len(targets) != len(scaled):
        raise ValueError(f"target_sizes has {len(targets)} rows for {len(scaled)} images; give one to each")
    probabilities = _class_probabilities(class_queries_logits)
    images: list[list[_Window]] = [[] for _ in scaled]
    for index, (image, start, _) in enumerate([int(value) for value in row] for row in windows):
        offset = (start, 0) if window_axis(scaled[image], (height, width)) == 0 else (0, start)
        masks = _masks(masks_queries_logits[index])
        images[image].append(_Window(offset, (height, width), probabilities[index], masks))
    # A pixel without a window would divide by zero windows, and get class C - 1 from the NaN.
    for image, (image_windows, size) in enumerate(zip(images, scaled, strict=True)):
        _check_coverage(image, image_windows, size)
    return [
        _classify(image_windows, size, target, return_segmentation_scores, confidences)
        for image_windows, size, target in zip(images, scaled, targets, strict=True)
    ]


def semantic_segments_from_logits(
    logits: Tensor, target_sizes: Sequence[Size] | Tensor | None = None, confidences: Sequence[Confidence] = ()
) -> list[Any]:
    """Semantic maps of a model that classifies pixels, such as SegFormer, whose logits are upsampled in tiles.

    Args:
        logits: (B, C, h, w), without no-object.
        target_sizes: (height, width) of each result; None: the logits' own.
        confidences: which ones to compute; see confidence.py.

    Returns:
        For each image the (H, W) int64 map of classes; with confidences, pairs of that and maps by name.
    """
    num_classes, height, width = logits.shape[1:]
    sizes = image_sizes(len(logits), target_sizes, (height, width), None)
    results: list[Any] = []
    for image, (_, target) in zip(logits.detach().float(), sizes, strict=True):
        cells = image.transpose(0, 1).contiguous()
        counts = tiles_per_axis(target, num_classes, image.device)
        blocks = [
            axis_blocks([(length, wanted)], count, image.device, torch.float32)
            for length, wanted, count in zip((height, width), target, counts, strict=True)
        ]
        segmentation = torch.empty(target, dtype=torch.int64, device=image.device)
        maps = {str(each): torch.empty(target, device=image.device) for each in confidences}
        with torch.autocast(image.device.type, enabled=False):
            for rows, columns in product(*blocks):
                tile_scores = resample(cells[rows.cells, :, columns.cells], rows, columns)
                tile = rows.pixels, columns.pixels
                segmentation[tile] = tile_scores.argmax(1)
                for name, values in pixel_confidences(tile_scores, confidences, dim=1, are_logits=True).items():
                    maps[name][tile] = values
        refuse_nan(maps)
        results.append((segmentation, maps) if confidences else segmentation)
    return results


def _check_coverage(image: int, windows: list[_Window], size: Size) -> None:
    for axis, name in enumerate(("rows", "columns")):
        covered = 0
        for start, length in sorted((window.offset[axis], window.size[axis]) for window in windows):
            covered = max(covered, start + length) if start <= covered else covered
        if covered < size[axis]:
            raise ValueError(
                f"image {image}: no window covers {name} from {covered} on (the scaled image has {size[axis]}); "
                "pass all its windows, and the sizes and window size they were cut with"
            )


def _class_probabilities(class_queries_logits: Tensor) -> Tensor:
    """(N, Q, C+1) logits -> (N, C, Q) probabilities without no-object."""
    return class_queries_logits.detach().float().softmax(-1)[..., :-1].transpose(1, 2).contiguous()


def _masks(mask_logits: Tensor) -> Tensor:
    return finite_masks(mask_logits).transpose(0, 1).contiguous()


def _classify(
    windows: list[_Window],
    scaled_size: Size,
    target_size: Size,
    return_scores: bool,
    confidences: Sequence[Confidence],
) -> Tensor | tuple[Any, ...]:
    """Merge the windows of an image of `scaled_size`, resize the scores to `target_size`, and take the best class."""
    num_classes, num_queries = windows[0].class_probabilities.shape
    device = windows[0].masks.device
    placement = (device, torch.float32)
    counts = tiles_per_axis(target_size, num_queries + num_classes, device)
    rows, columns = (
        [(block, _window_blocks(block, windows, axis)) for block in axis_blocks([lengths], count, *placement)]
        for axis, (lengths, count) in enumerate(zip(zip(scaled_size, target_size, strict=True), counts, strict=True))
    )
    segmentation = torch.empty(target_size, dtype=torch.int64, device=device)
    scores = torch.empty((num_classes, *target_size), device=device) if return_scores else None
    all_classes = torch.arange(num_classes, device=device)
    maps = {str(each): torch.empty(target_size, device=device) for each in confidences}
    rejects = any(each.name == "rejection" for each in confidences)
    # Elsewhere, finding the contenders costs more than it saves; and scores and confidences need all classes.
    prune = device.type == "cpu" and not return_scores and not confidences
    # Autocast would compute the products in half precision, where close classes become equal.
    with torch.autocast(device.type, enabled=False):
        for row_block, row_parts in rows:
            for column_block, column_parts in columns:
                parts = [
                    (window, window.masks[row.cells, :, column.cells], row, column)
                    for window, row, column in zip(windows, row_parts, column_parts, strict=True)
                    if row and column
                ]
                classes = _contenders(parts) if prune else all_classes
                merged, best = _merge(parts, classes, (row_block.num_cells, column_block.num_cells), rejects)
                tile_scores = resample(merged, row_block, column_block)
                # Not as one more class: a product of other sizes would round the scores otherwise.
                rejection = None if best is None else resample(best, row_block, column_block)[:, 0]
                tile = row_block.pixels, column_block.pixels
                # Codes fall with the class, so of equal scores the first class wins, as in an argmax.
                codes = code_of_largest(tile_scores, (num_classes - classes)[:, None])
                segmentation[tile] = num_classes - codes.clamp_(min=1)
                if scores is not None:
                    scores[:, *tile] = tile_scores.transpose(0, 1)
                if maps:
                    found = pixel_confidences(tile_scores, confidences, dim=1, rejection=rejection)
                    for name, values in found.items():
                        maps[name][tile] = values
    if confidences:
        refuse_nan(maps)
        return segmentation, scores, maps
    return segmentation if scores is None else (segmentation, scores)


# What one window contributes to a tile: its cells (cells, Q, cells) and the blocks that upsample them. The pixels of
# these blocks are pixels of the scaled image, counted from the first one that the tile depends on.
_Part = tuple[_Window, Tensor, AxisBlock, AxisBlock]


def _window_blocks(target_block: AxisBlock, windows: list[_Window], axis: int) -> list[AxisBlock | None]:
    """For each window, what it contributes along an axis to the pixels behind a target block, if anything."""
    wanted = target_block.cells
    blocks: list[AxisBlock | None] = []
    for window in windows:
        offset, length = window.offset[axis], window.size[axis]
        start, stop = max(wanted.start, offset), min(wanted.stop, offset + length)
        if start >= stop:
            blocks.append(None)
            continue
        own_pixels = slice(start - offset, stop - offset)
        stage = (window.masks.shape[2 * axis], length)
        block = axis_block([stage], own_pixels, window.masks.device, window.masks.dtype)
        blocks.append(replace(block, pixels=slice(start - wanted.start, stop - wanted.start)))
    return blocks


def _merge(parts: list[_Part], classes: Tensor, size: Size, rejects: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scores of the given classes (k,) averaged over the windows of a tile, (rows, k, columns) float32.

    With `rejects` also (rows, 1, columns): the largest of all queries' mask probability x probability of an object.
    """
    height, width = size
    merged = torch.zeros((height, len(classes), width), device=classes.device)
    best = torch.zeros((height, 1, width), device=classes.device) if rejects else None
    coverage = torch.zeros((height, 1, width), device=classes.device)
    for window, cells, rows, columns in parts:
        probabilities = serial_sigmoid_(resample(cells, rows, columns))
        pixels = rows.pixels, slice(None), columns.pixels
        merged[pixels] += matmul(window.class_probabilities[classes], probabilities)
        coverage[pixels] += 1
        if best is not None:
            is_object = window.class_probabilities.sum(0)[:, None]
            best[pixels] += probabilities.mul_(is_object).amax(1, keepdim=True)
    return merged.div_(coverage), None if best is None else best.div_(coverage)


def _contenders(parts: list[_Part]) -> Tensor:
    """Classes (k,) that may have the largest score somewhere in a tile."""
    lower: list[Tensor] = []
    upper: list[Tensor] = []
    for window, cells, _, _ in parts:
        # Scores grow with every mask logit, so bounds on the logits of a tile bound its scores.
        extremes = (torch.from_numpy(extremum(cells.numpy(), (0, 2))) for extremum in (np.min, np.max))
        for bounds, logits in zip((lower, upper), widened(*extremes), strict=True):
            bounds.append(matmul(window.class_probabilities, logits.sigmoid()[:, None]))
    best_lower = torch.stack(lower).amin(0).max()
    return (torch.stack(upper).amax(0) * (1 + _ROUNDING) >= best_lower).nonzero()[:, 0]
