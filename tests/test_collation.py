"""Collation: what the models take, ragged images, and the same batch finished on the device."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_segvit.data.augmentation import AugmentedDataset, AugmentedSample, augmentation
from hf_segvit.data.collation import MaskCollator, PointCollator, binary_masks, normalize_pixels, placed_pixels
from hf_segvit.data.generated_scenes import GeneratedScenes
from tests.tiny_models import tiny_eomt


def sample(num_segments: int, size: int = 8) -> AugmentedSample:
    generator = torch.Generator().manual_seed(num_segments)
    return AugmentedSample(
        image_id=num_segments,
        pixels=torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator),
        segment_map=torch.randint(-1, num_segments or 0, (size, size), generator=generator).to(torch.int16)
        if num_segments
        else torch.full((size, size), -1, dtype=torch.int16),
        labels=torch.arange(num_segments) * 2,
        counted=torch.ones(size, size, dtype=torch.bool),
    )


def test_masks_of_several_images():
    samples = [sample(3), sample(0), sample(1)]
    batch = MaskCollator(with_loss_mask=True)(samples)
    assert list(batch) == ["pixel_values", "mask_labels", "class_labels", "loss_mask"]
    assert [tuple(masks.shape) for masks in batch["mask_labels"]] == [(3, 8, 8), (0, 8, 8), (1, 8, 8)]
    for masks, labels, given in zip(batch["mask_labels"], batch["class_labels"], samples, strict=True):
        assert masks.dtype == torch.bool
        assert torch.equal(labels, given.labels)
        for place, mask in enumerate(masks):
            assert torch.equal(mask, given.segment_map == place)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (samples[0].pixels.permute(1, 2, 0) / 255 - mean) / std
    torch.testing.assert_close(batch["pixel_values"][0].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-5)
    assert batch["loss_mask"].dtype == torch.bool


def test_the_device_finishes_what_collation_left():
    samples = [sample(3), sample(2)]
    whole, rest = MaskCollator()(samples), MaskCollator(on_device=True)(samples)
    assert rest["pixel_values"].dtype == torch.uint8
    assert torch.equal(normalize_pixels(rest["pixel_values"]), whole["pixel_values"])
    for segment_map, labels, masks in zip(
        rest["segment_maps"], rest["class_labels"], whole["mask_labels"], strict=True
    ):
        assert torch.equal(binary_masks(segment_map, len(labels)), masks)


@pytest.mark.parametrize("scale_range", [(0.1, 0.9), (1.1, 2.0)])
def test_images_that_the_device_scales_become_the_same(scale_range):
    scenes = GeneratedScenes(6, size=(48, 64))
    now, later = (
        AugmentedDataset(
            scenes, augmentation("eomt_coco_panoptic", (56, 64), scale_range=scale_range, scale_later=scale_later)
        )
        for scale_later in (False, True)
    )
    samples = [[dataset[index] for index in range(6)] for dataset in (now, later)]
    expected = MaskCollator(on_device=True)(samples[0])
    batch = MaskCollator(on_device=True)(samples[1])
    assert "pixel_values" not in batch
    assert any(tuple(crop.shape) != (3, 56, 64) for crop in batch["crops"])
    assert all(crop.untyped_storage().nbytes() == crop.numel() for crop in batch["crops"])  # nothing else travels
    placed = placed_pixels(batch["crops"], batch["placements"], (56, 64))
    assert torch.equal(placed, expected["pixel_values"])
    assert torch.equal(batch["segment_maps"], expected["segment_maps"])
    # Without a device that finishes, and beside samples that are finished, collation scales.
    for mixed in (samples[1], [samples[0][0], *samples[1][1:]]):
        whole = MaskCollator()(mixed)
        assert torch.equal(whole["pixel_values"], normalize_pixels(expected["pixel_values"]))


def test_overlapping_masks_are_handed_on():
    overlapping = sample(2)
    overlapping.masks = torch.ones(2, 8, 8, dtype=torch.bool)
    for on_device in (False, True):
        batch = MaskCollator(on_device=on_device)([overlapping, sample(1)])
        assert batch["mask_labels"][0].all()
        assert torch.equal(batch["mask_labels"][1][0], sample(1).segment_map == 0)


def test_a_batch_trains_the_model():
    dataset = AugmentedDataset(GeneratedScenes(4, size=(48, 64)), augmentation("eomt_coco_panoptic", 64))
    (batch,) = DataLoader(dataset, batch_size=4, collate_fn=MaskCollator(with_loss_mask=True), num_workers=1)
    model = tiny_eomt(num_labels=6).train()
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.class_predictor.weight.grad.abs().sum() > 0


def test_points_become_prompts():
    dataset = AugmentedDataset(GeneratedScenes(3, size=(48, 64)), augmentation("vit_p", (28, 42), num_points=5))
    samples = [dataset[index] for index in range(3)]
    batch = PointCollator()(samples)
    assert batch["pixel_values"].shape == (3, 3, 28, 42)
    assert batch["prompts"].shape == (3, 5, 4)
    assert not batch["prompts"][..., 2:].any()
    assert torch.equal(batch["prompts"][1], samples[1].prompts)
    assert torch.equal(batch["labels"], torch.stack([s.prompt_labels for s in samples]))
    assert batch["prompt_mask"].all()
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="no prompts"):
        PointCollator()([sample(1)])


def test_pixels_are_not_changed_by_normalising():
    pixels = torch.from_numpy(np.full((1, 3, 2, 2), 255, np.uint8))
    values = normalize_pixels(pixels, (0.5, 0.5, 0.5), (0.5, 0.25, 0.125))
    assert values[0, :, 0, 0].tolist() == [1.0, 2.0, 4.0]
    assert (pixels == 255).all()
