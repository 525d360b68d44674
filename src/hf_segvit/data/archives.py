"""Read files of a data set from disk or from zip archives, in place.

`read_location` reads one file; a `Location` is a path, or an archive and a member of it. An `Archive` reads its
directory once per process; after that a member costs one seek and its own bytes. `read_json` parses annotation files.

Nothing is extracted, and nothing is trusted: names that are absolute, leave the archive or occur twice, encrypted
members and members larger than a limit are refused, and no member yields more bytes than it declares.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypedDict

from ..models.regular_files import read_regular_file

MAX_IMAGE_BYTES = 512 * 2**20  # bounds the memory that one hostile file can take
MAX_TEXT_BYTES = 2 * 2**30  # COCO's largest JSON has 0.5 GB, LVIS' 1.1 GB
NESTED = "::"  # `outer.zip::inner.zip`: COCO ships its panoptic PNGs as archives inside an archive


class Location(TypedDict):
    """Where a file is: `member` of `archive`, or a path on disk if `archive` is `None`."""

    archive: str | None
    member: str


# Size, time of the last change in ns, and whether it is a folder, by path; `None` for what does not exist.
PathStates = dict[str, tuple[int, int, bool] | None]

_states: ContextVar[PathStates | None] = ContextVar("states", default=None)


@contextmanager
def noted_paths() -> Iterator[PathStates]:
    """Note all files and folders of data sets that are looked at, as they are before that."""
    states: PathStates = {}
    token = _states.set(states)
    try:
        yield states
    finally:
        _states.reset(token)


def note_path(path: str | os.PathLike[str]) -> None:
    """Note a file or folder that is looked at, or looked for."""
    states = _states.get()
    if states is not None and (name := os.fspath(path)) not in states:
        states[name] = path_state(name)


def path_state(path: str) -> tuple[int, int, bool] | None:
    """See `PathStates`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, stat.S_ISDIR(status.st_mode)


def location_name(location: Location) -> str:
    """The location as written in error messages."""
    return f"{location['archive']}/{location['member']}" if location["archive"] else location["member"]


def read_location(location: Location, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a file; one larger than `max_bytes` is refused before it is read.

    Raises:
        ValueError: it is missing, not a regular file, too large, or damaged in the archive.
    """
    if location["archive"]:
        return open_archive(location["archive"]).read(location["member"], max_bytes)
    path = location["member"]
    if "\0" in path or not (path.isascii() or all(character < "\ud800" or character >= "\udc80" for character in path)):
        raise ValueError(f"{path!r} is no path of a file; check it")
    note_path(path)
    return read_regular_file(path, path, max_bytes, may_be_empty=True)


def open_archive(path: str) -> Archive:
    """The archive at a path, from this process' cache; its directory is read at the first call."""
    note_path(path.split(NESTED)[0])
    if path not in _archives:
        _archives[path] = Archive(path)
    return _archives[path]


class Archive:
    """A zip archive whose members are read in place.

    Args:
        path: `outer.zip::inner.zip` for an archive inside another one, which is then held in memory.

    Raises:
        ValueError: it is missing, damaged or unsafe; see the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        outer, _, inner = path.rpartition(NESTED)
        self._content = open_archive(outer).read(inner, MAX_TEXT_BYTES) if outer else None
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, None] = {}
        try:
            self._size = os.path.getsize(path) if self._content is None else len(self._content)
            infos = self._opened().infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
            raise ValueError(f"{path}: not a readable zip archive ({error}); download it again") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
        for info in infos:
            _check_member(info, path, self._members)
            if not info.is_dir():
                self._members[info.filename] = None

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
            ValueError: there is no such member, it is larger than `max_bytes`, or it is damaged.
        """
        name = f"{self.path}/{member}"
        if member not in self._members:
            raise ValueError(f"{name}: the archive has no such member; check the name, or download the archive again")
        info = self._opened().getinfo(member)
        # Both sizes are mere claims of the archive's directory, and both are memory that reading may take.
        size = max(info.file_size, info.compress_size)
        if size > max_bytes:
            raise ValueError(_too_large(name, size, max_bytes))
        if fault := _size_fault(info, self._size):
            raise ValueError(f"{name}: {fault}")
        try:
            with self._opened().open(info) as file:
                # zipfile stops unpacking at the requested length; a bare `read()` would unpack a bomb up to a gigabyte.
                content = file.read(info.file_size + 1)
        except _MEMBER_ERRORS as error:
            raise ValueError(f"{name}: damaged ({error}); download the archive again") from error
        if len(content) != info.file_size:
            raise ValueError(f"{name}: damaged (shorter than the archive says); download the archive again")
        return content

    def _opened(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path if self._content is None else io.BytesIO(self._content))
        return self._zip


# What zipfile raises about damaged members.
_MEMBER_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
)
_LARGE_MEMBER = 64 * 2**20
_MOST_UNPACKED = 100  # times the packed size of a large member; annotations unpack to 20 times theirs at most

_archives: dict[str, Archive] = {}


def _forget_handles() -> None:
    # A forked child shares the file's read position with its parent, and any lock that a thread held at the fork.
    for archive in _archives.values():
        archive._zip = None


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget_handles)


def _check_member(info: zipfile.ZipInfo, archive: str, members: Mapping[str, None]) -> None:
    # `filename` has already been cut off at a NUL and had its separators replaced.
    name = info.orig_filename
    if not info.filename.strip("/"):
        raise ValueError(f"{archive}: a member has no name; repack the archive")
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or name[1:2] == ":" or "\0" in name:
        raise ValueError(
            f"{archive}: member {name[:200]!r} names a file outside the archive; such an archive can be an attack, "
            "get it from its official source"
        )
    if info.filename in members:
        raise ValueError(
            f"{archive}: two members are called {name[:200]!r}; which is meant is unclear, repack the archive"
        )
    if info.flag_bits & 0x1:
        raise ValueError(f"{archive}: member {name[:200]!r} is encrypted; unpack the archive and point to the folder")
    # zipfile's bzip2 and LZMA readers ignore the requested length, so that a bomb would go off.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"{archive}: member {name[:200]!r} is compressed by method {info.compress_type}; repack the archive with "
            "the usual deflate method, or unpack it"
        )


def _size_fault(info: zipfile.ZipInfo, archive_size: int) -> str:
    """What is wrong with the sizes that a member claims; "" if nothing is."""
    # Checked first, since reading takes memory for what is claimed.
    is_stored = info.compress_type == zipfile.ZIP_STORED
    if info.compress_size > archive_size or (is_stored and info.file_size != info.compress_size):
        return "damaged (its size is not the one that the archive says); download the archive again"
    if info.file_size > max(_LARGE_MEMBER, _MOST_UNPACKED * info.compress_size):
        return (
            f"{info.compress_size:,} bytes that unpack to {info.file_size:,}; such a file can be an attack (a bomb). "
            "If it is not, unpack the archive and point to the folder"
        )
    return ""


def _too_large(name: str, size: int, limit: int) -> str:
    return (
        f"{name}: {size:,} bytes, more than the limit of {limit:,}; such a file can be an attack (a bomb). If it is "
        "not, split it into smaller files"
    )


def read_json(location: Location) -> Any:
    """Parse a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Whole numbers of more than 64 bits come as floats, perhaps infinite ones.

    Raises:
        ValueError: it cannot be read, is too large, nested too deeply or not JSON; the message has line and column.
    """
    name = location_name(location)
    content = read_location(location, MAX_TEXT_BYTES)
    if not content.strip():
        raise ValueError(f"{name}: the file is empty; copy or download it again")
    try:
        # As `json.loads` does with bytes, but for halves of characters (surrogates) in the bytes, which it lets pass.
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {encoding_fault(content, error)}") from error
    del content  # as large as the text
    return parse_json(text, name)


def parse_json(text: str, name: str) -> Any:
    """Parse JSON text of the file or entry `name`; see `read_json`."""
    # A callback for each whole number slows parsing down, so only files that hold long ones pay for it.
    read_int = _bounded_int if _has_long_integer(text) else None
    try:
        # `NaN` and `Infinity` are not JSON, but many tools write them: readers refuse them only in values they use.
        return json.loads(text, parse_int=read_int)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: no valid JSON at line {error.lineno}, column {error.colno}; a comma too many or a truncated "
            "download are the usual causes: correct it, or get it again"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deep to be an annotation file; get it from its source again") from error


def read_text(location: Location) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark, as Windows writes it.

    Raises:
        ValueError: it cannot be read, is too large, or has another encoding, which the message names.
    """
    content = read_location(location, MAX_TEXT_BYTES)
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location_name(location)}: {encoding_fault(content, error)}") from error


_LONG_INTEGER = b"0" * 19
_DIGITS_TO_ZEROS = bytes(ord("0") if chr(byte) in "123456789" else byte for byte in range(256))
_BLOCK = 2**20


def _has_long_integer(text: str) -> bool:
    # A regular expression takes a third of the time of parsing; this takes a twentieth.
    return any(
        _LONG_INTEGER in text[start : start + _BLOCK + 18].encode("utf-8", "replace").translate(_DIGITS_TO_ZEROS)
        for start in range(0, len(text), _BLOCK)
    )


def _bounded_int(digits: str) -> int | float:
    # `int` refuses thousands of digits, and NumPy and Arrow end in an OverflowError at anything over 64 bits.
    if len(digits) > 20:
        return float(digits)
    number = int(digits)
    return number if -(2**63) <= number < 2**63 else float(number)


def encoding_fault(content: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a text file that is not UTF-8, with the encodings that it may have, and the remedy."""
    # Older versions of tools write in the code page of the system. Two high bytes in a row are rare in Western text.
    is_western = re.search(rb"[\x80-\xff]{2}", content) is None
    candidates = [("Windows-1252", "cp1252")] if is_western else [("GBK", "gbk"), ("Shift JIS", "shift_jis")]
    names = [name for name, encoding in candidates if content.decode(encoding, "replace").find("\ufffd") < 0]
    perhaps = f", perhaps {' or '.join(names)}" if names else ""
    return f"no valid {error.encoding.upper()} text (byte {error.start}){perhaps}; save it as UTF-8"
