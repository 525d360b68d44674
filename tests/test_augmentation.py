"""Augmentation: images and labels stay together, randomness is reproducible, parameters are those of the papers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from hf_segvit.data.augmentation import (
    AUGMENTATIONS,
    AugmentedDataset,
    Crop,
    MaskAugmentation,
    augmentation,
    sample_generator,
)
from hf_segvit.data.collation import MaskCollator
from hf_segvit.data.color_changes import jitter_colors
from hf_segvit.data.entries import decode_entry
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.models.mask_encoding import encode_mask

COLORS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)  # void and three segments


def loss_mask(sample):
    """(H, W) bool, what the collator makes of a sample."""
    return MaskCollator(with_loss_mask=True)([sample])["loss_mask"][0]


def entry_of(segment_map, segments, image=None):
    """An entry whose image is painted in a colour for each of up to three segments, by their order."""
    segment_map = np.asarray(segment_map, dtype=np.int32)
    if image is None:
        places = {row["id"]: place for place, row in enumerate(segments)}
        image = Image.fromarray(COLORS[np.vectorize(lambda value: places.get(value, -1) + 1)(segment_map)])
    return {"image": image, "image_id": "x", "segment_map": segment_map, "segments": segments}


def quarters(height=40, width=60, crowd=False):
    """Four quarters: void, and segments of large ids that are not in order, the first a crowd if wanted."""
    segment_map = np.full((height, width), -1)
    segment_map[: height // 2, width // 2 :] = 9_000_000
    segment_map[height // 2 :, : width // 2] = 7
    segment_map[height // 2 :, width // 2 :] = 300
    rows = [(9_000_000, 4, crowd), (7, 1, False), (300, 2, False)]
    return entry_of(segment_map, [{"id": i, "label_id": label, "is_crowd": c} for i, label, c in rows])


@pytest.mark.parametrize("scale_range", [(0.1, 0.9), (0.5, 2.0), (2.0, 2.0)])
@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_labels_follow_the_image(scale_range, size):
    transform = MaskAugmentation(size, scale_range=scale_range)
    entry = quarters()
    for seed in range(30):
        sample = transform(entry, sample_generator(0, 0, seed))
        assert sample.pixels.shape == (3, *size)
        assert sample.segment_map.shape == size
        # Where no border blurs the colour, it says which label the pixel must have.
        labels = torch.cat([sample.labels, torch.tensor([-1])])[sample.segment_map.long()]
        for channel, label in enumerate((4, 1, 2)):
            assert (labels[sample.pixels[channel] > 200] == label).all()
        assert (labels[sample.pixels.amax(0) == 0] == -1).all()
        assert sorted(labels[labels >= 0].unique().tolist()) == sorted(sample.labels.tolist())
        assert torch.equal(loss_mask(sample), labels >= 0)


def test_the_crop_is_cut_and_resized_as_torchvision_does():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    segment_map = generator.integers(0, 5, (50, 70))
    entry = entry_of(segment_map, [{"id": i, "label_id": i, "is_crowd": False} for i in range(5)], image)
    transform = MaskAugmentation((64, 64))
    crop = Crop(top=3, left=5, height=32, width=40, new_height=64, new_width=60, flip=True)
    transform.draw = lambda size, generator: crop
    sample = transform(entry, generator)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    expected = functional.resized_crop(pixels, 3, 5, 32, 40, [64, 60], antialias=True).flip(-1)
    # Torchvision's integer arithmetic differs by a level with the memory layout.
    assert (sample.pixels[:, :, :60].int() - expected.int()).abs().max() <= 1
    assert not sample.pixels[:, :, 60:].any()
    labels = torch.nn.functional.interpolate(
        torch.from_numpy(segment_map[None, None, 3:35, 5:45]).float(), (64, 60), mode="nearest-exact"
    )[0, 0].flip(-1)
    assert torch.equal(sample.labels[sample.segment_map[:, :60].long()], labels.long())
    assert (sample.segment_map[:, 60:] == -1).all()
    assert not loss_mask(sample)[:, 60:].any()
    assert loss_mask(sample)[:, :60].all()


def test_scales_are_those_of_the_recipe():
    transform = MaskAugmentation((64, 96), scale_range=(0.1, 2.0))
    generator = np.random.default_rng(0)
    crops = [transform.draw((480, 640), generator) for _ in range(3000)]
    # 64 / 480 is the largest scale that fits. Of the sizes after scaling, U(0.1, 2) times 64 rows:
    small = np.array([crop.new_height for crop in crops if crop.height == 480])
    assert small.min() == 6
    assert len(small) / 3000 == pytest.approx(0.9 / 1.9, abs=0.03)
    scales = np.array([crop.new_height / crop.height / (64 / 480) for crop in crops])
    assert scales.min() == pytest.approx(0.1, abs=0.03)
    assert scales.max() == pytest.approx(2.0, abs=0.03)
    assert scales.mean() == pytest.approx(1.05, abs=0.03)
    ratio = [crop.new_height / crop.height * crop.width / crop.new_width for crop in crops if crop.new_height > 30]
    assert np.abs(np.array(ratio) - 1).max() < 0.05  # the image keeps its shape
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.03)
    large = [crop for crop in crops if crop.height < 480]
    tops = np.array([crop.top / (480 - crop.height) for crop in large if crop.height < 450])
    assert tops.mean() == pytest.approx(0.5, abs=0.03)
    assert (tops == 1).any()
    assert (tops == 0).any()
    assert AUGMENTATIONS["eomt_semantic"]["scale_range"] == (0.5, 2.0)


def test_crowds_void_and_padding_do_not_count():
    transform = MaskAugmentation((40, 80), scale_range=(1.0, 1.0), flip_probability=0)
    sample = transform(quarters(crowd=True), sample_generator(0, 0, 0))
    assert sample.labels.tolist() == [1, 2]
    counted = torch.zeros(40, 80, dtype=torch.bool)
    counted[20:, :60] = True
    assert torch.equal(loss_mask(sample), counted)
    # In instance segmentation what is no object is background, but crowds are still neither.
    transform = MaskAugmentation((40, 80), scale_range=(1.0, 1.0), flip_probability=0, void_counts=True)
    counted[:20, :30] = True
    assert torch.equal(loss_mask(transform(quarters(crowd=True), sample_generator(0, 0, 0))), counted)


def test_images_without_objects_pass():
    crowd_only = entry_of(np.zeros((20, 20)), [{"id": 0, "label_id": 3, "is_crowd": True}])
    nothing = entry_of(np.full((20, 20), -1), [])
    for entry in (crowd_only, nothing):
        sample = MaskAugmentation((16, 16))(entry, sample_generator(0, 0, 0))
        assert sample.labels.shape == (0,)
        assert (sample.segment_map == -1).all()
        assert not loss_mask(sample).any()


def test_a_crop_without_segments_is_drawn_again_but_not_for_ever():
    segment_map = np.full((400, 400), -1)
    segment_map[0, 0] = 1  # hardly any crop shows it
    entry = entry_of(segment_map, [{"id": 1, "label_id": 0, "is_crowd": False}], np.zeros((400, 400, 3), np.uint8))
    transform = MaskAugmentation((16, 16), scale_range=(20.0, 20.0), max_tries=3)
    drawn = []
    draw = transform.draw
    transform.draw = lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1]
    assert len(transform(entry, sample_generator(0, 0, 0)).labels) == 0
    assert len(drawn) == 3
    # Where a crop in three shows it, ten tries nearly always find it.
    half = entry_of(np.where(np.arange(400)[:, None] < 100, 1, -1).repeat(400, 1), entry["segments"], entry["image"])
    transform = MaskAugmentation((16, 16), scale_range=(4.0, 4.0))
    found = [len(transform(half, sample_generator(0, 0, index)).labels) for index in range(50)]
    assert sum(found) > 45


def test_overlapping_masks_stay_apart():
    masks = np.zeros((3, 30, 30), bool)
    masks[0, :20], masks[1, 10:], masks[2, :4, :4] = True, True, True
    rows = [{"id": i, "label_id": i + 5, "is_crowd": i == 2, "rle": encode_mask(mask)} for i, mask in enumerate(masks)]
    entry = {"image": np.zeros((30, 30, 3), np.uint8), "image_id": 0, "segment_map": None, "segments": rows}
    sample = MaskAugmentation((60, 70), scale_range=(1, 1), flip_probability=0, void_counts=True)(
        entry, sample_generator(0, 0, 0)
    )
    assert sample.labels.tolist() == [5, 6]
    expected = torch.from_numpy(masks[:2]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(sample.masks[:, :, :60], expected)
    assert not sample.masks[:, :, 60:].any()
    with pytest.raises(ValueError, match="segment 1 has no rle"):
        decode_entry(entry | {"segments": [rows[0], {"id": 1, "label_id": 0, "is_crowd": False}]})


def test_samples_depend_on_seed_epoch_and_index_alone():
    scenes = GeneratedScenes(6, size=(32, 32))
    transform = augmentation("eomt_ade20k_panoptic", 32)

    def epoch(workers, seed=0, number=0):
        dataset = AugmentedDataset(scenes, transform, seed=seed)
        dataset.set_epoch(number)
        torch.manual_seed(workers)  # global randomness must not matter
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=list)
        return torch.stack([sample.pixels for batch in loader for sample in batch])

    first = epoch(0)
    assert torch.equal(first, epoch(2))
    assert torch.equal(AugmentedDataset(scenes, transform)[3].pixels, first[3])
    for other in (epoch(0, seed=1), epoch(0, number=1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_workers_that_persist_follow_the_epoch():
    dataset = AugmentedDataset(GeneratedScenes(2, size=(32, 32)), augmentation("eomt_coco_panoptic", 32))
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, collate_fn=list)
    seen = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        seen.append(torch.stack([batch[0].pixels for batch in loader]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_color_jitter_has_the_official_parameters():
    gray = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    levels = np.array([int(jitter_colors(gray, sample_generator(0, 0, i))[0, 0, 0]) for i in range(600)])
    # Of a grey image only the brightness changes, in half of all cases by up to 12.5 %.
    assert np.mean(np.abs(levels - 100) <= 1) == pytest.approx(0.5, abs=0.1)
    assert 86 <= levels.min() <= 89  # a level less where the contrast was changed, which rounds as well
    assert 110 <= levels.max() <= 112
    color = torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None].repeat(1, 4, 4)
    saturation = []
    for i in range(600):
        pixel = jitter_colors(color, sample_generator(1, 0, i))[:, 0, 0].float()
        saturation.append(float((pixel.max() - pixel.min()) / pixel.max()))
    assert min(saturation) < 0.45
    assert max(saturation) > 0.9
    assert len(set(saturation)) > 300


def test_entries_and_arguments_that_do_not_fit_are_refused():
    entry = quarters()
    with pytest.raises(ValueError, match=r"image 'x'.*ids \[9000000\]"):
        decode_entry(entry | {"segments": entry["segments"][1:]})
    with pytest.raises(ValueError, match=r"40 x 60 but its segment map \(60, 40\)"):
        decode_entry(entry | {"segment_map": entry["segment_map"].T})
    with pytest.raises(ValueError, match=r"no augmentation .mosaic.; choose one of eomt_coco_panoptic"):
        augmentation("mosaic", 640)
    with pytest.raises(ValueError, match="scale_range is"):
        augmentation("eomt_semantic", 512, scale_range=(2, 1))
    with pytest.raises(ValueError, match="seed is -1"):
        AugmentedDataset([], augmentation("vit_p", 518), seed=-1)


def test_odd_images_become_rgb():
    segment_map = np.zeros((9, 7), np.int32)
    rows = [{"id": 0, "label_id": 0, "is_crowd": False}]
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        entry = entry_of(segment_map, rows, Image.new(mode, (7, 9), 1))
        assert MaskAugmentation((16, 16))(entry, sample_generator(0, 0, 0)).pixels.shape == (3, 16, 16)
