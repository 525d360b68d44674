"""Which picture an official checkpoint's position embeddings are for, and making them fit another one.

The file holds them as a list without its rows and columns. The released models are square; others must be told.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.modeling_plain_vit import resample_position_embeddings
from .key_maps import POSITION_TABLE


def fit_positions(
    weights: dict[str, Tensor], fields: dict[str, Any], given: Mapping[str, Any], notes: list[str]
) -> None:
    """Settle the picture size, and resample learned position embeddings to it; in place.

    Args:
        weights: of a `PlainViTModel`.
        fields: config fields; `image_size` is set.
        given: what `--set` gives: `image_size`, and `native_image_size` where the file does not tell.
        notes: told of a resampling.

    Raises:
        ValueError: the size is open, or does not fit; the message says what to set.
    """
    patch_size, wanted = fields["patch_size"], given.get("image_size")
    if POSITION_TABLE not in weights:
        if wanted is None and "image_size" not in fields:
            raise ValueError("rotary positions do not tell the picture size; pass --set image_size=640 or what it is")
        fields["image_size"] = wanted or fields["image_size"]
        return
    table = weights[POSITION_TABLE]
    native = _native_grid(len(table), patch_size, wanted, given.get("native_image_size"))
    new = native if wanted is None else _grid(wanted, patch_size)
    height, width = (cells * patch_size for cells in new)
    fields["image_size"] = height if height == width else [height, width]
    if new != native:
        weights[POSITION_TABLE] = resample_position_embeddings(table, native, new)
        notes.append(f"resampled position embeddings from {native[0]} x {native[1]} to {new[0]} x {new[1]} patches")


def _native_grid(length: int, patch_size: int, wanted: Any, native: Any) -> tuple[int, int]:
    """Rows and columns of a table of position embeddings, which its length alone does not always tell."""
    if native is not None:
        grid = _grid(native, patch_size)
        if math.prod(grid) != length:
            raise ValueError(
                f"--set native_image_size={native}: its {grid[0]} x {grid[1]} patches are not the {length} positions "
                "of the file"
            )
        return grid
    side = math.isqrt(length)
    fits = wanted is not None and math.prod(_grid(wanted, patch_size)) == length
    if side * side == length:
        if fits and _grid(wanted, patch_size) != (side, side):
            raise ValueError(
                f"--set image_size={wanted}: the file's {length} positions may be those of this picture or of a square "
                "one; say which with --set native_image_size=..."
            )
        return side, side
    if fits:
        return _grid(wanted, patch_size)
    raise ValueError(
        f"the file has {length} positions, which is no square; say for which picture they are with "
        "--set native_image_size=HEIGHT,WIDTH"
    )


def _grid(image_size: Any, patch_size: int) -> tuple[int, int]:
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"image size {image_size}: expected pixels, or height,width")
    if any(side < patch_size or side % patch_size for side in sides):
        raise ValueError(f"image size {image_size}: both sides must be multiples of the patch size {patch_size}")
    return sides[0] // patch_size, sides[1] // patch_size
