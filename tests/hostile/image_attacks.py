"""Small image files that claim much, and sound ones to damage."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

FORMS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def sound_files() -> dict[str, bytes]:
    """Small files of all formats, of kinds that take different ways through the decoders."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    frames = [noise, noise.rotate(90, expand=False), noise.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "progressive.jpg": saved(noise, "JPEG", progressive=True, exif=exif),
        "plain.jpg": saved(noise, "JPEG", quality=80),
        "plain.png": saved(noise, "PNG", exif=exif),
        "palette.png": saved(noise.quantize(8), "PNG"),
        "film.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "plain.webp": saved(noise, "WEBP", lossless=True, exif=exif),
        "film.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "plain.bmp": saved(noise, "BMP"),
        "film.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "grey.tif": saved(noise.convert("L"), "TIFF"),
        "pages.tif": saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression}.tif"] = saved(noise, "TIFF", compression=compression)
    return files


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """An image as a file."""
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, color: int = 2, bits: int = 8, before: bytes = b"") -> bytes:
    """A PNG of zeros, which deflate takes to a thousandth of its size."""
    channels = {0: 1, 2: 3, 6: 4}[color]
    packer = zlib.compressobj(9)
    row = bytes(1 + width * channels * bits // 8)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before
    return start + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")


def many_frames_png(frames: int) -> bytes:
    """A PNG that announces frames which are not there."""
    return png(8, 8, before=png_chunk(b"acTL", struct.pack(">II", frames, 0)))


def many_scans_jpeg(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, each of a few bytes for the whole image."""
    content = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * scans + b"\xff\xd9"


def gif(width: int, height: int, frames: int) -> bytes:
    """A GIF of tiny frames on a large canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = (
        b"\x21\xf9\x04\x04\x00\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    )
    return head + frame * frames + b"\x3b"


def webp(width: int, height: int) -> bytes:
    """A WebP of one colour: whatever its size, it takes a few dozen bytes."""
    content = bytearray(saved(Image.new("RGB", (64, 64), (200, 10, 10)), "WEBP", lossless=True))
    place = content.index(b"VP8L") + 9
    (packed,) = struct.unpack_from("<I", content, place)
    struct.pack_into("<I", content, place, packed & ~0xFFFFFFF | (width - 1) | (height - 1) << 14)
    return bytes(content)


def bmp(width: int, height: int) -> bytes:
    """A BMP in run-length encoding whose rows are all skipped."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 4, 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start) + head + bytes(1024) + b"\x00\x01\x00\x01"


def tiff(entries: list[tuple[int, int, int, int]], tail: bytes = b"") -> bytes:
    """A TIFF of one directory; entries are (tag, type, count, value or offset)."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + tail


def page(width: int, height: int, **changed: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Entries of a grey page; `changed` are t258=(type, count, value) and so on."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 278: (4, 1, height), 279: (4, 1, 64)}
    tags |= {int(name[1:]): value for name, value in changed.items()}
    return [(tag, *value) for tag, value in tags.items() if value]


def overlapping_tags(count: int, size: int) -> bytes:
    """A TIFF whose tags all point at the same bytes."""
    entries = page(8, 8)
    entries += [(1000 + index, 1, size, 8) for index in range(count)]
    return tiff(entries, bytes(size))


def attacks() -> dict[str, bytes]:
    """Files of at most some hundred kilobytes, by name, that no reader may follow."""
    exif = overlapping_tags(5000, 60_000)
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    blocks = b"".join(
        b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part
        for part in (exif[start : start + 60_000] for start in range(0, len(exif), 60_000))
    )
    strips = 40_000
    offsets = tiff(page(2000, 2000, t273=(4, strips, 150), t278=(4, 1, 2000), t279=(4, strips, 150)), bytes(4 * strips))
    packed = zlib.compress(bytes(20_000_000), 9)
    return {
        "13000.png": png(13_000, 13_000, color=0),
        "line.png": png(170_000_000, 1, color=0),
        "frames.png": many_frames_png(2**30),
        "scans.jpg": many_scans_jpeg(3000, 2000),
        "exif.jpg": jpeg[:2] + blocks + jpeg[2:],
        "frames.gif": gif(3000, 3000, 3000),
        "canvas.gif": gif(65_535, 65_535, 1),
        "flat.webp": webp(16_383, 16_383),
        "rows.bmp": bmp(30_000, 30_000),
        "tags.tif": overlapping_tags(5000, 200_000),
        "tile.tif": tiff(
            page(16, 16, t322=(4, 1, 40_000), t323=(4, 1, 40_000), t324=(4, 1, 200), t325=(4, 1, 64), t273=(), t279=()),
            bytes(64),
        ),
        "strips.tif": offsets,
        "bands.tif": tiff(page(9000, 9000, t277=(3, 1, 60_000), t258=(3, 1, 64), t259=(3, 1, 8)), packed[:100]),
        "loop.tif": tiff(page(2**31, 2**31)),
    }
