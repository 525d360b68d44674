"""What is wrong with a data set: `Problem`, and `ProblemList` that collects them.

A reader goes on after a problem and leaves the damaged part out, so that all problems can be told at once. Errors are
what would hurt training; warnings are repairs that were made, and oddities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: where; a path, or `archive.zip/member`.
        item: the id of the image, annotation or segment, or "" where the whole file is meant.
        message: what is wrong, and the remedy.
        severity: "error" or "warning".
    """

    file: str
    item: str
    message: str
    severity: str

    def __str__(self) -> str:
        return f"{self.file}: {self.item}: {self.message}" if self.item else f"{self.file}: {self.message}"


class ProblemList(list[Problem]):
    """Problems in the order in which they were found."""

    def error(self, file: str, item: str, message: str) -> None:
        """Note something that would hurt training."""
        self.append(Problem(file, item, message, "error"))

    def warn(self, file: str, item: str, message: str) -> None:
        """Note a repair or an oddity."""
        self.append(Problem(file, item, message, "warning"))

    @property
    def errors(self) -> list[Problem]:
        """Those that would hurt training."""
        return [problem for problem in self if problem.severity == "error"]

    def raise_errors(self) -> None:
        """Stop if there are errors.

        Raises:
            ValueError: the first few errors, and how to see the rest.
        """
        if errors := self.errors:
            raise ValueError(summary(errors))


def summary(errors: Iterable[Problem]) -> str:
    """The first few errors in one text, and how many more there are."""
    texts = [str(error) for error in errors]
    text = "; ".join(texts[:_SHOWN])
    if len(texts) > _SHOWN:
        text += f"; and {len(texts) - _SHOWN} more problems, which `hf-segvit check-data` lists"
    return text
