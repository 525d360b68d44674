"""Being asked to stop: SIGTERM, as schedulers of clusters send it, and Ctrl-C.

`StopSignals` notes them while training finishes its step; where nothing is lost by it, `interruptible` lets them break
in. Ctrl-C a second time ends the program on the spot.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop, saved, and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""


class StopRequested(Exception):
    """Raised in an `interruptible` block."""


class StopSignals:
    """Signals that ask for a stop, while the block runs.

    Attributes:
        requested: name of the first signal that came, or `None`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interruptible = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal ends at once.

        Raises:
            StopRequested: a signal came before or during the block.
        """
        self._interruptible = True
        try:
            if self.requested is not None:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self._interruptible:
            raise StopRequested
