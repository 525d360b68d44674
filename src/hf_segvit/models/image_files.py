"""Open image files within limits; whatever a decoder raises is damage.

`open_image_file` decodes a page of a file as it is stored; image_decoding.py converts it. Every failure is a
`ValueError` with the file, the fault and the remedy. Orientation (EXIF) is read here and applied by `upright`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError

from .image_bands import Bands, read_bands
from .image_claims import FREE_PIXELS, MAX_IMAGE_PIXELS, checked_claims, limit_remedy, max_image_pixels, refuse_pixels
from .image_tiff import (
    HEIGHT,
    ORIENTATION,
    WIDTH,
    DamagedTiff,
    exif_orientation,
    is_tiff,
    number,
    tiff_directories,
    tiff_pages,
)
from .regular_files import read_regular_file

# Pillow has many more decoders; those that data sets do not need would only widen the attack surface.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

_MAX_FILE_BYTES = 16 * MAX_IMAGE_PIXELS  # no image within the limits is larger
_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow keeps an orientation
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


def open_image_file(source: Any, name: str | None = None, page: int = 0, free_pixels: int = FREE_PIXELS) -> Any:
    """Decode a page of a file, bytes or file object, neither converted nor upright; see `open_image`.

    A Pillow image, or `Bands` where Pillow has no mode that holds the samples. `free_pixels` as for `checked_claims`.
    """
    name = name or file_name(source)
    content = read_content(source, name)
    claims = checked_claims(content, name, free_pixels)
    if claims is None:
        raise _no_image(name)
    directory = page
    if is_tiff(content):
        pages = tiff_pages(tiff_directories(content))
        directory = pages[page] if page < len(pages) else page
    limit = max_image_pixels()
    with named_damage(name):
        bands = read_bands(content, name, directory, limit)
    if bands is not None:
        return bands
    # Whoever raised our limit has decided about Pillow's as well, whose error comes at twice this number.
    if limit > MAX_IMAGE_PIXELS and (Image.MAX_IMAGE_PIXELS or limit) < limit:
        Image.MAX_IMAGE_PIXELS = limit
    try:
        with named_damage(name):
            image = Image.open(BytesIO(content), formats=IMAGE_FORMATS)
            if directory:
                image.seek(directory)
    except EOFError as error:
        raise ValueError(f"{name}: has no page {page + 1}; ask for one that is there") from error
    with image:
        decode(image, name)
    return image


def decode(image: Image.Image, name: str) -> None:
    """Read the pixels of an image that Pillow has opened, unless they are too many."""
    refuse_pixels(*image.size, name)  # before any pixel is decoded
    try:
        with named_damage(name):
            image.load()
    except EOFError as error:
        raise ValueError(f"{name}: the image is truncated or damaged; copy or download it again") from error


@contextmanager
def named_damage(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a `ValueError` that names the file; `EOFError` and our own pass."""
    try:
        yield
    except EOFError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; {limit_remedy()}") from error
    except UnidentifiedImageError as error:
        raise _no_image(name) from error
    except MemoryError as error:
        raise ValueError(f"{name}: there is not enough memory to decode it; {limit_remedy()}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, IndexError, KeyError, struct.error and others
        if isinstance(error, ValueError) and str(error).startswith(f"{name}: "):
            raise
        # What a decoder says of its own state helps nobody; our own errors of damage are of this class alone.
        reason = f" ({error})" if isinstance(error, DamagedTiff) else ""
        raise ValueError(f"{name}: the image is truncated or damaged{reason}; copy or download it again") from error


def _no_image(name: str) -> ValueError:
    return ValueError(
        f"{name}: not an image of the formats {', '.join(IMAGE_FORMATS)}, whatever its name ends in; "
        "convert it to one of them, or copy it again if it is damaged"
    )


def count_pages(source: Any, free_pixels: int = FREE_PIXELS) -> int:
    """Pages of a TIFF, or frames of an animation; 1 for anything else, also for what cannot be read."""
    try:
        claims = checked_claims(read_content(source, "image"), "image", free_pixels)
    except ValueError:  # whatever is wrong with the file is reported when it is read
        return 1
    return claims.pages if claims is not None else 1


def stored_frame(content: bytes, name: str) -> tuple[int, int, int]:
    """Height and width of an image as they are stored, and its orientation, without decoding it."""
    if checked_claims(content, name) is None:
        raise _no_image(name)
    if is_tiff(content):  # of several bands, Pillow may not know even the size
        tags = tiff_directories(content, most=1)[0]
        return number(tags, HEIGHT, 0), number(tags, WIDTH, 0), number(tags, ORIENTATION, 1)
    try:
        with named_damage(name), Image.open(BytesIO(content), formats=IMAGE_FORMATS) as image:
            return image.height, image.width, orientation(image)
    except EOFError as error:
        raise ValueError(f"{name}: the image is truncated or damaged; copy or download it again") from error


def orientation(image: Any) -> int:
    """The EXIF orientation of a Pillow image or of `Bands`, 1 (upright) to 8; 1 if it is missing or malformed."""
    if isinstance(image, Bands):
        return image.orientation
    if getattr(image, "_exif", None) is not None:  # its owner has read it, and perhaps changed it
        return _valid(image.getexif().get(ORIENTATION, 1))
    if hasattr(image, "tag_v2"):
        return _valid(image.tag_v2.get(ORIENTATION, 1))
    # Not by Pillow's own parser, which reads all tags, whatever they claim.
    block = image.info.get("exif")
    if block is None and isinstance(text := image.info.get("Raw profile type exif"), str):
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            block = None
    found = exif_orientation(block) if isinstance(block, bytes) else 1
    if found != 1:
        return found
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    match = _XMP_ORIENTATION.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else bytes(xmp))
    return int(match[1]) if match else 1


def _valid(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its orientation says; one that is upright is returned as it is."""
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    forget_orientation(turned)  # or it would be turned again
    return turned


def forget_orientation(image: Image.Image) -> None:
    """Let an image count as upright, as it is."""
    for key in _EXIF_KEYS:
        image.info.pop(key, None)
    image._exif = None
    if hasattr(image, "tag_v2"):
        image.tag_v2[ORIENTATION] = 1


def file_name(source: Any) -> str:
    """What errors call a source that nobody named."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", "image"))


def read_content(source: Any, name: str) -> bytes:
    """All bytes of a path, of bytes or of a file object.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    if isinstance(source, bytes | bytearray):
        if not source:
            raise ValueError(f"{name}: empty (0 bytes); copy or download it again")
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return read_regular_file(source, name, _MAX_FILE_BYTES)
    try:
        return source.read()
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error}); check its permissions") from error
