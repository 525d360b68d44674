"""Reading mask PNGs: one channel of labels or ids, or COCO's colour-coded ids.

`read_index_map` and `read_color_ids` decode a file, `relabel` turns the file's values into label ids, `present_values`
lists what a map holds. Values are what the file stores: indices of palette images, all 16 bits, no scaling, no
orientation. H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from ..models.picture_decoding import open_image_file
from .archives import Location, location_name, read_location

VOID = -1


def read_index_map(location: Location) -> np.ndarray:
    """A map of labels or ids.

    Colour images are taken if they are grey (all channels equal, nothing transparent), as some tools save maps so.

    Returns:
        (H, W) uint8, uint16 or int32.

    Raises:
        ValueError: the file cannot be read, is a JPEG (whose compression changes labels), or has colours.
    """
    return index_map(read_location(location), location_name(location))


def index_map(content: bytes, name: str) -> np.ndarray:
    """`read_index_map` of a file's content."""
    image = _open(content, name)
    pixels, mode = np.asarray(image), image.mode
    if mode in ("L", "P", "1") or mode.startswith("I"):
        return pixels.astype(np.uint8) if mode == "1" else pixels
    channels = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    opaque = mode not in ("LA", "RGBA") or (channels[-1] == 255).all()
    values = channels[:-1] if mode in ("LA", "RGBA") else channels
    if mode in ("LA", "RGB", "RGBA") and opaque and all((channel == values[0]).all() for channel in values[1:]):
        return np.ascontiguousarray(values[0])
    raise ValueError(
        f"{name}: a mask of mode {mode} with colours, but one channel of labels or ids is expected; if colours stand "
        "for classes, replace each by its label first, and if this is a panoptic PNG, read it as COCO panoptic"
    )


def read_color_ids(location: Location) -> np.ndarray:
    """A map of ids in colours, id = R + 256 * G + 65536 * B.

    Returns:
        (H, W) int32.

    Raises:
        ValueError: the file cannot be read, is a JPEG, or has no three channels.
    """
    return color_ids(read_location(location), location_name(location))


def color_ids(content: bytes, name: str) -> np.ndarray:
    """`read_color_ids` of a file's content."""
    image = _open(content, name)
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(
            f"{name}: a mask of mode {image.mode}, but panoptic PNGs have red, green and blue; check the folder"
        )
    # Four bytes a pixel are what Pillow holds in memory: read as one little-endian number, the fourth cut off.
    pixels = image.convert("RGB").tobytes("raw", "RGBX")
    ids = np.frombuffer(pixels, dtype="<u4").reshape(image.height, image.width) & 0xFFFFFF
    return ids.astype(np.int32, copy=False)


def relabel(values: np.ndarray, labels: Mapping[int, int], name: str, remedy: str) -> np.ndarray:
    """Replace a file's values by labels.

    Args:
        values: (H, W) as in the file.
        labels: label by value, `VOID` for values that count as nothing.
        name: of the file, for errors.
        remedy: what to do about a value that `labels` lacks.

    Returns:
        (H, W) int32.

    Raises:
        ValueError: a value is not in `labels`.
    """
    unknown = -2
    length = 256 if values.dtype == np.uint8 else int(max(values.max(initial=0), 0)) + 1
    table = np.full(length, unknown, dtype=np.int32)
    for value, label in labels.items():
        if 0 <= value < length:
            table[value] = label
    if values.size and values.min() < 0:
        raise ValueError(f"{name}: the mask holds the negative value {values.min()}; {remedy}")
    replaced = table[values]
    if replaced.min(initial=0) == unknown:
        strangers = np.unique(values[replaced == unknown])[:8].tolist()
        raise ValueError(f"{name}: the mask holds the values {strangers}, which stand for no class; {remedy}")
    return replaced


def present_values(segment_map: np.ndarray) -> list[int]:
    """The values of a map (H, W), ascending."""
    flat = segment_map.reshape(-1)
    # Segments are compact: far fewer runs of equal values than pixels, and sorting is the slow part.
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return sorted({int(flat[0]), *flat[starts].tolist()}) if flat.size else []


def _open(content: bytes, name: str) -> Image.Image:
    """The decoded mask, in the mode that it is stored in."""
    image = open_image_file(content, name)
    if image.format in ("JPEG", "GIF") or (image.format == "WEBP" and image.mode != "L"):
        raise ValueError(
            f"{name}: a {image.format} file as mask; its compression changes labels near every border. Save masks as "
            "PNG, from the original annotation"
        )
    return image
