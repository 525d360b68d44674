"""Cityscapes with its coarse labels, gtCoarse; see cityscapes.py."""

from __future__ import annotations

from collections.abc import Sequence

from ..problems import ProblemList
from ..reading import Reading
from . import cityscapes

TASKS = cityscapes.TASKS
LAYOUT = cityscapes.LAYOUT.replace("gtFine", "gtCoarse")


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """The splits that have coarse labels."""
    return cityscapes.splits(path, wanted, annotations="gtCoarse")


def read(path: str, split: str, task: str, problems: ProblemList) -> Reading:
    """Read one split, see `cityscapes.read`."""
    return cityscapes.read(path, split, task, problems, annotations="gtCoarse")
