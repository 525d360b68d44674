"""Jobs of `hf-segvit segment`: what is complete in an output folder, by a manifest.

A `Job` owns the manifest of an output folder, or of one shard of the work in it: JSON Lines, a line for the settings
and one for each image, which is appended once the image's files are in place. So a process that is killed loses what
was in flight and nothing else; half a line at the end is cut off by the next one. The other shards' manifests count as
complete, too. `shard_of` splits work by a hash of names, the same way on every machine.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..atomic_files import DiskFull, naming_full_disk

FORMAT, VERSION = "hf-segvit job", 1
PREFIX, SUFFIX = ".hf-segvit-job", ".jsonl"
_SYNC_SECONDS = 5.0  # between waits for the disk, so that a crash of the machine loses little


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`I/N` as a user writes it; a ValueError if it is none."""
        first, separator, second = text.partition("/")
        if not (separator and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
            raise ValueError(f"--shard {text}: give I/N, such as 1/4 for the first of four parts")
        index, count = int(first), int(second)
        if not 1 <= index <= count:
            raise ValueError(f"--shard {text} is out of range; with {count} parts, I goes from 1 to {count}")
        return cls(index, count)

    def has(self, name: str) -> bool:
        """Whether something with this name belongs to the part: its SHA-256, modulo the number of parts."""
        if self.count == 1:
            return True
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


class Job:
    """The work in an output folder, or a shard of it.

    Args:
        folder: exists.
        shard: which part of the work.
        resume: go on with what is complete; False forgets it.

    Raises:
        ValueError: another process works in the folder, its manifest is of another version, or it cannot be written.
    """

    def __init__(self, folder: Path, shard: Shard | None = None, resume: bool = True) -> None:
        shard = shard or Shard()
        self.folder, self.shard = folder, shard
        part = "" if shard.count == 1 else f".{shard.index}-of-{shard.count}"
        self.path = folder / f"{PREFIX}{part}{SUFFIX}"
        try:
            self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}; check its folder") from error
        try:
            self._refuse_others(shard)
            self._cut_half_a_line()
            if not resume:
                self._forget()
            self.settings: dict[str, Any] | None = None
            self._complete: dict[bytes, int] = {}  # digest of the source -> digest of its version
            for path in manifests(folder):
                self._read(path)
        except BaseException:
            self._file.close()
            raise
        self._last_sync = time.monotonic()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the disk and give the folder free."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a full disk has been reported by `record`
                os.fsync(self._file.fileno())
            is_empty = os.fstat(self._file.fileno()).st_size == 0
            with contextlib.suppress(OSError):  # likewise; closing writes again what did not fit
                self._file.close()
            if is_empty:  # refused before it began
                self.path.unlink(missing_ok=True)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings; a ValueError if the folder was begun with others, which names what differs."""
        settings = dict(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
        if self.settings is not None:
            refuse_other_settings(str(self.folder), self.settings, settings)
        self.settings = dict(settings)
        if os.fstat(self._file.fileno()).st_size == 0:
            self._append({"format": FORMAT, "version": VERSION, "settings": settings})
            os.fsync(self._file.fileno())

    def is_complete(self, source: str, version: str) -> bool:
        """Whether the image is complete, in the version of its source (size and time) that is there now."""
        return self._complete.get(digest_of(source)) == _number(version)

    def record(self, source: str, version: str, row: Mapping[str, Any]) -> None:
        """Note that all files of an image are in place; `row` is kept for `rows`."""
        self._append({"source": source, "version": version, **row})
        self._complete[digest_of(source)] = _number(version)
        self._sync_sometimes()

    def record_failure(self, source: str, error: str) -> None:
        """Note why an image could not be segmented; the next time, it is tried again."""
        self._append({"source": source, "error": error})
        self._sync_sometimes()

    def _append(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"  # JSON escapes what is not ASCII, and names that are not UTF-8
        try:
            with naming_full_disk(self.path):
                self._file.write(data)
                self._file.flush()  # in the system's hands, where a killed process loses nothing
        except DiskFull:
            raise
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}; check the disk") from error

    def _sync_sometimes(self) -> None:
        if time.monotonic() - self._last_sync > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._last_sync = time.monotonic()

    def _refuse_others(self, shard: Shard) -> None:
        """Refuse a folder in which another process works, unless on another shard of the same number of shards."""
        if not try_lock(self._file):
            part = "it" if shard.count == 1 else f"shard {shard.index}/{shard.count} of it"
            raise ValueError(f"{self.folder}: another job is working on {part}; wait, or choose another --output")
        for path in manifests(self.folder):
            ends = path.name.endswith(f"-of-{shard.count}{SUFFIX}")
            if path == self.path or (ends and shard.count > 1):
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if not try_lock(file):
                    raise ValueError(
                        f"{self.folder}: another job is working in it ({path.name}), which is no shard of "
                        f"{shard.count}; wait for it, or choose another --output"
                    )

    def _cut_half_a_line(self) -> None:
        """Remove what a killed process left of its last line."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                end += len(line)
        if end < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(end)

    def _forget(self) -> None:
        self._file.truncate(0)
        for path in manifests(self.folder):
            # A shard forgets its own part only, as the others may be at work.
            if path != self.path and self.shard.count == 1:
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        for line in read_lines(path):
            if "settings" in line:
                if self.settings is None:
                    self.settings = line["settings"]
            elif "error" not in line:
                self._complete[digest_of(line["source"])] = _number(line["version"])


def refuse_other_settings(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs from the settings that a folder was begun with."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
        raise ValueError(
            f"{folder} holds results with other settings ({changes}); choose another --output, or forget what is "
            "complete there with --no-resume"
        )


def manifests(folder: Path) -> list[Path]:
    """The manifests in a folder, of all shards."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a manifest, its settings first; another process may be appending to it.

    Raises:
        ValueError: it is damaged, or of a later version of this package.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # being written
                return
            try:
                content = json.loads(line)
                is_ours = number > 1 or (content["format"] == FORMAT and content["version"] <= VERSION)
                if number > 1 and "error" not in content:
                    content["source"], content["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: damaged; --no-resume starts anew") from error
            if not is_ours:
                raise ValueError(f"{path} is of another version of hf-segvit; update it, or start anew by --no-resume")
            yield content


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What was recorded of each complete image of all shards, the latest of each image, in the order of recording."""
    latest: dict[bytes, tuple[int, int]] = {}
    paths = manifests(folder)
    for part, path in enumerate(paths):
        for number, line in enumerate(read_lines(path)):
            if "settings" not in line and "error" not in line:
                latest[digest_of(line["source"])] = part, number
    for part, path in enumerate(paths):
        for number, line in enumerate(read_lines(path)):
            if "source" in line and latest.get(digest_of(line["source"])) == (part, number):
                yield line


def digest_of(text: str) -> bytes:
    """12 bytes that stand for the source of an image."""
    # Millions of paths take a fraction of their memory so.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _number(version: str) -> int:
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=6).digest(), "big")


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed, if nobody else has; the system gives it free when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(2**40)  # far behind what is written, as the bytes locked there can be read by nobody else
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks
        return True
    return True
