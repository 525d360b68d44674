"""Writing files and folders whole or not at all: beside the destination, then renamed over it.

`replacing` does so for one file, `replacing_folder` for a folder with all that is in it, and `complete_folder` for that
of a model, which is replaced only where that was asked for. `write_json` is how results are written. Whatever happens
before the renaming, the destination stays as it was.
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
    """A path to write to that becomes `path` when the block ends without an error.

    Args:
        path: the destination; its folder must be there. An older file stays until the new one is complete.
        durable: wait until the file is on the disk, so that not even a crash of the machine leaves half of it.

    Yields:
        A new, empty file in the same folder, with the same ending, as writers choose the format by it.

    Raises:
        OSError: the folder cannot be written to.
    """
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    # Made by hand, since `tempfile` makes files that only their owner can read; the system applies the umask to this
    # mode, which could be read only by changing it for the whole process.
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
    """Write JSON for people and `diff`: one line for each field, and for each entry of a field that is a dictionary or
    a list of them. Numbers that are not finite become null.

    Args:
        path: the file, written whole or not at all.
        content: fields, or a list with one line for each entry.
        durable: see `replacing`.

    Raises:
        ValueError: the file cannot be written.
    """
    if isinstance(content, Mapping):
        lines, ends = (
            [f" {json.dumps(name)}: {_json_field(value)}" for name, value in _without_nan(content).items()],
            "{}",
        )
    else:
        lines, ends = [f" {json.dumps(entry)}" for entry in _without_nan(content)], "[]"
    try:
        with replacing(path, durable) as partial:
            partial.write_text(ends[0] + "\n" + ",\n".join(lines) + "\n" + ends[1] + "\n", encoding="utf-8")
    except OSError as error:
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
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error and all of it is on the disk.

    Args:
        path: the destination, whose parents are made as needed. An older folder stays until the new one is complete.

    Yields:
        A new, empty folder beside the destination. A process that is killed leaves it there, as `.NAME.*.partial`, and
        in the moment of the exchange the older folder as `.NAME.*.replaced`.

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
        if path.exists():  # a folder with files in it cannot be renamed over
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
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well


@contextmanager
def complete_folder(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`replacing_folder` for a model, which replaces nothing by mistake.

    Args:
        destination: where the folder goes.
        overwrite: replace a model folder that is there already; an empty folder is replaced in any case.

    Yields:
        A new, empty folder beside the destination.

    Raises:
        ValueError: the destination is there and may not be replaced.
    """
    check_destination(destination, overwrite)
    with replacing_folder(Path(os.path.abspath(destination))) as partial:
        yield partial


# Files of which a model folder has at least one: anything else is never replaced, however the command was mistyped.
_MARKS = ("config.json", "preprocessor_config.json")


def check_destination(destination: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a destination that `complete_folder` would refuse, before any work is done for it.

    Raises:
        ValueError: a file, or a folder that is not empty, is there, and `overwrite` does not allow to replace it.
    """
    destination = Path(destination)
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise ValueError(f"{destination} is there and is not a folder; choose another destination")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{destination} is there already; choose another destination, or replace it with --overwrite")
    if not any((destination / mark).is_file() for mark in _MARKS):
        raise ValueError(
            f"{destination} holds no {' or '.join(_MARKS)}, so it is no model folder, and is not replaced; choose "
            "another destination"
        )


def prepare_output_folder(folder: Path) -> None:
    """Make a folder to write results to, and see that it can be written to, before any work is done for it.

    Raises:
        ValueError: it cannot be made or written to; the message names it and the reason.
    """
    remedy = "choose another folder with --output, or change its permissions"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"cannot write to {folder}: it is there and is not a folder; {remedy}") from error
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; {remedy}") from error


def _sync_contents(folder: Path) -> None:
    # safetensors makes files that only their owner may read, whatever the umask says; the folder knows what it says.
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
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
