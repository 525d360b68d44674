"""Tiles of upsampled masks against resizing the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_segvit.models import mask_resampling
from hf_segvit.models.mask_resampling import tile_members, tiled_masks

lengths = st.integers(1, 40)


def whole(masks, input_size, content_size, target_size):
    """The plain formula: resize, crop, resize."""
    masks = F.interpolate(masks[None], size=input_size, mode="bilinear")
    masks = masks[..., : content_size[0], : content_size[1]]
    return F.interpolate(masks, size=target_size, mode="bilinear")[0]


def tile_values(tiles, tile, chosen):
    """All strips of a tile, which must follow each other: (k, rows, columns)."""
    rows, columns = tile
    strips = list(tiles.values(rows, columns, chosen))
    assert [strip.start for strip, _ in strips] == [rows.pixels.start] + [strip.stop for strip, _ in strips[:-1]]
    assert strips[-1][0].stop == rows.pixels.stop
    return torch.cat([values for _, values in strips]).transpose(0, 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.tuples(lengths, lengths),
    st.tuples(lengths, lengths),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(lengths, lengths),
    st.integers(1, 50),
    st.integers(0, 2**31),
)
def test_tiles_equal_two_resizes(mask_size, input_size, share, target_size, tile_pixels, seed):
    masks = torch.randn(3, *mask_size, generator=torch.Generator().manual_seed(seed))
    content = tuple(max(1, int(length * part)) for length, part in zip(input_size, share, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_resampling, "TILE_PIXELS", tile_pixels)
        patch.setattr(mask_resampling, "_SERIAL_VALUES", 100)
        patch.setattr(mask_resampling, "_SERIAL_PRODUCT", 50)
        tiles = tiled_masks(masks, torch.tensor([2, 0]), input_size, content, target_size)
        lower, upper = tiles.bounds()
        result = torch.full((2, *target_size), torch.nan)
        chosen = torch.tensor([0, 1])
        for number, (rows, columns) in enumerate(tiles):
            values = tile_values(tiles, (rows, columns), chosen)
            result[:, rows.pixels, columns.pixels] = values
            limits = [bound.flatten(1)[:, number, None, None] for bound in (lower, upper)]
            assert ((limits[0] <= values) & (values <= limits[1])).all()
    assert len(tiles) == number + 1
    assert int(tiles.areas.sum()) == target_size[0] * target_size[1]
    # float32 rounding of values up to 5, twice
    torch.testing.assert_close(result, whole(masks[[2, 0]], input_size, content, target_size), atol=5e-6, rtol=0)


def test_long_axes_use_pytorchs_positions():
    """Far from the origin, positions in float64 would differ from PyTorch's by 3e-5 cells, for most pixels.

    Builds of PyTorch that multiply and add in one rounding, such as 2.11's, differ from ours in one pixel of 400.
    """
    masks = 100 * torch.randn(1, 2, 640)
    tiles = tiled_masks(masks, torch.tensor([0]), (2, 640), (2, 640), (2, 1921))
    values = torch.cat([tile_values(tiles, tile, torch.tensor([0])) for tile in tiles], 2)
    difference = (values - whole(masks, (2, 640), (2, 640), (2, 1921))).abs()
    assert difference.max() < 0.01
    assert (difference > 1e-4).float().mean() < 0.01


def test_global_float32_precision_and_autocast_do_not_matter():
    masks = 10 * torch.randn(2, 40, 40)
    arguments = (masks, torch.tensor([0, 1]), (160, 160), (120, 160), (90, 70))
    tiles = tiled_masks(*arguments)
    before = [tile_values(tiles, tile, torch.tensor([0, 1])) for tile in tiles]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            tiles = tiled_masks(*arguments)
            after = [tile_values(tiles, tile, torch.tensor([0, 1])) for tile in tiles]
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_members_are_listed_tile_by_tile():
    relevant = torch.rand(5, 2, 3) < 0.4
    members = tile_members(relevant)
    expected = [relevant[:, row, column].nonzero()[:, 0].tolist() for row in range(2) for column in range(3)]
    assert [part.tolist() for part in members] == expected


def test_accelerator_tiles_bound_memory():
    device = torch.device("meta")
    for planes, size in ((200, (480, 640)), (200, (4000, 6000)), (1, (2, 3))):
        rows, columns = mask_resampling.tiles_per_axis(size, planes, device)
        assert 1 <= rows <= size[0]
        assert 1 <= columns <= size[1]
        values = planes * -(-size[0] // rows) * -(-size[1] // columns)
        assert values <= 1.1 * mask_resampling.ACCELERATOR_TILE_VALUES
