"""What tasks share in scoring and drawing: `validation_split` finds the data, `side_by_side` lays answers out."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...data import reading
from ...drawing.segments import contact_sheet


def validation_split(spec: str) -> str:
    """The split of "FORMAT:PATH" to score on where a recipe names none.

    Raises:
        ValueError: it has none of the usual names.
    """
    return reading.validation_split(spec, "name one with val_split=, or other data with val_data=")


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Picture, truth and answer in a row, under these titles."""
    return contact_sheet([panels], ("picture", "truth", "answer"))
