"""Quick reading for training: the same pixels and segments as the readers give, from a cache of id maps too."""

import io
import os
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit.data.augmentation import AugmentedDataset, augmentation
from hf_segvit.data.decoding import image_in_frame
from hf_segvit.data.entries import (
    MapCache,
    RunMap,
    _is_bare_jpeg,
    _plain_jpeg,
    decode_entry,
    decode_for_training,
    image_pixels,
)
from hf_segvit.data.generated_scenes import GeneratedScenes
from hf_segvit.data.reading import decoder_of, load_segmentation_dataset
from hf_segvit.models.image_decoding import to_rgb

from .data_folders import SIZE, coco_folder, halves, mask_folder, panoptic_folder, write_json, write_mask


def encoded(format_name: str, mode: str = "RGB", orientation: int = 1, **options) -> bytes:
    """An image of smooth colours, as photographs have, in a file's form."""
    down, right = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    pixels = np.stack([down * 9 % 256, right * 7 % 256, (down + right) * 4 % 256], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format_name, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "is_plain"),
    [
        pytest.param(encoded("JPEG"), True, id="RGB"),
        pytest.param(encoded("JPEG", subsampling=0, quality=95), True, id="full colour resolution"),
        pytest.param(encoded("JPEG", progressive=True), True, id="progressive"),
        pytest.param(encoded("JPEG", "L"), True, id="grey"),
        pytest.param(encoded("JPEG", "CMYK"), False, id="CMYK"),
        pytest.param(encoded("JPEG", orientation=3), False, id="upside down"),
        pytest.param(encoded("JPEG", orientation=6), False, id="sideways"),
        pytest.param(encoded("PNG"), False, id="PNG"),
        pytest.param(encoded("PNG", "RGBA"), False, id="PNG with alpha"),
        pytest.param(encoded("WEBP"), False, id="WEBP"),
    ],
)
def test_pixels_are_those_that_pillow_decodes(content, is_plain):
    assert (_plain_jpeg(content, None) is not None) == is_plain
    for size in (None, SIZE):
        expected = np.asarray(image_in_frame(content, "a", size))
        found = image_pixels(content, "a", size)
        assert found.dtype == torch.uint8
        # Both decode by libjpeg-turbo, perhaps of different versions, whose rounding agreed so far.
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
        assert found.permute(1, 2, 0).is_contiguous()


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with another segment at its start."""
    return content[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + content[2:]


BARE = encoded("JPEG")
BARE = BARE[:20] + BARE[20 + 2 + int.from_bytes(BARE[22:24], "big") :]  # without its EXIF block, which follows JFIF


@pytest.mark.parametrize(
    ("content", "is_bare"),
    [
        pytest.param(with_segment(BARE, 0xFE, b"a comment"), True, id="comment"),
        pytest.param(with_segment(BARE, 0xE2, b"ICC_PROFILE\0\1\1"), True, id="colour profile"),
        pytest.param(with_segment(BARE, 0xE2, b"MPF\0"), False, id="several images"),
        pytest.param(with_segment(BARE, 0xE1, b"http://ns.adobe.com/xap/1.0/\0"), False, id="XMP"),
        pytest.param(encoded("JPEG", orientation=3), False, id="upside down"),
        pytest.param(encoded("JPEG", "CMYK"), False, id="CMYK"),
        pytest.param(BARE[:60], False, id="cut off"),
        pytest.param(b"", False, id="empty"),
    ],
)
def test_only_bare_headers_are_read_without_pillow(content, is_bare):
    assert _is_bare_jpeg(content) == is_bare


def test_an_image_in_the_frame_of_its_mask_stays_there_when_it_is_copied():
    """As it is on its way from a process that reads; the file's EXIF block would turn the copy."""
    content = encoded("JPEG", orientation=6)
    stored = Image.open(io.BytesIO(content))
    image = image_in_frame(content, "a", (stored.height, stored.width))
    for copy in (image, image.copy(), pickle.loads(pickle.dumps(image))):
        assert to_rgb(copy).size == stored.size != stored.size[::-1]
        assert np.array_equal(np.asarray(to_rgb(copy)), np.asarray(stored))


@pytest.mark.parametrize("content", [b"", b"x" * 99, encoded("JPEG")[:-300], encoded("JPEG")[:40]])
def test_damaged_images_are_told_as_ever(content):
    with pytest.raises(ValueError, match=r"^a: "):
        image_pixels(content, "a")


def test_a_mask_of_another_size_is_told():
    with pytest.raises(ValueError, match="a: the image has 20 x 30 pixels but its mask 30 x 20"):
        image_pixels(encoded("JPEG"), "a", (30, 20))


def test_pixels_of_photographs_are_identical(sample_data):
    files = sorted((sample_data / "coco_train100" / "train2017").glob("*.jpg"))[::5]
    for file in files:
        content = file.read_bytes()
        assert _plain_jpeg(content, None) is not None
        found = image_pixels(content, file.name).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - np.asarray(image_in_frame(content, file.name))).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17)])
def test_runs_are_the_map(shape):
    rng = np.random.default_rng(0)
    for id_map in (rng.integers(-1, 3, shape) * 70000, np.full(shape, -1), np.zeros(shape, dtype=np.int32)):
        id_map = np.maximum(id_map, -1)
        runs = RunMap.of(id_map)
        assert np.array_equal(np.asarray(runs), id_map)
        assert np.asarray(runs).dtype == np.int32
        assert runs.lengths.sum() == id_map.size
        doubled = runs.unrolled(np.append(runs.ids * 2, -5))
        assert np.array_equal(doubled, np.where(id_map == -1, -5, id_map * 2))


def same_entry(quick, plain):
    ours, theirs = decode_entry(quick), decode_entry(plain)
    assert torch.equal(ours.pixels, theirs.pixels)
    np.testing.assert_array_equal(ours.segment_map, theirs.segment_map)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    if theirs.masks is None:
        assert ours.masks is None
    else:
        np.testing.assert_array_equal(ours.masks, theirs.masks)
    assert quick["segments"] == plain["segments"]
    assert quick["image_id"] == plain["image_id"]


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic", "no objects"])
def test_entries_are_those_of_the_data_set(tmp_path, kind):
    if kind == "semantic":
        dataset = load_segmentation_dataset(mask_folder(tmp_path / "data", ("a", "b")))
    elif kind == "panoptic":
        dataset = load_segmentation_dataset(panoptic_folder(tmp_path / "data"), task="panoptic")
    else:
        change = (lambda content: content["annotations"].clear()) if kind == "no objects" else (lambda content: None)
        dataset = load_segmentation_dataset(coco_folder(tmp_path / "data", change))
    for cache in (None, tmp_path / "cache"):
        entries = decode_for_training(dataset, cache)
        assert isinstance(entries[0]["image"], torch.Tensor)
        assert len(entries) == len(dataset)
        for index in range(len(dataset)):
            for _ in range(2):  # read, then from the cache
                same_entry(entries[index], dataset[index])
    files = list((tmp_path / "cache").rglob("*.runs"))
    assert len(files) == {"semantic": 2, "panoptic": 1}.get(kind, 0)  # outlines have no maps
    assert not list((tmp_path / "cache").rglob("*.partial*"))


def test_augmented_samples_are_the_same_with_a_cache_and_in_workers(tmp_path):
    dataset = load_segmentation_dataset(mask_folder(tmp_path / "data", ("a", "b", "c")))
    recipe = augmentation("eomt_semantic", 24)
    plain = AugmentedDataset([dataset[index] for index in range(3)], recipe, seed=1)
    for _ in range(2):
        cached = AugmentedDataset(dataset, recipe, seed=1, cache=tmp_path / "cache")
        loader = torch.utils.data.DataLoader(
            pickle.loads(pickle.dumps(cached)), batch_size=None, num_workers=2, collate_fn=lambda sample: sample
        )
        for sample, expected in zip(loader, (plain[index] for index in range(3)), strict=True):
            assert torch.equal(sample.pixels, expected.pixels)
            assert torch.equal(sample.segment_map, expected.segment_map)
            assert torch.equal(sample.labels, expected.labels)


class Counting:
    """A mask reader that counts how often it is asked."""

    def __init__(self, reader):
        self.reader, self.calls = reader, 0

    def __repr__(self):
        return repr(self.reader)

    def __call__(self, *arguments):
        self.calls += 1
        return self.reader(*arguments)


def counted_entries(spec, cache, **options):
    entries = decode_for_training(load_segmentation_dataset(spec, **options), cache)
    known_maps = decoder_of(entries).read_masks
    assert isinstance(known_maps, MapCache)
    known_maps.read_masks = counting = Counting(known_maps.read_masks)
    return entries, counting


def test_maps_are_read_once_until_their_file_changes(tmp_path):
    spec, cache = mask_folder(tmp_path / "data"), tmp_path / "cache"
    entries, counting = counted_entries(spec, cache)
    first = [np.asarray(entries[0]["segment_map"]) for _ in range(3)]
    assert counting.calls == 1
    assert np.array_equal(first[0], halves())
    mask = tmp_path / "data" / "annotations" / "train" / "one.png"
    write_mask(mask, halves(1, 0))
    os.utime(mask, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert np.array_equal(np.asarray(entries[0]["segment_map"]), halves(1, 0))
    assert counting.calls == 2
    # Other classes make other maps of the same file.
    write_json(tmp_path / "data" / "classes.json", {"1": "car", "0": "void"})
    other, counting = counted_entries(spec, cache)
    assert np.array_equal(np.asarray(other[0]["segment_map"]), np.where(halves(1, 0) == 1, 0, -1))
    assert counting.calls == 1


def test_labels_come_from_the_annotations_not_from_the_cache(tmp_path):
    cache = tmp_path / "cache"
    entries, _ = counted_entries(panoptic_folder(tmp_path / "data"), cache, task="panoptic")
    assert [row["label_id"] for row in entries[0]["segments"]] == [0, 1]

    def change(content):
        content["annotations"][0]["segments_info"][0]["category_id"] = 4
        content["annotations"][0]["segments_info"][0]["iscrowd"] = 1

    png = tmp_path / "data" / "annotations" / "panoptic_train" / "a.png"
    before, status = png.read_bytes(), png.stat()
    spec = panoptic_folder(tmp_path / "data", change)
    png.write_bytes(before)
    os.utime(png, ns=(status.st_atime_ns, status.st_mtime_ns))
    entries, counting = counted_entries(spec, cache, task="panoptic")
    assert [(row["label_id"], row["is_crowd"]) for row in entries[0]["segments"]] == [(1, True), (1, False)]
    assert counting.calls == 0  # the map itself is the same

    # A segment that the annotations no longer list is the error that it was without a cache.
    def remove(content):
        content["annotations"][0]["segments_info"].pop()

    spec = panoptic_folder(tmp_path / "data", remove)
    png.write_bytes(before)
    os.utime(png, ns=(status.st_atime_ns, status.st_mtime_ns))
    entries, _ = counted_entries(spec, cache, task="panoptic")
    with pytest.raises(ValueError, match=r"holds the ids \[70000\], which segments_info does not list"):
        entries[0]


def test_damaged_or_missing_cache_files_are_read_anew(tmp_path):
    spec, cache = mask_folder(tmp_path / "data"), tmp_path / "cache"
    entries, counting = counted_entries(spec, cache)
    entries[0]
    (file,) = cache.rglob("*.runs")
    whole = file.read_bytes()
    for content in (whole[:-9], b"", whole[:40] + b"\0" * 9, b"other" + whole):
        file.write_bytes(content)
        assert np.array_equal(np.asarray(entries[0]["segment_map"]), halves())
        assert file.read_bytes() == whole
    assert counting.calls == 5
    file.unlink()
    file.parent.rmdir()
    entries[0]
    assert file.read_bytes() == whole


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="cannot make cache folder"):
        decode_for_training(load_segmentation_dataset(mask_folder(tmp_path / "data")), tmp_path / "closed" / "cache")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"cannot make cache folder .*cache: File exists; name another"):
        decode_for_training(load_segmentation_dataset(mask_folder(tmp_path / "data")), tmp_path / "cache")


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    entries, _ = counted_entries(mask_folder(tmp_path / "data"), tmp_path / "cache")
    monkeypatch.setattr("hf_segvit.data.entries.replacing", full)
    assert np.array_equal(np.asarray(entries[0]["segment_map"]), halves())
    assert not list((tmp_path / "cache").rglob("*.runs"))


def test_archives_are_cached_by_member(tmp_path):
    mask_folder(tmp_path / "data", ("a", "b"))
    write_mask(tmp_path / "data" / "annotations" / "train" / "b.png", halves(1, 0))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted((tmp_path / "data").rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path / "data"))
    entries, counting = counted_entries(f"mask_folder:{tmp_path / 'data.zip'}", tmp_path / "cache")
    for _ in range(2):
        found = [np.asarray(entries[index]["segment_map"]) for index in range(2)]
        assert np.array_equal(found, [halves(), halves(1, 0)])
    assert counting.calls == 2


def test_other_data_sets_stay_as_they_are():
    scenes = GeneratedScenes(2, size=(32, 32))
    assert decode_for_training(scenes) is scenes
    drawn = load_segmentation_dataset("generated:easy", num_scenes=2)
    assert decode_for_training(drawn) is drawn
    without = load_segmentation_dataset("generated:easy", num_scenes=2).with_format(None)
    assert decode_for_training(without) is without


def test_the_rows_stay_within_reach(tmp_path: Path):
    entries = decode_for_training(load_segmentation_dataset(mask_folder(tmp_path)))
    assert entries.with_format(None)[0]["image"]["member"].endswith("one.jpg")
