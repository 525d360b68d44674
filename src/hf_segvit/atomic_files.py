"""Write files and folders atomically: first beside, then renamed.

`replacing` writes a file, `replacing_folder` a folder, and `complete_folder` a model folder, which is overwritten only
on request; `write_json` writes results. Until the renaming, the destination stays as it was.
"""

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a new, empty file that replaces `path` when the block ends without an error.

    Args:
        path: destination, in an existing folder.
        durable: wait until the file is on the disk, so that even a crash of the machine never leaves half of it.

    Raises:
        OSError: the folder cannot be written to.
    """
    # In the same folder, as renaming is atomic within a file system only; with the same suffix, from which many writers
    # infer the format.
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    # Not `tempfile`, whose files only their owner can read. Here the system applies the umask, which a process cannot
    # read without changing it.
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


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any], durable: bool = False) -> None:
    """Write JSON with one line per field or list entry, for people and `diff`; numbers that are not finite become null.

    Raises:
        ValueError: the file cannot be written.
    """
    content = _without_nan(content)
    if isinstance(content, Mapping):
        # Dictionaries, and lists of them, such as scores by class, get one line per entry too.
        lines = [f" {json.dumps(name)}: {_json_field(value)}" for name, value in content.items()]
        start, end = "{", "}"
    else:
        lines = [f" {json.dumps(entry)}" for entry in content]
        start, end = "[", "]"
    try:
        with replacing(path, durable) as partial:
            partial.write_text(start + "\n" + ",\n".join(lines) + "\n" + end + "\n", encoding="utf-8")
    except OSError as error:
        # As ValueError, since commands print those as one line, and a full disk is the user's to solve.
        raise ValueError(f"cannot write {path}: {error.strerror or error}; check its folder and the disk") from error


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

    Parents are created as needed. A process that is killed leaves `.NAME.*.partial` beside the destination, and at the
    moment of the exchange the old folder as `.NAME.*.replaced`.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.{uuid.uuid4().hex[:8]}"
    partial, replaced = path.with_name(f"{name}.partial"), path.with_name(f"{name}.replaced")
    partial.mkdir()
    try:
        yield partial
        _sync_contents(partial)
        if path.exists():  # a folder that is not empty cannot be renamed over
            os.rename(path, replaced)
        try:
            os.rename(partial, path)
        except OSError:
            if replaced.exists():
                os.rename(replaced, path)
            raise
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already renamed if all went well


@contextmanager
def complete_folder(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`replacing_folder` for a model folder, after `check_destination`."""
    check_destination(destination, overwrite)
    with replacing_folder(Path(os.path.abspath(destination))) as partial:
        yield partial


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
    if not any((destination / mark).is_file() for mark in _MARKS):
        raise ValueError(
            f"{destination} holds no {' or '.join(_MARKS)}, so it is no model folder, and is not replaced; choose "
            "another destination"
        )


def prepare_output_folder(folder: Path) -> None:
    """Create a folder for results; raise `ValueError` if it cannot be written to, before any work is done."""
    remedy = "choose another folder with --output, or change its permissions"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell, such as on a read-only disk
            pass
    except FileExistsError as error:
        raise ValueError(f"cannot write to {folder}: it exists and is not a folder; {remedy}") from error
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; {remedy}") from error


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
