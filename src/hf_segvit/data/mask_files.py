"""Read and write masks: label PNGs, COCO's panoptic PNGs, polygons and RLE.

`read_index_map` and `read_color_ids` decode a PNG, `relabel` turns its values into label ids, `present_values` lists
the values of a map. `polygon_fault` and `rle_fault` check annotations, and `draw_polygons` draws them as COCO's tools
do. `panoptic_png` writes an id map as COCO does. H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic_files import writing
from ..models.image_bands import Bands
from ..models.image_files import open_image_file
from ..models.mask_encoding import decode_counts, encode_counts
from .annotation_values import shown, whole_number
from .archives import Location, location_name, read_location
from .png_files import png_bytes


def read_index_map(location: Location) -> np.ndarray:
    """Decode a map (H, W) of labels or ids, whole numbers as the file stores them.

    Raises:
        ValueError: the file cannot be read, is a JPEG, or has colours or fractions.
    """
    return index_map(read_location(location), location_name(location))


def index_map(content: bytes, name: str) -> np.ndarray:
    """`read_index_map` of a file's content."""
    image = _open(content, name)
    if isinstance(image, Bands):  # a TIFF with a type of numbers that Pillow has no mode for
        if image.values.shape[2] == 1:
            return _whole_numbers(image.values[..., 0], name)
        raise ValueError(
            f"{name}: a mask of {image.mode}, but one channel of labels or ids is expected; save it as a PNG of one"
        )
    pixels, mode = np.asarray(image), image.mode
    if mode == "F":
        return _whole_numbers(pixels, name)
    if mode in ("L", "P", "1") or mode.startswith("I"):
        return pixels.astype(np.uint8) if mode == "1" else pixels
    # Some tools save maps as grey colour images: fine if all channels are equal and nothing is transparent.
    channels = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    opaque = mode not in ("LA", "RGBA") or (channels[-1] == 255).all()
    values = channels[:-1] if mode in ("LA", "RGBA") else channels
    if mode in ("LA", "RGB", "RGBA") and opaque and all((channel == values[0]).all() for channel in values[1:]):
        return np.ascontiguousarray(values[0])
    raise ValueError(
        f"{name}: a mask of mode {mode} with colours, but one channel of labels or ids is expected; if colours stand "
        f"for classes, say so in {COLOR_FORMS}, which the format mask_folder reads; if this is a panoptic PNG, read it "
        "as COCO panoptic"
    )


# The two forms of a table of colours, for errors.
COLOR_FORMS = (
    'classes.json, as {"classes": [{"name": "road", "color": [128, 64, 128]}, ...]}, or CVAT\'s labelmap.txt, with '
    "lines such as road:128,64,128::"
)


def read_colored_map(location: Location, colors: Mapping[int, int], by_palette: bool) -> np.ndarray:
    """Decode a map (H, W) int32 whose colours stand for values.

    Args:
        location: of the file.
        colors: value by colour, 65536 * R + 256 * G + B.
        by_palette: a mask with a palette counts by its colours too, and a grey one by its greys; otherwise their
            numbers are the values.

    Raises:
        ValueError: the file cannot be read, is a JPEG, or has a colour that is not in the table.
    """
    content, name = read_location(location), location_name(location)
    image = _open(content, name)
    if isinstance(image, Bands) or image.mode not in ("1", "L", "P", "LA", "RGB", "RGBA"):
        return index_map(content, name)
    if image.mode in ("1", "L", "P") and not by_palette:
        return index_map(content, name)
    # Transparency says nothing about the class: CVAT and others save it with every colour opaque.
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    packed = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    found, places = np.unique(packed, return_inverse=True)
    unknown = [int(color) for color in found if int(color) not in colors]
    if unknown:
        counts = np.bincount(places.ravel(), minlength=len(found))
        pixels = int(sum(counts[np.searchsorted(found, color)] for color in unknown))
        shown = ", ".join(f"({color >> 16}, {color >> 8 & 255}, {color & 255})" for color in unknown[:5])
        raise ValueError(
            f"{name}: {len(unknown)} colour{'s' if len(unknown) != 1 else ''} in {pixels} of {packed.size} pixels "
            f"stand for no class: {shown}{', ...' if len(unknown) > 5 else ''}; list each with a class, or as void "
            "(many colours near borders: the mask was scaled or compressed, save it again from the annotation)"
        )
    values = np.array([colors[int(color)] for color in found], dtype=np.int32)
    return values[places].reshape(packed.shape)


def _whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """A map of any type of numbers as integers, if it holds nothing else."""
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2**31)
    if not whole.all():
        wrong = values[~whole]
        shown = ", ".join(f"{value:g}" for value in np.unique(wrong)[:5])
        raise ValueError(
            f"{name}: a mask of floating-point numbers of which {wrong.size} are not whole, such as {shown}; classes "
            "are whole numbers: export it with nearest-neighbour resampling, and write pixels without data as a number "
            "that is listed as void"
        )
    return values.astype(np.int32)


def read_color_ids(location: Location) -> np.ndarray:
    """Decode a map (H, W) int32 of ids written as colours, id = R + 256 * G + 65536 * B.

    Raises:
        ValueError: the file cannot be read, is a JPEG, or does not have three channels.
    """
    return color_ids(read_location(location), location_name(location))


def color_ids(content: bytes, name: str) -> np.ndarray:
    """`read_color_ids` of a file's content."""
    image = _open(content, name)
    if isinstance(image, Bands) or image.mode not in ("RGB", "RGBA"):
        raise ValueError(
            f"{name}: a mask of mode {image.mode}, but panoptic PNGs have red, green and blue; check the folder"
        )
    # Pillow holds four bytes per pixel in memory: read as one little-endian number, without the fourth.
    pixels = image.convert("RGB").tobytes("raw", "RGBX")
    ids = np.frombuffer(pixels, dtype="<u4").reshape(image.height, image.width) & 0xFFFFFF
    return ids.astype(np.int32, copy=False)


def relabel(values: np.ndarray, labels: Mapping[int, int], name: str, remedy: str) -> np.ndarray:
    """Replace the values (H, W) of a file by label ids (H, W) int32.

    Args:
        labels: label id by value, `VOID` for void.
        name: of the file, for error messages.
        remedy: against a value that `labels` lacks, for error messages.

    Raises:
        ValueError: a value is not in `labels`.
    """
    # A table, since a lookup by index costs a fraction of one comparison per class and pixel.
    unknown = -2
    low, high = (0, 255) if values.dtype == np.uint8 else (int(values.min(initial=0)), int(values.max(initial=0)))
    if high - low > _LONGEST_TABLE:  # such as -2147483648 for "no data": a table of all between would fill the memory
        replaced = replace_values(values, labels, unknown)
    else:
        table = np.full(high - low + 1, unknown, dtype=np.int32)
        for value, label in labels.items():
            if low <= value <= high:
                table[value - low] = label
        replaced = table[np.subtract(values, low, dtype=np.int64) if low else values]
    if replaced.min(initial=0) == unknown:
        unlisted = np.unique(values[replaced == unknown])[:8].tolist()
        raise ValueError(f"{name}: the mask holds the values {unlisted}, which stand for no class; {remedy}")
    return replaced


_LONGEST_TABLE = 2**20


def replace_values(values: np.ndarray, table: Mapping[int, int], otherwise: int) -> np.ndarray:
    """Replace the values (H, W) that a table has, and all others by one number; (H, W) int32.

    The time depends on neither the size of the values nor their number.
    """
    keys = sorted(key for key in table if -(2**63) <= key < 2**63)
    if not keys:
        return np.full(values.shape, otherwise, dtype=np.int32)
    known = np.array(keys, dtype=np.int64)
    position = np.minimum(np.searchsorted(known, values), len(keys) - 1)
    replaced = np.array([table[key] for key in keys], dtype=np.int32)[position]
    return np.where(known[position] == values, replaced, np.int32(otherwise))


def present_values(segment_map: np.ndarray) -> list[int]:
    """The values of a map (H, W), ascending."""
    flat = segment_map.reshape(-1)
    # Segments are compact: there are far fewer runs of equal values than pixels, and sorting is the slow part.
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(np.append(flat[starts], flat[0])).tolist() if flat.size else []


def _open(content: bytes, name: str) -> Image.Image | Bands:
    """The decoded mask, in the mode in which it is stored."""
    image = open_image_file(content, name)
    if image.format in ("JPEG", "GIF") or (image.format == "WEBP" and image.mode != "L"):
        raise ValueError(
            f"{name}: a {image.format} file as mask; its compression changes labels near every border. Save masks as "
            "PNG, from the original annotation"
        )
    return image


_NO_POLYGON = "a polygon is a flat list of numbers x, y, x, y, ..."

# COCO's code takes 80 bytes and 0.1 microseconds for each pixel of an outline; 4,000,000 are a third of a gigabyte.
LONGEST_OUTLINE = 4_000_000  # pixels along one outline
LONGEST_OUTLINES = 20_000_000  # pixels along all outlines of an image
_LONG_REMEDY = "store such a mask as RLE or PNG, or cut the image into tiles"


def polygon_fault(polygon: Any, size: tuple[int, int]) -> str:
    """What is wrong with a polygon x, y, x, y, ... in pixels of an image of `size` (H, W); "" if it can be drawn."""
    # Nothing reaches pycocotools unchecked: its C code crashes on distant coordinates.
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return _NO_POLYGON
    if points.ndim != 1:
        return _NO_POLYGON
    if len(points) < 6 or len(points) % 2:
        return f"a polygon of {len(points)} numbers; it takes at least 3 points of x and y"
    if not np.isfinite(points).all():
        return "a polygon with a coordinate that is NaN or infinite"
    # Annotation tools overshoot a little, and drawing stops at the image's edge; by more than the image's own size, the
    # polygon is most likely another image's.
    height, width = size
    low, high = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
    if low[0] < -width or low[1] < -height or high[0] > 2 * width or high[1] > 2 * height:
        return (
            f"a polygon that reaches from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}), far outside of the "
            f"image of {width} x {height} pixels"
        )
    # The bound is a hundred times faster than the length, and is enough for nearly all.
    if len(points) / 2 * max(high - low) > LONGEST_OUTLINE and (length := outline_length(points)) > LONGEST_OUTLINE:
        return f"an outline of {length:,} pixels, more than the limit of {LONGEST_OUTLINE:,}; {_LONG_REMEDY}"
    return ""


def outline_length(polygon: Any) -> int:
    """Pixels along a polygon x, y, x, y, ..., which decide what drawing it costs."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return int(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def outlines_fault(length: int) -> str:
    """What is wrong with outlines of this length in one image; "" if they can be drawn."""
    if length <= LONGEST_OUTLINES:
        return ""
    return (
        f"the outlines of this image have {length:,} pixels, more than the limit of {LONGEST_OUTLINES:,} for an image; "
        f"{_LONG_REMEDY}"
    )


def rle_fault(rle: Any, size: tuple[int, int]) -> str:
    """What is wrong with a run-length mask, {"size": [H, W], "counts": str or list of ints}; "" if nothing is."""
    # pycocotools returns uninitialised memory for runs that end too early.
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        return "an RLE mask needs `size` and `counts`"
    lengths = rle["size"]
    stated = tuple(map(whole_number, lengths)) if isinstance(lengths, list | tuple) and len(lengths) == 2 else ()
    if not stated or None in stated:
        return f"an RLE mask whose size is {shown(lengths)}; it must be [height, width]"
    if stated != size:
        note = "; height and width are swapped" if stated == size[::-1] else ""
        return f"an RLE mask of size {list(stated)} for an image of {list(size)} (height, width){note}"
    counts = rle["counts"]
    # Runs may be empty, but more than two for each pixel are no mask; a number has six characters at most.
    if isinstance(counts, str | bytes | list) and len(counts) > 12 * (size[0] * size[1] + 2):
        return f"an RLE mask of {len(counts):,} counts for an image of {size[0] * size[1]:,} pixels"
    if isinstance(counts, str | bytes):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return str(error)
    elif isinstance(counts, list) and all(_is_whole(run) for run in counts):
        runs = np.array([run if abs(run) < 2**62 else -1 for run in counts], dtype=np.int64)
    else:
        return "an RLE mask whose counts are neither text nor a list of whole numbers"
    if not len(runs):
        return "an RLE mask with no counts"
    # Each run is bounded before the sum, which could overflow.
    if runs.min() < 0 or runs.max() > size[0] * size[1] or runs.sum() != size[0] * size[1]:
        return f"an RLE mask whose runs do not add up to the image's {size[0]} * {size[1]} pixels"
    return ""


def _is_whole(run: Any) -> bool:
    # Numbers beyond 64 bits come as floats from JSON.
    return type(run) is int or (type(run) is float and abs(run) >= 2**62)


def compressed_counts(counts: str | bytes | Sequence[int]) -> str:
    """Counts of a valid mask as compressed text."""
    if isinstance(counts, bytes):
        return counts.decode("ascii")
    return counts if isinstance(counts, str) else encode_counts(counts)


def draw_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    """The union of valid polygons as COCO's own tools draw it: {"size": [H, W], "counts": str}."""
    # Imported here, since only formats with outlines need it.
    from pycocotools import mask as coco_mask

    height, width = size
    drawn = coco_mask.frPyObjects([np.asarray(polygon, dtype=np.float64).tolist() for polygon in polygons], *size)
    merged = coco_mask.merge(drawn) if len(drawn) > 1 else drawn[0]
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def merge_masks(rles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of encoded masks of one size, without decoding them."""
    from pycocotools import mask as coco_mask

    encoded = [{"size": rle["size"], "counts": str(rle["counts"]).encode("ascii")} for rle in rles]
    return {"size": list(rles[0]["size"]), "counts": coco_mask.merge(encoded)["counts"].decode("ascii")}


def covers_nothing(polygons: Sequence[Any] | None, rle: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether an outline has no pixel; polygons are drawn only if they are thin, small or outside."""
    if polygons:
        x, y = np.array(polygons[0]).reshape(-1, 2).T
        if x.min() >= 0 and y.min() >= 0 and x.max() <= size[1] and y.max() <= size[0]:
            # The shoelace formula: with more area than a strip one pixel wide, no shape misses all centres of pixels.
            area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
            if area > max(4, 2 * np.ptp(x), 2 * np.ptp(y)):
                return False
        rle = draw_polygons(polygons, size)
    return not mask_area(rle)


def mask_area(rle: Mapping[str, Any]) -> int:
    """Pixels inside an encoded mask, from its runs alone."""
    return int(decode_counts(rle["counts"])[1::2].sum())


MAX_ID = 2**24 - 2  # three bytes a pixel, and 0 is void: files hold our ids plus one


def id_png(ids: np.ndarray) -> bytes:
    """The PNG of a map (H, W) of ids from 0, as colours: id = R + 256 * G + 65536 * B."""
    # The low three bytes of a little-endian 32-bit id are its red, green and blue.
    return png_bytes(ids.astype("<i4", order="C").view(np.uint8).reshape(*ids.shape, 4)[..., :3])


def panoptic_png(segmentation: Any, path: str | PathLike[str]) -> None:
    """Write an id map (H, W), with void -1, as COCO's panoptic PNG, completely or not at all.

    In the file, and so in the JSON that goes with it, ids are greater by one, and void is 0.

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
    with writing(path) as partial:
        partial.write_bytes(id_png(ids + 1))
