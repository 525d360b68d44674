"""Runs of ids, painting and cropping in runs, and colour changes of a crop: all equal to the plain way, bit by bit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from hf_segvit.data import augmentation as module
from hf_segvit.data import color_changes
from hf_segvit.data.augmentation import AugmentedDataset, MaskAugmentation, place, sample_generator
from hf_segvit.data.color_changes import jitter_colors, turned_hue
from hf_segvit.data.decoding import PaintedPanoptic, PaintedPolygons
from hf_segvit.data.entries import MapCache, decode_entry, encode_entry
from hf_segvit.data.reading import decoder_of, load_segmentation_dataset
from hf_segvit.data.run_maps import RunMap, RunMasks, run_lengths
from hf_segvit.models.mask_encoding import decode_mask, encode_mask


def blobs(rng, count, size):
    """Masks (n, H, W): rectangles and noise, some of them empty or the whole image."""
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        (top, bottom), (left, right) = (sorted(rng.integers(0, length + 1, 2)) for length in size)
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < rng.choice([0.5, 1.0])
    masks[::7] = 0
    masks[3::11] = 1
    return masks


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (17, 23)])
@pytest.mark.parametrize("ground", [-1, 5])
def test_painting_in_runs_is_painting_pixels(size, ground):
    rng = np.random.default_rng(0)
    for count in (0, 1, 30):
        masks, values = blobs(rng, count, size), rng.integers(-2, 6, count).tolist()
        expected = np.full(size, ground, dtype=np.int32)
        for mask, value in zip(masks, values, strict=True):
            expected[mask] = value
        layers = [(run_lengths(encode_mask(mask)), value) for mask, value in zip(masks, values, strict=True)]
        painted = RunMap.painted(layers, size, ground)
        assert np.array_equal(np.asarray(painted), expected)
        assert painted.ids.tolist() == [value for value in np.unique(expected) if value != -1]
        assert painted.lengths.min() > 0


def some_indices(rng, size):
    """Rows and columns as crops choose them: all, more than there are, few, backwards, one."""
    yield np.arange(size[0]), np.arange(size[1])
    for _ in range(20):
        rows, columns = (np.sort(rng.integers(0, length, rng.integers(1, 2 * length + 1))) for length in size)
        yield rows, columns[::-1] if rng.random() < 0.5 else columns


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_a_cut_is_that_of_the_whole_map(size):
    rng = np.random.default_rng(1)
    masks = blobs(rng, 12, size)
    layers = [(run_lengths(encode_mask(mask)), value) for value, mask in enumerate(masks)]
    by_columns = RunMap.painted(layers, size)
    by_rows = RunMap.of(np.asarray(by_columns))
    encoded = RunMasks(size, [runs for runs, _ in layers])
    for runs in (by_columns, by_rows):
        values = np.append(runs.ids * 2, -5).astype(np.int8)
        for rows, columns in some_indices(rng, size):
            assert np.array_equal(runs.cut(values, (rows, columns)), runs.unrolled(values)[np.ix_(rows, columns)])
    for rows, columns in some_indices(rng, size):
        whole = masks[:, rows][:, :, columns]
        cut, present = encoded.cut((rows, columns))
        assert np.array_equal(present, whole.any((1, 2)))
        assert np.array_equal(cut, whole[present])


def outlines(rng, size, count):
    """Rows of segments as readers make them, of polygons and of run lengths."""
    height, width = size
    rows = []
    for index, mask in enumerate(blobs(rng, count, size)):
        corners = rng.random((rng.integers(3, 9), 2)) * (width * 1.2, height * 1.2) - (width * 0.1, height * 0.1)
        polygons = [corners.reshape(-1).tolist()] if index % 3 else None
        rle = {"size": [height, width], "counts": None if polygons else encode_mask(mask)["counts"]}
        label, is_crowd = int(rng.integers(-1, 4)), bool(rng.random() < 0.2)
        rows.append({"id": index + 10**10, "label_id": label, "is_crowd": is_crowd, "polygons": polygons, "rle": rle})
    return rows


def drawn(row):
    from pycocotools import mask as coco_mask

    if not row["polygons"]:
        return decode_mask(row["rle"])
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(row["polygons"], *row["rle"]["size"]))) > 0


def test_painted_readers_paint_as_pixel_by_pixel():
    rng = np.random.default_rng(2)
    for _ in range(20):
        size = tuple(rng.integers(8, 40, 2).tolist())
        rows = outlines(rng, size, 9)
        expected = np.full(size, 3)
        for row in rows:
            expected[drawn(row)] = row["label_id"]
        label_map, segments = PaintedPolygons(3)([], rows, "a.jpg")
        assert label_map.dtype == np.int32
        assert label_map.flags.c_contiguous
        assert np.array_equal(label_map, expected)
        assert [row["label_id"] for row in segments] == [value for value in np.unique(expected) if value >= 0]

        stuff = frozenset({0, 2})
        expected, of_stuff = np.full(size, -1), {}
        for index in sorted(range(len(rows)), key=lambda index: rows[index]["label_id"] not in stuff):
            label = rows[index]["label_id"]
            number = of_stuff.setdefault(label, index) if label in stuff else -1 if label == -1 else index
            expected[drawn(rows[index])] = number
        id_map, segments = PaintedPanoptic(stuff)([], rows, "a.jpg")
        assert np.array_equal(id_map, expected)
        assert [row["id"] for row in segments] == [value for value in np.unique(expected) if value >= 0]
        assert all(row["label_id"] == rows[row["id"]]["label_id"] for row in segments)


def plain_jitter(pixels, generator):
    """The whole image changed by torchvision, one change after another."""

    def chosen():
        return generator.random() < 0.5

    if chosen():
        pixels = functional.adjust_brightness(pixels, generator.uniform(1 - 32 / 255, 1 + 32 / 255))
    contrast_first = chosen()
    if contrast_first and chosen():
        pixels = functional.adjust_contrast(pixels, generator.uniform(0.5, 1.5))
    if chosen():
        pixels = functional.adjust_saturation(pixels, generator.uniform(0.5, 1.5))
    if chosen():
        pixels = functional.adjust_hue(pixels, generator.uniform(-18 / 360, 18 / 360))
    if not contrast_first and chosen():
        pixels = functional.adjust_contrast(pixels, generator.uniform(0.5, 1.5))
    return pixels


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_crop_changes_its_colours_as_the_whole_image_does(channels, monkeypatch):
    monkeypatch.setattr(color_changes, "_BAND", 500)  # bands of a few rows, and a last one of fewer
    rng = np.random.default_rng(3)
    seen = set()
    for seed in range(60):
        image = torch.from_numpy(rng.integers(0, 256, (37, 53, channels), dtype=np.uint8)).permute(2, 0, 1)
        ours, theirs = sample_generator(0, 0, seed), sample_generator(0, 0, seed)
        (top, bottom), (left, right) = (sorted(rng.choice(length + 1, 2, replace=False)) for length in (37, 53))
        expected = plain_jitter(image[:3], theirs)
        found = jitter_colors(image, ours, (slice(top, bottom), slice(left, right)))
        assert torch.equal(found, torch.cat([expected, image[3:]])[:, top:bottom, left:right])
        assert ours.random() == theirs.random()  # as many numbers were drawn
        seen.add(torch.equal(expected, image[:3]))
    assert seen == {True, False}


@pytest.mark.parametrize("angle", [0.05, -0.05, 0.0, 0.5, -0.5, 0.0123])
def test_hues_turn_as_in_torchvision(angle):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (3, 200, 300), dtype=np.uint8)
    image[:, :20] = image[:1, :20]  # greys
    image[1, 20:40], image[2, 40:60], image[2, 60:80] = image[0, 20:40], image[1, 40:60], image[0, 60:80]  # ties
    image[:, 80:100] = rng.integers(0, 3, (3, 20, 300))  # nearly black
    pixels = torch.from_numpy(image)
    assert torch.equal(turned_hue(pixels, angle), functional.adjust_hue(pixels, angle))


def plain_sample(transform, entry, generator):
    """Pixels, map of labels, masks and labels of a sample, from the whole image in the plain way."""
    decoded = decode_entry(entry)
    for _ in range(transform.max_tries):
        crop = transform.draw(decoded.segment_map.shape, generator)
        rows, columns = module._indices(crop)
        segment_map = decoded.segment_map[np.ix_(rows, columns)]
        if not len(decoded.labels) or segment_map.max() >= 0:
            break
    pixels = plain_jitter(decoded.pixels, generator) if transform.color_jitter else decoded.pixels
    pixels = pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    pixels = place(pixels, module.Placement(crop.new_height, crop.new_width, crop.flip), transform.size)
    masks = None
    if decoded.masks is not None:
        masks = decoded.masks[:, rows][:, :, columns]
    return pixels, np.append(decoded.labels, [-1, -1])[segment_map], masks, decoded.labels


def labelme_folder(root, size=(60, 80), count=3):
    rng = np.random.default_rng(4)
    root.mkdir()
    for index in range(count):
        pixels = rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(root / f"{index}.jpg")
        shapes = [
            {
                "label": str(rng.choice(["car", "road", "tree"])),
                "points": (rng.random((5, 2)) * size[::-1]).tolist(),
                "shape_type": "polygon",
                "group_id": None,
                "flags": {},
            }
            for _ in range(5)
        ]
        content = {"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": f"{index}.jpg", "imageData": None}
        (root / f"{index}.json").write_text(
            json.dumps({**content, "imageHeight": size[0], "imageWidth": size[1]}), encoding="utf-8"
        )
    return f"labelme:{root}"


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("scale_range", [(0.1, 2.0), (4.0, 8.0)])
def test_samples_of_outlines_are_those_of_the_whole_image(tmp_path, task, scale_range):
    dataset = load_segmentation_dataset(labelme_folder(tmp_path / "data"), task=task)
    transform = MaskAugmentation((24, 32), scale_range=scale_range, color_jitter=True)
    # Twice with a cache: first painted and stored, then read.
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        samples = AugmentedDataset(dataset, transform, seed=1, cache=cache)
        for epoch in range(8):
            for index in range(len(dataset)):
                sample = samples[epoch, index]
                entry = {**dataset[index], "image": samples.dataset[index]["image"]}
                generator = sample_generator(1, epoch, index)
                pixels, label_map, masks, labels = plain_sample(transform, entry, generator)
                height, width = label_map.shape
                assert torch.equal(sample.pixels, pixels)
                if masks is None:
                    padded = torch.cat([sample.labels, torch.tensor([-1])])[sample.segment_map.long()].numpy()
                    assert np.array_equal(padded[:height, :width], label_map)
                else:
                    present = masks.any((1, 2))
                    assert np.array_equal(sample.masks.numpy()[:, :height, :width], masks[present])
                    assert sample.labels.tolist() == labels[present].tolist()


def test_painted_maps_are_cached_until_an_outline_changes(tmp_path):
    spec, cache = labelme_folder(tmp_path / "data"), tmp_path / "cache"
    dataset = load_segmentation_dataset(spec, task="semantic")
    row = dataset.with_format(None)[0]
    reader = MapCache(decoder_of(dataset).read_masks, cache)
    painted, segments = reader([], row["segments"], "a.jpg")
    (file,) = cache.rglob("*.runs")
    written = file.stat().st_mtime_ns
    again, same = reader([], row["segments"], "a.jpg")
    assert np.array_equal(np.asarray(again), np.asarray(painted))
    assert again.by_columns
    assert same == segments
    assert file.stat().st_mtime_ns == written
    # Other outlines, labels or another order of painting are another map.
    row["segments"][0]["polygons"][0][0] += 20
    moved, _ = reader([], row["segments"], "a.jpg")
    expected, _ = decoder_of(dataset).read_masks([], row["segments"], "a.jpg")
    assert np.array_equal(np.asarray(moved), expected)
    assert not np.array_equal(np.asarray(moved), np.asarray(painted))
    reader([], row["segments"][::-1], "a.jpg")
    assert len(list(cache.rglob("*.runs"))) == 3
    # A cache is data from outside: what does not fit is read anew.
    file.write_bytes(file.read_bytes()[:-3])
    row["segments"][0]["polygons"][0][0] -= 20
    assert np.array_equal(np.asarray(reader([], row["segments"], "a.jpg")[0]), np.asarray(painted))


def test_too_many_masks_are_an_error_only_where_all_are_decoded():
    runs = np.array([70_000 * 70_000])
    masks = [{"id": 1, "label_id": 0, "is_crowd": False, "rle": {"size": [70_000, 70_000], "counts": runs}}]
    image = torch.zeros((1, 1, 1), dtype=torch.uint8).expand(3, 70_000, 70_000)
    entry = {"image": image, "image_id": 4, "segment_map": None, "segments": masks}
    assert encode_entry(entry).masks.cut((np.array([0, 69_999]), np.array([5])))[1].tolist() == [False]
    with pytest.raises(ValueError, match="image 4: 1 masks of 70000 x 70000 pixels take more"):
        decode_entry(entry)
