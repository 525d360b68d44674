import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from hf_segvit.models import mask_criterion as mask_matching
from hf_segvit.models.mask_criterion import match_masks
from hf_segvit.models.mask_targets import MaskTargets

WEIGHTS = (2.0, 5.0, 3.0)


def _case(counts: list[int], num_queries: int = 7, loss_mask: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(n, 24, 32, generator=generator) > 0.6 for n in counts]
    labels = [torch.randint(0, 4, (n,), generator=generator) for n in counts]
    class_logits = [torch.randn(len(counts), num_queries, 5, generator=generator) for _ in range(2)]
    mask_logits = [torch.randn(len(counts), num_queries, 6, 8, generator=generator) * 5 for _ in range(2)]
    points = [torch.rand(len(counts), 400, 2, generator=generator) for _ in range(2)]
    targets = MaskTargets.pack(masks, labels, 4, loss_mask, torch.device("cpu"))
    return class_logits, mask_logits, points, masks, labels, targets


def _naive_pairs(class_logits, mask_logits, points, masks, labels, loss_mask):
    """The plain formula, image by image, point by point that counts."""
    pairs = []
    for i, (truth, classes) in enumerate(zip(masks, labels, strict=True)):
        grid = 2 * points[i][None, :, None] - 1
        x = F.grid_sample(mask_logits[i][None], grid, align_corners=False)[0, :, :, 0].double()
        t = F.grid_sample(truth[None].float(), grid, align_corners=False)[0, :, :, 0].double()
        if loss_mask is not None:
            share = F.grid_sample(loss_mask[i][None, None].float(), grid, align_corners=False, padding_mode="border")
            weight = F.grid_sample(loss_mask[i][None, None].float(), grid, mode="nearest", align_corners=False)
            t = F.grid_sample((truth & loss_mask[i])[None].float(), grid, align_corners=False)[0, :, :, 0].double()
            inside = ((points[i] > 1 / 24) & (points[i] < 23 / 24)).all(-1)  # where padding plays no part
            keep = (weight[0, 0, :, 0] > 0) & inside
            x, t = x[:, keep], t[:, keep] / share[0, 0, keep, 0]
        bce = F.binary_cross_entropy_with_logits(
            x[:, None].expand(-1, len(t), -1), t.expand(len(x), -1, -1), reduction="none"
        ).mean(-1)
        p = x.sigmoid()
        dice = 1 - (2 * p @ t.T + 1) / (p.sum(-1)[:, None] + t.sum(-1) + 1)
        cost = WEIGHTS[1] * bce + WEIGHTS[2] * dice - WEIGHTS[0] * class_logits[i].softmax(-1)[:, classes]
        pairs.append(linear_sum_assignment(cost.numpy()))
    return pairs


@pytest.mark.parametrize("counts", [[3, 5], [0, 2, 1], [9, 7], [0]])
@pytest.mark.parametrize("chunk", [1, 2**26])
def test_pairs_equal_the_plain_formula(counts, chunk, monkeypatch) -> None:
    monkeypatch.setattr(mask_matching, "CHUNK_ON_CPU", chunk)
    class_logits, mask_logits, points, masks, labels, targets = _case(counts)
    matches = match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
    assert matches is not None
    for layer in range(2):
        pairs = _naive_pairs(class_logits[layer], mask_logits[layer], points[layer], masks, labels, None)
        offsets = [sum(counts[:i]) for i in range(len(counts))]
        expected = [(i, q, offsets[i] + t) for i, pair in enumerate(pairs) for q, t in zip(*pair, strict=True)]
        actual = zip(matches.image_index, matches.query_index[layer], matches.target_index[layer], strict=True)
        assert [tuple(int(number) for number in row) for row in actual] == expected


def test_pixels_that_do_not_count_are_left_out() -> None:
    loss_mask = torch.rand(2, 24, 32) > 0.3
    class_logits, mask_logits, points, masks, labels, targets = _case([4, 6], loss_mask=loss_mask)
    points = [p * 22 / 24 + 1 / 24 for p in points]
    matches = match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
    assert matches is not None
    for layer in range(2):
        pairs = _naive_pairs(class_logits[layer], mask_logits[layer], points[layer], masks, labels, loss_mask)
        assert matches.query_index[layer].tolist() == [int(q) for queries, _ in pairs for q in queries]
        assert matches.target_index[layer].tolist() == [*pairs[0][1], *(pairs[1][1] + 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_layout_and_type_do_not_matter(dtype) -> None:
    class_logits, mask_logits, points, _, _, targets = _case([3, 6])
    mask_logits = [m.to(dtype) for m in mask_logits]
    expected = match_masks(class_logits, [m.float() for m in mask_logits], points, targets, *WEIGHTS)
    channels_last = [m.contiguous(memory_format=torch.channels_last) for m in mask_logits]
    for logits in (mask_logits, channels_last):
        actual = match_masks(class_logits, logits, points, targets, *WEIGHTS)
        assert actual is not None
        assert expected is not None
        assert torch.equal(actual.query_index, expected.query_index)
        assert torch.equal(actual.target_index, expected.target_index)


def test_costs_are_float32_under_autocast(monkeypatch) -> None:
    costs = []
    monkeypatch.setattr(mask_matching, "_assign", lambda on_host, counts, device: costs.append(on_host.copy()))
    class_logits, mask_logits, points, _, _, targets = _case([3, 6])
    match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
    assert (costs[0] == costs[1]).all()


def test_non_finite_predictions_still_get_pairs() -> None:
    class_logits, mask_logits, points, _, _, targets = _case([3, 6])
    mask_logits[0][0, 2] = torch.nan
    mask_logits[1][1, 3] = torch.inf
    class_logits[0][1, 4] = torch.nan
    matches = match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
    assert matches is not None
    for layer in range(2):
        assert sorted(matches.target_index[layer].tolist()) == list(range(9))


def test_without_scipy_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(mask_matching, "linear_sum_assignment", None)
    class_logits, mask_logits, points, _, _, targets = _case([1])
    with pytest.raises(ImportError, match="pip install scipy"):
        match_masks(class_logits, mask_logits, points, targets, *WEIGHTS)
