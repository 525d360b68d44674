"""PNGs written quickly have the same pixels as Pillow reads them, in every mode."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_segvit.data.mask_files import color_ids, id_png
from hf_segvit.data.png_files import png_bytes


@pytest.mark.parametrize(
    ("shape", "mode"), [((5, 7), "L"), ((1, 1), "L"), ((6, 3, 3), "RGB"), ((3, 4, 4), "RGBA"), ((300, 1, 3), "RGB")]
)
@pytest.mark.parametrize("level", [0, 1, 9])
def test_pixels(shape, mode, level):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for each in (pixels, pixels[::-1], np.asfortranarray(pixels)):
        with Image.open(BytesIO(png_bytes(each, level))) as image:
            image.verify()  # of the checksums
        image = Image.open(BytesIO(png_bytes(each, level)))
        assert (image.format, image.mode, image.size) == ("PNG", mode, (shape[1], shape[0]))
        assert (np.asarray(image) == each).all()


def test_no_larger_than_pillows_on_an_id_map():
    ids = np.random.default_rng(0).integers(0, 9, (12, 16)).repeat(40, 0).repeat(40, 1)
    content, theirs = id_png(ids), BytesIO()
    rgb = np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)
    Image.fromarray(rgb).save(theirs, "PNG", compress_level=1)
    assert (color_ids(content, "ids") == ids).all()
    assert len(content) <= len(theirs.getvalue())


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2), np.int32), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_refused(pixels):
    with pytest.raises(ValueError, match=r"no PNG of .*; give uint8"):
        png_bytes(pixels)
