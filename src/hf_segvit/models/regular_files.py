"""Read regular files in one piece, without waiting for pipes.

Nothing but the standard library, so that commands can use it before PyTorch is imported.
"""

import errno
import os
import stat
from pathlib import Path

_NO_REGULAR_FILE = "is a pipe, socket or device, not a regular file; remove it, or name a file"


def read_regular_file(path: str | os.PathLike[str], name: str, max_bytes: int, may_be_empty: bool = False) -> bytes:
    """Read a file in one piece; one that is no regular file is refused, without waiting for it.

    Raises:
        ValueError: it is missing, empty, too large, may not be read, or is a folder, pipe, socket or device.
    """
    # A pipe would wait for a writer; and what is checked must be what is read, so there is one descriptor for both.
    extra = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | extra)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{name}: {_NO_REGULAR_FILE}")
            if status.st_size == 0 and not may_be_empty:
                raise ValueError(f"{name}: the file is empty (0 bytes); copy or download it again")
            if status.st_size > max_bytes:
                raise ValueError(
                    f"{name}: {status.st_size:,} bytes, more than the limit of {max_bytes:,}; such a file can be an "
                    "attack (a bomb). If it is not, split it into smaller files"
                )
            # Not up to the limit: as much memory would be reserved, however short the file.
            return file.read(status.st_size)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file; check the path (it is read from {Path.cwd()})") from error
    except OSError as error:
        if Path(path).is_dir():
            raise ValueError(f"{name}: is a folder, not a regular file; name the files in it") from error
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket
            raise ValueError(f"{name}: {_NO_REGULAR_FILE}") from error
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{name}: not readable: {reason}; check its permissions") from error
    except ValueError as error:
        if "null" in str(error):  # open's own
            raise ValueError(f"{name}: no such file, as its name holds a NUL character; check the path") from error
        raise
