"""Bilinear upsampling of mask logits, tile by tile, skipping most of it.

In here: `AxisBlock`, a band of the interpolation matrix of one axis; `MaskTiles`, built of blocks, which give the
values of some masks on a tile and bounds of all masks on all tiles; `image_sizes` and `tiled_masks`, which lay tiles
over an image. Bilinear interpolation is separable and linear, so rows @ mask @ columns equals any chain of resizes with
crops in between; and it stays within the range of the cells that it mixes, so the small masks alone tell which of them
matter in a tile.

Shapes: K masks, h w cells of a mask, H W pixels. Bilinear means PyTorch's: `align_corners=False`, no antialiasing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from .image_geometry import Size

TILE_PIXELS = 48  # side of a tile on a CPU: smaller ones exclude more masks, larger ones cost fewer calls
MAX_TILES_PER_AXIS = 24  # bounds the calls for large images
_SERIAL_VALUES = 2**15 - 1  # most values for which PyTorch works on one thread
_SERIAL_PRODUCT = 2**18  # most multiplications for which OpenBLAS, inside NumPy, works on one thread
ROUNDING = 1e-5  # exceeds the error of a float32 probability against its bound
ACCELERATOR_TILE_VALUES = 2**24  # values (masks x pixels) resampled at once on an accelerator: 128 MiB in float64


@dataclass(frozen=True)
class AxisBlock:
    """A run of pixels along one axis and how they follow from the cells of a mask."""

    pixels: slice  # of the target
    cells: slice  # of the mask: all that have a weight
    weights: Tensor  # (pixels, cells); rows sum to 1

    @property
    def length(self) -> int:
        """Number of pixels."""
        return self.pixels.stop - self.pixels.start

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return self.cells.stop - self.cells.start


def tiles_per_axis(size: tuple[int, int], planes: int, device: torch.device) -> tuple[int, int]:
    """Number of blocks to cut the axes of a target of this size into, if `planes` masks are resampled at once."""
    if device.type == "cpu":
        rows, columns = (min(math.ceil(length / TILE_PIXELS), MAX_TILES_PER_AXIS) for length in size)
        return rows, columns
    # Elsewhere nothing is pruned, and tiles only bound the memory of what is computed at once.
    side = max(4, math.ceil(math.sqrt(planes * size[0] * size[1] / ACCELERATOR_TILE_VALUES)))
    return min(side, size[0]), min(side, size[1])


def axis_blocks(
    stages: Sequence[tuple[int, int]], count: int, device: torch.device, dtype: torch.dtype
) -> list[AxisBlock]:
    """Cut an axis into `count` blocks, in order, whose lengths differ by at most one pixel.

    `stages` are the interpolations (length before, length after) in order; where a stage starts with less than the one
    before it gave, the rest is cropped at the end.
    """
    edges = [stages[-1][1] * index // count for index in range(count + 1)]
    return [axis_block(stages, slice(start, stop), device, dtype) for start, stop in pairwise(edges)]


def axis_block(stages: Sequence[tuple[int, int]], pixels: slice, device: torch.device, dtype: torch.dtype) -> AxisBlock:
    """The block of the given pixels; see `axis_blocks`."""
    # From the target back to the mask: each stage needs only those cells that the next one reads.
    cells, weights = pixels, None
    for length, target_length in reversed(stages):
        cells, band = _interpolation_band(length, target_length, cells)
        weights = band if weights is None else weights @ band
    return AxisBlock(pixels, cells, torch.from_numpy(weights).to(device, dtype, non_blocking=True))


def _interpolation_band(length: int, target_length: int, pixels: slice) -> tuple[slice, np.ndarray]:
    """The cells behind a run of pixels under one linear interpolation, and float64 weights (pixels, cells)."""
    # Positions are rounded to float32 as in PyTorch's kernels, which at the far end of a long axis is 3e-5 cells.
    scale = np.float32(length) / np.float32(target_length)
    centre = np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)
    position = (centre * scale - np.float32(0.5)).clip(0, length - 1)
    low = position.astype(np.int64)
    high = np.minimum(low + 1, length - 1)
    fraction = (position - low).astype(np.float64)
    first, last = int(low[0]), int(high[-1])
    weights = np.zeros((len(low), last - first + 1))
    row = np.arange(len(low))
    weights[row, low - first] = 1 - fraction
    weights[row, high - first] += fraction  # += as both are the last cell at the edge
    return slice(first, last + 1), weights


@dataclass(frozen=True)
class MaskTiles:
    """Masks of one image and the blocks that upsample them; a tile is a row block x a column block."""

    masks: Tensor  # (h, K, w) logits in the dtype of the blocks
    rows: list[AxisBlock]  # cover the vertical axis of the target in order
    columns: list[AxisBlock]  # and the horizontal one

    @property
    def size(self) -> Size:
        """Height and width of the target."""
        return self.rows[-1].pixels.stop, self.columns[-1].pixels.stop

    @property
    def areas(self) -> Tensor:
        """(len(rows), len(columns)) int64: pixels of each tile."""
        heights, widths = ([block.length for block in blocks] for blocks in (self.rows, self.columns))
        return torch.tensor(heights)[:, None] * torch.tensor(widths)

    @property
    def prunable(self) -> bool:
        """Whether computing bounds pays."""
        # Elsewhere they cost a synchronisation and many small kernels.
        return self.masks.device.type == "cpu"

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[AxisBlock, AxisBlock]]:
        """Tiles row by row."""
        return product(self.rows, self.columns)

    def values(self, rows: AxisBlock, columns: AxisBlock, chosen: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The strips of a tile: rows of the target, and logits (rows, k, columns.length) of the masks `chosen` (k,)."""
        cells = self.masks[rows.cells, :, columns.cells].index_select(1, chosen)
        wide = _interpolate_columns(cells, columns)
        step = rows.length
        # Strips have few enough values that PyTorch starts no threads for what is done with them.
        if self.masks.device.type == "cpu":
            step = max(1, _SERIAL_VALUES // (len(chosen) * columns.length))
        for start in range(0, rows.length, step):
            weights = rows.weights[start : start + step]
            values = matmul(weights, wide).view(len(weights), -1, columns.length)
            first = rows.pixels.start + start
            yield slice(first, first + len(weights)), values.float()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of all `values`, two of (K, len(rows), len(columns)) float32 on the CPU."""
        masks = self.masks.numpy()  # NumPy's minimum and maximum start no threads
        bounds = []
        for extremum in (np.min, np.max):
            strips = np.stack([extremum(masks[block.cells], 0) for block in self.rows], 1)
            tiles = np.stack([extremum(strips[:, :, block.cells], 2) for block in self.columns], 2)
            bounds.append(torch.from_numpy(tiles))
        return widened(*bounds)


def widened(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of cells, widened to hold for values interpolated between them with rounding."""
    slack = 1e-5 * torch.maximum(lower.abs(), upper.abs())
    return lower - slack, upper + slack


def tile_members(relevant: Tensor) -> Sequence[Tensor]:
    """(K, rows, columns) bool -> for each tile, row by row, the indices (k,) of its masks in rising order."""
    per_tile = relevant.flatten(1).T
    return per_tile.nonzero()[:, 1].split(per_tile.sum(1).tolist())


def resample(cells: Tensor, rows: AxisBlock, columns: AxisBlock) -> Tensor:
    """Interpolate what lies behind one tile: (cells, k, cells) -> (rows.length, k, columns.length)."""
    return matmul(rows.weights, _interpolate_columns(cells, columns)).view(rows.length, -1, columns.length)


def serial_sigmoid_(values: Tensor) -> Tensor:
    """Sigmoid in place of a contiguous tensor."""
    # Pieces too small for PyTorch to start threads for, as in `matmul`.
    pieces = values.view(-1).split(_SERIAL_VALUES) if values.device.type == "cpu" else [values]
    for piece in pieces:
        piece.sigmoid_()
    return values


def _interpolate_columns(cells: Tensor, columns: AxisBlock) -> Tensor:
    """(cells, k, cells) -> (cells, k * columns.length)."""
    return matmul(cells.reshape(-1, cells.shape[2]), columns.weights.T).reshape(len(cells), -1)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(m, n) @ (..., n, p), in full precision and, on a CPU, without threads."""
    if left.device.type != "cpu":
        return left @ right
    # PyTorch's own float32 product may round to TF32 or bfloat16 if some other part of the program asked for speed,
    # and on a CPU starts threads for matrices as small as ours: that costs more than it gains, and on a busy machine a
    # thousand times more. NumPy's does neither as long as a product stays small.
    a, b = left.numpy(), right.numpy()
    step = max(1, _SERIAL_PRODUCT // (b.shape[-2] * b.shape[-1]))
    if len(a) <= step:
        return torch.from_numpy(np.matmul(a, b))
    parts = [np.matmul(a[start : start + step], b) for start in range(0, len(a), step)]
    return torch.from_numpy(np.concatenate(parts, axis=-2))


def code_of_largest(values: Tensor, codes: Tensor) -> Tensor:
    """For each pixel the code of its largest value; of equals the largest code, (rows, columns).

    `values` are (rows, k, columns), `codes` positive integers that broadcast to them; 0 where a value is NaN.
    """
    # `max` with indices would start threads however little there is to do.
    return ((values == values.amax(1, keepdim=True)) * codes).amax(1)


def image_sizes(
    batch_size: int,
    target_sizes: Sequence[Size] | Tensor | None,
    input_size: Size,
    content_sizes: Sequence[Size] | Tensor | None,
) -> list[tuple[Size, Size]]:
    """Content and target (height, width) of each image; without targets both are the input size."""
    full = as_size(input_size)
    if target_sizes is None:
        return [(full, full)] * batch_size
    contents = [full] * batch_size if content_sizes is None else [as_size(size) for size in content_sizes]
    targets = [as_size(size) for size in target_sizes]
    for name, given in (("target_sizes", targets), ("content_sizes", contents)):
        if len(given) != batch_size:
            raise ValueError(f"{name} has {len(given)} rows for {batch_size} images; give one (height, width) to each")
        for size in given:
            if min(size) < 1:
                raise ValueError(f"{name}: {size} is not a size in pixels; give (height, width), each at least 1")
    for size in contents:
        if size[0] > full[0] or size[1] > full[1]:
            raise ValueError(
                f"content_sizes: {size} does not fit into the input {full}; it is the size of the scaled image "
                "before padding, in pixels of the model input"
            )
    return list(zip(contents, targets, strict=True))


def as_size(size: Sequence[int] | Tensor) -> Size:
    """Height and width as plain integers."""
    height, width = (int(length) for length in size)
    return height, width


def tiled_masks(
    mask_logits: Tensor, chosen: Tensor, input_size: Size, content_size: Size, target_size: Size
) -> MaskTiles:
    """Tiles over the target of an image, for the masks `chosen` (K,), indices on the CPU, of (Q, h, w).

    The masks are resized to `input_size`, of which the part of `content_size` at the top left is resized to the target.
    """
    device = mask_logits.device
    # On accelerators only float64 products are safe from TF32 and autocast; Apple's have no float64.
    dtype = torch.float32 if device.type in ("cpu", "mps") else torch.float64
    masks = finite_masks(mask_logits.index_select(0, chosen.to(device, non_blocking=True))).to(dtype)
    counts = tiles_per_axis(target_size, len(chosen), device)
    rows, columns = (
        axis_blocks([(cells, length), (content, target)], count, device, dtype)
        for cells, length, content, target, count in zip(
            mask_logits.shape[-2:], input_size, content_size, target_size, counts, strict=True
        )
    )
    return MaskTiles(masks.transpose(0, 1).contiguous(), rows, columns)


def finite_masks(mask_logits: Tensor) -> Tensor:
    """Detached float32 logits with infinities clamped."""
    # Masks that are switched off have infinite logits, and a weight of 0 x infinity would spread as NaN.
    largest = torch.finfo(torch.float32).max
    return mask_logits.detach().float().clamp(-largest, largest)
