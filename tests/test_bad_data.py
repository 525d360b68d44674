"""Damaged images, annotations, masks and folders: each ends in a clear error or a repair that is told.

The numbers are those of the list of bad inputs that this package promises to withstand (1 to 56: images, annotation
JSON, mask PNGs, folder layout). Nothing here may crash the interpreter or read outside of the data set's folder.

Where to look:
- images (1 to 18): empty, truncated, wrong checksum, no image, wrong ending, tiny, long, odd sides, bombs, colour
  modes, palettes, 16 bits, orientation, several frames, arrays, formats that are not read. The same images read
  quickly for training: test_quick_entries.py; given to the image processor: test_image_decoding.py.
- annotations (19 to 38): missing lists, doubled and unknown ids, order, categories, segments that PNG or JSON lack, no
  segments, crowd flags, areas, boxes, polygons, runs, file names, encodings, size and depth. Areas that differ from
  their masks: test_readers_coco.py; labelme and YOLO: test_readers_outlines.py.
- masks (39 to 48): other size, JPEG, colours, palettes, unknown values, all void, binary, off by one, train ids.
  Regions against objects in Cityscapes' instanceIds: test_readers_label_maps.py.
- layout (49 to 56): empty, one image, the same in two splits, loops, unsafe archives, bombs, tar files, pipes, names.
  Doubled, encrypted and oddly compressed members, damaged archives: test_archives.py.
"""

import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit.data.archives import MAX_TEXT_BYTES
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.problems import ProblemList
from hf_segvit.data.reading import load_segmentation_dataset
from hf_segvit.models.image_tensors import check_unit_range, image_tensor
from hf_segvit.models.mask_encoding import decode_mask

from .data_folders import (
    SIZE,
    coco_content,
    coco_folder,
    colored,
    halves,
    mask_folder,
    panoptic_folder,
    write_image,
    write_json,
    write_mask,
)

H, W = SIZE


def _image_bytes(format_name: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8)).convert(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


def _bad_crc() -> bytes:
    content = bytearray(_image_bytes("PNG"))
    content[content.index(b"IDAT") + 8] ^= 255
    return bytes(content)


def _bomb() -> bytes:
    """A PNG that says 20,000 x 20,000 pixels in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _with_image(root: Path, content: bytes, name: str = "one.jpg", mask: Any = None) -> str:
    spec = mask_folder(root)
    (root / "images" / "train" / "one.jpg").unlink()
    (root / "images" / "train" / name).write_bytes(content)
    if mask is not None:
        write_mask(root / "annotations" / "train" / "one.png", mask)
    return spec


# Images, 1 to 18.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "empty", id="1 zero bytes"),
        pytest.param(_image_bytes()[:-200], "truncated|Truncated", id="2 truncated JPEG"),
        pytest.param(_bad_crc(), "damaged|cannot be read", id="3 PNG with a bad checksum"),
        pytest.param(b"hello " * 9, "not an image", id="4 text"),
        pytest.param(_bomb(), "decompression bomb|limit", id="9 bomb"),
        pytest.param(b"\0\0\0\x18ftypheic" + bytes(40), "not an image", id="18 HEIC"),
        pytest.param(b"#?RADIANCE\n" + bytes(40), "not an image", id="18 HDR"),
        pytest.param(b"\0\0\0\x1cftypavif" + bytes(40), "not an image", id="18 AVIF"),
    ],
)
def test_unreadable_images(tmp_path: Path, content: bytes, message: str) -> None:
    dataset = load_segmentation_dataset(_with_image(tmp_path, content))
    with pytest.raises(ValueError, match=rf"one\.jpg.*({message})"):
        dataset[0]
    (problem,) = check_dataset(f"mask_folder:{tmp_path}").problems.errors
    assert problem.file.endswith("one.jpg")
    assert problem.item == "image 'one'"


def test_05_the_content_counts_not_the_ending(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(_with_image(tmp_path, _image_bytes("TIFF"), "one.png"))
    assert dataset[0]["image"].getpixel((3, 3)) == (90, 90, 90)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000)], ids=["6", "7"])
def test_06_07_tiny_and_long_images_are_read_and_told(tmp_path: Path, size: tuple[int, int]) -> None:
    spec = _with_image(tmp_path, _image_bytes("PNG", size=size), "one.png", np.zeros(size, dtype=np.uint8))
    assert load_segmentation_dataset(spec)[0]["segment_map"].shape == size
    assert any("too small or too long" in problem.message for problem in check_dataset(spec).problems)


def test_08_any_side_is_read_as_it_is(tmp_path: Path) -> None:
    spec = _with_image(tmp_path, _image_bytes(size=(33, 47)), mask=np.zeros((33, 47), dtype=np.uint8))
    assert load_segmentation_dataset(spec)[0]["image"].size == (47, 33)


@pytest.mark.parametrize(
    ("format_name", "mode"),
    [("JPEG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK"), ("JPEG", "YCbCr"), ("PNG", "I;16")],
    ids=["10", "11", "11 RGBA", "12", "13", "13 YCbCr", "14"],
)
def test_10_to_14_all_modes_become_rgb(tmp_path: Path, format_name: str, mode: str) -> None:
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full(SIZE, 90 * 257, dtype=np.uint16)).save(buffer, "PNG")
        content = buffer.getvalue()
    else:
        colors = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        buffer = io.BytesIO()
        Image.fromarray(np.full((*SIZE, 3), 90, dtype=np.uint8)).convert(mode, **colors).save(buffer, format_name)
        content = buffer.getvalue()
    sample = load_segmentation_dataset(_with_image(tmp_path, content))[0]
    assert sample["image"].mode == "RGB"
    assert np.abs(np.asarray(sample["image"]).astype(int) - 90).max() <= 3  # CMYK and JPEG round


def test_12_transparency_of_a_palette_lies_on_white(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image = Image.new("P", SIZE[::-1], 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(buffer, "PNG", transparency=1)
    sample = load_segmentation_dataset(_with_image(tmp_path, buffer.getvalue(), "one.png"))[0]
    assert sample["image"].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("annotated", ["stored", "upright"])
def test_15_a_turned_image_is_read_in_the_frame_of_its_mask(tmp_path: Path, annotated: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
    pixels[:, : W // 2] = 255  # the left half as stored, the upper half as shown
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    mask = halves(0, 1) if annotated == "stored" else halves(0, 1).T.copy()
    spec = _with_image(tmp_path, buffer.getvalue(), "one.png", mask)
    sample = load_segmentation_dataset(spec)[0]
    assert np.array_equal(np.asarray(sample["image"])[..., 0] == 255, sample["segment_map"] == 0)
    assert any("EXIF" in problem.message for problem in check_dataset(spec).problems)


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "TIFF"])
def test_16_the_first_frame_counts(tmp_path: Path, format_name: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", SIZE[::-1], color) for color in ("white", "black")]
    frames[0].save(buffer, format_name, save_all=True, append_images=frames[1:])
    spec = _with_image(tmp_path, buffer.getvalue(), f"one.{format_name.lower()}")
    assert load_segmentation_dataset(spec)[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    assert any(re.search("several frames|2 pages", problem.message) for problem in check_dataset(spec).problems)


def test_17_arrays_that_are_no_images() -> None:
    with pytest.raises(ValueError, match="channels first or last"):
        image_tensor(np.zeros((3, 3, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="values of type int64"):
        image_tensor(np.zeros((5, 5), dtype=np.int64))
    for values in (torch.full((3, 4, 4), float("nan")), torch.full((3, 4, 4), 1.5)):
        with pytest.raises(ValueError, match=r"but \[0, 1\] is expected"):
            check_unit_range(values, "image")


# Annotation JSON, 19 to 38.


def _entry(number: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][number].update(changes)


def _image(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"][0].update(changes)


def _polygon(*polygon: float) -> Callable[[dict[str, Any]], object]:
    return _entry(0, segmentation=[list(polygon)])


def _rle(counts: Any, size: tuple[int, int] = SIZE) -> Callable[[dict[str, Any]], object]:
    return _entry(2, segmentation={"size": list(size), "counts": counts})


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c.pop("categories"), "no list 'categories'", id="19"),
        pytest.param(lambda c: c["images"].append(c["images"][0]), "image 5: two images have this id", id="20"),
        pytest.param(_entry(0, image_id=6), "annotation 1: it is for image 6, which `images` lacks", id="22"),
        pytest.param(_entry(0, category_id=8), "annotation 1: category 8 is not in the list", id="23"),
        pytest.param(_entry(0, iscrowd="yes"), "annotation 1: iscrowd is 'yes'; it must be 0 or 1", id="28"),
        pytest.param(_polygon(1, 1, 5, 5), "annotation 1: a polygon of 4 numbers", id="32 two points"),
        pytest.param(_polygon(1, 1, 5, 5, 9, 1, 3), "annotation 1: a polygon of 7 numbers", id="32 odd"),
        pytest.param(_polygon(1e9, 1, 5, 5, 9, 1e9), "far outside of the image of 30 x 20", id="33 far"),
        pytest.param(_polygon(NAN, 1, 5, 5, 9, 1), "NaN or infinite", id="33 NaN"),
        pytest.param(_polygon(float("inf"), 1, 5, 5, 9, 1), "NaN or infinite", id="33 infinite"),
        pytest.param(_rle([0, 40]), "annotation 3: an RLE mask whose runs do not add up", id="34 short"),
        pytest.param(_rle([0, 40, H * W]), "runs do not add up", id="34 long"),
        pytest.param(_rle([0, -40, H * W + 40]), "runs do not add up", id="34 negative"),
        pytest.param(_rle([0, 2**63, 2**63, H * W]), "runs do not add up", id="34 overflow"),
        pytest.param(_rle([2**62] * 4 + [H * W]), "runs do not add up", id="34 sum wraps around"),
        pytest.param(_rle([]), "no counts", id="34 empty list"),
        pytest.param(_rle(""), "no counts", id="34 empty text"),
        pytest.param(_rle("0\x7f"), "malformed counts", id="34 characters"),
        pytest.param(_rle(3.5), "neither text nor a list", id="34 number"),
        pytest.param(_rle([0, 40.5, 559.5]), "neither text nor a list of whole", id="34 fractions"),
        pytest.param(_rle([0, 40, H * W - 40], (W, H)), "height and width are swapped", id="35"),
        pytest.param(_rle([0, 40, H * W - 40], ()), r"size is \[\]", id="35 no size"),
        pytest.param(_image(file_name="../../etc/passwd"), "absolute or leaves its folder", id="36 above"),
        pytest.param(_image(file_name="/etc/passwd"), "absolute or leaves its folder", id="36 absolute"),
        pytest.param(_image(file_name="..\\..\\etc\\passwd"), "absolute or leaves its folder", id="36 backslash"),
        pytest.param(_image(file_name="C:\\b.jpg"), "absolute or leaves its folder", id="36 drive"),
        pytest.param(_image(file_name="A.JPG"), "there is 'a.jpg', which differs in case", id="36 case"),
        pytest.param(_image(file_name="b.jpg"), "there is no file 'b.jpg'", id="36 missing"),
        pytest.param(_image(file_name=None), "must be a relative path", id="36 none"),
        pytest.param(_image(height=0), "whole numbers above 0", id="height 0"),
        pytest.param(_entry(0, id=2), "annotation 2: two annotations have this id", id="doubled annotation"),
        pytest.param(_entry(0, segmentation=[]), "annotation 1: it has no segmentation", id="box only"),
    ],
)
def test_damaged_annotations(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    spec = coco_folder(tmp_path, change)
    with pytest.raises(ValueError, match=rf"instances_train\.json: .*{message}"):
        load_segmentation_dataset(spec)


@pytest.mark.parametrize(
    ("change", "kept", "warning"),
    [
        pytest.param(_entry(0, iscrowd="0"), 3, "iscrowd is the text '0'", id="28 text"),
        pytest.param(lambda c: c["annotations"][0].pop("iscrowd"), 3, "", id="28 missing"),
        pytest.param(lambda c: c["annotations"].__delitem__(slice(0, 2)), 1, "only as crowd", id="29 crowd only"),
        pytest.param(_entry(0, area=0), 3, "area is 0", id="30"),
        pytest.param(_entry(0, bbox=[1, 1, -5, 3]), 3, "is no box", id="31 negative"),
        pytest.param(_entry(0, bbox=[1, NAN, 5, 3]), 3, "is no box", id="31 and 37 NaN literal"),
        pytest.param(_polygon(2, 2, 20, 15, 20, 2, 2, 15), 3, "", id="33 crosses itself"),
        pytest.param(_entry(0, segmentation=[2, 2, 20, 15, 20, 2]), 3, "one flat polygon", id="flat polygon"),
        pytest.param(_image(file_name="..\\train\\a.jpg".replace("..\\", "")), 3, "", id="36 backslash inside"),
    ],
)
def test_repaired_annotations(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], kept: int, warning: str
) -> None:
    problems = ProblemList()
    dataset = load_segmentation_dataset(coco_folder(tmp_path, change), problems=problems)
    sample = dataset[0]
    assert len(sample["segments"]) == kept
    assert all(decode_mask(row["rle"]).any() for row in sample["segments"])
    assert problems.errors == []
    assert [warning in problem.message for problem in problems] == [True] * bool(warning)


def test_21_orders_may_differ(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"].insert(0, {"id": 9, "file_name": "b.jpg", "height": H, "width": W})
        content["annotations"].insert(0, {**content["annotations"][1], "id": 77})
        content["annotations"].append({**content["annotations"][1], "id": 78, "image_id": 9})

    write_image(tmp_path / "train" / "b.jpg", seed=1)
    dataset = load_segmentation_dataset(coco_folder(tmp_path, change))
    found = {sample["image_id"]: [row["id"] for row in sample["segments"]] for sample in dataset}
    assert found == {9: [78], 5: [77, 1, 2, 3]}


def test_24_category_0_and_gaps(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 200, "name": "dog"}, {"id": 0, "name": "cat"}]
        for entry, category in zip(content["annotations"], (200, 0, 200), strict=True):
            entry["category_id"] = category

    dataset = load_segmentation_dataset(coco_folder(tmp_path, change))
    assert [row["label_id"] for row in dataset[0]["segments"]] == [1, 0, 1]


def test_25_a_listed_segment_without_pixels_is_dropped_and_told(tmp_path: Path) -> None:
    spec = panoptic_folder(tmp_path, ids=halves(7, 7, dtype=np.int64))
    assert [row["id"] for row in load_segmentation_dataset(spec, task="panoptic")[0]["segments"]] == [7]
    (problem,) = check_dataset(spec, task="panoptic").problems
    assert (problem.item, problem.severity) == ("image 5, segment 70000", "warning")


def test_26_pixels_of_an_unlisted_segment_are_an_error(tmp_path: Path) -> None:
    spec = panoptic_folder(tmp_path, ids=halves(7, 8, dtype=np.int64))
    with pytest.raises(ValueError, match=r"a\.png: the PNG holds the ids \[8\], which segments_info does not list"):
        load_segmentation_dataset(spec, task="panoptic")[0]
    assert "the ids [8]" in check_dataset(spec, task="panoptic").problems.errors[0].message


def test_27_no_segments(tmp_path: Path) -> None:
    spec = panoptic_folder(tmp_path, _entry(0, segments_info=[]), np.zeros(SIZE, dtype=np.int64))
    sample = load_segmentation_dataset(spec, task="panoptic")[0]
    assert sample["segments"] == []
    assert (sample["segment_map"] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "image 5: the image has two panoptic annotations"),
        (_entry(0, segments_info=None), "image 5: the annotation has no list segments_info"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=70000), "two segments of the image have this id"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=0), "whole number from 1"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=9), "category 9 is not"),
        (_entry(0, file_name="../a.png"), "leaves its folder"),
        (_entry(0, image_id=[1]), r"image \[1\]"),
        (lambda c: c["categories"][0].pop("isthing"), "category 'cat' needs `isthing`"),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), "two categories have the id 1"),
        (lambda c: c["categories"].append({"id": 9, "name": "cat"}), "several categories are called 'cat'"),
        (lambda c: c["categories"].clear(), "list of categories is empty"),
    ],
)
def test_damaged_panoptic_annotations(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_segmentation_dataset(panoptic_folder(tmp_path, change), task="panoptic")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_37_byte_order_marks_are_read(tmp_path: Path, encoding: str) -> None:
    spec = coco_folder(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(coco_content()), encoding=encoding)
    assert len(load_segmentation_dataset(spec)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [],}', "line 1, column 1[45]"),
        (b"", "empty"),
        (b"\xff\x00\xff{", "no valid text|no valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "no list 'images'"),
        (b'{"images": [3], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', r"images\[0\]"),
    ],
    ids=["37 comma", "37 empty", "37 bytes", "38 deep", "list", "image no object"],
)
def test_37_38_malformed_json(tmp_path: Path, content: bytes, message: str) -> None:
    spec = coco_folder(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"instances_train\.json: .*({message})"):
        load_segmentation_dataset(spec)


def test_38_a_huge_json_is_refused_before_it_is_read(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path)
    with open(tmp_path / "annotations" / "instances_train.json", "wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)  # a sparse file: nothing is written
    with pytest.raises(ValueError, match=r"instances_train\.json: 2,147,483,649 bytes, more than the limit"):
        load_segmentation_dataset(spec)


# Mask PNGs, 39 to 48.


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        pytest.param(halves(size=(H, W + 1)), {}, "20 x 30 pixels but its mask 20 x 31", id="39"),
        pytest.param(halves(), {"format": "JPEG"}, "a JPEG file as mask", id="40"),
        pytest.param(colored(halves(7, 70000, dtype=np.int64)), {}, "mode RGB with colours", id="41"),
        pytest.param(halves(0, 7), {}, r"holds the values \[7\].*list the value as a class, or as void", id="43"),
        pytest.param(halves(0, 2), {}, r"holds the values \[2\].*number classes from 1", id="47"),
    ],
)
def test_damaged_masks(tmp_path: Path, mask: np.ndarray, options: dict[str, Any], message: str) -> None:
    spec = mask_folder(tmp_path)
    write_mask(tmp_path / "annotations" / "train" / "one.png", mask, **options)
    with pytest.raises(ValueError, match=rf"one\.\w+.*{message}"):
        load_segmentation_dataset(spec)[0]
    assert len(check_dataset(spec).problems.errors) >= 1


def test_42_palettes_are_read_as_indices(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    mask = Image.fromarray(halves()).convert("P")
    mask.putpalette([128, 0, 0, 0, 128, 0])
    write_mask(tmp_path / "annotations" / "train" / "one.png", mask)
    assert np.array_equal(load_segmentation_dataset(spec)[0]["segment_map"], halves())


def test_44_45_all_void_is_told(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, ("one", "two"))
    write_mask(tmp_path / "annotations" / "train" / "one.png", np.full(SIZE, 255, dtype=np.uint8))
    assert load_segmentation_dataset(spec)[0]["segments"] == []
    (warning,) = check_dataset(spec).problems
    assert (warning.item, warning.severity) == ("image 'one'", "warning")
    write_mask(tmp_path / "annotations" / "train" / "two.png", np.full(SIZE, 255, dtype=np.uint8))
    assert "all is void" in check_dataset(spec).problems.errors[0].message


def test_46_binary_masks_of_0_and_255_are_told(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    write_mask(tmp_path / "annotations" / "train" / "one.png", halves(0, 255))
    (error,) = check_dataset(spec).problems.errors
    assert "saved as 0 and 255, list 255 as a class" in error.message
    write_json(tmp_path / "classes.json", {"0": "road", "255": "car"})
    assert check_dataset(spec).problems == []
    assert np.array_equal(load_segmentation_dataset(spec)[0]["segment_map"], halves())


def test_47_ade20k_numbers_of_the_full_data_set(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "training" / "a.jpg")
    write_mask(tmp_path / "annotations" / "training" / "a.png", halves(150, 151))
    with pytest.raises(ValueError, match=r"a\.png: .*\[151\].*hold 0 \(other\) to 150"):
        load_segmentation_dataset(f"ade20k:{tmp_path}")[0]


def test_48_cityscapes_train_ids_are_noticed(tmp_path: Path) -> None:
    place = tmp_path / "{}" / "train" / "city" / "a"
    write_image(Path(f"{str(place).format('leftImg8bit')}_leftImg8bit.png"))
    write_mask(Path(f"{str(place).format('gtFine')}_gtFine_labelIds.png"), halves(7, 255))
    write_mask(Path(f"{str(place).format('gtFine')}_gtFine_instanceIds.png"), halves(7, 60_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"labelIds\.png: .*\[255\].*labelTrainIds under a wrong name"):
        load_segmentation_dataset(f"cityscapes:{tmp_path}")[0]
    with pytest.raises(ValueError, match=r"instanceIds\.png: the mask holds the id 60000"):
        load_segmentation_dataset(f"cityscapes:{tmp_path}", task="panoptic")[0]


# Layout, 49 to 56.


def test_49_empty_splits(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    (tmp_path / "images" / "val").mkdir()
    with pytest.raises(ValueError, match="split 'val': there are no images"):
        load_segmentation_dataset(spec, split="val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no split of a mask_folder data set is there; expected images/train"):
        load_segmentation_dataset(f"mask_folder:{tmp_path / 'empty'}")


def test_50_one_image(tmp_path: Path) -> None:
    report = check_dataset(mask_folder(tmp_path))
    assert report.splits[0].images == 1
    assert report.problems == []


def test_51_the_same_image_in_train_and_val(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, ("one", "two"))
    mask_folder(tmp_path, ("other",), split="val")  # the same pixels as "one"
    (error,) = check_dataset(spec).problems.errors
    assert error.file.endswith("other.jpg")
    assert "the same image is in split train, image 'one'" in error.message


def test_52_loops_of_links_end(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    os.symlink(tmp_path / "images", tmp_path / "images" / "train" / "loop")
    os.symlink("self.jpg", tmp_path / "images" / "train" / "self.jpg")
    problems = ProblemList()
    assert len(load_segmentation_dataset(spec, problems=problems)) == 1


@pytest.mark.parametrize(
    "name",
    ["../classes.json", "/images/a.jpg"],
)
def test_53_unsafe_archives(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match=r"data\.zip: member .* outside"):
        load_segmentation_dataset(f"mask_folder:{tmp_path / 'data.zip'}")


def test_54_bombs_in_archives(tmp_path: Path) -> None:
    mask_folder(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((tmp_path / "data").rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path / "data"))
    dataset = load_segmentation_dataset(f"mask_folder:{tmp_path / 'data.zip'}")
    assert dataset[0]["image"].size == SIZE[::-1]
    content = bytearray((tmp_path / "data.zip").read_bytes())
    entry = content.rindex(b"images/train/one.jpg") - 46  # in the directory
    content[entry + 24 : entry + 28] = (2**30).to_bytes(4, "little")  # its size
    (tmp_path / "bomb.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"one\.jpg: 1,073,741,824 bytes, more than the limit of 536,870,912"):
        load_segmentation_dataset(f"mask_folder:{tmp_path / 'bomb.zip'}")[0]


def test_55_tar_files_are_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        device = tarfile.TarInfo("images/null")
        device.type, device.linkname = tarfile.CHRTYPE, "/dev/null"
        archive.addfile(device)
    with pytest.raises(ValueError, match=r"data\.tar\.gz: neither a folder nor a zip archive; unpack it"):
        load_segmentation_dataset(f"mask_folder:{tmp_path / 'data.tar.gz'}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_55_pipes_are_not_opened(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path)
    (tmp_path / "images" / "train" / "one.jpg").unlink()
    os.mkfifo(tmp_path / "images" / "train" / "one.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        load_segmentation_dataset(spec)[0]


def test_56_unusual_names_and_read_only_folders(tmp_path: Path) -> None:
    names = ("süß 道路", "with space", "new\nline", "%41&#;'\"")
    spec = mask_folder(tmp_path / "data", names)
    for folder in ("images/train", "annotations/train"):
        (tmp_path / "data" / folder).chmod(0o555)
    try:
        dataset = load_segmentation_dataset(spec)
        assert sorted(row["image_id"] for row in dataset) == sorted(names)
    finally:
        for folder in ("images/train", "annotations/train"):
            (tmp_path / "data" / folder).chmod(0o755)


def test_files_without_partner(tmp_path: Path) -> None:
    spec = mask_folder(tmp_path, ("one", "two"))
    (tmp_path / "annotations" / "train" / "two.png").unlink()
    write_mask(tmp_path / "annotations" / "train" / "three.png", halves())
    problems = ProblemList()
    assert len(load_segmentation_dataset(spec, problems=problems)) == 1
    assert [(problem.item, problem.severity) for problem in problems] == [("three", "warning"), ("two", "error")]
    with pytest.raises(ValueError, match=r"two\.jpg: two: the image has no mask of the same name"):
        load_segmentation_dataset(spec)


def test_many_errors_are_summed_up(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, lambda content: [row.update(category_id=9) for row in content["annotations"] * 1])
    with pytest.raises(ValueError, match=r"annotation 1.*annotation 2.*annotation 3"):
        load_segmentation_dataset(spec)

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [{**content["annotations"][0], "id": number, "category_id": 9} for number in range(9)]

    with pytest.raises(ValueError, match="and 6 more problems, which `hf-segvit check-data` lists"):
        load_segmentation_dataset(coco_folder(tmp_path, change))
    assert len(check_dataset(spec).problems.errors) == 10  # and that nothing is left


def test_a_polygon_may_overshoot_a_little(tmp_path: Path) -> None:
    dataset = load_segmentation_dataset(coco_folder(tmp_path, _polygon(-3, -3, W + 4, -3, W + 4, H + 2, -3, H + 2)))
    assert decode_mask(dataset[0]["segments"][0]["rle"]).all()


_ODD_VALUES = (None, True, -1, 0, 2**70, 1.5, NAN, float("inf"), "", "x", [], [None], {}, {"a": 1}, [[1]], "../x", "\0")


def _mutated(content: Any, rng: np.random.Generator) -> None:
    """Replace, remove or double one random entry, at any depth, in place."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(content)
    node, key = places[rng.integers(len(places))]
    kind = rng.integers(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = _ODD_VALUES[rng.integers(len(_ODD_VALUES))]


@pytest.mark.parametrize("kind", ["instance", "panoptic", "labelme"])
def test_random_damage_ends_in_a_clear_error_or_a_sample(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    outcomes, messages = {"read": 0, "refused": 0}, list[str]()
    shape = {"label": "a", "points": [[2, 2], [12, 2], [2, 12]], "shape_type": "polygon", "group_id": 1}
    labelme = {"imagePath": "a.jpg", "imageHeight": H, "imageWidth": W, "shapes": [shape, shape]}
    write_image(tmp_path / "a.jpg")
    for _ in range(200):
        if kind == "labelme":
            content = json.loads(json.dumps(labelme))
            _mutated(content, rng)
            write_json(tmp_path / "a.json", content)
            spec = f"labelme:{tmp_path}"
        else:
            folder = coco_folder if kind == "instance" else panoptic_folder
            spec = folder(tmp_path, lambda content: _mutated(content, rng))
        try:
            sample = load_segmentation_dataset(spec, **({} if kind == "labelme" else {"task": kind}))[0]
        except ValueError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
        else:
            outcomes["read"] += 1
            assert sample["image"].size == (W, H)
    assert all(str(tmp_path) in message for message in messages)
    assert min(outcomes.values()) > 2
