"""Collect the problems of a data set.

A reader adds a `Problem` to a `ProblemList`, leaves the damaged part out and continues, so that all problems are
reported at once. Errors would hurt training; warnings are repairs that were made, and oddities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str  # a path, or `archive.zip/member`
    item: str  # the image, annotation or segment; "" for the whole file
    message: str  # what is wrong, and the remedy
    severity: str  # "error" or "warning"

    def __str__(self) -> str:
        return f"{self.file}: {self.item}: {self.message}" if self.item else f"{self.file}: {self.message}"


class ProblemList(list[Problem]):
    """Problems in the order in which they were found."""

    def error(self, file: str, item: str, message: str) -> None:
        """Add something that would hurt training."""
        self.append(Problem(file, item, message, "error"))

    def warn(self, file: str, item: str, message: str) -> None:
        """Add a repair or an oddity."""
        self.append(Problem(file, item, message, "warning"))

    @property
    def errors(self) -> list[Problem]:
        """Problems that would hurt training."""
        return [problem for problem in self if problem.severity == "error"]

    def raise_errors(self) -> None:
        """Raise a `ValueError` with the first few errors, if there are any."""
        if errors := self.errors:
            raise ValueError(summary(errors))


def summary(errors: Iterable[Problem]) -> str:
    """The first few errors in one text, and the number of the others."""
    texts = [str(error) for error in errors]
    text = "; ".join(texts[:_SHOWN])
    if len(texts) > _SHOWN:
        text += f"; and {len(texts) - _SHOWN} more problems, which `hf-segvit check-data` lists"
    return text


def some_of(names: Sequence[str]) -> str:
    """The first few names and the number of the others, such as "a.txt, b.txt, c.txt and 12 more"."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
