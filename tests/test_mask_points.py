"""One point a mask: the maximum, a central or a random one, in the image's own coordinates, without ties of luck."""

import pytest
import torch

from hf_segvit.models.mask_points import first_maximum, points_from_masks


def cells(points: torch.Tensor, height: int, width: int, offset: float) -> torch.Tensor:
    """(B, Q, 2) row and column of points."""
    return (points.flip(-1) * torch.tensor([height, width]) - offset).round().long()


@pytest.mark.parametrize(("origin", "offset"), [("center", 0.5), ("corner", 0.0)])
def test_the_maximum_is_the_naive_one(origin, offset):
    logits = torch.randn(3, 5, 7, 11)
    points = points_from_masks(logits, origin=origin)
    assert points.shape == (3, 5, 2)
    for image in range(3):
        for query in range(5):
            row, column = divmod(int(logits[image, query].argmax()), 11)
            expected = torch.tensor([(column + offset) / 11, (row + offset) / 7])
            torch.testing.assert_close(points[image, query], expected)


def test_of_equal_maxima_the_first_in_reading_order_counts():
    logits = torch.zeros(2, 3, 40, 60)
    logits[0, 1, 5, 40] = logits[0, 1, 9, 2] = logits[0, 1, 5, 41] = 3.0
    logits[1, 2, 39, 59] = 1.0
    rows, columns = first_maximum(logits)
    assert rows.tolist() == [[0, 5, 0], [0, 0, 39]]
    assert columns.tolist() == [[0, 40, 0], [0, 0, 59]]
    # Saturated masks of half precision are full of ties; NumPy's argmax names the first by contract.
    saturated = (torch.randn(2, 4, 9, 9) * 3).round().half()
    rows, columns = first_maximum(saturated)
    assert torch.equal(rows * 9 + columns, torch.from_numpy(saturated.numpy().reshape(2, 4, -1).argmax(-1)))


def test_points_stay_in_the_content_and_count_in_it():
    logits = torch.rand(2, 3, 8, 8)
    logits[:, :, 5:] += 10  # the padding has the highest values
    logits[1, :, :, 6:] += 20
    content = [(5.0, 8.0), (4.5, 6.0)]
    points = points_from_masks(logits, content_sizes=content)
    for image, (height, width) in enumerate(content):
        rows = int(height)  # a cell whose middle is inside: 4.5 < 4.5 is not
        inside = logits[image, :, :rows, : int(width)]
        flat = inside.flatten(1).argmax(-1)
        expected = torch.stack([(flat % int(width) + 0.5) / width, (flat // int(width) + 0.5) / height], dim=-1)
        torch.testing.assert_close(points[image], expected)
    tensor = points_from_masks(logits, content_sizes=torch.tensor(content))
    assert torch.equal(tensor, points)
    tiny = points_from_masks(logits, content_sizes=[(0.25, 0.25)] * 2)  # less than half a cell
    assert torch.equal(tiny, torch.ones(2, 3, 2))


def test_the_centroid_is_the_nearest_cell_of_the_mask():
    logits = torch.full((1, 3, 9, 9), -1.0)
    logits[0, 0, 2:5, 3:8] = 1.0  # a rectangle, centre (3, 5)
    logits[0, 1, :, 0] = logits[0, 1, :, 8] = 1.0  # two bars: the mean lies between, so a bar is named
    logits[0, 2, 6, 7] = -0.5  # no positive cell: the maximum
    points = points_from_masks(logits, mode="centroid")
    assert cells(points, 9, 9, 0.5)[0].tolist() == [[3, 5], [4, 0], [6, 7]]
    random = torch.randn(2, 4, 10, 13)
    found = cells(points_from_masks(random, mode="centroid"), 10, 13, 0.5).flatten(0, 1)
    for (row, column), mask in zip(found.tolist(), (random > 0).flatten(0, 1), strict=True):
        places = mask.nonzero().double()
        distances = (places - places.mean(0)).square().sum(1)
        assert mask[row, column]
        own = (torch.tensor([row, column]) - places.mean(0)).square().sum()
        assert own == pytest.approx(distances.min().item(), abs=1e-4)


def test_random_points_are_uniform_over_the_mask_and_repeatable():
    logits = torch.randn(1, 1, 5, 6)
    mask = logits[0, 0] > 0
    many = logits.expand(1, 20000, 5, 6)
    points = points_from_masks(many, mode="random", generator=torch.Generator().manual_seed(1))
    found = cells(points, 5, 6, 0.5)[0]
    counts = torch.zeros(5, 6).index_put_((found[:, 0], found[:, 1]), torch.ones(20000), accumulate=True)
    assert torch.equal(counts > 0, mask)
    expected = 20000 / mask.sum()
    # Four standard deviations of a binomial count.
    assert (counts[mask] - expected).abs().max() < 4 * expected.sqrt()
    again = points_from_masks(many, mode="random", generator=torch.Generator().manual_seed(1))
    assert torch.equal(points, again)


def test_random_and_central_points_stay_in_the_content():
    logits = torch.rand(2, 50, 8, 8) + 0.1
    for mode in ("random", "centroid"):
        points = points_from_masks(logits, mode=mode, content_sizes=[(3, 5), (8, 2)])
        for image, (height, width) in enumerate([(3, 5), (8, 2)]):
            found = cells(points[image : image + 1], height, width, 0.5)[0]
            assert found[:, 0].max() < height
            assert found[:, 1].max() < width


def test_an_empty_set_of_masks_has_no_points():
    assert points_from_masks(torch.zeros(2, 0, 4, 4)).shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "middle"}, "mode='middle'"),
        ({"origin": "centre"}, "origin='centre'"),
        ({"content_sizes": [(4, 4)]}, r"content_sizes of shape \(1, 2\)"),
        ({"content_sizes": [(4, 4), (0, 4)]}, r"content_sizes\[1\] is \[0.0, 4.0\]"),
        ({"content_sizes": [(40, 40), (4, 4)]}, r"content_sizes\[0\].*4 x 4 cells"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        points_from_masks(torch.zeros(2, 3, 4, 4), **arguments)
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        points_from_masks(torch.zeros(4, 4))
