"""COCO's panoptic PNG files: an id map as a colour picture.

`panoptic_png` writes one and `read_panoptic_png` reads it back. In the file void is 0 and an id is
R + 256 * G + 65536 * B. Our maps (H, W) have void -1 and ids from 0, so files hold our ids plus one: in the JSON that
goes with a file, ids are plus one too.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import replacing

MAX_ID = 2**24 - 2  # the file's largest value is void's 0 plus 2**24 - 1


def panoptic_png(segmentation: Any, path: str | PathLike[str]) -> None:
    """Write an id map as COCO's panoptic PNG, whole or not at all.

    Args:
        segmentation: (H, W) tensor or array of integer ids, void -1.
        path: the file; its folder must be there.

    Raises:
        ValueError: an id is below -1 or above `MAX_ID`, or the file cannot be written.
    """
    path = Path(path)
    if hasattr(segmentation, "detach"):
        segmentation = segmentation.detach().cpu().numpy()
    ids = np.asarray(segmentation)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{path}: need an integer id map (height, width), not {ids.dtype} of shape {ids.shape}")
    if ids.min() < -1 or ids.max() > MAX_ID:
        raise ValueError(f"{path}: ids {ids.min()} to {ids.max()} do not fit; a PNG holds -1 (void) to {MAX_ID}")
    # The low three bytes of a little-endian 32-bit id are its red, green and blue.
    rgb = (ids.astype("<i4", order="C") + 1).view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    try:
        with replacing(path) as partial:
            Image.fromarray(np.ascontiguousarray(rgb)).save(partial, format="PNG")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; check its folder and the disk") from error


def read_panoptic_png(path: str | PathLike[str]) -> np.ndarray:
    """Read a COCO panoptic PNG.

    Returns:
        (H, W) int32: the file's ids less one, so that void is -1.

    Raises:
        ValueError: the file cannot be read, or is no colour picture.
    """
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture.convert("RGBA"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as a picture: {error}") from error
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path} has mode {mode}; COCO's panoptic encoding has red, green and blue")
    # Four bytes a pixel are a little-endian integer, of which the highest byte, alpha, is cut off.
    return (pixels.view("<i4")[..., 0] & 0xFFFFFF).astype(np.int32, copy=False) - 1
