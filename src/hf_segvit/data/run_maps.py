"""Id maps as runs of equal ids, which is how segments look along the rows: a few kilobytes a picture, quick to unroll.

`RunMap` stands for an (H, W) map wherever numpy takes one, and `decode_entry` unrolls it straight to training places.
`MapCache` is a mask reader that keeps the maps of another one as such files in a folder: a PNG of ids takes as long to
decode as its photograph, its runs a twentieth of that.

H W pixels, n ids, r runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import replacing
from .archives import NESTED, Location
from .decoding import MaskReader, Segments
from .mask_files import VOID

_MAGIC = b"HFSEGVITRUNS1\n"
_HEADER = struct.Struct("<IIII")  # height, width, number of runs, bytes of JSON


@dataclass(frozen=True)
class RunMap:
    """An (H, W) map of ids, row by row.

    Attributes:
        shape: (H, W).
        ids: (n,) int32, those that occur besides void, ascending.
        places: (r,) int16 place in `ids`, -1 for void.
        lengths: (r,) pixels of each run; together H * W.
    """

    shape: tuple[int, int]
    ids: np.ndarray
    places: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, id_map: np.ndarray) -> RunMap:
        """The runs of a map."""
        flat = np.ascontiguousarray(id_map).reshape(-1)
        starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        values = flat[starts]
        ids = np.unique(values[values != VOID])
        places = np.where(values == VOID, -1, np.searchsorted(ids, values))
        lengths = np.diff(starts, append=len(flat))
        return cls((id_map.shape[0], id_map.shape[1]), ids.astype(np.int32), places.astype(np.int16), lengths)

    def unrolled(self, values: np.ndarray) -> np.ndarray:
        """The map (H, W) with another value for each id, in their order (n,), and the last value (n + 1,) for void."""
        return np.repeat(values[self.places], self.lengths).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The map (H, W) of ids, void -1."""
        id_map = self.unrolled(np.append(self.ids, np.int32(VOID)))
        return id_map if dtype is None else id_map.astype(dtype, copy=False)


class MapCache:
    """A mask reader that remembers on disk what another one read.

    A map is known by the place, size and time of its files and by the reader, so that changed files are read anew;
    what annotations say beside (label, crowd) always comes from the data set, never from here. Processes may share
    the folder, and it may be deleted at any time.

    Args:
        read_masks: what reads maps that are not known yet.
        folder: for the files; made if need be.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(self, read_masks: MaskReader, folder: str | os.PathLike[str]) -> None:
        self.read_masks, self.folder = read_masks, Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make the cache folder {folder}: {error.strerror or error}; name another"
            ) from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to the cache folder {folder}; name another, or change its permissions")
        # Readers are dataclasses of all that decides what they make of a file.
        self.reader = f"{type(read_masks).__qualname__} {read_masks!r}"

    def __call__(self, maps: Sequence[Location], segments: Segments | None, name: str) -> tuple[Any, Segments]:
        """See `MaskReader`; maps come as `RunMap`."""
        path = self._path(maps)
        if path is None:
            return self.read_masks(maps, segments, name)
        known = _read(path)
        if known is not None:
            run_map, rows = known
            if segments is None:
                return run_map, rows
            present = set(run_map.ids.tolist())
            rows = [row for row in segments if row["id"] in present]
            if len(rows) == len(present):
                return run_map, rows
        id_map, rows = self.read_masks(maps, segments, name)
        run_map = RunMap.of(id_map)
        if len(run_map.ids) > np.iinfo(np.int16).max:
            return id_map, rows
        _write(path, run_map, rows)
        return run_map, rows

    def _path(self, maps: Sequence[Location]) -> Path | None:
        """Where the answer for these files is kept; `None` where there is no file that could be asked."""
        parts = [self.reader]
        for location in maps:
            file = (location["archive"] or location["member"]).split(NESTED)[0]
            try:
                status = os.stat(file)
            except OSError:
                return None
            parts.append(f"{location['archive']}\0{location['member']}\0{status.st_size}\0{status.st_mtime_ns}")
        digest = hashlib.blake2b("\0\0".join(parts).encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.runs" if maps else None


def _read(path: Path) -> tuple[RunMap, Segments] | None:
    """What a file holds; `None` where there is none, or a damaged one."""
    try:
        content = path.read_bytes()
        if not content.startswith(_MAGIC):
            return None
        raw = zlib.decompress(content[len(_MAGIC) :])
        height, width, num_runs, length = _HEADER.unpack_from(raw)
        places = np.frombuffer(raw, "<i2", num_runs, _HEADER.size)
        lengths = np.frombuffer(raw, "<u4", num_runs, _HEADER.size + 2 * num_runs)
        facts = json.loads(raw[-length:])
        if lengths.sum(dtype=np.int64) != height * width:
            return None
        ids = np.array(facts["ids"], dtype=np.int32)
        rows = [{"id": i, "label_id": label, "is_crowd": crowd} for i, label, crowd in facts["rows"]]
    except (OSError, ValueError, KeyError, TypeError, zlib.error, struct.error):
        return None
    return RunMap((height, width), ids, places, lengths), rows


def _write(path: Path, run_map: RunMap, rows: Segments) -> None:
    facts = {
        "ids": run_map.ids.tolist(),
        "rows": [[int(row["id"]), int(row["label_id"]), bool(row["is_crowd"])] for row in rows],
    }
    text = json.dumps(facts).encode()
    header = _HEADER.pack(*run_map.shape, len(run_map.places), len(text))
    runs = run_map.places.astype("<i2").tobytes() + run_map.lengths.astype("<u4").tobytes()
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(_MAGIC + zlib.compress(header + runs + text))
    except OSError:
        return  # a full disk costs time, not the training
