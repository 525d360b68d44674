"""Outlines of masks: exact ones cover the mask, simplified ones stay within their tolerance."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from hf_segvit.data.outlines import joined, mask_polygons, simplified


def filled(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre an odd number of vertical edges lie to the right of; for exact rings."""
    inside = np.zeros(size, bool)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
        if x0 == x1:
            inside ^= (x < x0) & (y > min(y0, y1)) & (y < max(y0, y1))
    return inside


@pytest.mark.parametrize("seed", range(60))
def test_exact_outlines_cover_the_mask(seed):
    """Noise: single pixels, holes, parts within holes, pixels that touch by a corner, the edge of the image."""
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 14, 2)) < rng.choice([0.3, 0.5, 0.8])
    polygons = mask_polygons(mask)
    assert len(polygons) == ndimage.label(mask)[1]
    covered = np.zeros(mask.shape, int)
    for polygon in polygons:
        part = filled(polygon.exterior, mask.shape)
        for hole in polygon.holes:
            assert (part & filled(hole, mask.shape)).sum() == filled(hole, mask.shape).sum()
            part ^= filled(hole, mask.shape)
        assert ndimage.label(part)[1] == 1
        covered += part
    assert (covered == mask).all()
    assert (filled(joined(polygons), mask.shape) == mask).all()


@pytest.mark.parametrize(("tolerance", "share"), [(0.5, 0.9), (1.0, 0.5), (3.0, 0.3)])
def test_simplified_outlines_keep_their_tolerance(tolerance, share):
    mask = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(120, 160)), 6) > 0
    exact, polygons = mask_polygons(mask), mask_polygons(mask, tolerance)
    assert sum(len(each.exterior) for each in polygons) < share * sum(len(each.exterior) for each in exact)
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([joined(polygons).ravel().tolist()], 120, 160)))
    # Beyond the tolerance, and a pixel that the drawing rounds by, nothing differs but parts that are left out.
    reach = int(np.ceil(tolerance)) + 1
    near = ndimage.binary_dilation(mask, iterations=reach) & ~ndimage.binary_erosion(mask, iterations=reach)
    assert not ((drawn.astype(bool) != mask) & ~near).any()


def test_points_left_out_are_near():
    rng = np.random.default_rng(2)
    angles = np.sort(rng.random(300)) * 2 * np.pi
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) * (50 + rng.random(300))[:, None]
    kept = simplified(ring, 2.0)
    assert 8 < len(kept) < 60
    start, stop = kept, np.roll(kept, -1, 0)
    line = stop - start
    offset = ring[:, None] - start
    along = np.clip((offset * line).sum(-1) / (line**2).sum(-1), 0, 1)
    distances = np.linalg.norm(offset - along[..., None] * line, axis=-1).min(1)
    assert distances.max() <= 2.0 + 1e-9


def test_nothing_and_everything():
    assert mask_polygons(np.zeros((4, 5), bool)) == []
    [whole] = mask_polygons(np.ones((4, 5), bool), 1.0)
    assert sorted(map(tuple, whole.exterior.tolist())) == [(0, 0), (0, 4), (5, 0), (5, 4)]
    assert joined([]).shape == (0, 2)
