"""One point for every mask: what ViT-P is asked about.

`points_from_masks` takes the highest-valued cell of each mask (Table 4b of the paper: better than a random point, as
good as a central one), or for research one of the other two. All work is done on the whole batch, and ties are broken
the same way on every device: the first cell in reading order.

Shapes: B batch, Q masks, h w cells of a mask.

The points that ViT-P is asked about, in the coordinates of the image that it sees.

A query's point is the middle of the cell where its mask logits are highest. Masks lie on the generator's input, which
may be padded, or be one of several windows; the classifier sees the whole image without padding. Here the one is
turned into the other. The two official codes leave parts of this out; they can be reproduced for comparison.

Shapes: B images, R rows of the generator's outputs (one an image, or one a window), Q queries, H W pixels of the
generator's input, h w mask cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("maximum", "centroid", "random")
# Where in its cell a point lies, in cells.
ORIGINS = {"center": 0.5, "corner": 0.0}


def points_from_masks(
    mask_logits: Tensor,
    mode: str = "maximum",
    content_sizes: Tensor | Sequence[Sequence[float]] | None = None,
    origin: str = "center",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point in every mask.

    Args:
        mask_logits: (B, Q, h, w), before the sigmoid, at any resolution.
        mode: `"maximum"` takes the cell of highest value; `"centroid"` the cell with a positive logit that is nearest
            to the mean of those; `"random"` any of them, all being equally likely. A mask without positive logits gives
            its maximum.
        content_sizes: (B, 2) height and width, in cells, of the part of each mask that shows the image, from the
            upper left corner; they may be fractions. Points lie in it and count in it. `None`: the whole mask.
        origin: `"center"` of the cell, or its upper left `"corner"` as in the official code.
        generator: of the random numbers.

    Returns:
        (B, Q, 2) fp32 x and y in [0, 1] of the content.

    Raises:
        ValueError: unknown mode or origin, masks that are not (B, Q, h, w) or without cells, or content sizes that are
            not one positive pair an image or exceed the mask.
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
    """Row and column (B, Q) of the highest value of maps (B, Q, h, w), the first in reading order where there are many.

    `torch.argmax` leaves open which of equal values it names, and on a GPU names others than on a CPU.
    """
    row_maxima = values.amax(dim=-1)
    rows = _first_true(row_maxima == row_maxima.amax(dim=-1, keepdim=True))
    row_values = _row_of(values, rows)
    return rows, _first_true(row_values == row_values.amax(dim=-1, keepdim=True))


def _first_true(flags: Tensor) -> Tensor:
    """Place of the first True along the last axis; the last place where there is none (values that are NaN)."""
    size = flags.shape[-1]
    places = torch.arange(size, device=flags.device)
    return torch.where(flags, places, size - 1).amin(dim=-1)


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
    distances = row_distances[..., :, None] + column_distances[..., None, :]
    return first_maximum(distances.neg_().masked_fill_(~mask, -torch.inf))


def _random_cell(mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    counts = mask.sum(dim=3).cumsum(dim=-1)  # (B, Q, h), cells of the mask down to each row
    area = counts[..., -1:]
    device = mask.device if generator is None else generator.device
    drawn = torch.rand(area.shape, generator=generator, device=device).to(mask.device)
    # fp32 may round the product up to the area itself.
    number = torch.minimum((drawn * area).long(), area - 1).clamp(min=0)  # which of its cells
    rows = _first_true(counts > number)
    before = (counts - mask.sum(dim=3)).gather(-1, rows[..., None])
    return rows, _first_true(_row_of(mask, rows).cumsum(dim=-1) > number - before)


def _inside(extent: Tensor, height: int, width: int, offset: float) -> Tensor:
    """(B, 1, h, w) bool: cells whose point lies in the content of (B, 2) cells; the first always does."""
    row_inside, column_inside = (
        torch.arange(n, device=extent.device) + offset < extent[:, axis, None] for axis, n in enumerate((height, width))
    )
    row_inside[:, 0] = column_inside[:, 0] = True
    return (row_inside[:, :, None] & column_inside[:, None, :])[:, None]


def _checked_content(content_sizes: Any, mask_logits: Tensor) -> Tensor:
    sizes = torch.as_tensor(content_sizes, dtype=torch.float32)
    batch, _, height, width = mask_logits.shape
    if sizes.shape != (batch, 2):
        raise ValueError(
            f"content_sizes of shape {tuple(sizes.shape)} must be one (height, width) an image: ({batch}, 2)"
        )
    # A rounding error of a size that was scaled to the mask is none.
    wrong = ~((sizes > 0) & (sizes <= sizes.new_tensor([height, width]) + 1e-3)).all(dim=1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"content_sizes[{index}] is {sizes[index].tolist()}, not between 0 and the {height} x {width} cells of the "
            "masks; scale sizes in pixels by mask height / input height and mask width / input width"
        )
    return sizes


_QUERIES_AT_A_TIME = 16  # at the image's own resolution, where a mask may have millions of pixels


def query_points(
    masks_queries_logits: Tensor,
    input_size: tuple[int, int],
    content_sizes: Tensor | None = None,
    patch_offsets: Tensor | None = None,
) -> Tensor:
    """A point in each query's mask.

    Args:
        masks_queries_logits: (R, Q, h, w), before the sigmoid.
        input_size: (H, W) of the generator's input.
        content_sizes: (B, 2) height and width of each scaled image, in pixels of the input, before padding or cutting
            into windows; `None`: all images fill the input.
        patch_offsets: (R, 3), for each window the image's index and the first pixel and the one behind the last along
            the axis that exceeds the input; `None`: rows are images.

    Returns:
        (R, Q, 2) fp32 x and y in [0, 1] of the whole image.
    """
    if patch_offsets is None:
        return points_from_masks(
            masks_queries_logits, content_sizes=_in_cells(masks_queries_logits, input_size, content_sizes)
        )
    if content_sizes is None:
        raise ValueError(
            "patch_offsets came without content_sizes, so it is not known where a window lies in its image; give the "
            "model all that the processor returned"
        )
    in_window = points_from_masks(masks_queries_logits)
    contents = content_sizes[patch_offsets[:, 0].long()].to(in_window)
    starts = patch_offsets[:, 1].to(in_window)
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
    """Points as the official codes place them: upper left corners, and where an image is padded, beside the object.

    `"oneformer"` upsamples the masks to the input, crops the padding, resizes to the image's own size and divides by
    that, while its classifier sees the padded input. `"internimage"` divides by the size of the whole mask, padding
    and windows regardless.

    Args:
        masks_queries_logits: (R, Q, h, w), before the sigmoid.
        input_size: (H, W) of the generator's input.
        geometry: `"oneformer"` or `"internimage"`.
        content_sizes: as in `query_points`.
        original_sizes: (B, 2) height and width of the images as they were given; for `"oneformer"`.

    Returns:
        (R, Q, 2) fp32 x and y in [0, 1).

    Raises:
        ValueError: `"oneformer"` without sizes.
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
        parts = []
        for part in masks.split(_QUERIES_AT_A_TIME):
            padded = F.interpolate(part[None], size=input_size, mode="bilinear", align_corners=False)
            cropped = padded[..., : content[0], : content[1]]
            resized = F.interpolate(cropped, size=original, mode="bilinear", align_corners=False)
            parts.append(points_from_masks(resized, origin="corner")[0])
        points.append(torch.cat(parts))
    return torch.stack(points)


def _in_cells(masks: Tensor, input_size: tuple[int, int], content_sizes: Any) -> Tensor | None:
    if content_sizes is None:
        return None
    cells = content_sizes.new_tensor(
        [masks.shape[2] / input_size[0], masks.shape[3] / input_size[1]], dtype=torch.float32
    )
    return content_sizes.float() * cells
