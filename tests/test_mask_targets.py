import re

import pytest
import torch
import torch.nn.functional as F

from hf_segvit.models.mask_targets import MaskTargets, validate_targets


def _masks(*counts: int, size: tuple[int, int] = (6, 8)) -> list[torch.Tensor]:
    return [torch.rand(count, *size) > 0.5 for count in counts]


def _labels(*counts: int) -> list[torch.Tensor]:
    return [torch.arange(count) for count in counts]


def test_valid_targets_pass() -> None:
    validate_targets(_masks(2, 0, 3), _labels(2, 0, 3), num_labels=3, batch_size=3)
    validate_targets(_masks(2, 1), _labels(2, 1), 2, 2, loss_mask=torch.ones(2, 6, 8, dtype=torch.bool))
    validate_targets([m.float() for m in _masks(2)], [torch.tensor([0, 1], dtype=torch.uint8)], 2, 1)
    # an image without segments has no size to compare
    validate_targets([torch.zeros(0, 0, 0), *_masks(1)], _labels(0, 1), 2, 2)


@pytest.mark.parametrize(
    ("mask_labels", "class_labels", "loss_mask", "message"),
    [
        (_masks(1), _labels(1, 1), None, "mask_labels has 1 entries for a batch of 2 images"),
        (_masks(1, 1), _labels(1), None, "class_labels has 1 entries for a batch of 2 images"),
        (_masks(1, 2), _labels(1, 1), None, "mask_labels[1] has 2 masks but class_labels[1] has 1 labels"),
        (
            [*_masks(1), torch.ones(6, 8)],
            _labels(1, 1),
            None,
            "mask_labels[1] is a torch.float32 tensor of shape (6, 8)",
        ),
        ([*_masks(1), [[1]]], _labels(1, 1), None, "mask_labels[1] is a list"),
        (_masks(1, 1), [torch.zeros(1), torch.zeros(1)], None, "class_labels[0] is a torch.float32 tensor"),
        (
            [*_masks(1), *_masks(1, size=(6, 7))],
            _labels(1, 1),
            None,
            "mask_labels[1] is 6 x 7 pixels but mask_labels[0]",
        ),
        (_masks(1, 1), [torch.tensor([0]), torch.tensor([9])], None, "class_labels[1] holds label id 9, outside 0..2"),
        (_masks(1, 1), [torch.tensor([-1]), torch.tensor([0])], None, "class_labels[0] holds label id -1, outside"),
        ([*_masks(1), torch.full((1, 6, 8), 255)], _labels(1, 1), None, "mask_labels[1] holds values from 255 to 255"),
        ([torch.full((1, 6, 8), torch.nan), *_masks(1)], _labels(1, 1), None, "mask_labels[0] holds values from nan"),
        (_masks(1, 1), _labels(1, 1), torch.ones(2, 6, 8), "loss_mask is a torch.float32 tensor"),
        (_masks(1, 1), _labels(1, 1), torch.ones(1, 6, 8) > 0, "loss_mask is a torch.bool tensor of shape (1, 6, 8)"),
        (_masks(1, 1), _labels(1, 1), torch.ones(2, 6, 9) > 0, "loss_mask is 6 x 9 pixels but mask_labels[0] is 6 x 8"),
    ],
)
def test_bad_targets_are_named(mask_labels, class_labels, loss_mask, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_targets(mask_labels, class_labels, 3, 2, loss_mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_sampling_equals_grid_sample(dtype) -> None:
    masks = _masks(2, 0, 3)
    targets = MaskTargets.pack([m.to(dtype) for m in masks], _labels(2, 0, 3), 3, None, torch.device("cpu"))
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.5, 1.0]])
    points = torch.cat([torch.rand(4, 500, 2), corners.expand(4, -1, -1)], dim=1)
    index = torch.tensor([4, 0, 2, 2])
    stacked = torch.cat(masks).float()[index]
    expected = F.grid_sample(stacked[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]
    # grid_sample rounds its coordinates once more
    torch.testing.assert_close(targets.sample(index, points), expected, rtol=0, atol=1e-5)
    assert torch.equal(targets.weights(targets.image_index[index], points), torch.ones(4, 504))


def test_weights_are_those_of_the_nearest_pixel() -> None:
    loss_mask = torch.rand(2, 6, 8) > 0.4
    targets = MaskTargets.pack(_masks(2, 1), _labels(2, 1), 3, loss_mask, torch.device("cpu"))
    points = torch.rand(2, 500, 2)
    expected = F.grid_sample(
        loss_mask.float()[:, None], 2 * points[:, :, None] - 1, mode="nearest", align_corners=False
    )[:, 0, :, 0]
    image_index = torch.tensor([0, 1])
    assert torch.equal(targets.weights(image_index, points), expected)
    # rounding up to the far edge of the image is still its last pixel
    edge = torch.ones(2, 1, 2)
    assert torch.equal(targets.weights(image_index, edge)[:, 0], loss_mask[:, -1, -1].float())


def test_uncounted_pixels_do_not_leak_into_their_neighbours() -> None:
    masks = torch.ones(1, 6, 8, dtype=torch.bool)
    loss_mask = torch.ones(1, 6, 8, dtype=torch.bool)
    loss_mask[0, :, 4:] = False
    masks[0, :, 4:] = False  # whatever an annotation has there
    targets = MaskTargets.pack([masks], _labels(1), 3, loss_mask, torch.device("cpu"))
    inner = torch.rand(1, 200, 2) * 0.6 + 0.2
    counted = targets.weights(torch.tensor([0]), inner) > 0
    assert torch.equal(counted, inner[..., 0] < 0.5)
    assert torch.equal(targets.sample(torch.tensor([0]), inner)[counted], torch.ones(int(counted.sum())))


def test_packing_notices_values_out_of_range() -> None:
    device = torch.device("cpu")
    assert MaskTargets.pack(_masks(2), _labels(2), 3, None, device).valid
    assert not MaskTargets.pack(_masks(2), [torch.tensor([0, 3])], 3, None, device).valid
    assert not MaskTargets.pack([torch.full((1, 6, 8), 2.0)], _labels(1), 3, None, device).valid
    assert not MaskTargets.pack([torch.full((1, 6, 8), torch.nan)], _labels(1), 3, None, device).valid
