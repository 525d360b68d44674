import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hf_segvit.models.mask_criterion import MaskCriterion, MaskPrediction
from hf_segvit.models.mask_targets import MaskTargets

NUM_QUERIES, NUM_LABELS, SIZE = 6, 4, (32, 48)


def _targets(*counts: int) -> tuple[list[Tensor], list[Tensor]]:
    masks = [torch.rand(n, SIZE[0] // 4, SIZE[1] // 4) > 0.5 for n in counts]
    masks = [m.repeat_interleave(4, 1).repeat_interleave(4, 2) for m in masks]
    return masks, [torch.randint(0, NUM_LABELS, (n,)) for n in counts]


def _logits(batch_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    classes = torch.randn(batch_size, NUM_QUERIES, NUM_LABELS + 1).to(dtype).requires_grad_()
    masks = (torch.randn(batch_size, NUM_QUERIES, SIZE[0] // 4, SIZE[1] // 4) * 3).to(dtype).requires_grad_()
    return classes, masks


def _criterion(same_points: bool = False, **kwargs) -> MaskCriterion:
    if same_points:  # for every image and mask, so that batches can be cut up
        kwargs["point_sampler"] = lambda num_sets, num_points, device: torch.rand(
            1, num_points, 2, generator=torch.Generator().manual_seed(num_points)
        ).expand(num_sets, -1, -1)
    return MaskCriterion(NUM_LABELS, **{"num_points": 200, **kwargs})


def _loss_and_gradients(criterion, classes, masks, mask_labels, class_labels, **kwargs):
    torch.manual_seed(5)
    loss, _ = criterion([MaskPrediction(classes, masks)], mask_labels, class_labels, **kwargs)
    return loss, *torch.autograd.grad(loss, (classes, masks))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (9, 7), (6, 1)])
def test_any_number_of_segments(counts) -> None:
    classes, masks = _logits(2)
    loss, class_gradient, mask_gradient = _loss_and_gradients(_criterion(), classes, masks, *_targets(*counts))
    assert loss.isfinite()
    assert class_gradient.isfinite().all()
    # a query learns a mask where it was matched, and only there
    learning = (mask_gradient.abs().sum((2, 3)) > 0).sum(1)
    assert learning.tolist() == [min(count, NUM_QUERIES) for count in counts]


def test_without_segments_the_loss_is_the_class_loss_and_still_connected() -> None:
    classes, masks = _logits(2)
    _, terms = _criterion()([MaskPrediction(classes, masks)], *_targets(0, 0))
    expected = -classes.log_softmax(-1)[..., -1].mean()
    torch.testing.assert_close(terms["loss_class_layer_0"], expected.detach())  # the same weights above and below
    assert terms["loss_mask_layer_0"] == terms["loss_dice_layer_0"] == 0

    features = torch.randn(8, 12, requires_grad=True)

    def matched(image_index: Tensor, query_index: Tensor) -> Tensor:
        return features.expand(len(image_index), -1, -1) * 2

    loss, _ = _criterion()([MaskPrediction(classes, masks.detach(), matched)], *_targets(0, 0))
    loss.backward()
    assert torch.equal(features.grad, torch.zeros(8, 12))


def test_matched_masks_can_come_from_elsewhere() -> None:
    """The same loss and gradients, without a graph through the masks of all queries."""
    classes, masks = _logits(3)
    mask_labels, class_labels = _targets(2, 0, 8)
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    asked = []

    def matched(image_index: Tensor, query_index: Tensor) -> Tensor:
        asked.append((image_index, query_index))
        return masks[image_index, query_index]

    torch.manual_seed(5)
    loss, _ = _criterion()([MaskPrediction(classes, masks.detach(), matched)], mask_labels, class_labels)
    gradients = torch.autograd.grad(loss, (classes, masks))
    for actual, reference in zip((loss, *gradients), expected, strict=True):
        assert torch.equal(actual, reference)
    ((image_index, query_index),) = asked
    assert image_index.tolist() == [0, 0, 2, 2, 2, 2, 2, 2]
    assert query_index[:2].tolist() == sorted(query_index[:2].tolist())
    assert query_index[2:].tolist() == list(range(NUM_QUERIES))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_type_of_masks_does_not_matter(dtype) -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(3, 2)
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    converted = [m.to(dtype) for m in mask_labels]
    for actual, reference in zip(
        _loss_and_gradients(_criterion(), classes, masks, converted, class_labels), expected, strict=True
    ):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(dtype) -> None:
    classes, masks = _logits(2, dtype)
    mask_labels, class_labels = _targets(3, 2)
    loss, *gradients = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    exact = [x.detach().float().requires_grad_() for x in (classes, masks)]
    expected, *expected_gradients = _loss_and_gradients(_criterion(), *exact, mask_labels, class_labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, reference.to(dtype))  # rounded once, at the end


def test_autocast_does_not_reach_the_loss_but_reaches_the_masks() -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(3, 2)
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)

    types = []

    def matched(image_index: Tensor, query_index: Tensor) -> Tensor:
        rows = masks[image_index, query_index]
        types.append((rows @ rows.transpose(1, 2)).dtype)
        return rows

    with torch.autocast("cpu", torch.bfloat16):
        _criterion()([MaskPrediction(classes, masks.detach(), matched)], mask_labels, class_labels)
    assert types == [torch.bfloat16]


def test_order_of_targets_does_not_matter() -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(5, 4)
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    orders = [torch.randperm(5), torch.randperm(4)]
    shuffled = [[x[order] for x, order in zip(xs, orders, strict=True)] for xs in (mask_labels, class_labels)]
    for actual, reference in zip(_loss_and_gradients(_criterion(), classes, masks, *shuffled), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-7)


def test_random_points_follow_the_global_seed() -> None:
    classes, masks = _logits(2)
    targets = _targets(5, 4)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(_criterion()([MaskPrediction(classes, masks)], *targets)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_uncertain_points_are_chosen() -> None:
    """Most points of the loss lie where the logit is smallest: here, in a narrow band."""
    masks = torch.full((1, NUM_QUERIES, 8, 12), 9.0)
    masks[..., 6] = 0.0
    criterion = _criterion(oversample_ratio=30.0, num_points=100)
    targets = MaskTargets.pack(*_targets(1), NUM_LABELS, None, torch.device("cpu"))
    points = criterion._points_of_loss(masks[0], torch.zeros(NUM_QUERIES, dtype=torch.int64), targets)
    assert points.shape == (NUM_QUERIES, 100, 2)
    # two cells wide by interpolation; the image's corners, where it fades too, stay above 9 / 4
    near = ((points[..., 0] - 6.5 / 12).abs() < 1 / 12).sum(1)
    assert (near >= 75).all()
    assert (near < 100).all()


def _left_half() -> Tensor:
    counted = torch.zeros(2, *SIZE, dtype=torch.bool)
    counted[:, :, : SIZE[1] // 2] = True
    return counted


def test_targets_where_pixels_do_not_count_have_no_influence() -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(4, 3)
    other = [torch.where(_left_half()[:1], m, torch.rand(m.shape) > 0.5) for m in mask_labels]
    assert not torch.equal(mask_labels[0], other[0])
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels, loss_mask=_left_half())
    actual = _loss_and_gradients(_criterion(), classes, masks, other, class_labels, loss_mask=_left_half())
    for one, reference in zip(actual, expected, strict=True):
        assert torch.equal(one, reference)
    everywhere = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    assert everywhere[0] != expected[0]


def test_logits_where_pixels_do_not_count_have_no_gradient_and_no_influence() -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(4, 3)
    loss, _, gradient = _loss_and_gradients(
        _criterion(), classes, masks, mask_labels, class_labels, loss_mask=_left_half()
    )
    # interpolation reaches one cell (of 12) beyond the border at 6
    assert (gradient[..., 7:] == 0).all()
    assert (gradient[..., :6] != 0).any()
    changed = masks.detach().clone()
    changed[..., 7:] = 100.0
    changed.requires_grad_()
    again, *_ = _loss_and_gradients(_criterion(), classes, changed, mask_labels, class_labels, loss_mask=_left_half())
    assert again == loss


def test_loss_over_counted_points_is_the_loss_of_the_crop() -> None:
    """Where the left half alone counts, it might as well be the whole image."""
    classes, masks = _logits(1)
    with torch.no_grad():
        masks[..., 6:] = masks[..., 5:6]  # so that interpolation at the cut is that of an image's edge
    mask_labels, class_labels = _targets(3)
    mask_labels[0][..., 24:] = mask_labels[0][..., 23:24]
    points = torch.rand(1, 400, 2)
    points = points[:, ((points[0, :, 0] > 0.05) & ((points[0, :, 0] < 0.45) | (points[0, :, 0] > 0.55)))]
    points = points[:, (points[0, :, 1] > 0.1) & (points[0, :, 1] < 0.9)]
    left = points[:, points[0, :, 0] < 0.5]

    def terms(points: Tensor, masks: Tensor, mask_labels: list[Tensor], loss_mask: Tensor | None) -> dict[str, Tensor]:
        criterion = _criterion(
            num_points=points.shape[1],
            importance_sample_ratio=0.0,
            point_sampler=lambda num_sets, num_points, device: points.expand(num_sets, -1, -1),
        )
        return criterion([MaskPrediction(classes, masks)], mask_labels, class_labels, loss_mask)[1]

    whole = terms(points, masks, mask_labels, _left_half()[:1])
    crop = terms(left * torch.tensor([2.0, 1.0]), masks[..., :6], [mask_labels[0][..., :24]], None)
    for name, value in whole.items():
        torch.testing.assert_close(value, crop[name], rtol=1e-5, atol=1e-6)


def test_points_beside_the_counted_pixels_are_no_part_of_the_dice_loss() -> None:
    """There a mask's interpolated edge is above zero, but the prediction is not asked."""
    classes, masks = _logits(1)
    mask_labels, class_labels = [_left_half()[:1]], [torch.tensor([1])]
    x = torch.linspace(0.49, 0.51, 200)
    points = torch.stack([x, torch.full_like(x, 0.5)], dim=-1)[None]
    criterion = _criterion(
        importance_sample_ratio=0.0,
        point_sampler=lambda num_sets, num_points, device: points.repeat(num_sets, 3, 1)[:, :num_points],
    )
    prediction = MaskPrediction(classes, torch.full_like(masks, 20.0))
    _, terms = criterion([prediction], mask_labels, class_labels, loss_mask=_left_half()[:1])
    assert terms["loss_dice_layer_0"] < 1e-6


def test_loss_mask_that_counts_everything_or_nothing() -> None:
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(4, 3)
    expected = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels)
    everything = torch.ones(2, *SIZE, dtype=torch.bool)
    actual = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels, loss_mask=everything)
    for one, reference in zip(actual, expected, strict=True):
        assert torch.equal(one, reference)

    _, terms = _criterion()([MaskPrediction(classes, masks)], mask_labels, class_labels, loss_mask=~everything)
    assert terms["loss_mask_layer_0"] == terms["loss_dice_layer_0"] == 0
    nothing = _loss_and_gradients(_criterion(), classes, masks, mask_labels, class_labels, loss_mask=~everything)
    assert all(x.isfinite().all() for x in nothing)
    assert (nothing[2] == 0).all()


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    layers = [MaskPrediction(*_logits(2)) for _ in range(3)]
    criterion = _criterion(class_weight=3.0, mask_weight=7.0, dice_weight=11.0)
    loss, terms = criterion(layers, *_targets(2, 5))
    assert list(terms) == [f"loss_{name}_layer_{i}" for i in range(3) for name in ("mask", "dice", "class")]
    weights = {"loss_mask": 7.0, "loss_dice": 11.0, "loss_class": 3.0}
    total = sum(weights[name.split("_layer_")[0]] * term for name, term in terms.items())
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)
    assert not any(term.requires_grad for term in terms.values())


def test_normalizers_count_what_targets_say() -> None:
    labels = [torch.zeros(n, dtype=torch.int64) for n in (2, 0, 9)]
    counts = _criterion(no_object_weight=0.1).count_normalizers(labels, NUM_QUERIES)
    assert counts.tolist() == pytest.approx([8, 8 + 0.1 * 10])
    empty = [torch.zeros(0, dtype=torch.int64)]
    assert _criterion(no_object_weight=0.5).count_normalizers(empty, NUM_QUERIES).tolist() == [0, 3]
    per_rank = _criterion(no_object_weight=0.5, loss_normalization="per_rank")
    assert per_rank.count_normalizers(empty, NUM_QUERIES).tolist() == [1, 3]


def test_accumulated_micro_batches_equal_the_joint_batch() -> None:
    classes, masks = _logits(4)
    mask_labels, class_labels = _targets(5, 0, 1, 8)
    expected = _loss_and_gradients(_criterion(same_points=True), classes, masks, mask_labels, class_labels)
    normalizers = _criterion().count_normalizers(class_labels, NUM_QUERIES)
    total = [torch.zeros_like(x) for x in expected]
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        torch.manual_seed(5)
        loss, _ = _criterion(same_points=True)(
            [MaskPrediction(classes[part], masks[part])], mask_labels[part], class_labels[part], normalizers=normalizers
        )
        for sum_, x in zip(total, (loss, *torch.autograd.grad(loss, (classes, masks))), strict=True):
            sum_ += x
    for actual, reference in zip(total, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-7)


def test_values_out_of_range_on_the_device_are_named() -> None:
    """What `validate_targets` leaves to the criterion, because looking would wait for the device."""
    classes, masks = _logits(1)
    mask_labels, _ = _targets(2)
    with pytest.raises(ValueError, match=r"class_labels\[0\] holds label id 4, outside 0..3"):
        _criterion()([MaskPrediction(classes, masks)], mask_labels, [torch.tensor([1, 4])])
    bad = [mask_labels[0].float() * 255]
    with pytest.raises(ValueError, match=r"mask_labels\[0\] holds values from 0 to 255"):
        _criterion()([MaskPrediction(classes, masks)], bad, [torch.tensor([1, 2])])


def test_ratios_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"importance_sample_ratio=0\.75 must lie between 0 and .* oversample_ratio=0\.5"
    ):
        MaskCriterion(NUM_LABELS, oversample_ratio=0.5)
    with pytest.raises(ValueError, match=r"importance_sample_ratio=1\.5"):
        MaskCriterion(NUM_LABELS, importance_sample_ratio=1.5)


@dataclasses.dataclass
class _Share:
    """What one process trains on, and the answers it got."""

    rank: int
    images: slice
    counts: tuple[int, ...]
    folder: str


def _train_on_share(share: _Share) -> None:
    torch.set_num_threads(1)
    store = f"file://{share.folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=share.rank, world_size=2)
    torch.manual_seed(0)
    classes, masks = _logits(2)
    mask_labels, class_labels = _targets(*share.counts)
    answers = {}
    for normalization in ("global", "per_rank"):
        criterion = _criterion(same_points=True, loss_normalization=normalization)
        loss, terms = criterion(
            [MaskPrediction(classes[share.images], masks[share.images])],
            mask_labels[share.images],
            class_labels[share.images],
        )
        answers[normalization] = (loss.detach(), *torch.autograd.grad(loss, (classes, masks)), terms)
    if share.rank == 0:  # evaluation must not wait for the other process
        criterion.eval()([MaskPrediction(classes, masks)], mask_labels, class_labels)
    torch.save(answers, f"{share.folder}/{share.counts[1]}_{share.rank}.pt")
    torch.distributed.destroy_process_group()


def _spawned(rank: int, folder: str) -> None:
    for counts in ((2, 20), (2, 0), (0, 0)):
        nested = f"{folder}/{sum(counts)}"
        _train_on_share(_Share(rank, slice(rank, rank + 1), counts, nested))


def test_two_processes_equal_one(tmp_path) -> None:
    cases = ((2, 20), (2, 0), (0, 0))
    for counts in cases:
        (tmp_path / str(sum(counts))).mkdir()
    torch.multiprocessing.spawn(_spawned, args=(str(tmp_path),), nprocs=2)
    for counts in cases:
        torch.manual_seed(0)
        classes, masks = _logits(2)
        mask_labels, class_labels = _targets(*counts)
        one = _loss_and_gradients(_criterion(same_points=True), classes, masks, mask_labels, class_labels)
        answers = [torch.load(tmp_path / str(sum(counts)) / f"{counts[1]}_{rank}.pt") for rank in range(2)]
        for mine, theirs, single in zip(answers[0]["global"], answers[1]["global"], one, strict=False):
            torch.testing.assert_close((mine + theirs) / 2, single, rtol=1e-6, atol=1e-8)

        # The official normalisers differ, each by a known factor.
        matched = [min(n, NUM_QUERIES) for n in counts]
        weights = [m + 0.1 * (NUM_QUERIES - m) for m in matched]
        for rank in range(2):
            joint, alone = (answers[rank][name][3] for name in ("global", "per_rank"))
            if matched[rank] > 0:
                factor = max(sum(matched) / 2, 1) / (sum(matched) / 2)
                torch.testing.assert_close(
                    joint["loss_mask_layer_0"], alone["loss_mask_layer_0"] * factor, rtol=1e-6, atol=0
                )
            factor = weights[rank] / (sum(weights) / 2)
            torch.testing.assert_close(
                joint["loss_class_layer_0"], alone["loss_class_layer_0"] * factor, rtol=1e-6, atol=0
            )
        if counts == (2, 20):
            assert not math.isclose(weights[0], weights[1])
            official = sum(answer["per_rank"][1] for answer in answers) / 2
            assert (official - one[1]).norm() / one[1].norm() > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    classes, masks = _logits(3)
    mask_labels, class_labels = _targets(4, 0, 8)
    loss_mask = torch.rand(3, *SIZE) > 0.2
    points = {size: torch.rand(16, size, 2) for size in (200, 600, 50)}
    criterion = _criterion(point_sampler=lambda num_sets, num_points, device: points[num_points][:num_sets].to(device))
    expected = _loss_and_gradients(criterion, classes, masks, mask_labels, class_labels, loss_mask=loss_mask)
    moved = [x.detach().cuda().requires_grad_() for x in (classes, masks)]
    targets = [[x.cuda() for x in xs] for xs in (mask_labels, class_labels)]
    actual = _loss_and_gradients(criterion, *moved, *targets, loss_mask=loss_mask.cuda())
    for one, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), reference, rtol=1e-5, atol=1e-6)  # sums in another order
