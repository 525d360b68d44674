"""Writing a file whole or not at all: it is written beside its destination, then renamed over it."""

import os
import tempfile
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
