"""The points that ViT-P is asked about: one for every mask.

`points_from_masks` takes the highest-valued cell of each mask (Table 4b of the paper: better than a random point, as
good as a central one), or for research one of the other two. `query_points` turns the points of a generator's masks
into coordinates of the whole image, which ViT-P sees without padding: the masks lie on the generator's input, which may
be padded, or one of several windows. The official codes skip parts of this; `official_query_points` reproduces them.

Shapes: B images, R rows of the generator's outputs (one an image, or one a window), Q queries, H W pixels of the
generator's input, h w mask cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("maximum", "centroid", "random")
ORIGINS = {"center": 0.5, "corner": 0.0}  # where in its cell a point lies, in cells
_QUERIES_AT_A_TIME = 16  # at the image's own resolution, where a mask may have millions of pixels


def points_from_masks(
    mask_logits: Tensor,
    mode: str = "maximum",
    content_sizes: Tensor | Sequence[Sequence[float]] | None = None,
    origin: str = "center",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point in every mask, (B, Q, 2) fp32 x and y in [0, 1] of the content.

    Args:
        mask_logits: (B, Q, h, w), before the sigmoid, at any resolution.
        mode: `"maximum"` takes the cell of highest value; `"centroid"` the cell with a positive logit that is nearest
            to the mean of those; `"random"` any of them, all being equally likely. A mask without positive logits gives
            its maximum.
        content_sizes: (B, 2) height and width, in cells, of the part of each mask that shows the image, from the
            upper left corner; they may be fractions. Points lie in it and are relative to it. `None`: the whole mask.
        origin: `"center"` of the cell, or its upper left `"corner"` as in the official code.
        generator: of the random numbers.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; it is one of {', '.join(map(repr, MODES))}")
    if origin not in ORIGINS:
        raise ValueError(f"origin={origin!r}; it is one of {', '.join(map(repr, ORIGINS))}")
    if mask_logits.ndim != 4 or 0 in mask_logits.shape[2:]:
        raise ValueError(f"mask_logits of shape {tuple(mask_logits.shape)} must be (images, masks, height, width)")
    height, width = mask_logits.shape[2:]
    device = mask_logits.device
    extent = torch.tensor([height, width], dtype=torch.float32, device=device)
    if content_sizes is not None:
        extent = _checked_content(content_sizes, mask_logits).to(device=device)[:, None]  # (B, 1, 2)
        mask_logits = mask_logits.masked_fill(~_inside(extent[:, 0], height, width, ORIGINS[origin]), -torch.inf)

    rows, columns = first_maximum(mask_logits)
    if mode != "maximum":
        mask = mask_logits > 0
        choose = _nearest_to_centroid if mode == "centroid" else _random_cell
        chosen_rows, chosen_columns = choose(mask, generator)
        empty = ~mask.flatten(2).any(dim=-1)
        rows, columns = torch.where(empty, rows, chosen_rows), torch.where(empty, columns, chosen_columns)
    cells = torch.stack((columns, rows), dim=-1).float() + ORIGINS[origin]
    # The first cell stands for a content that is smaller than its middle.
    return (cells / extent.flip(-1)).clamp(max=1.0)


def first_maximum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (B, Q) of the highest value of maps (B, Q, h, w), of equals the first in reading order."""
    # `torch.argmax` does not define which of equal values it returns, and GPU and CPU differ; points must not.
    row_maxima = values.amax(dim=-1)
    rows = _first_true(row_maxima == row_maxima.amax(dim=-1, keepdim=True))
    row_values = _row_of(values, rows)
    return rows, _first_true(row_values == row_values.amax(dim=-1, keepdim=True))


def _first_true(flags: Tensor) -> Tensor:
    """Index of the first True along the last axis; the last index where there is none (values that are NaN)."""
    size = flags.shape[-1]
    indices = torch.arange(size, device=flags.device)
    return torch.where(flags, indices, size - 1).amin(dim=-1)


def _row_of(maps: Tensor, rows: Tensor) -> Tensor:
    """Row `rows` (B, Q) of each of the maps (B, Q, h, w), (B, Q, w)."""
    return maps.gather(2, rows[..., None, None].expand(-1, -1, 1, maps.shape[-1]))[:, :, 0]


def _nearest_to_centroid(mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    del generator
    height, width = mask.shape[2:]
    rows, columns = (torch.arange(n, device=mask.device, dtype=torch.float32) for n in (height, width))
    area = mask.sum(dim=(2, 3)).clamp(min=1)
    row_mean = (mask.sum(dim=3) * rows).sum(dim=-1) / area
    column_mean = (mask.sum(dim=2) * columns).sum(dim=-1) / area
    row_distances = (rows - row_mean[..., None]).square()
    column_distances = (columns - column_mean[..., None]).square()
    # The nearest cell of the mask, since the mean of a concave mask can lie outside it.
    distances = row_distances[..., :, None] + column_distances[..., None, :]
    return first_maximum(distances.neg_().masked_fill_(~mask, -torch.inf))


def _random_cell(mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    counts = mask.sum(dim=3).cumsum(dim=-1)  # (B, Q, h), cells of the mask down to each row
    area = counts[..., -1:]
    device = mask.device if generator is None else generator.device
    # Drawn where the generator lives, so that a seed gives the same points on every device.
    drawn = torch.rand(area.shape, generator=generator, device=device).to(mask.device)
    # fp32 may round the product up to the area itself.
    nth = torch.minimum((drawn * area).long(), area - 1).clamp(min=0)  # which of its cells
    rows = _first_true(counts > nth)
    before = (counts - mask.sum(dim=3)).gather(-1, rows[..., None])
    return rows, _first_true(_row_of(mask, rows).cumsum(dim=-1) > nth - before)


def _inside(extent: Tensor, height: int, width: int, offset: float) -> Tensor:
    """(B, 1, h, w) bool: cells whose point lies in the content (B, 2), in cells."""
    row_inside, column_inside = (
        torch.arange(n, device=extent.device) + offset < extent[:, axis, None] for axis, n in enumerate((height, width))
    )
    # A content smaller than half a cell would have none.
    row_inside[:, 0] = column_inside[:, 0] = True
    return (row_inside[:, :, None] & column_inside[:, None, :])[:, None]


def _checked_content(content_sizes: Any, mask_logits: Tensor) -> Tensor:
    sizes = torch.as_tensor(content_sizes, dtype=torch.float32)
    batch, _, height, width = mask_logits.shape
    if sizes.shape != (batch, 2):
        raise ValueError(
            f"content_sizes of shape {tuple(sizes.shape)} must be one (height, width) an image: ({batch}, 2)"
        )
    # Sizes scaled from pixels to cells may exceed the mask by a rounding error.
    wrong = ~((sizes > 0) & (sizes <= sizes.new_tensor([height, width]) + 1e-3)).all(dim=1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"content_sizes[{index}] is {sizes[index].tolist()}, not between 0 and the {height} x {width} cells of the "
            "masks; scale sizes in pixels by mask height / input height and mask width / input width"
        )
    return sizes


def query_points(
    masks_queries_logits: Tensor,
    input_size: tuple[int, int],
    content_sizes: Tensor | None = None,
    patch_offsets: Tensor | None = None,
) -> Tensor:
    """A point in each query's mask, (R, Q, 2) fp32 x and y in [0, 1] of the whole image.

    Args:
        masks_queries_logits: (R, Q, h, w), before the sigmoid.
        input_size: (H, W) of the generator's input.
        content_sizes: (B, 2) height and width of each scaled image, in pixels of the input, before padding or cutting
            into windows; `None`: all images fill the input.
        patch_offsets: (R, 3) windows (image, start, end) along the axis that exceeds the input; `None`: no windows.
    """
    if patch_offsets is None:
        return points_from_masks(
            masks_queries_logits, content_sizes=_in_cells(masks_queries_logits, input_size, content_sizes)
        )
    if content_sizes is None:
        raise ValueError(
            "patch_offsets came without content_sizes, so the position of a window in its image is unknown; give the "
            "model all that the processor returned"
        )
    in_window = points_from_masks(masks_queries_logits)
    contents = content_sizes[patch_offsets[:, 0].long()].to(in_window)
    starts = patch_offsets[:, 1].to(in_window)
    # As `image_geometry.window_axis`, for all windows without a copy to the host.
    by_rows = contents[:, 0] > input_size[0]
    origins = torch.stack((torch.where(by_rows, 0, starts), torch.where(by_rows, starts, 0)), dim=-1)
    window = in_window.new_tensor([input_size[1], input_size[0]])
    return ((origins[:, None] + in_window * window) / contents.flip(-1)[:, None]).clamp(max=1.0)


def official_query_points(
    masks_queries_logits: Tensor,
    input_size: tuple[int, int],
    geometry: str,
    content_sizes: Tensor | None = None,
    original_sizes: Tensor | None = None,
) -> Tensor:
    """Points as the official codes place them: upper left corners of cells, and off the object in a padded image.

    `"oneformer"` upsamples the masks to the input, crops the padding, resizes to the image's own size and divides by
    that, while its classifier sees the padded input; it needs the (B, 2) `original_sizes`. `"internimage"` divides by
    the size of the whole mask, ignoring padding and windows. Other arguments are those of `query_points`.
    """
    if geometry == "internimage":
        return points_from_masks(masks_queries_logits, origin="corner")
    if content_sizes is None or original_sizes is None:
        raise ValueError(
            "official_geometry='oneformer' needs content_sizes and original_sizes; make the inputs with a "
            "ViTPFusionImageProcessor of the same official_geometry"
        )
    points = []
    for masks, content, original in zip(
        masks_queries_logits.float(), content_sizes.tolist(), original_sizes.tolist(), strict=True
    ):
        image_points = []
        for chunk in masks.split(_QUERIES_AT_A_TIME):
            padded = F.interpolate(chunk[None], size=input_size, mode="bilinear", align_corners=False)
            cropped = padded[..., : content[0], : content[1]]
            resized = F.interpolate(cropped, size=original, mode="bilinear", align_corners=False)
            image_points.append(points_from_masks(resized, origin="corner")[0])
        points.append(torch.cat(image_points))
    return torch.stack(points)


def _in_cells(masks: Tensor, input_size: tuple[int, int], content_sizes: Any) -> Tensor | None:
    if content_sizes is None:
        return None
    cells = content_sizes.new_tensor(
        [masks.shape[2] / input_size[0], masks.shape[3] / input_size[1]], dtype=torch.float32
    )
    return content_sizes.float() * cells
