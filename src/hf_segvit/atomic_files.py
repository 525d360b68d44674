"""Writing a file whole or not at all: it is written beside its destination, then renamed over it.

Writing a folder all or nothing.

The files are written into a folder beside the destination, flushed to the disk, and the folder is renamed when it is
complete. Whatever happens before that, the destination stays as it was.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends without an error.

    Args:
        path: the destination; its folder must be there. An older file stays until the new one is complete.

    Yields:
        A new, empty file in the same folder, with the same ending, as writers choose the format by it.

    Raises:
        OSError: the folder cannot be written to.
    """
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def _umask() -> int:
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    return umask


# Files of which a model folder has at least one: anything else is never replaced, however the command was mistyped.
_MARKS = ("config.json", "preprocessor_config.json")


@contextmanager
def complete_folder(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes the destination when the block ends without an error.

    Args:
        destination: where the folder goes; its parents are made as needed.
        overwrite: replace a model folder that is there already; an empty folder is replaced in any case.

    Yields:
        A new, empty folder beside the destination.

    Raises:
        ValueError: the destination is there and may not be replaced.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    name = f".{destination.name}.{uuid.uuid4().hex[:8]}"
    partial = destination.with_name(f"{name}.partial")
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        _put_in_place(partial, destination, replaced=destination.with_name(f"{name}.replaced"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well


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


def _put_in_place(partial: Path, destination: Path, replaced: Path) -> None:
    if not destination.exists():
        os.rename(partial, destination)
    else:
        os.rename(destination, replaced)
        try:
            os.rename(partial, destination)
        except OSError:
            os.rename(replaced, destination)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    _flush_entry(destination.parent)


def _flush(folder: Path) -> None:
    # safetensors makes files that only their owner may read, whatever the umask says; the folder knows what it says.
    mode = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for file in files:
            os.chmod(Path(root, file), mode)
            _flush_entry(Path(root, file))
        _flush_entry(Path(root))


def _flush_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
