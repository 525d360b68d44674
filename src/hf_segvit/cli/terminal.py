"""Escape what names could do to a terminal, in all that a command prints.

Class and file names come from strangers: an escape sequence in one could hide lines, or type for the user. `printable`
(lookup.py) escapes the names that a command knows of; the streams here do it for all other output, of libraries too.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..lookup import printable

_CURSOR = re.compile(r"(\x1b\[A)")  # progress bars move to the line above with it


class EscapedStream:
    """A text stream whose control characters are escaped, but for line ends, tabs and, on stderr, what bars need."""

    def __init__(self, stream: Any, bars: bool) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        parts = _CURSOR.split(text) if self._bars else [text]
        allowed = "\n\t\r" if self._bars else "\n\t"
        self._stream.write("".join(part if part == "\x1b[A" else printable(part, allowed) for part in parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to stdout and stderr within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = EscapedStream(before[0], bars=False), EscapedStream(before[1], bars=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
