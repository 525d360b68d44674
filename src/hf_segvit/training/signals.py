"""Stop requests: SIGTERM, as cluster schedulers send it, and Ctrl-C.

`StopSignals` notes a signal while training finishes its step; within `interruptible`, where nothing would be lost, it
interrupts at once. A second Ctrl-C ends the program immediately.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Exit code of a run that was stopped, has saved and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED_EXIT_CODE = 75


class StopRequested(Exception):
    """Raised in an `interruptible` block."""


class StopSignals:
    """A context manager that notes stop signals instead of letting them end the program."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the latest signal
        self._interruptible = False
        self._earlier_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._earlier_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        self._earlier_handlers.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `StopRequested` in the block as soon as a signal arrives, or at once if one has arrived already."""
        self._interruptible = True
        try:
            if self.requested is not None:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the user does not want to wait for the step to finish
        self.requested = signal.Signals(number).name
        if self._interruptible:
            raise StopRequested
