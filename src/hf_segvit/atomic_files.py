"""Write files and folders atomically: first beside, then renamed.

`replacing` and `writing` write a file, `replacing_folder` a folder, and `complete_folder` a model folder, which is
overwritten only on request; `write_json` writes results. Until the renaming, the destination stays as it was. A
destination that is a symbolic link is replaced itself; nothing is ever written through it. `only_writer` keeps a second
process out, and `DiskFull` is the error of a disk without room, whichever library noticed it.
"""

import ctypes
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota, beyond the largest file allowed


class DiskFull(OSError):
    """The disk is full, or the quota used up; `filename` is what could not be written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.ENOSPC, "the disk is full", str(path))

    def __str__(self) -> str:
        return f"cannot write {self.filename}: the disk is full; make room and run the same command again"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk lies behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # safetensors has only text, as Rust writes it.
        code = re.search(r"\(os error (\d+)\)", str(error)[-1000:])
        if code is not None and int(code[1]) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error that a full disk has caused in the block into `DiskFull` of this path."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:  # each library has its own
        if is_disk_full(error):
            raise DiskFull(path) from error
        raise


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a new, empty file that replaces `path` when the block ends without an error.

    Args:
        path: destination, in an existing folder; if it is a symbolic link, the link is replaced.
        durable: wait until the file is on the disk, so that even a crash of the machine never leaves half of it.

    Raises:
        DiskFull: there is no room.
        OSError: the folder cannot be written to, or a folder has the name.
    """
    # In the same folder, as renaming is atomic within a file system only; with the same suffix, from which many writers
    # infer the format.
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    # Not `tempfile`, whose files only their owner can read. Here the system applies the umask, which a process cannot
    # read without changing it.
    with naming_full_disk(path):
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.close(descriptor)
        try:
            yield partial
            if durable:
                _sync(partial)
            os.replace(partial, path)
            if durable:
                _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, durable: bool = False) -> Iterator[Path]:
    """`replacing`, with a `ValueError` that names the file instead of any `OSError` but `DiskFull`."""
    try:
        with replacing(path, durable) as partial:
            yield partial
    except DiskFull:
        raise
    except OSError as error:
        # As ValueError, since commands print those as one line, and permissions are the user's to solve.
        raise ValueError(f"cannot write {path}: {error.strerror or error}; check its folder and the disk") from error


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any], durable: bool = False) -> None:
    """Write `json_text` into a file.

    Raises:
        DiskFull: there is no room.
        ValueError: the file cannot be written for another reason.
    """
    text = json_text(content)
    with writing(path, durable) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON with one line per field or list entry, for people and `diff`; numbers that are not finite become null."""
    content = _without_nan(content)
    if isinstance(content, Mapping):
        # Dictionaries, and lists of them, such as scores by class, get one line per entry too.
        lines = [f" {json.dumps(name)}: {_json_field(value)}" for name, value in content.items()]
        start, end = "{", "}"
    else:
        lines = [f" {json.dumps(entry)}" for entry in content]
        start, end = "[", "]"
    return start + "\n" + ",\n".join(lines) + "\n" + end + "\n"


def _json_field(value: Any) -> str:
    if value and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
    if value and isinstance(value, dict):
        entries = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
        return "{\n" + ",\n".join(entries) + "\n }"
    return json.dumps(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    # JSON has no NaN; Python would write one that other readers reject.
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder that replaces `path` once the block has ended without an error and it is on the disk.

    Parents are created as needed. A process that is killed leaves `.NAME.*.partial` beside the destination. Where the
    system cannot exchange two folders at once (Linux can), there is a moment in which the old folder is
    `.NAME.*.replaced` and nothing has its name.

    Raises:
        DiskFull: there is no room.
        OSError: it cannot be written.
    """
    with _folder_beside(path) as partial:
        yield partial
        _put_in_place(partial, path)


@contextmanager
def complete_folder(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`replacing_folder` for a model folder, after `check_destination`.

    What appears at the destination only after that check is never deleted: it is a `ValueError`.
    """
    check_destination(destination, overwrite)
    path = Path(os.path.abspath(destination))
    found = _folder_number(path) if path.is_dir() and any(path.iterdir()) else None
    with _folder_beside(path) as partial:
        yield partial
        if found is not None and _folder_number(path) == found and _is_model_folder(path):
            _put_in_place(partial, path)
            return
        _sync_contents(partial)
        try:
            if os.name == "nt" and path.is_dir():
                path.rmdir()  # Windows renames over nothing
            os.rename(partial, path)  # over an empty folder, too, but never over anything else
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise ValueError(
                f"{destination} has appeared or changed meanwhile, and was left alone; choose another destination"
            ) from error
        _sync(path.parent)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside the path, which is on the disk once the caller's block has ended; deleted at the end."""
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            yield partial
        finally:
            _delete(partial)  # already renamed if all went well


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a folder its final name, and delete what had that name before."""
    _sync_contents(partial)
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not _exchanged(partial, path):
        replaced = partial.with_suffix(".replaced")
        os.rename(path, replaced)  # a folder that is not empty cannot be renamed over
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(replaced, path)
            raise
        _delete(replaced)
    _sync(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; `False` where system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, see renameat2(2)
    return rename(at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other), exchange) == 0


def _delete(path: Path) -> None:
    """Delete a folder or, without following it, a link or file; without an error if that fails."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _folder_number(path: Path) -> tuple[int, int] | None:
    """What tells a folder from any other that gets its name later; `None` if nothing is there."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


# A model folder has at least one of these files. No other folder is ever replaced, so a mistyped path deletes nothing.
_MARKS = ("config.json", "preprocessor_config.json")


def check_destination(destination: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise `ValueError` unless the destination is free, an empty folder, or a model folder and `overwrite` is set."""
    destination = Path(destination)
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise ValueError(f"{destination} exists and is not a folder; choose another destination")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{destination} already exists; choose another destination, or replace it with --overwrite")
    if not _is_model_folder(destination):
        raise ValueError(
            f"{destination} holds no {' or '.join(_MARKS)}, so it is no model folder, and is not replaced; choose "
            "another destination"
        )


def _is_model_folder(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


_LOCK = ".hf-segvit.lock"
_locked: set[str] = set()  # by this process, whose own locks the system would let pass


@contextmanager
def only_writer(destination: str | os.PathLike[str], beside: bool = False) -> Iterator[None]:
    """Keep other processes from writing into the same folder.

    The lock is a file that is deleted at the end. The system lifts it when the process ends in whatever way, so one
    that was left behind does no harm. Windows and file systems without locks go without.

    Args:
        destination: an existing folder, in which the lock is.
        beside: the folder will be created or replaced as a whole, so the lock is beside it.

    Raises:
        ValueError: another process, or another thread of this one, holds the lock.
    """
    path = Path(os.path.realpath(destination))
    lock = path.with_name(f".{path.name}{_LOCK}") if beside else path / _LOCK
    refusal = f"another process is writing into {destination}; wait until it has ended, or choose another folder"
    if fcntl is None:
        yield
        return
    if str(lock) in _locked:
        raise ValueError(refusal)
    with naming_full_disk(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock, refusal)
    _locked.add(str(lock))
    try:
        yield
    finally:
        _locked.discard(str(lock))
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # before it is released: whoever waits notices and makes a new one
            os.close(descriptor)


def _lock(lock: Path, refusal: str) -> int | None:
    """The descriptor that holds the lock; `None` where the file system has none."""
    while True:
        # Never through a link, which would create a file elsewhere.
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise ValueError(f"cannot write {lock}: {error.strerror}; check its folder, or choose another") from error
        try:
            # Record locks belong to the process alone: unlike those of `flock`, reading workers do not inherit them.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(refusal) from error
            return None
        try:
            # The holder before may have deleted the file between our opening and locking it.
            if os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def delete_remains(path: Path) -> None:
    """Delete what killed writers of a folder have left beside it; restore it if its exchange was cut.

    Only for whoever holds the lock: a writer at work has such folders, too.
    """
    if not path.parent.is_dir():
        return
    remains = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for entry in sorted(path.parent.iterdir()):
        match = remains.fullmatch(entry.name)
        if match is None:
            continue
        if match[1] == "replaced" and not os.path.lexists(path):
            os.rename(entry, path)
        else:
            _delete(entry)


def prepare_output_folder(folder: Path) -> None:
    """Create a folder for results; raise `ValueError` if it cannot be written to, before any work is done."""
    remedy = "choose another folder with --output, or change its permissions"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell, such as on a read-only disk
            pass
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(folder) from error
        if not isinstance(error, FileExistsError):
            raise ValueError(f"cannot write to {folder}: {error.strerror or error}; {remedy}") from error
        raise ValueError(f"cannot write to {folder}: it exists and is not a folder; {remedy}") from error


def _sync_contents(folder: Path) -> None:
    # safetensors creates files that only their owner may read, whatever the umask; the folder's mode reflects it.
    mode = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for file in files:
            os.chmod(Path(root, file), mode)
            _sync(Path(root, file))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
