"""Files and annotations of masks: label PNGs, COCO's colour-coded ids, polygons and run-length masks.

`read_index_map` and `read_color_ids` decode a PNG, `relabel` turns the file's values into label ids, `present_values`
lists what a map holds. Values are what the file stores: indices of palette images, all 16 bits, no scaling, no
orientation. `panoptic_png` writes an id map as COCO does: in the file void is 0 and an id is R + 256 * G + 65536 * B,
while our maps have void -1 and ids from 0. So files hold our ids plus one, and so does the JSON that goes with them.

The C code of pycocotools crashes on far coordinates and returns uninitialised memory for short runs, so nothing reaches
it unchecked: `polygon_fault` and `rle_fault` say what is wrong, `draw_polygons` gives the mask that COCO's tools draw.

H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import replacing
from ..models.image_decoding import open_image_file
from ..models.mask_encoding import decode_counts, encode_counts
from .archives import Location, location_name, read_location


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


def polygon_fault(polygon: Any, size: tuple[int, int]) -> str:
    """What is wrong with a polygon.

    Args:
        polygon: x, y, x, y, ... in pixels.
        size: (H, W) of the image.

    Returns:
        What is wrong, or "" for a polygon that can be drawn. Points may lie outside of the image by its own size at
        most: annotation tools overshoot a little, and the drawing is cut off at the image's edge.
    """
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        return "a polygon is a flat list of numbers x, y, x, y, ..."
    if points.ndim != 1:
        return "a polygon is a flat list of numbers x, y, x, y, ..."
    if len(points) < 6 or len(points) % 2:
        return f"a polygon of {len(points)} numbers; it takes at least 3 points of x and y"
    if not np.isfinite(points).all():
        return "a polygon with a coordinate that is NaN or infinite"
    height, width = size
    low, high = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    if low[0] < -width or low[1] < -height or high[0] > 2 * width or high[1] > 2 * height:
        return (
            f"a polygon that reaches from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}), far outside of the "
            f"image of {width} x {height} pixels"
        )
    return ""


def rle_fault(rle: Any, size: tuple[int, int]) -> str:
    """What is wrong with a run-length mask, {"size": [H, W], "counts": str or list of ints}; "" if nothing is."""
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        return "an RLE mask needs `size` and `counts`"
    try:
        stated = tuple(int(length) for length in rle["size"])
    except (TypeError, ValueError, OverflowError):
        return f"an RLE mask whose size is {rle['size']!r}; it must be [height, width]"
    if stated != size:
        note = "; height and width are swapped" if stated == size[::-1] else ""
        return f"an RLE mask of size {list(stated)} for an image of {list(size)} (height, width){note}"
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return str(error)
    elif isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        runs = np.array(counts, dtype=np.int64) if max(map(abs, counts), default=0) < 2**62 else np.array([-1])
    else:
        return "an RLE mask whose counts are neither text nor a list of whole numbers"
    if not len(runs):
        return "an RLE mask with no counts"
    # Each run is bounded before they are summed, as the sum of huge ones could wrap around.
    if runs.min() < 0 or runs.max() > size[0] * size[1] or runs.sum() != size[0] * size[1]:
        return f"an RLE mask whose runs do not add up to the image's {size[0]} * {size[1]} pixels"
    return ""


def compressed_counts(counts: str | bytes | Sequence[int]) -> str:
    """Counts of a faultless mask as compressed text."""
    if isinstance(counts, bytes):
        return counts.decode("ascii")
    return counts if isinstance(counts, str) else encode_counts(counts)


def draw_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    """The union of polygons as COCO's own tools draw it.

    Args:
        polygons: faultless ones, x, y, x, y, ... in pixels.
        size: (H, W) of the image.

    Returns:
        {"size": [H, W], "counts": str}.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    drawn = coco_mask.frPyObjects([np.asarray(polygon, dtype=np.float64).tolist() for polygon in polygons], *size)
    merged = coco_mask.merge(drawn) if len(drawn) > 1 else drawn[0]
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


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
