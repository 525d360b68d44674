"""Our image processor against Transformers' own for EoMT: pixels, windows and mask labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EomtImageProcessor
from transformers.image_utils import load_image

from hf_segvit.models.image_geometry import padded_content_size, windowed_content_size
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor

# (height, width) where Transformers' rounding (down) and the official one (to nearest) give the same size.
PADDED_SIZES = [(48, 64), (64, 48), (30, 47), (64, 64), (100, 100), (90, 160), (200, 123)]
WINDOWED_SIZES = [(64, 64), (64, 128), (128, 64), (32, 44), (30, 60), (100, 325), (37, 37)]
# Float rounding only: (v / 255 - mean) / std against (v - 255 mean) / (255 std), values up to 2.7.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def example_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def label_map(height: int, width: int, values: list[int], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.choice(values, (height // 8 + 1, width // 8 + 1))
    return np.kron(coarse, np.ones((8, 8), dtype=np.int64))[:height, :width]


@pytest.fixture
def upstream_padded() -> EomtImageProcessor:
    return EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True)


@pytest.fixture
def upstream_windowed() -> EomtImageProcessor:
    return EomtImageProcessor(size={"shortest_edge": 64}, do_split_image=True, do_pad=False)


@pytest.mark.parametrize("size", PADDED_SIZES)
def test_padded_pixels(size: tuple[int, int], upstream_padded: EomtImageProcessor) -> None:
    image = Image.fromarray(example_image(*size))
    ours = EoMTImageProcessor(size=64)(image)
    theirs = upstream_padded(image, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], **TOLERANCE)
    assert ours["content_sizes"].tolist() == [list(padded_content_size(size, (64, 64)))]


@pytest.mark.parametrize("size", WINDOWED_SIZES)
def test_windowed_pixels_and_offsets(size: tuple[int, int], upstream_windowed: EomtImageProcessor) -> None:
    image = Image.fromarray(example_image(*size))
    ours = EoMTImageProcessor(size=64, task="semantic")(image)
    theirs = upstream_windowed(image, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], **TOLERANCE)
    assert ours["patch_offsets"].tolist() == [row.tolist() for row in theirs["patch_offsets"]]
    assert ours["content_sizes"].tolist() == [list(windowed_content_size(size, (64, 64)))]


def test_pixels_of_a_turned_photograph(tmp_path: Path, upstream_padded: EomtImageProcessor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(example_image(90, 160)).save(path, exif=exif)
    # What the pipeline hands to Transformers' processor.
    theirs = upstream_padded(load_image(str(path)), return_tensors="pt")
    ours = EoMTImageProcessor(size=64)(path)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], **TOLERANCE)
    assert ours["content_sizes"].tolist() == [[64, 36]]


def test_batches_of_mixed_sizes(upstream_padded: EomtImageProcessor, upstream_windowed: EomtImageProcessor) -> None:
    padded = [example_image(*size, seed) for seed, size in enumerate(PADDED_SIZES)]
    ours = EoMTImageProcessor(size=64)(padded)["pixel_values"]
    torch.testing.assert_close(ours, upstream_padded(padded, return_tensors="pt")["pixel_values"], **TOLERANCE)

    windowed = [example_image(*size, seed) for seed, size in enumerate(WINDOWED_SIZES)]
    ours = EoMTImageProcessor(size=64, task="semantic")(windowed)
    theirs = upstream_windowed(windowed, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], **TOLERANCE)
    assert ours["patch_offsets"].tolist() == [row.tolist() for row in theirs["patch_offsets"]]


def test_mask_labels_of_label_maps_and_id_maps(upstream_padded: EomtImageProcessor) -> None:
    # A square image and the full input: upstream fills the padding of maps with class 0.
    image, labels = example_image(96, 96), label_map(96, 96, [0, 1, 2, 7])
    ours = EoMTImageProcessor(size=64)(image, labels)
    theirs = upstream_padded(image, labels, return_tensors="pt")
    assert torch.equal(ours["mask_labels"][0].float(), theirs["mask_labels"][0])
    assert torch.equal(ours["class_labels"][0], theirs["class_labels"][0])

    ids, classes = label_map(96, 96, [3, 70_000, 16_777_213]), {3: 4, 70_000: 1, 16_777_213: 4}
    ours = EoMTImageProcessor(size=64)(image, ids, classes)
    theirs = upstream_padded(image, ids, classes, return_tensors="pt")
    assert torch.equal(ours["mask_labels"][0].float(), theirs["mask_labels"][0])
    assert ours["class_labels"][0].tolist() == theirs["class_labels"][0].tolist() == [4, 1, 4]


def test_mask_labels_with_reduced_labels(upstream_padded: EomtImageProcessor) -> None:
    # There ignore_index means that labels count from 1; then padding, being 0, is ignored as well.
    image, labels = example_image(64, 96), label_map(64, 96, [0, 1, 2, 7])
    ours = EoMTImageProcessor(size=64, do_reduce_labels=True)(image, labels)
    theirs = upstream_padded(image, labels, ignore_index=255, return_tensors="pt")
    assert torch.equal(ours["mask_labels"][0].float(), theirs["mask_labels"][0])
    assert ours["class_labels"][0].tolist() == theirs["class_labels"][0].tolist() == [0, 1, 6]


def test_real_photographs(sample_data: Path) -> None:
    # At the models' real size; 8-bit resizing is the same code on both sides.
    paths = sorted((sample_data / "coco_train100" / "train2017").glob("*.jpg"))[:6]
    upstream = EomtImageProcessor(size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True)
    ours = EoMTImageProcessor()
    for path in paths:
        image = Image.open(path).convert("RGB")
        height, width = image.height, image.width
        expected = upstream(image, return_tensors="pt")["pixel_values"]
        found = ours(path)
        torch.testing.assert_close(found["pixel_values"], expected, **TOLERANCE)
        assert found["content_sizes"].tolist() == [list(padded_content_size((height, width), (640, 640)))]
