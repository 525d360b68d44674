"""A cache of the tables that readers make of large annotation files.

Reading COCO's annotations takes seconds and gigabytes in every process. The first one leaves the table here, as an
Arrow file that all others map into memory and share. `cached_table` finds the file for a data set, or `None` if it has
none, or if a file or folder that the reader looked at is not as it was; `store_table` writes it.

A file holds an Arrow stream, a JSON object of what else the reader returned and of all that it looked at, and a
checksum. Nothing in it is executed: mask readers are listed in `_MASK_READERS`, and their fields are plain values.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.table import InMemoryTable
from transformers.utils import logging

from ..atomic_files import replacing
from ..models.image_claims import max_image_pixels
from .archives import PathStates, path_state
from .coco_panoptic import PanopticMasks
from .decoding import PaintedPanoptic, PaintedPolygons, PolygonMasks

logger = logging.get_logger(__name__)

CACHE_VARIABLE = "HF_SEGVIT_CACHE"  # a folder, or "off"
_OFF = ("off", "0", "false", "no")
SMALLEST = 8 * 2**20  # bytes of annotations; less is read in a moment
MOST_FILES = 64
_VERSION = 1  # of the file, and of what readers make of annotations
_MAGIC = b"HFSVTAB1"
_TRAILER = struct.Struct("<Q16s8s")  # bytes of JSON, checksum of all before the trailer, magic
_RECENT = 2.0  # seconds in which a file may change again without another time, on coarse file systems
_BLOCK = 2**22
_MASK_READERS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (PanopticMasks, PolygonMasks, PaintedPolygons, PaintedPanoptic)
}


def cache_root() -> Path | None:
    """The folder of the cache: `HF_SEGVIT_CACHE`, or `hf_segvit` in the user's cache folder; `None` without."""
    value = os.environ.get(CACHE_VARIABLE, "").strip()
    if value.lower() in _OFF:
        return None
    folder = Path(value) if value else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_segvit"
    try:
        return folder.expanduser()
    except RuntimeError:  # containers may run as a user who has no home
        logger.warning_once(
            f"the tables of annotations cannot be kept in {folder}, as there is no such home folder, so each process "
            f"reads them anew; name a folder that can be written in {CACHE_VARIABLE}, or set it to off"
        )
        return None


def table_key(version: str, format_name: str, path: str, options: Mapping[str, Any]) -> str | None:
    """The name of a table, which depends on everything but files; `None` if an option is no plain value.

    Args:
        version: of this package.
        options: of the format, with split and task.
    """
    folder = "" if os.path.isabs(path) else os.getcwd()  # locations in the table are relative if the path is
    try:
        text = json.dumps([_VERSION, version, format_name, folder, path, max_image_pixels(), options], sort_keys=True)
    except TypeError:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def cached_table(key: str) -> tuple[InMemoryTable, dict[str, Any]] | None:
    """A table and its JSON object, with `read_masks` as an object; `None` if it must be read from its files."""
    root = cache_root()
    path = None if root is None else _file(root, key)
    # Unlike `Path.exists`, false where a folder may not be entered or its name is too long; `store_table` says so.
    if path is None or not os.path.exists(path):
        return None
    try:
        table, content = _opened(path)
        if content["key"] != key:
            raise ValueError("it belongs to another data set")
        if not all(_is_same(file, state) for file, state in content["files"].items()):
            return None
        reader = content["read_masks"]
        fields = {name: frozenset(value) if isinstance(value, list) else value for name, value in reader[1].items()}
        content["read_masks"] = _MASK_READERS[reader[0]](**fields)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        struct.error,
        pa.ArrowException,
    ) as error:
        logger.warning(f"the cached table {path} is damaged ({error or type(error).__name__}); it is written again")
        return None
    return table, content


def store_table(key: str, table: pa.Table, read_masks: Any, content: Mapping[str, Any], states: PathStates) -> None:
    """Write a table, unless its annotations are small or have just changed; a folder that refuses is a warning.

    Args:
        content: what else is needed to use the table, plain values.
        states: all files and folders that the reader looked at, and how they were before.
    """
    root = cache_root()
    # Exactly these types: a subclass may read masks in another way.
    if root is None or type(read_masks) not in _MASK_READERS.values():
        return
    files = {path: state for path, state in states.items() if state is not None and not state[2]}
    newest = max((state[1] for state in files.values()), default=0)
    # Of many files, such as one for each image, all would have to be looked at again, and images hashed.
    if len(files) > MOST_FILES or sum(state[0] for state in files.values()) < SMALLEST:
        return
    if time.time() - newest / 1e9 < _RECENT:
        return
    fields = {
        name: sorted(value) if isinstance(value, frozenset) else value for name, value in asdict(read_masks).items()
    }
    try:
        marks = {path: None if state is None else [*state, _digest(path, state[2])] for path, state in states.items()}
        if any(path_state(path) != state for path, state in states.items()):
            return  # changed while it was read
        header = {**content, "key": key, "files": marks, "read_masks": [type(read_masks).__name__, fields]}
        text = json.dumps(header).encode("utf-8")
        path = _file(root, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            with open(unfinished, "ab") as file:
                file.write(text)
            digest = _checksum(unfinished)
            with open(unfinished, "ab") as file:
                file.write(_TRAILER.pack(len(text), digest, _MAGIC))
    except OSError as error:
        logger.warning(
            f"the table of the annotations cannot be kept in {root} ({error.strerror or error}), so each process reads "
            f"them anew; name a folder that can be written in {CACHE_VARIABLE}, or set it to off"
        )


def _file(root: Path, key: str) -> Path:
    return root / "tables" / f"{key}.arrow"


def _opened(path: Path) -> tuple[_MappedTable, dict[str, Any]]:
    """A complete file's table and JSON object."""
    size = path.stat().st_size
    if size < _TRAILER.size:
        raise ValueError("it is cut off")
    with open(path, "rb") as file:
        file.seek(size - _TRAILER.size)
        length, digest, magic = _TRAILER.unpack(file.read(_TRAILER.size))
        if magic != _MAGIC or length > size - _TRAILER.size:
            raise ValueError("its end is missing")
        if _checksum(path, size - _TRAILER.size) != digest:
            raise ValueError("its checksum is wrong")
        file.seek(size - _TRAILER.size - length)
        content = json.loads(file.read(length))
    return _MappedTable.opened(str(path), digest), content


class _MappedTable(InMemoryTable):
    """A table in a file that is mapped into memory; it is sent to other processes as the file's path.

    It is no `MemoryMappedTable`, beside whose file `datasets` would write the results of `map`.
    """

    _source: tuple[str, bytes]

    @classmethod
    def opened(cls, path: str, digest: bytes) -> _MappedTable:
        with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as stream:
            table = cls(stream.read_all())
        table._source = (path, digest)
        return table

    def __reduce__(self) -> Any:
        return _reopened, self._source

    def replace_schema_metadata(self, metadata: Any = None) -> InMemoryTable:
        """The same table if nothing changes, which every `Dataset` asks for."""
        wanted = {name.encode(): value.encode() for name, value in (metadata or {}).items()}
        return self if wanted == self.schema.metadata else super().replace_schema_metadata(metadata)

    def __deepcopy__(self, memo: dict[int, Any]) -> _MappedTable:
        return self  # never changed


def _reopened(path: str, digest: bytes) -> InMemoryTable:
    """The table in another process."""
    try:
        with open(path, "rb") as file:
            file.seek(-_TRAILER.size, os.SEEK_END)
            found = _TRAILER.unpack(file.read())[1]
    except OSError as error:
        raise ValueError(f"{path}: the cached table is gone ({error.strerror or error}); start again") from error
    if found != digest:
        raise ValueError(f"{path}: the annotations have changed since the start of the run; start again")
    return _MappedTable.opened(path, digest)


def _checksum(path: Path, length: int | None = None) -> bytes:
    digest, rest = hashlib.blake2b(digest_size=16), path.stat().st_size if length is None else length
    with open(path, "rb") as file:
        for block in iter(partial(file.read, _BLOCK), b""):
            digest.update(block[:rest])
            rest -= len(block[:rest])
    return digest.digest()


def _digest(path: str, is_folder: bool) -> str:
    """Digest of a file's content or of the names in a folder."""
    if not is_folder:
        return _checksum(Path(path)).hex()
    names = "\0".join(sorted(os.listdir(path)))
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _is_same(path: str, mark: Sequence[Any] | None) -> bool:
    """Whether a file or folder is as it was, by size and time, or else by its content."""
    state = path_state(path)
    if state is None or mark is None:
        return state is None and mark is None
    size, changed, is_folder, digest = mark
    if (state[0], state[2]) != (size, is_folder) and not (is_folder and state[2]):
        return False
    return state[1] == changed or _digest(path, is_folder) == digest
