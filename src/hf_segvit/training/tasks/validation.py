"""What tasks share in scoring and drawing: `validation_split` finds the data, `side_by_side` lays answers out."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...data.reading import available_splits

_VALIDATION_SPLITS = ("val", "validation", "valid", "test")


def validation_split(spec: str) -> str:
    """The split of "FORMAT:PATH" to score on where a recipe names none.

    Raises:
        ValueError: it has none of the usual names.
    """
    splits = available_splits(spec)
    for name in _VALIDATION_SPLITS:
        if name in splits:
            return name
    raise ValueError(
        f"{spec} has no split to score on, only {', '.join(splits)}; name one with val_split=, or other data with "
        "val_data="
    )


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row, without anything between them."""
    width, height = panels[0].size
    strip = Image.new("RGB", (width * len(panels), height))
    for place, panel in enumerate(panels):
        strip.paste(panel, (place * width, 0))
    return strip
