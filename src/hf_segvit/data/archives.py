"""Files of a data set, on disk or inside zip archives, read in place.

`read_location` reads one file; a `Location` is a path, or an archive and a member of it. An archive's directory is read
once per process tree: forked workers inherit it, spawned ones read it at their first file. After that a member costs
one seek and its own bytes. The file handle is opened when it is first needed, reopened after a fork, and never pickled.

Nothing is extracted, and nothing is trusted: names that are absolute, leave the archive or occur twice, encrypted
members and members larger than a limit are refused, and no member yields more bytes than it declares. An archive inside
an archive is written `outer.zip::inner.zip` (COCO ships its panoptic PNGs so).

Reading JSON that others wrote: annotations of COCO, labelme and class lists.

`read_json` takes UTF-8, UTF-16 and UTF-32, with or without a byte order mark. `NaN` and `Infinity`, which are no JSON
but which many tools write, are read; whoever uses the value refuses it.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, TypedDict

MAX_IMAGE_BYTES = 512 * 2**20
MAX_TEXT_BYTES = 2 * 2**30  # COCO's largest JSON has 0.5 GB, LVIS' 1.1 GB
NESTED = "::"

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and of extra field


class Location(TypedDict):
    """Where a file is: `member` of `archive`, or a path on disk where `archive` is `None`."""

    archive: str | None
    member: str


def location_name(location: Location) -> str:
    """The location as errors call it."""
    return f"{location['archive']}/{location['member']}" if location["archive"] else location["member"]


def read_location(location: Location, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The content of a file.

    Args:
        location: where it is.
        max_bytes: a larger file is refused before it is read.

    Raises:
        ValueError: it is missing, no regular file, too large, or damaged in the archive.
    """
    if location["archive"]:
        return open_archive(location["archive"]).read(location["member"], max_bytes)
    path = location["member"]
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is a folder, device or pipe, not a regular file; remove it from the data set")
        if status.st_size > max_bytes:
            raise ValueError(_too_large(path, status.st_size, max_bytes))
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and permissions"
        ) from error


def open_archive(path: str) -> Archive:
    """The archive at a path, from this process' cache; its directory is read at the first call."""
    archive = _archives.get(path)
    if archive is None:
        archive = _archives[path] = Archive(path)
    return archive


class _Member(NamedTuple):
    offset: int
    compressed_size: int
    size: int
    method: int
    crc: int


class Archive:
    """A zip archive whose members are read in place.

    Args:
        path: of the archive; `outer.zip::inner.zip` for an archive inside another. An inner archive that the outer one
            compresses is held in memory, one that it only stores is read in place.

    Raises:
        ValueError: it is missing, damaged or unsafe; see the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        outer, *inner = path.split(NESTED)
        self._file_path, self._content = outer, b""
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        try:
            self._start, self._length = 0, os.path.getsize(outer)
        except OSError as error:
            raise ValueError(f"{outer}: cannot be read ({error.strerror}); check the path") from error
        self._members = self._read_directory(outer)
        for name in inner:
            self._enter(name)

    def __reduce__(self) -> str:
        raise TypeError(f"{self.path}: an open archive cannot be pickled; send its path and open it there")

    def __contains__(self, member: str) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, member: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The content of a member.

        Raises:
            ValueError: there is no such member, it is larger than `max_bytes`, or damaged.
        """
        name = f"{self.path}/{member}"
        entry = self._members.get(member)
        if entry is None:
            raise ValueError(f"{name}: the archive has no such member; check the name, or download the archive again")
        if max(entry.size, entry.compressed_size) > max_bytes:
            raise ValueError(_too_large(name, max(entry.size, entry.compressed_size), max_bytes))
        start = self._data_offset(entry, name)
        raw = self._read_at(start, entry.compressed_size)
        if entry.method == zipfile.ZIP_STORED:
            content = raw
        else:
            try:
                # One byte more than declared is enough to see that there is too much.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, entry.size + 1)
            except zlib.error as error:
                raise ValueError(f"{name}: damaged ({error}); download the archive again") from error
        if len(content) != entry.size or zlib.crc32(content) != entry.crc:
            raise ValueError(
                f"{name}: damaged (its size or checksum is not what the archive says); download the archive again"
            )
        return content

    def _enter(self, member: str) -> None:
        name = f"{self.path}/{member}"
        entry = self._members.get(member)
        if entry is None:
            raise ValueError(f"{name}: the archive has no such member; check the name, or download the archive again")
        if entry.method == zipfile.ZIP_STORED:
            self._start, self._length = self._data_offset(entry, name), entry.size
        else:
            self._content = self.read(member, MAX_TEXT_BYTES)
            self._start, self._length = 0, len(self._content)
        self._members = self._read_directory(name)

    def _data_offset(self, entry: _Member, name: str) -> int:
        """Where the member's bytes start, counted as `_read_at` does."""
        header = self._read_at(self._start + entry.offset, _LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size:
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature == b"PK\x03\x04":
                return self._start + entry.offset + _LOCAL_HEADER.size + name_length + extra_length
        raise ValueError(f"{name}: the archive is truncated or damaged there; download it again")

    def _read_at(self, offset: int, length: int) -> bytes:
        if self._content:
            return self._content[offset : offset + length]
        with self._lock:
            if self._file is None:
                self._file = open(self._file_path, "rb")  # noqa: SIM115 - stays open as long as the process
            self._file.seek(offset)
            return self._file.read(length)

    def _forget_handle(self) -> None:
        # A forked child would share the file's position with its parent, and a lock that a thread held then.
        self._file, self._lock = None, threading.Lock()

    def _read_directory(self, name: str) -> dict[str, _Member]:
        try:
            window: Any = _Window(self, self._start, self._length)
            with zipfile.ZipFile(io.BufferedReader(window)) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise ValueError(f"{name}: not a readable zip archive ({error}); download it again") from error
        members: dict[str, _Member] = {}
        for info in infos:
            _check_member(info, name, members)
            if not info.is_dir():
                members[info.filename] = _Member(
                    info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
                )
        return members


_archives: dict[str, Archive] = {}


def _forget_handles() -> None:
    for archive in _archives.values():
        archive._forget_handle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_handles)


class _Window(io.RawIOBase):
    """A part of an archive's file as a file of its own."""

    def __init__(self, archive: Archive, start: int, length: int) -> None:
        self._archive, self._start, self._length, self._position = archive, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("the end of the archive is missing")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self._length - self._position))
        content = self._archive._read_at(self._start + self._position, wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _check_member(info: zipfile.ZipInfo, archive: str, members: dict[str, _Member]) -> None:
    name = info.orig_filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or name[1:2] == ":" or "\0" in name:
        raise ValueError(
            f"{archive}: member {name!r} names a place outside the archive; such an archive can be an attack, get it "
            "from its official source"
        )
    if info.filename in members:
        raise ValueError(f"{archive}: two members are called {name!r}; which is meant is unclear, repack the archive")
    if info.flag_bits & 0x1:
        raise ValueError(f"{archive}: member {name!r} is encrypted; unpack the archive and point to the folder")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"{archive}: member {name!r} is compressed by method {info.compress_type}; repack the archive with the "
            "usual deflate method, or unpack it"
        )


def _too_large(name: str, size: int, limit: int) -> str:
    return (
        f"{name}: {size:,} bytes, more than the limit of {limit:,}; such a file can be an attack (a bomb). If it is "
        "not, split it into smaller files"
    )


def read_json(location: Location) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read, is too large or nested too deep, or is no JSON; the message has line and column.
    """
    name = location_name(location)
    content = read_location(location, MAX_TEXT_BYTES)
    if not content.strip():
        raise ValueError(f"{name}: the file is empty; copy or download it again")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: no valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); a comma too many or a "
            "truncated download are the usual causes"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no valid text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deep to be an annotation file; get it from its source again") from error
