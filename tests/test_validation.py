"""What training tasks share in scoring and drawing: the split they score on, and strips of images under titles."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_segvit.training.tasks import side_by_side, validation_split

from .data_folders import mask_folder


def test_without_a_split_to_score_on_the_fields_of_the_recipe_are_named(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    with pytest.raises(
        ValueError,
        match="only train; name one with val_split=, other data with val_data=, or hold out a part with val_fraction=",
    ):
        validation_split(spec)
    mask_folder(tmp_path, split="valid")
    assert validation_split(spec) == "valid"


def test_panels_stay_as_they_are_under_titles() -> None:
    panels = [Image.new("RGB", (96, 64), color) for color in ("red", "green", "blue")]
    strip = np.asarray(side_by_side(panels))
    assert strip.shape[0] > 64
    for panel in panels:
        # Each panel is there whole; the rows above it hold dark letters on white.
        rows, columns = np.nonzero((strip == np.asarray(panel)[0, 0]).all(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (64, 96, 64 * 96)
        above = strip[: rows.min(), columns.min() : columns.max() + 1]
        assert (above.max(-1) < 100).sum() > 20
