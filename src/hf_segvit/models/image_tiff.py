"""Read the directories of a TIFF within bounds: its tags as numbers, its pages.

Pillow's parser trusts what a directory says: tags that all point at the same bytes fill the memory, and so do chains of
overlapping directories. Here every value counts against the size of the file. EXIF blocks are TIFFs too, and their
orientation is read by the same parser.
"""

import struct
from contextlib import suppress
from typing import Any

# Tags of TIFF; the last one is GDAL's.
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS = 254, 256, 257, 258, 259, 262, 273
ORIENTATION, SAMPLES, ROWS, COUNTS, PLANAR, PREDICTOR = 274, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, EXTRA, FORMAT, NODATA = 322, 323, 324, 325, 338, 339, 42113
_WANTED = {
    *(SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, ORIENTATION, SAMPLES, ROWS, COUNTS, PLANAR),
    *(PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, EXTRA, FORMAT, NODATA),
}

_INNER = (34665, 34853, 40965)  # directories of EXIF, GPS and interoperability

_REDUCED, _TRANSPARENCY = 1, 4  # bits of the subfile type: a smaller copy of a page, and its mask
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_LETTERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
# Sound files use each byte for one tag; a few writers let equal values share their bytes.
_MOST_USES, _SLACK = 4, 65536

Tags = dict[int, Any]


class DamagedTiff(ValueError):
    """The directories of a TIFF cannot be followed."""


class OverclaimingTiff(DamagedTiff):
    """The directories of a TIFF claim more than the file holds."""


def is_tiff(start: bytes) -> bool:
    """Whether a file that starts so is a TIFF, BigTIFF included."""
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def tiff_directories(content: bytes, most: int | None = None) -> list[Tags]:
    """The directories of a TIFF in the order of the file, at most `most`: numbers or text by tag.

    Raises:
        DamagedTiff: the first one cannot be read, or all together claim more than the file can hold.
    """
    parser = _Parser(content)
    found: list[Tags] = []
    seen = set[int]()
    try:
        offset = parser.first
        while offset and offset not in seen and (most is None or len(found) < most):  # damaged files may point back
            seen.add(offset)
            tags, offset = parser.directory(offset)
            found.append(tags)
    except (struct.error, OverflowError) as error:
        if not found:  # a damaged directory of a later page costs that page only
            raise DamagedTiff("its directory is cut off") from error
    if not found:
        raise DamagedTiff("it has no directory")
    return found


class _Parser:
    """Reads directories, and adds up the bytes that all of them claim."""

    def __init__(self, content: bytes) -> None:
        self.content, self.used = content, 0
        self.order = "<" if content.startswith(b"II") else ">"
        is_big = content[2:4] in (b"+\0", b"\0+")
        letters, self.entry_size = ("QQ", 20) if is_big else ("IH", 12)
        self.number, self.entry_count = (self.order + letter for letter in letters)
        self.number_size = struct.calcsize(self.number)
        self.header = 8 if is_big else 4

    @property
    def first(self) -> int:
        """Offset of the first directory."""
        return self._read(self.number, self.header)

    def directory(self, offset: int, depth: int = 0) -> tuple[Tags, int]:
        """The wanted tags of a directory, and the offset of the next one."""
        tags: Tags = {}
        entries = self._read(self.entry_count, offset)
        self._use(self.entry_size * entries)
        start = offset + struct.calcsize(self.entry_count)
        end = start + self.entry_size * entries
        for position in range(start, end, self.entry_size):
            tag, kind = struct.unpack_from(f"{self.order}HH", self.content, position)
            count, place = self._read(self.number, position + 4), position + 4 + self.number_size
            size = count * _SIZES.get(kind, 1)
            if size > self.number_size:
                place = self._read(self.number, place)
                self._use(max(0, min(size, len(self.content) - place)))
            if place + size > len(self.content):
                continue
            if tag in _WANTED:
                tags[tag] = self._value(kind, count, place)
            elif tag in _INNER and depth < 2:
                # Of no use here, but Pillow reads them, so that they count.
                for inner in self._value(kind, min(count, 1), place):
                    with suppress(struct.error, OverflowError):
                        self.directory(inner, depth + 1)
        return tags, self._read(self.number, end)

    def _read(self, form: str, place: int) -> int:
        return struct.unpack_from(form, self.content, place)[0]

    def _use(self, size: int) -> None:
        self.used += size
        if self.used > _MOST_USES * len(self.content) + _SLACK:
            raise OverclaimingTiff(f"its tags claim over {self.used:,} bytes in a file of {len(self.content):,}")

    def _value(self, kind: int, count: int, place: int) -> Any:
        """The value of a tag: text, or a tuple of integers; empty for types that no wanted tag has."""
        if kind == 2:
            return self.content[place : place + count].decode("latin-1")
        letter = _LETTERS.get(kind)
        return struct.unpack_from(f"{self.order}{count}{letter}", self.content, place) if letter else ()


def numbers(tags: Tags, tag: int) -> tuple[int, ...]:
    """The integers of a tag; none if it is missing or text."""
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else ()


def number(tags: Tags, tag: int, default: int) -> int:
    """The first integer of a tag."""
    return (numbers(tags, tag) or (default,))[0]


def tiff_pages(directories: list[Tags]) -> list[int]:
    """Indices of the directories that are pages: neither smaller copies of one nor its mask."""
    kinds = [number(tags, SUBFILE, 0) for tags in directories]
    # Cloud-optimised GeoTIFF keeps its overviews as further directories.
    return [index for index, kind in enumerate(kinds) if not kind & (_REDUCED | _TRANSPARENCY)] or [0]


def refuse_overclaiming(block: bytes) -> None:
    """Refuse an EXIF block whose tags claim more than it holds; a malformed one is ignored, as viewers do."""
    block = block.removeprefix(b"Exif\0\0")
    if is_tiff(block):
        try:
            tiff_directories(block)
        except OverclaimingTiff:
            raise
        except DamagedTiff:
            return


def exif_orientation(block: bytes) -> int:
    """The orientation in an EXIF block, 1 (upright) to 8; 1 if it is missing or malformed."""
    block = block.removeprefix(b"Exif\0\0")
    try:
        value = number(tiff_directories(block, most=1)[0], ORIENTATION, 1) if is_tiff(block) else 1
    except DamagedTiff:
        return 1
    return value if 1 <= value <= 8 else 1
