"""The points that ViT-P is asked about, in the coordinates of the picture that it sees.

A query's point is the middle of the cell where its mask logits are highest. Masks lie on the generator's input, which
may be padded, or be one of several windows; the classifier sees the whole picture without padding. Here the one is
turned into the other. The two official codes leave parts of this out; they can be reproduced for comparison.

Shapes: B pictures, R rows of the generator's outputs (one a picture, or one a window), Q queries, H W pixels of the
generator's input, h w mask cells.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_points import points_from_masks

_QUERIES_AT_A_TIME = 16  # at the picture's own resolution, where a mask may have millions of pixels


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
        content_sizes: (B, 2) height and width of each scaled picture, in pixels of the input, before padding or cutting
            into windows; `None`: all pictures fill the input.
        patch_offsets: (R, 3), for each window the picture's index and the first pixel and the one behind the last along
            the axis that exceeds the input; `None`: rows are pictures.

    Returns:
        (R, Q, 2) fp32 x and y in [0, 1] of the whole picture.
    """
    if patch_offsets is None:
        return points_from_masks(
            masks_queries_logits, content_sizes=_in_cells(masks_queries_logits, input_size, content_sizes)
        )
    if content_sizes is None:
        raise ValueError(
            "patch_offsets came without content_sizes, so it is not known where a window lies in its picture; give the "
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
    """Points as the official codes place them: upper left corners, and where a picture is padded, beside the object.

    `"oneformer"` upsamples the masks to the input, crops the padding, resizes to the picture's own size and divides by
    that, while its classifier sees the padded input. `"internimage"` divides by the size of the whole mask, padding
    and windows regardless.

    Args:
        masks_queries_logits: (R, Q, h, w), before the sigmoid.
        input_size: (H, W) of the generator's input.
        geometry: `"oneformer"` or `"internimage"`.
        content_sizes: as in `query_points`.
        original_sizes: (B, 2) height and width of the pictures as they were given; for `"oneformer"`.

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
