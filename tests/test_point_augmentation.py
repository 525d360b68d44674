"""ViT-P's training samples: which prompts are drawn, that they stay with the image, coarse labels and mixtures."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_segvit.data.augmentation import AugmentedDataset, augmentation, sample_generator
from hf_segvit.data.collation import PointCollator
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.data.mixture import MixedDataset, MixturePart
from hf_segvit.data.prompts import (
    PointAugmentation,
    PromptSampling,
    coarse_segment_map,
    draw_crop,
    draw_points,
    mask_boxes,
    segment_boxes,
)
from hf_segvit.models.mask_encoding import encode_mask


def entry_of(segment_map, segments, image=None):
    segment_map = np.asarray(segment_map, dtype=np.int32)
    if image is None:
        image = np.zeros((*segment_map.shape, 3), np.uint8)
    return {"image": image, "image_id": "x", "segment_map": segment_map, "segments": segments}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_points_are_balanced_between_classes():
    label_map = np.full((20, 30), -1)
    label_map[:, :28] = 2
    label_map[3, 29] = 7
    points, labels = draw_points(label_map, 1000, generator())
    assert sorted(labels.unique().tolist()) == [2, 7]
    assert (labels == 7).float().mean() == pytest.approx(0.5, abs=0.05)
    columns, rows = (points[:, 0] * 30 - 0.5), (points[:, 1] * 20 - 0.5)
    found = label_map[rows.round().long().numpy(), columns.round().long().numpy()]
    np.testing.assert_array_equal(found, labels.numpy())
    assert len(points[labels == 2].unique(dim=0)) > 300
    points, labels = draw_points(np.full((4, 4), -1), 5, generator())
    assert labels.tolist() == [-100] * 5


def test_corners_that_a_rotation_uncovers_are_void():
    # The official code fills them with 0, which for COCO is the class "person".
    entry = entry_of(np.full((40, 40), 3), [{"id": 3, "label_id": 9, "is_crowd": False}])
    for crop in (False, True):
        transform = PointAugmentation((28, 28), num_points=50, crop=crop)
        for index in range(10):
            sample = transform(entry, sample_generator(0, 0, index))
            assert sample.pixels.shape == (3, 28, 28)
            assert set(sample.prompt_labels.tolist()) == {9}


def test_points_follow_the_image():
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    segment_map = (image[..., 0] > 0).astype(np.int32)
    entry = entry_of(segment_map, [{"id": i, "label_id": i, "is_crowd": False} for i in range(2)], image)
    transform = PointAugmentation((56, 56), num_points=100)
    agree = []
    for index in range(10):
        sample = transform(entry, sample_generator(0, 0, index))
        columns, rows = (sample.prompts[:, :2] * 56).long().clamp(max=55).T
        level = sample.pixels[0, rows, columns]
        sharp = (level == 0) | (level == 255)
        agree.append((level[sharp] > 0) == (sample.prompt_labels[sharp] == 1))
    assert torch.cat(agree).float().mean() > 0.97  # black corners touch white ones


def test_crops_of_points_have_the_papers_area_and_ratio():
    numbers = generator()
    boxes = np.array([draw_crop((300, 300), numbers) for _ in range(500)])
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 90000, boxes[:, 3] / boxes[:, 2]
    assert 0.49 < areas.min() < 0.55
    assert areas.max() > 0.9
    assert ratios.min() > 0.74
    assert ratios.max() < 1.35
    assert (boxes[:, 0] + boxes[:, 2] <= 300).all()
    # No allowed crop fits into a very long image: the largest in its middle.
    assert draw_crop((10, 1000), numbers) == (0, 493, 10, 13)


def two_squares():
    """An image of one class with a large and a small segment, another class, and void."""
    segment_map = np.full((40, 60), -1)
    segment_map[:20, :30] = 0
    segment_map[30:32, 50:53] = 1
    segment_map[25:35, 5:15] = 2
    return segment_map, np.array([4, 4, 7])


def test_instance_aware_points_are_balanced_between_segments():
    segment_map, labels = two_squares()
    shares = {}
    for aware in (False, True):
        prompts, drawn = PromptSampling(3000, instance_aware=aware)(segment_map, labels, generator())
        assert (drawn == 7).float().mean() == pytest.approx(0.5, abs=0.03)
        columns, rows = (prompts[:, :2] * torch.tensor([60, 40])).long().T
        found = segment_map[rows, columns]
        np.testing.assert_array_equal(labels[found], drawn.numpy())
        assert not prompts[:, 2:].any()
        shares[aware] = (found[drawn == 4] == 1).mean()
    assert shares[False] == pytest.approx(6 / 606, abs=0.01)
    assert shares[True] == pytest.approx(0.5, abs=0.04)


def test_boxes_lie_around_their_objects():
    # The published loader clips the wrong way, which puts every box at the image's origin.
    segment_map, labels = two_squares()
    prompts, drawn = PromptSampling(2000, source="box", box_share=0.4)(segment_map, labels, generator())
    boxes = {
        (0.25, 0.25, 0.5, 0.5): 4,
        (51.5 / 60, 31 / 40, 3 / 60, 2 / 40): 4,
        (10 / 60, 30 / 40, 10 / 60, 10 / 40): 7,
    }
    is_box = (prompts[:, 2:] > 0).all(1)
    assert is_box.float().mean() == pytest.approx(0.4, abs=0.03)
    seen = set()
    for prompt, label in zip(prompts[is_box], drawn[is_box], strict=True):
        (box,) = (box for box in boxes if np.allclose(box, prompt.numpy(), atol=1e-6))
        assert boxes[box] == int(label)
        seen.add(box)
    assert seen == set(boxes)
    assert not prompts[~is_box, 2:].any()
    for label in (4, 7):
        points = prompts[~is_box & (drawn == label), :2].numpy()
        inside = [
            (np.abs(points - np.array(box[:2])) <= np.array(box[2:]) / 2 + 1e-6).all(1)
            for box, owner in boxes.items()
            if owner == label
        ]
        assert np.logical_or.reduce(inside).all()
        assert len(np.unique(points, axis=0)) > 0.9 * len(points)


def test_boxes_of_maps_and_masks_are_those_of_a_plain_loop():
    numbers = generator(1)
    for _ in range(5):
        segment_map = np.where(numbers.random((13, 17)) < 0.97, -1, numbers.integers(0, 6, (13, 17)))
        segment_map[3:5, 8:10] = 5
        expected = {}
        for segment in range(6):
            rows, columns = np.nonzero(segment_map == segment)
            if len(rows):
                corners = (columns.min() / 17, rows.min() / 13, (columns.max() + 1) / 17, (rows.max() + 1) / 13)
                expected[segment] = corners
        for boxes, present in (
            segment_boxes(segment_map),
            mask_boxes(segment_map == np.arange(6)[:, None, None]),
        ):
            assert present.tolist() == sorted(expected)
            np.testing.assert_allclose(boxes, [expected[segment] for segment in sorted(expected)], atol=1e-12)
    assert segment_boxes(np.full((3, 3), -1))[0].shape == (0, 4)
    assert mask_boxes(np.zeros((0, 3, 3), bool))[0].shape == (0, 4)


def white_square_entry(masks: bool):
    image = np.zeros((60, 90, 3), np.uint8)
    image[15:35, 50:70] = 255
    is_square = image[..., 0] > 0
    if not masks:
        return entry_of(np.where(is_square, 0, -1), [{"id": 0, "label_id": 3, "is_crowd": False}], image)
    rows = [{"id": 0, "label_id": 3, "is_crowd": False, "rle": encode_mask(is_square)}]
    return {"image": image, "image_id": "x", "segment_map": None, "segments": rows}


@pytest.mark.parametrize("masks", [False, True])
def test_boxes_follow_the_image(masks):
    transform = PointAugmentation((112, 112), num_points=6, source="box", box_share=1.0, max_rotation=40)
    for seed in range(15):
        sample = transform(white_square_entry(masks), generator(seed))
        rows, columns = torch.nonzero(sample.pixels[0] > 127, as_tuple=True)
        corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 112
        center, size = (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]
        # Interpolated borders are blurred by up to two pixels of 112.
        torch.testing.assert_close(
            sample.prompts, torch.cat([center, size]).expand(6, 4), rtol=0, atol=2.5 / 112, msg=f"seed {seed}"
        )
        assert set(sample.prompt_labels.tolist()) == {3}


def test_points_need_masks_that_do_not_overlap():
    with pytest.raises(ValueError, match=r"may overlap.*source \"box\""):
        PointAugmentation((28, 28))(white_square_entry(masks=True), generator())


def test_coarse_labels_are_the_insides_of_segments():
    numbers = generator(2)
    segment_map = np.kron(numbers.integers(-1, 3, (5, 6)), np.ones((9, 9), int))
    for margin in (0.03, 0.07):
        coarse = coarse_segment_map(segment_map, margin)
        reach = max(1, round(margin * 45))
        for y in range(45):
            for x in range(54):
                window = segment_map[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                assert coarse[y, x] == (segment_map[y, x] if (window == segment_map[y, x]).all() else -1)
    with pytest.raises(ValueError, match="margin of coarse labels is 0"):
        coarse_segment_map(segment_map, 0)


def test_points_of_coarse_labels_stay_inside():
    segment_map, labels = two_squares()
    rows = [{"id": place, "label_id": int(label), "is_crowd": False} for place, label in enumerate(labels)]
    transform = PointAugmentation(
        (40, 60), num_points=200, source="coarse", coarse_margin=0.05, crop=False, max_rotation=0, flip_probability=0
    )
    sample = transform(entry_of(segment_map, rows), generator())
    columns, rows = (sample.prompts[:, :2] * torch.tensor([60, 40])).long().T
    found = segment_map[rows, columns]
    assert set(found.tolist()) == {0, 2}  # the small segment is all border
    assert rows[found == 0].max() == 17
    assert rows[found == 2].min() == 27


def test_images_without_labels_ask_nothing():
    for source in ("mask", "coarse", "box"):
        transform = PointAugmentation((28, 28), num_points=4, source=source)
        sample = transform(entry_of(np.full((30, 30), -1), []), generator())
        assert sample.prompt_labels.tolist() == [-100] * 4
        assert sample.prompts.shape == (4, 4)
        batch = PointCollator()([sample])
        assert not batch["prompt_mask"].any()


def test_ragged_prompts_are_padded():
    entry = white_square_entry(masks=False)
    samples = [PointAugmentation((28, 28), num_points=number)(entry, generator()) for number in (5, 2)]
    batch = PointCollator()(samples)
    assert batch["prompts"].shape == (2, 5, 4)
    assert batch["prompt_mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch["labels"].tolist() == [[3] * 5, [3, 3, -100, -100, -100]]
    assert torch.equal(batch["prompts"][1, :2], samples[1].prompts)


def scenes(number: int, split: str = "train", difficulty: str = "easy") -> GeneratedScenes:
    return GeneratedScenes(number, split, size=(32, 32), difficulty=difficulty)


class Marked:
    """Augments a scene to its id and a mark in its place."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def __call__(self, entry, generator):
        return self.mark, entry["image_id"], float(generator.random())


def test_a_mixture_keeps_its_shares():
    parts = [MixturePart(scenes(7), Marked(0), 1.0), MixturePart(scenes(30), Marked(1), 3.0)]
    mixed = MixedDataset(parts, length=40, seed=1)
    assert len(mixed) == 40
    seen: list[list[int]] = [[], []]
    numbers = set()
    for epoch in range(3):
        mixed.set_epoch(epoch)
        samples = [mixed[index] for index in range(40)]
        assert sum(mark == 0 for mark, _, _ in samples) == 10
        for mark, image_id, number in samples:
            seen[mark].append(image_id)
            numbers.add(number)
    assert len(numbers) == 120  # every sample is augmented in its own way, those of one image too
    for images, size in zip(seen, (7, 30), strict=True):
        for turn in range(len(images) // size):  # all images before any comes again
            assert sorted(images[turn * size : (turn + 1) * size]) == list(range(size))
    assert mixed[-1] == mixed[39]
    assert MixedDataset(parts, seed=1)[5] == MixedDataset(parts, seed=1)[5]
    assert len(MixedDataset(parts)) == 37
    for wrong in ([], [MixturePart(scenes(0), Marked(0))], [MixturePart(scenes(2), Marked(0), 0.0)]):
        with pytest.raises(ValueError, match="a mixture needs parts"):
            MixedDataset(wrong)
    with pytest.raises(IndexError, match="no sample 40"):
        mixed[40]


def test_a_mixture_of_fine_and_coarse_labels_loads():
    size, fine = (28, 28), {"num_points": 3}
    parts = [
        MixturePart(scenes(4), augmentation("vit_p", size, **fine)),
        MixturePart(scenes(8, "val"), augmentation("vit_p", size, source="coarse", **fine)),
    ]
    mixed = MixedDataset(parts, seed=3)
    batches = [
        torch.cat([batch["prompts"] for batch in DataLoader(mixed, 4, num_workers=workers, collate_fn=PointCollator())])
        for workers in (0, 1)
    ]
    assert batches[0].shape == (12, 3, 4)
    assert torch.equal(*batches)


def test_samples_depend_on_seed_epoch_and_index_alone():
    for source in ("mask", "coarse", "box"):
        transform = augmentation("vit_p", 28, num_points=5, source=source)
        first, again = (AugmentedDataset(scenes(3), transform, seed=4)[1] for _ in range(2))
        assert torch.equal(first.prompts, again.prompts)
        assert torch.equal(first.pixels, again.pixels)
        other = transform(scenes(3)[1], sample_generator(5, 0, 1))
        assert not torch.equal(first.prompts, other.prompts)


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"num_points": 0}, "num_points 0"),
        ({"source": "boxes"}, "choose one of mask, coarse, box"),
        ({"box_share": 1.5}, "box_share is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            PointAugmentation((28, 28), **settings)
