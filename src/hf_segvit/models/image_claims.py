"""What an image file claims, checked before anything is decoded.

A few hundred bytes can claim gigabytes of pixels, thousands of frames or of progressive scans. `checked_claims` reads
the structure of a file, format by format, without any decoder, and refuses what is above a limit, or too much for the
size of the file. Whoever sets `HF_SEGVIT_MAX_PIXELS` has decided about the number of pixels; the other limits stay.
"""

import os
import re
import struct
from dataclasses import dataclass

from .image_tiff import (
    BITS,
    HEIGHT,
    OFFSETS,
    PLANAR,
    ROWS,
    SAMPLES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    DamagedTiff,
    Tags,
    is_tiff,
    number,
    numbers,
    refuse_overclaiming,
    tiff_directories,
    tiff_pages,
)

# Pillow's own limit for an error; checked here too, since any library in the process can switch Pillow's off.
MAX_IMAGE_PIXELS = 178_956_970
MAX_PIXELS_VARIABLE = "HF_SEGVIT_MAX_PIXELS"
# Photographs have 2 to 20 pixels a byte and masks some hundred; above FREE_PIXELS, more than that is no image.
FREE_PIXELS = 8192 * 8192
FREE_FOR_INFERENCE = 4096 * 4096  # less, as an answer takes several times the memory of its image
PIXELS_PER_BYTE = 200
MAX_PAGES = 10_000
MAX_SCANS = 64  # of a progressive JPEG, each of which passes over the whole image; encoders write about ten
_FREE_SCANNED_PIXELS = 2**30
_BYTES_PER_PIXEL = 4  # what the pixel limits allow for; more of them count as more pixels

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, other than restarts and stuffed bytes
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True)
class Claims:
    """What a file claims.

    Attributes:
        pages: of a TIFF, or frames of an animation.
        bytes_per_pixel: of the largest page, once decoded.
        scans: of a JPEG.
        fault: what cannot be true, such as tiles far larger than the image; "" if nothing.
    """

    width: int
    height: int
    pages: int = 1
    bytes_per_pixel: int = 4
    scans: int = 1
    fault: str = ""


def max_image_pixels() -> int:
    """The most pixels that an image may have: `MAX_IMAGE_PIXELS`, or what `HF_SEGVIT_MAX_PIXELS` says."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, "").strip().replace("_", "")
    if not text:
        return MAX_IMAGE_PIXELS
    if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) < 1:
        raise ValueError(
            f"{MAX_PIXELS_VARIABLE}={text[:40]!r}: give a number of pixels, such as {2 * MAX_IMAGE_PIXELS}"
        )
    return int(text)


def limit_remedy() -> str:
    """What to do about an image that is too large."""
    return (
        f"if it is to be read, raise the limit with {MAX_PIXELS_VARIABLE}=NUMBER in the environment (commands: "
        "--max-pixels NUMBER), or scale it down with an image editor first"
    )


def refuse_pixels(width: int, height: int, name: str) -> None:
    """Refuse more pixels than `max_image_pixels`."""
    limit = max_image_pixels()
    if width * height > limit:
        raise ValueError(
            f"{name}: {width}x{height} pixels, more than the limit of {limit:,}; such a file can be an "
            f"attack (decompression bomb); {limit_remedy()}"
        )


def checked_claims(content: bytes, name: str, free_pixels: int = FREE_PIXELS) -> Claims | None:
    """What a file claims, or `None` if it is of no known format; `free_pixels` need no bytes to back them.

    Raises:
        ValueError: it is damaged, or claims more than the limits allow.
    """
    try:
        claims = claims_of(content)
    except DamagedTiff as error:
        raise ValueError(f"{name}: the image is truncated or damaged ({error}); copy or download it again") from error
    except (struct.error, IndexError):
        raise ValueError(
            f"{name}: the image is truncated or damaged (its header is cut off); copy or download it again"
        ) from None
    if claims is None:
        return None
    refuse_pixels(claims.width, claims.height, name)
    pixels = claims.width * claims.height * -(-claims.bytes_per_pixel // _BYTES_PER_PIXEL)
    size = f"{claims.width}x{claims.height} pixels"
    size += f" of {claims.bytes_per_pixel} bytes" if claims.bytes_per_pixel > _BYTES_PER_PIXEL else ""
    size += f" on {claims.pages:,} pages" if claims.pages > 1 else ""
    attack = "such a file can be an attack (decompression bomb)"
    backed = max(free_pixels, PIXELS_PER_BYTE * len(content))
    decided = os.environ.get(MAX_PIXELS_VARIABLE, "").strip() != ""
    if pixels > (2 * max_image_pixels() if decided else backed):
        raise ValueError(f"{name}: {size} in a file of only {len(content):,} bytes; {attack}; {limit_remedy()}")
    if claims.pages > MAX_PAGES or (claims.pages > 1 and claims.pages * pixels > max(pixels, backed)):
        raise ValueError(
            f"{name}: {size} in a file of only {len(content):,} bytes; {attack}; split it into single images first"
        )
    scanned = claims.scans * claims.width * claims.height
    if claims.scans > MAX_SCANS or scanned > max(_FREE_SCANNED_PIXELS, PIXELS_PER_BYTE * len(content)):
        raise ValueError(
            f"{name}: a JPEG of {size} in {claims.scans} scans, where about 10 are usual; {attack}; save it again as a "
            "baseline JPEG"
        )
    if claims.fault:
        raise ValueError(f"{name}: the image is damaged ({claims.fault}); copy or download it again")
    return claims


def claims_of(content: bytes) -> Claims | None:
    """What a file claims, unchecked; `None` if it is of no known format."""
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(content)
    if content.startswith((b"GIF87a", b"GIF89a")):
        return _gif(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _webp(content)
    if content.startswith(b"BM"):
        return _bmp(content)
    return _tiff(content) if is_tiff(content) else None


def _jpeg(content: bytes) -> Claims:
    width = height = channels = scans = 0
    position, exif = 2, []
    while found := _MARKER.search(content, position):
        kind, position = found[0][1], found.end()
        if kind == 0xD9:  # what follows is another image, such as a preview or a film
            break
        if kind in (0x01, 0xD8):
            continue
        if position + 2 > len(content):
            break
        length = int.from_bytes(content[position : position + 2], "big")
        if kind in _FRAME_HEADERS and position + 8 <= len(content):
            rows, columns, depth = struct.unpack_from(">HHB", content, position + 3)
            width, height, channels = max(width, columns), max(height, rows), max(channels, depth)
        scans += kind == 0xDA
        if kind == 0xE1 and content.startswith(b"Exif\0\0", position + 2):
            exif.append(content[position + 8 : position + length])
        position += max(length, 2)
    refuse_overclaiming(b"".join(exif))  # Pillow joins them, and reads them to learn the resolution
    return Claims(width, height, 1, 4 if channels != 1 else 1, max(scans, 1))


def _png(content: bytes) -> Claims:
    width, height, bits, kind = struct.unpack_from(">IIBB", content, 16)
    channels = {0: 1, 2: 4, 3: 1, 4: 4, 6: 4}.get(kind, 4)
    position, frames, announced, is_first_apart, seen_data = 8, 0, 1, False, False
    while position + 8 <= len(content):
        length, chunk = struct.unpack_from(">I4s", content, position)
        if chunk == b"acTL" and not seen_data and length >= 4:
            (announced,) = struct.unpack_from(">I", content, position + 8)
        frames += chunk == b"fcTL"
        if chunk == b"IDAT" and not seen_data:
            seen_data, is_first_apart = True, frames == 0
        position += 12 + length
    pages = 1
    fault = ""
    if announced > 1:
        pages = announced + is_first_apart
        fault = f"{frames} of {announced} frames are there" if announced > frames else ""
    return Claims(width, height, pages, channels * (2 if bits == 16 else 1), 1, fault)


def _gif(content: bytes) -> Claims:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    position, frames = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0), 0
    while position < len(content) and content[position] in (0x21, 0x2C, 0x00):
        kind = content[position]
        position += 1
        if kind == 0x21:
            position += 1
        elif kind == 0x2C:
            if position + 9 > len(content):
                break
            left, top, columns, rows, flags = struct.unpack_from("<HHHHB", content, position)
            width, height, frames = max(width, left + columns), max(height, top + rows), frames + 1
            position += 10 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        else:  # a stray terminator between blocks
            continue
        while position < len(content) and content[position]:
            position += content[position] + 1
        position += 1
    return Claims(width, height, max(frames, 1))


def _webp(content: bytes) -> Claims:
    width = height = frames = 0
    position = 12
    while position + 8 <= len(content):
        chunk, length = struct.unpack_from("<4sI", content, position)
        place = position + 8
        size = (0, 0)
        if chunk == b"VP8X" and place + 10 <= len(content):
            size = _three_bytes(content, place + 4) + 1, _three_bytes(content, place + 7) + 1
        elif chunk == b"VP8 " and place + 10 <= len(content):
            columns, rows = struct.unpack_from("<HH", content, place + 6)
            size = columns & 0x3FFF, rows & 0x3FFF
        elif chunk == b"VP8L" and place + 5 <= len(content):
            (packed,) = struct.unpack_from("<I", content, place + 1)
            size = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        elif chunk == b"ANMF" and place + 12 <= len(content):
            size = _three_bytes(content, place + 6) + 1, _three_bytes(content, place + 9) + 1
            frames += 1
        width, height = max(width, size[0]), max(height, size[1])
        position = place + length + length % 2
    return Claims(width, height, max(frames, 1))


def _three_bytes(content: bytes, place: int) -> int:
    return int.from_bytes(content[place : place + 3], "little")


def _bmp(content: bytes) -> Claims:
    (header,) = struct.unpack_from("<I", content, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", content, 18)
    return Claims(abs(width), abs(height))


def _tiff(content: bytes) -> Claims:
    directories = tiff_directories(content)
    pages = tiff_pages(directories)
    shapes = [(number(tags, WIDTH, 0), number(tags, HEIGHT, 0), _bytes_per_pixel(tags)) for tags in directories]
    width, height, depth = max(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])
    faults = (_tiff_fault(tags) for tags in directories)
    return Claims(width, height, len(pages), depth, 1, next((fault for fault in faults if fault), ""))


def _bytes_per_pixel(tags: Tags) -> int:
    samples, bits = number(tags, SAMPLES, 1), numbers(tags, BITS) or (1,)
    # Pillow keeps colours in four bytes.
    return max(1, samples * max(1, max(bits) // 8), 4 if samples == 3 else 1)


def _tiff_fault(tags: Tags) -> str:
    """What cannot be true of the strips or tiles of a page; "" if nothing."""
    width, height, rows = number(tags, WIDTH, 0), number(tags, HEIGHT, 0), number(tags, ROWS, 0)
    planes = number(tags, SAMPLES, 1) if number(tags, PLANAR, 1) == 2 else 1
    if numbers(tags, TILE_WIDTH) or numbers(tags, TILE_OFFSETS):
        columns, rows = number(tags, TILE_WIDTH, 0), number(tags, TILE_HEIGHT, 0)
        if columns < 1 or rows < 1:
            return "tiles without a size"
        if columns > max(2 * width, 1024) or rows > max(2 * height, 1024):
            return f"tiles of {columns}x{rows} in an image of {width}x{height}"
        needed, there = -(-width // columns) * -(-height // rows) * planes, len(numbers(tags, TILE_OFFSETS))
    else:
        rows = min(rows or height, height)
        needed, there = (-(-height // rows) if rows > 0 else 0) * planes, len(numbers(tags, OFFSETS))
    # More of them than fit would be decoded over each other, thousands of times.
    return f"{there} strips or tiles where {needed} fit" if there > 2 * needed + 16 else ""
