"""Samples of image files that Pillow cannot hold: several bands, more than 8 bits in colour, numbers with a sign.

`read_bands` gives the samples of a TIFF or PNG as `Bands`, or `None` where Pillow reads the file without a loss.
Strips and tiles of a TIFF are put together here; what neither Pillow nor zlib can decompress is left to tifffile, if it
is installed. H W pixels, C bands.
"""

import math
import struct
import zlib
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from .image_tiff import (
    BITS,
    COMPRESSION,
    COUNTS,
    EXTRA,
    FORMAT,
    HEIGHT,
    NODATA,
    OFFSETS,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR,
    PREDICTOR,
    ROWS,
    SAMPLES,
    TILE_COUNTS,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    DamagedTiff,
    is_tiff,
    number,
    numbers,
    tiff_directories,
)

_COLOUR_SPACES = (3, 5, 6, 8, 9)  # palette, CMYK, YCbCr and Lab: their samples are no values of bands
_JPEG = (6, 7)
_DEFLATE = (8, 32946)


@dataclass(frozen=True)
class Bands:
    """An image as its samples."""

    values: np.ndarray  # (H, W, C), as the file stores them
    nodata: float | None = None  # the value of pixels without data
    has_alpha: bool = False  # the last band is transparency
    orientation: int = 1  # as in EXIF
    format: str = "TIFF"

    @property
    def height(self) -> int:
        """Rows as they are stored."""
        return self.values.shape[0]

    @property
    def width(self) -> int:
        """Columns as they are stored."""
        return self.values.shape[1]

    @property
    def mode(self) -> str:
        """What errors call the kind of image."""
        return described(self.values.shape[2], str(self.values.dtype))

    def upright(self) -> "Bands":
        """The image turned as its orientation says."""
        values = self.values
        if self.orientation in (5, 6, 7, 8):
            values = values.transpose(1, 0, 2)
        if self.orientation in (3, 4, 7, 8):
            values = values[::-1]
        if self.orientation in (2, 3, 6, 7):
            values = values[:, ::-1]
        return replace(self, values=values, orientation=1)


def described(bands: int, dtype: str) -> str:
    """Number of bands and their type in words, such as "4 bands of 16 bits (uint16)"."""
    bits = 8 * np.dtype(dtype).itemsize
    return f"{bands} band{'s' if bands != 1 else ''} of {bits} bits ({dtype})"


def read_bands(content: bytes, name: str, page: int = 0, limit: int | None = None) -> Bands | None:
    """The samples of a file; `None` if Pillow reads it without a loss, or has to say what is wrong with it.

    Args:
        content: the whole file.
        page: the directory of a TIFF, see `tiff_pages`.
        limit: pixels above which it is left to Pillow, and so to the check of its size.

    Raises:
        ValueError: a TIFF is truncated, or of a kind that needs tifffile, which is not installed.
    """
    if content.startswith(b"\x89PNG") and len(content) > 26:
        width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
        bits, colour_type = content[24], content[25]
        # Pillow drops the low byte of 16-bit colours, and with it most of a 12-bit image.
        if bits != 16 or colour_type not in (2, 4, 6) or (limit is not None and width * height > limit):
            return None
        try:
            pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        except RuntimeError:
            return None
        return Bands(pixels.permute(1, 2, 0).numpy(), has_alpha=colour_type in (4, 6), format="PNG")
    if not is_tiff(content):
        return None
    try:
        directory = tiff_directories(content)[page]
    except (DamagedTiff, IndexError):
        return None
    return _tiff_bands(content, directory, name, page, limit)


def _tiff_bands(content: bytes, tags: Any, name: str, page: int, limit: int | None) -> Bands | None:
    width, height, samples = (number(tags, tag, 1) for tag in (WIDTH, HEIGHT, SAMPLES))
    compression, photometric = number(tags, COMPRESSION, 1), number(tags, PHOTOMETRIC, 1)
    bits, kinds, extra = (numbers(tags, tag) for tag in (BITS, FORMAT, EXTRA))
    bits, kind = bits or (1,), (kinds or (1,))[0]
    has_alpha = bool(extra) and extra[-1] in (1, 2) and samples in (2, 4)
    if photometric in _COLOUR_SPACES or (limit is not None and width * height > limit):
        return None
    # These modes of Pillow hold every value: grey of 1, 8, 12 or 16 bits, 32 bits with a sign or a point, and colours
    # of 8 bits.
    plain = (bits[0], kind) in ((1, 1), (2, 1), (4, 1), (8, 1), (12, 1), (16, 1), (16, 2), (32, 2), (32, 3))
    # Pillow mistakes the byte order of predictor 3 in files of Motorola's.
    if samples == 1 and plain and number(tags, PREDICTOR, 1) != 3:
        return None
    if bits == (8,) * samples and kind == 1 and (samples == 3 or has_alpha):
        return None
    dtype = np.dtype(f"{'?uif'[kind] if kind < 4 else 'u'}{bits[0] // 8}") if _is_whole(bits, kind) else None
    facts: dict[str, Any] = {
        "nodata": _as_number(tags.get(NODATA)),
        "has_alpha": has_alpha,
        "orientation": number(tags, ORIENTATION, 1),
    }
    if dtype is None or compression in _JPEG:
        return Bands(_by_tifffile(content, name, page, samples, bits[0], compression), **facts)
    try:
        values = _assembled(content, tags, (height, width, samples), dtype.newbyteorder(_byte_order(content)))
    except _NotDecompressed:
        values = _by_tifffile(content, name, page, samples, bits[0], compression)
    except (ValueError, IndexError, ZeroDivisionError, OverflowError, zlib.error) as error:
        raise ValueError(
            f"{name}: the TIFF of {described(samples, dtype.name)} is truncated or damaged ({error}); copy or download "
            "it again"
        ) from error
    return Bands(values, **facts)


class _NotDecompressed(Exception):
    """Pillow's libtiff does not know the compression."""


def _assembled(content: bytes, tags: Any, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """The samples (H, W, C) from strips or tiles; `dtype` in the file's byte order."""
    height, width, samples = shape
    tiled = tags.get(TILE_WIDTH) is not None
    offsets, counts = (numbers(tags, tag) for tag in ((TILE_OFFSETS, TILE_COUNTS) if tiled else (OFFSETS, COUNTS)))
    planar = number(tags, PLANAR, 1) == 2 and samples > 1
    compression, predictor = number(tags, COMPRESSION, 1), number(tags, PREDICTOR, 1)
    rows = number(tags, TILE_HEIGHT, height) if tiled else min(number(tags, ROWS, height), height)
    columns = number(tags, TILE_WIDTH, width) if tiled else width
    depth = 1 if planar else samples
    values = np.zeros((samples if planar else 1, height, width, depth), dtype=dtype.newbyteorder("="))
    down, across = -(-height // rows), -(-width // columns)
    if len(offsets) < down * across * len(values):
        raise ValueError(f"{len(offsets)} strips or tiles instead of {down * across * len(values)}")
    if not counts and compression == 1:
        counts = (len(content),) * len(offsets)  # some writers of uncompressed files leave the lengths out
    for index in range(down * across * len(values)):
        plane, place = divmod(index, down * across)
        top, left = place // across * rows, place % across * columns
        # The last strip is shorter, the last tile is padded.
        kept = rows if tiled else min(rows, height - top)
        length = kept * columns * depth * dtype.itemsize
        block = content[offsets[index] : offsets[index] + counts[index]]
        block = _decompressed(block, compression, (kept, columns * depth * dtype.itemsize))
        if len(block) < length:
            raise ValueError(f"a strip or tile holds {len(block)} of {length} bytes")
        piece = _unpredicted(block[:length], predictor, (kept, columns, depth), dtype)
        target = values[plane, top : top + kept, left : left + columns]
        target[...] = piece[: target.shape[0], : target.shape[1]]
    return values[..., 0].transpose(1, 2, 0) if planar else values[0]


def _decompressed(block: bytes, compression: int, shape: tuple[int, int]) -> bytes:
    """The bytes of one strip or tile, of `shape` (rows, bytes in a row)."""
    if compression == 1:
        return block
    if compression in _DEFLATE:
        return zlib.decompressobj().decompress(block, math.prod(shape))  # no more than fits, whatever the block holds
    # As a TIFF of one band of bytes it is within what Pillow can open, and libtiff undoes LZW, PackBits, Zstandard...
    height, width = shape
    tags = {WIDTH: width, HEIGHT: height, BITS: 8, COMPRESSION: compression, PHOTOMETRIC: 1, OFFSETS: 0}
    tags |= {SAMPLES: 1, ROWS: height, COUNTS: len(block)}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    tags[OFFSETS] = len(head) + 12 * len(tags) + 4
    # In ascending order, each as one number of 32 bits.
    head += b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags)) + bytes(4)
    try:
        with Image.open(BytesIO(head + block), formats=("TIFF",)) as image:
            return image.tobytes()
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise _NotDecompressed from error


def _unpredicted(block: bytes, predictor: int, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Samples (rows, columns, bands) in native byte order from bytes that hold differences, or not."""
    rows, columns, depth = shape
    native = dtype.newbyteorder("=")
    if predictor == 3:  # differences of bytes, the most significant bytes of a row first
        planes = np.frombuffer(block, np.uint8).reshape(rows, -1, depth)
        planes = np.cumsum(planes, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, columns * depth)
        packed = np.ascontiguousarray(planes.transpose(0, 2, 1))
        return packed.view(dtype.newbyteorder(">")).astype(native).reshape(shape)
    samples = np.frombuffer(block, dtype).reshape(shape).astype(native)
    return np.cumsum(samples, axis=1, dtype=native) if predictor == 2 else samples


def _by_tifffile(content: bytes, name: str, page: int, samples: int, bits: int, compression: int) -> np.ndarray:
    bands = f"{samples} band{'s' if samples != 1 else ''} of {bits} bits"
    kind = f"{name}: a TIFF of {bands} with compression {compression}"
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            f'{kind}, which Pillow does not read; install a reader for it with pip install "hf-segvit[tiff]", or save '
            "it as a TIFF without compression (if it is one that Pillow reads, such as LZW, the file is damaged)"
        ) from error
    try:
        values = np.asarray(tifffile.TiffFile(BytesIO(content)).pages[page].asarray())
    except Exception as error:  # it raises whatever its codecs raise
        raise ValueError(f"{kind}: tifffile cannot read it ({error}); save it as a TIFF without compression") from error
    if values.ndim == 2:
        return values[..., None]
    return values if values.shape[2] == samples else values.transpose(1, 2, 0)


def _is_whole(bits: tuple[int, ...], kind: int) -> bool:
    return len(set(bits)) == 1 and bits[0] in ((8, 16, 32, 64) if kind != 3 else (16, 32, 64)) and kind in (1, 2, 3, 4)


def _byte_order(content: bytes) -> Any:
    return "<" if content.startswith(b"II") else ">"


def nodata_of(image: Any) -> float | None:
    """The value that GDAL's tag names for pixels without data, of a TIFF opened by Pillow or of `Bands`."""
    if isinstance(image, Bands):
        return image.nodata
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else _as_number(tags.get(NODATA))


def _as_number(text: Any) -> float | None:
    try:
        return float(str(text).strip().rstrip("\0"))
    except ValueError:
        return None
