"""The criterion against transformers' EoMT loss, fed with the same random points."""

import pytest
import torch
from torch import Tensor
from transformers import EomtConfig
from transformers.models.eomt import modeling_eomt

from hf_segvit.models.mask_criterion import MaskCriterion, MaskPrediction

NUM_QUERIES, NUM_LABELS, NUM_POINTS, NUM_LAYERS = 8, 5, 256, 3
WEIGHTS = {"loss_mask": 5.0, "loss_dice": 5.0, "loss_cross_entropy": 2.0}


class PointTable:
    """Random points that depend on nothing but how many are asked for and for which row."""

    def __init__(self, batch_size: int):
        generator = torch.Generator().manual_seed(1)
        sizes = (NUM_POINTS, 3 * NUM_POINTS, NUM_POINTS // 4)
        self.rows = {size: torch.rand(64, size, 2, generator=generator) for size in sizes}
        self.batch_size = batch_size
        self.calls = 0

    def ours(self, num_sets: int, num_points: int, device: torch.device) -> Tensor:
        return self.rows[num_points][:num_sets]

    def theirs(self, *shape: int, device: torch.device | None = None) -> Tensor:
        num_sets, num_points, _ = shape
        if num_points != NUM_POINTS:
            return self.rows[num_points][:num_sets]
        # Matching, image by image: ours asks for the whole batch at once.
        image = self.calls % self.batch_size
        self.calls += 1
        return self.rows[num_points][image : image + 1]


def _case(counts: list[int], size: tuple[int, int] = (48, 64)) -> tuple[list[Tensor], list[Tensor], list, list]:
    """Logits of every layer with gradient, and targets: one mask per segment, which may overlap."""
    height, width = size
    batch_size = len(counts)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    mask_labels, class_labels = [], []
    for count in counts:
        top, left = torch.randint(0, height - 8, (count, 1, 1)), torch.randint(0, width - 8, (count, 1, 1))
        inside = (rows >= top) & (rows < top + 20) & (columns >= left) & (columns < left + 28)
        mask_labels.append(inside.view(count, height, width))
        class_labels.append(torch.randint(0, NUM_LABELS, (count,)))
    masks = [torch.randn(batch_size, NUM_QUERIES, height // 4, width // 4) * 4 for _ in range(NUM_LAYERS)]
    classes = [torch.randn(batch_size, NUM_QUERIES, NUM_LABELS + 1) * 2 for _ in range(NUM_LAYERS)]
    return [m.requires_grad_() for m in masks], [c.requires_grad_() for c in classes], mask_labels, class_labels


def _upstream_loss(masks, classes, mask_labels, class_labels, monkeypatch) -> Tensor:
    config = EomtConfig(train_num_points=NUM_POINTS, num_labels=NUM_LABELS)
    criterion = modeling_eomt.EomtLoss(config, WEIGHTS)
    table = PointTable(len(mask_labels))
    total = torch.zeros(())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", table.theirs)
        for mask_logits, class_logits in zip(masks, classes, strict=True):
            losses = criterion(mask_logits, class_logits, [m.float() for m in mask_labels], class_labels)
            total = total + sum(WEIGHTS[name] * loss for name, loss in losses.items())
    return total


def _criterion(batch_size: int, **kwargs) -> MaskCriterion:
    sampler = PointTable(batch_size).ours
    return MaskCriterion(NUM_LABELS, num_points=NUM_POINTS, point_sampler=sampler, **kwargs)


@pytest.mark.parametrize("counts", [[3, 5], [0, 4, 1], [8], [0, 0], [11, 2]])
def test_loss_and_gradients_equal_upstream(counts, monkeypatch) -> None:
    masks, classes, mask_labels, class_labels = _case(counts)
    expected = _upstream_loss(masks, classes, mask_labels, class_labels, monkeypatch)
    expected_gradients = torch.autograd.grad(expected, [*masks, *classes])

    predictions = [MaskPrediction(c, m) for c, m in zip(classes, masks, strict=True)]
    # Upstream divides by all segments, the official code by the matched ones; they differ beyond Q segments only.
    normalizers = MaskCriterion(NUM_LABELS).count_normalizers(class_labels, NUM_QUERIES)
    normalizers[0] = max(1, sum(counts))
    loss, terms = _criterion(len(counts))(predictions, mask_labels, class_labels, normalizers=normalizers)
    gradients = torch.autograd.grad(loss, [*masks, *classes])

    # float32 sums over 256 points in another order
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    weighted = sum(
        weight * terms[f"{name}_layer_{layer}"]
        for name, weight in (("loss_mask", 5.0), ("loss_dice", 5.0), ("loss_class", 2.0))
        for layer in range(NUM_LAYERS)
    )
    torch.testing.assert_close(weighted, expected.detach(), rtol=1e-6, atol=0)


def test_matching_equals_upstream_pair_by_pair(monkeypatch) -> None:
    """The pairs themselves, where the loss might agree by chance."""
    counts = [6, 1, 8]
    masks, classes, mask_labels, class_labels = _case(counts)
    matcher = modeling_eomt.EomtHungarianMatcher(2.0, 5.0, 5.0, NUM_POINTS)
    table = PointTable(len(counts))
    chosen: list[tuple[Tensor, Tensor]] = []

    def matched(masks: Tensor):
        def read(image_index: Tensor, query_index: Tensor) -> Tensor:
            chosen.append((image_index, query_index))
            return masks[image_index, query_index]

        return read

    predictions = [MaskPrediction(c, m.detach(), matched(m)) for c, m in zip(classes, masks, strict=True)]
    _criterion(len(counts))(predictions, mask_labels, class_labels)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", table.theirs)
        for layer in range(NUM_LAYERS):
            pairs = matcher(masks[layer], classes[layer], [m.float() for m in mask_labels], class_labels)
            queries = torch.cat([query for query, _ in pairs])
            image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
            assert torch.equal(chosen[layer][0], image)
            assert torch.equal(chosen[layer][1], queries)


def test_per_rank_equals_upstream_on_one_process(monkeypatch) -> None:
    masks, classes, mask_labels, class_labels = _case([2, 6])
    expected = _upstream_loss(masks, classes, mask_labels, class_labels, monkeypatch)
    predictions = [MaskPrediction(c, m) for c, m in zip(classes, masks, strict=True)]
    for normalization in ("per_rank", "global"):
        criterion = _criterion(2, loss_normalization=normalization)
        loss, _ = criterion(predictions, mask_labels, class_labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
