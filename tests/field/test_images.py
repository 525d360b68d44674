"""Images that cameras, satellites and scanners deliver: many bits, many bands, many pages."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segvit import EoMTConfig, EoMTForUniversalSegmentation, EoMTImageProcessor
from hf_segvit.cli import main
from hf_segvit.conversion.key_maps import PATCH_KERNEL, for_channels
from hf_segvit.data.augmentation import jitter_colors
from hf_segvit.data.checking import check_dataset
from hf_segvit.data.data_report import sample_sheet
from hf_segvit.data.reading import load_segmentation_dataset
from hf_segvit.drawing.segments import draw_segments
from hf_segvit.inference.point_classifier import PointClassifier
from hf_segvit.inference.segmenter import Segmenter
from hf_segvit.models.image_bands import Bands, read_bands
from hf_segvit.models.image_decoding import open_image
from hf_segvit.models.image_files import count_pages, open_image_file
from hf_segvit.models.image_processing_vit_p import ViTPImageProcessor
from hf_segvit.models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from hf_segvit.models.image_tensors import image_tensor
from hf_segvit.models.image_values import ImageSettings, checked_range

SIZE = (48, 64)  # height, width


def ramp(channels: int, high: int, dtype: Any = np.uint16) -> np.ndarray:
    """(H, W, C) with values from 0 to `high`, different in every channel."""
    values = np.linspace(0, high, SIZE[0] * SIZE[1] * channels).reshape(*SIZE, channels)
    return values.round().astype(dtype)


def write_tiff(
    path: Path,
    values: np.ndarray,
    *,
    planar: bool = False,
    tile: int | None = None,
    compression: int = 1,
    predictor: bool | int = False,
    order: str = "<",
    extra: int | None = None,
    big: bool = False,
    nodata: str | None = None,
    strip: bytes | None = None,
) -> Path:
    """A TIFF of (H, W, C), written byte by byte, so that no reader is tested against its own writer."""
    height, width, channels = values.shape
    stored = values.astype(values.dtype.newbyteorder(order))
    planes = [stored[..., i : i + 1] for i in range(channels)] if planar else [stored]
    blocks = []
    for plane in planes:
        step_y, step_x = (tile, tile) if tile else (20, width)
        for top in range(0, height, step_y):
            for left in range(0, width, step_x):
                block = plane[top : top + step_y, left : left + step_x]
                if tile:
                    block = np.pad(block, ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)))
                if predictor is True:
                    native = block.astype(values.dtype)
                    block = np.diff(native, axis=1, prepend=np.zeros_like(native[:, :1])).astype(stored.dtype)
                content = block.astype(stored.dtype).tobytes()
                blocks.append(zlib.compress(content) if compression == 8 else content)
    if strip is not None:  # compressed elsewhere
        blocks = [strip]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = 8 * values.dtype.itemsize
    tags: list[tuple[int, int, Any]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [compression]),
        (262, 3, [2 if channels >= 3 else 1]),
        (277, 3, [channels]),
        (284, 3, [2 if planar else 1]),
        (317, 3, [predictor + 1 if isinstance(predictor, bool) else predictor]),
        (339, 3, [kind] * channels),
    ]
    if channels > 3:
        tags.append((338, 3, [0 if extra is None else extra] * (channels - 3)))
    if tile:
        tags += [(322, 4, [tile]), (323, 4, [tile])]
    else:
        tags.append((278, 4, [20 if strip is None else height]))
    if nodata is not None:
        tags.append((42113, 2, nodata.encode() + b"\0"))
    tags += [(324 if tile else 273, 4, [0] * len(blocks)), (325 if tile else 279, 4, [len(block) for block in blocks])]
    count, number, offset = ("Q", "Q", 8) if big else ("H", "I", 4)
    start = 16 if big else 8
    entry = 20 if big else 12
    tags.sort()
    data_start = start + struct.calcsize(order + count) + entry * len(tags) + struct.calcsize(order + number)
    sizes = {1: "B", 2: "s", 3: "H", 4: "I"}

    def packed(tag: tuple[int, int, Any]) -> bytes:
        if tag[1] == 2:
            return tag[2]
        return struct.pack(f"{order}{len(tag[2])}{sizes[tag[1]]}", *tag[2])

    long_ones = sum(len(packed(tag)) for tag in tags if len(packed(tag)) > offset)
    position = data_start + long_ones
    for tag in tags:
        if tag[0] in (273, 324):
            for index, block in enumerate(blocks):
                tag[2][index] = position
                position += len(block)
    head = b"II" if order == "<" else b"MM"
    if big:
        head += struct.pack(f"{order}HHHQ", 43, 8, 0, 16)
    else:
        head += struct.pack(f"{order}HI", 42, 8)
    directory, long_values, at = struct.pack(order + count, len(tags)), b"", data_start
    for tag in tags:
        content = packed(tag)
        directory += struct.pack(f"{order}HH{number}", tag[0], tag[1], len(tag[2]))
        if len(content) > offset:
            directory += struct.pack(f"{order}{number}", at)
            long_values, at = long_values + content, at + len(content)
        else:
            directory += content.ljust(offset, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + directory + struct.pack(order + number, 0) + long_values + b"".join(blocks))
    return path


def write_png16(path: Path, values: np.ndarray) -> Path:
    """A PNG of 16 bits of (H, W, C), which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


FORMS: dict[str, dict[str, Any]] = {
    "strips": {},
    "planar": {"planar": True},
    "tiles": {"tile": 16},
    "planar tiles": {"planar": True, "tile": 32},
    "deflate": {"compression": 8},
    "deflate with differences": {"compression": 8, "predictor": True, "tile": 16},
    "Motorola": {"order": ">"},
    "Motorola with differences": {"order": ">", "compression": 8, "predictor": True},
    "BigTIFF": {"big": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(2, np.uint8), (3, np.uint16), (4, np.uint8), (4, np.uint16), (5, np.uint8), (6, np.float32)],
)
def test_tiffs_of_several_bands_give_their_samples(form: str, channels: int, dtype: Any, tmp_path: Path) -> None:
    options = FORMS[form]
    if dtype == np.float32 and options.get("predictor"):
        pytest.skip("differences of floating-point numbers are another predictor")
    values = ramp(channels, 250 if dtype == np.uint8 else 4095, dtype)
    bands = open_image_file(write_tiff(tmp_path / "a.tif", values, **options))
    assert isinstance(bands, Bands)
    assert bands.values.dtype == dtype
    assert np.array_equal(bands.values, values)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_libtiff_compresses_is_read_through_pillow(compression: str, dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 8, (30, 24, 5)).astype(dtype)
    # The strip of five bands is that of one band with as many bytes in a row.
    rows = np.frombuffer(values.tobytes(), np.uint8).reshape(30, -1)
    try:
        Image.fromarray(rows).save(tmp_path / "grey.tif", compression=compression)
    except (OSError, KeyError):
        pytest.skip("this Pillow was built without it")
    with Image.open(tmp_path / "grey.tif") as image:
        tags = image.tag_v2
        (start,), (length,) = tags[273], tags[279]
        code = tags[259]
    block = (tmp_path / "grey.tif").read_bytes()[start : start + length]
    bands = open_image_file(write_tiff(tmp_path / "a.tif", values, compression=code, strip=block))
    assert np.array_equal(bands.values, values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("order", ["<", ">"])
def test_differences_of_floating_point(order: str, bands: int, dtype: Any, tmp_path: Path) -> None:
    """Predictor 3: bytes of equal significance side by side, then their differences (TIFF Technical Note 3)."""
    values = np.random.default_rng(0).normal(size=(20, 24, bands)).astype(dtype)
    rows = []
    for row in values.reshape(20, -1):
        planes = row.astype(row.dtype.newbyteorder(">")).view(np.uint8).reshape(row.size, -1).T.reshape(-1)
        previous = np.concatenate([np.zeros(bands, np.uint8), planes[:-bands]])
        rows.append((planes - previous).astype(np.uint8).tobytes())
    strip = zlib.compress(b"".join(rows))
    path = write_tiff(tmp_path / "a.tif", values, compression=8, strip=strip, order=order, predictor=3)
    bands_read = read_bands(path.read_bytes(), "a.tif")
    assert np.array_equal(bands_read.values, values)
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    assert np.array_equal(tifffile.imread(path).reshape(values.shape), values)


def test_what_only_tifffile_reads(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = ramp(5, 1000, np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, planarconfig="contig", photometric="minisblack")
    assert np.array_equal(open_image_file(path).values, values)
    half = np.linspace(0, 1, 48 * 64 * 2, dtype=np.float16).reshape(48, 64, 2)
    # 24 bits are no type of NumPy's, so that the samples are left to tifffile, whose errors name the file.
    content = bytearray(write_tiff(tmp_path / "b.tif", half.astype(np.float32)).read_bytes())
    place = content.index(struct.pack("<HHI", 258, 3, 2)) + 8
    content[place : place + 4] = struct.pack("<HH", 24, 24)
    with pytest.raises(ValueError, match=r"b\.tif: a TIFF of 2 bands of 24 bits.*(tifffile cannot|pip install)"):
        open_image_file(bytes(content), "b.tif")


def test_a_tiff_that_ends_too_early_is_called_truncated(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", ramp(4, 4095))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.tif: the TIFF of 4 bands of 16 bits \(uint16\) is truncated"):
        open_image(path)


def test_compressions_of_no_reader_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "a.tif", ramp(4, 250, np.uint8), compression=34712)  # JPEG 2000
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ValueError, match=r'4 bands of 8 bits with compression 34712.*pip install "hf-segvit\[tiff\]"'):
        open_image(path)


class TestScaling:
    def test_colours_of_16_bits_keep_their_low_byte(self, tmp_path: Path) -> None:
        values = ramp(3, 65535)
        expected = (values.astype(int) + 128) // 257
        for path in (write_tiff(tmp_path / "a.tif", values), write_png16(tmp_path / "a.png", values)):
            assert np.array_equal(np.asarray(open_image(path)), expected), path

    def test_transparency_of_16_bits_lies_on_white(self, tmp_path: Path) -> None:
        values = np.zeros((2, 2, 4), np.uint16)
        values[0, ..., 3] = 65535
        image = np.asarray(open_image(write_png16(tmp_path / "a.png", values)))
        assert (image[0] == 0).all()
        assert (image[1] == 255).all()

    @pytest.mark.parametrize("kind", ["gray.png", "gray.tif", "rgb.png", "rgb.tif", "bands.tif"])
    def test_a_range_of_12_bits_fills_8(self, kind: str, tmp_path: Path) -> None:
        values = ramp({"gray": 1, "rgb": 3, "bands": 5}[kind.split(".")[0]], 4095)
        path = (write_png16 if kind.endswith("png") else write_tiff)(tmp_path / kind, values)
        settings = ImageSettings(value_range=(0, 4095))
        pixels = np.asarray(open_image(path, settings=settings))
        assert np.array_equal(pixels, np.broadcast_to(np.rint(values / 4095 * 255), pixels.shape))
        assert np.asarray(open_image(path, settings=ImageSettings())).max() == 16

    def test_signed_numbers_need_a_range(self, tmp_path: Path) -> None:
        values = np.full((*SIZE, 1), -1024, np.int16)
        values[0, :3, 0] = [-200, 50, 300]
        path = write_tiff(tmp_path / "ct.tif", values)
        with pytest.raises(ValueError, match=r"-1024 to 300.*--value-range -1024-300"):
            open_image(path)
        window = ImageSettings(value_range=checked_range("-200-300"))
        assert np.asarray(open_image(path, settings=window))[0, :4, 0].tolist() == [0, 128, 255, 0]

    def test_floating_point(self, tmp_path: Path) -> None:
        values = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(*SIZE, 1)
        assert np.array_equal(
            np.asarray(open_image(write_tiff(tmp_path / "a.tif", values)))[..., :1], np.rint(values * 255)
        )
        values[0, 0] = -9999
        stated = write_tiff(tmp_path / "stated.tif", values, nodata="-9999")
        assert np.asarray(open_image(stated))[0, 0].tolist() == [0, 0, 0]
        values[0, 0] = np.nan
        assert np.asarray(open_image(write_tiff(tmp_path / "nan.tif", values)))[0, 0].tolist() == [0, 0, 0]
        values[0, 0] = -9999
        with pytest.raises(ValueError, match=r"-9999 to 1.*say which values are black and white"):
            open_image(write_tiff(tmp_path / "unstated.tif", values))

    def test_arrays_and_tensors_take_the_range_of_the_processor(self, tmp_path: Path) -> None:
        values = ramp(3, 4095)
        processor = EoMTImageProcessor(size=64, value_range=(0, 4095), do_normalize=False)
        processor.save_pretrained(tmp_path)
        processor = EoMTImageProcessor.from_pretrained(tmp_path)
        path = write_tiff(tmp_path / "a.tif", values)
        expected = processor(Image.fromarray(np.rint(values / 4095 * 255).astype(np.uint8)))["pixel_values"]
        for image in (values, torch.from_numpy(values.astype(np.int32)), values.astype(np.float32), path):
            assert torch.equal(processor(image)["pixel_values"], expected)
        one_call = EoMTImageProcessor(size=64, do_normalize=False)(values, value_range="0-4095")["pixel_values"]
        assert torch.equal(one_call, expected)

    def test_a_range_below_zero_on_the_command_line(self, tmp_path: Path) -> None:
        values = np.linspace(-1024, 3071, SIZE[0] * SIZE[1]).round().astype(np.int16).reshape(SIZE)
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
        words = ["segment", str(tmp_path / "a.tif"), "--model", str(tiny_model(tmp_path / "model", 3))]
        assert main([*words, "--value-range", "-1024-3071", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
        assert (tmp_path / "out" / "a.semantic.png").is_file()

    @pytest.mark.parametrize("text", ["4095", "4095-0", "a-b", "", "5-5"])
    def test_ranges_that_are_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="such as 0-4095"):
            checked_range(text)


def image_folder(root: Path, values: np.ndarray, count: int = 2) -> str:
    """Masks of two classes for images of bands, in splits train and val."""
    for split in ("train", "val"):
        for index in range(count):
            shifted = np.roll(values, 7 * index + (split == "val"), axis=1)
            write_tiff(root / "images" / split / f"{index}.tif", shifted)
            mask = np.zeros(SIZE, np.uint8)
            mask[:, SIZE[1] // 2 :] = 1
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "annotations" / split / f"{index}.png")
    (root / "classes.json").write_text(json.dumps(["soil", "crop"]))
    return f"mask_folder:{root}"


class TestReaders:
    def test_12_bits_are_a_warning_and_an_option(self, tmp_path: Path) -> None:
        spec = image_folder(tmp_path, ramp(1, 4095))
        messages = [problem.message for problem in check_dataset(spec).problems]
        assert any("?range=0-4095" in message for message in messages)
        report = check_dataset(f"{spec}?range=0-4095")
        assert not any("range" in problem.message for problem in report.problems)
        dataset = load_segmentation_dataset(f"{spec}?range=0-4095")
        assert np.asarray(dataset[0]["image"]).max() == 255

    def test_bands_are_kept_or_chosen(self, tmp_path: Path) -> None:
        values = ramp(5, 250, np.uint8)
        spec = image_folder(tmp_path, values)
        assert np.array_equal(load_segmentation_dataset(spec)[0]["image"], values)
        chosen = load_segmentation_dataset(f"{spec}?bands=4,3,2")[0]["image"]
        assert np.array_equal(np.asarray(chosen), values[..., [3, 2, 1]])
        with pytest.raises(ValueError, match=r"there is no band 7, only 5 bands of 8 bits"):
            load_segmentation_dataset(f"{spec}?bands=7")[0]
        report = check_dataset(spec)
        assert not [problem for problem in report.problems if problem.is_error]
        assert sample_sheet(report.samples).size == sample_sheet(check_dataset(f"{spec}?bands=3,2,1").samples).size
        assert sample_sheet(report.samples, "eomt_semantic", 64).mode == "RGB"

    def test_options_that_are_none(self, tmp_path: Path) -> None:
        spec = image_folder(tmp_path, ramp(1, 4095))
        with pytest.raises(ValueError, match=r"range=4095: give the values of black and of white"):
            load_segmentation_dataset(f"{spec}?range=4095")
        with pytest.raises(ValueError, match=r"bands=x: give the numbers of bands"):
            load_segmentation_dataset(f"{spec}?bands=x")


def tiny_model(folder: Path, channels: int) -> Path:
    torch.manual_seed(0)
    config = EoMTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=16,
        image_size=64,
        num_queries=5,
        num_query_layers=1,
        num_channels=channels,
        id2label={0: "soil", 1: "crop"},
    )
    EoMTForUniversalSegmentation(config).save_pretrained(folder)
    statistics = {"image_mean": [0.5] * channels, "image_std": [0.25] * channels}
    EoMTImageProcessor(task="semantic", size=64, num_labels=2, **statistics).save_pretrained(folder)
    return folder


class TestChannels:
    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_processors_take_as_many_as_means(self, channels: int) -> None:
        processor = EoMTImageProcessor(size=64, image_mean=[0.5] * channels, image_std=[0.25] * channels)
        values = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
        expected = (torch.from_numpy(values).permute(2, 0, 1) / 255 - 0.5) / 0.25
        for image in (values, torch.from_numpy(values).permute(2, 0, 1), values.astype(np.float32) / 255):
            given = processor(image)["pixel_values"]
            assert given.shape == (1, channels, 64, 64)
            assert torch.allclose(given[0], expected, atol=1e-5)

    def test_others_are_refused_both_ways(self) -> None:
        four = EoMTImageProcessor(size=64, image_mean=[0.5] * 4, image_std=[0.5] * 4)
        with pytest.raises(ValueError, match=r"has 3 channels, but this image processor takes 4"):
            four(np.zeros((64, 64, 3), np.uint8))
        with pytest.raises(ValueError, match=r"mode RGB, but the model takes 4 channels"):
            four(Image.new("RGB", (64, 64)))
        with pytest.raises(ValueError, match=r"shape \(64, 64, 5\); an image has 1, 3 or 4 channels"):
            EoMTImageProcessor(size=64)(np.zeros((64, 64, 5), np.uint8))
        with pytest.raises(ValueError, match="image_mean has 4 values and image_std 3"):
            EoMTImageProcessor(size=64, image_mean=[0.5] * 4)

    def test_the_fourth_channel_of_a_png_may_be_depth(self, tmp_path: Path) -> None:
        values = ramp(4, 250, np.uint8)
        path = tmp_path / "rgbd.png"
        Image.fromarray(values, mode="RGBA").save(path)
        tensor = image_tensor(path, settings=ImageSettings(channels=4))
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), values)

    def test_segment_and_its_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        values = ramp(4, 4095)
        images = tmp_path / "images"
        write_tiff(images / "a.tif", values, planar=True)
        four, three = tiny_model(tmp_path / "four", 4), tiny_model(tmp_path / "three", 3)
        out = tmp_path / "out"
        arguments = ["segment", str(images), "--value-range", "0-4095", "--output", str(out), "--device", "cpu"]
        arguments.append("--no-resume")
        assert main([*arguments, "--model", str(four)]) == 0
        pixels = np.rint(values / 4095 * 255).astype(np.uint8)
        (answer,) = Segmenter.from_pretrained(str(four), device="cpu")([pixels])
        with Image.open(out / "a.semantic.png") as written:
            assert np.array_equal(np.asarray(written), answer.segment_map)
        capsys.readouterr()
        assert main([*arguments, "--model", str(three)]) == 1
        assert "a.tif: 4 bands of 16 bits (uint16), but the model takes 3 channels" in capsys.readouterr().err
        capsys.readouterr()
        assert main([*arguments, "--model", str(three), "--bands", "3,2,1"]) == 0
        (answer,) = Segmenter.from_pretrained(str(three), device="cpu")([Image.fromarray(pixels[..., 2::-1].copy())])
        with Image.open(out / "a.semantic.png") as written:
            assert np.array_equal(np.asarray(written), answer.segment_map)
        with pytest.raises(ValueError, match=r"images\[0\]: 4 bands of 8 bits"):
            Segmenter.from_pretrained(str(three), device="cpu")([pixels])

    def test_views_average_over_mirrored_bands(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        write_tiff(images / "a.tif", ramp(4, 250, np.uint8))
        arguments = ["segment", str(images), "--output", str(tmp_path / "out"), "--device", "cpu", "--tta-flip"]
        assert main([*arguments, "--model", str(tiny_model(tmp_path / "four", 4))]) == 0

    def test_drawings_show_the_first_three(self) -> None:
        values = ramp(5, 250, np.uint8)
        drawn = draw_segments(values, np.full(SIZE, -1), [], {})
        assert np.array_equal(np.asarray(drawn), values[..., :3])

    def test_jitter_changes_colours_only(self) -> None:
        pixels = torch.from_numpy(ramp(5, 250, np.uint8)).permute(2, 0, 1)
        changed = jitter_colors(pixels, np.random.default_rng(1))
        assert torch.equal(changed[3:], pixels[3:])
        assert torch.equal(changed[:3], jitter_colors(pixels[:3], np.random.default_rng(1)))
        assert not torch.equal(changed[:3], pixels[:3])

    @pytest.mark.parametrize(("old", "new"), [(3, 4), (3, 6), (3, 1), (3, 2), (4, 3)])
    def test_patch_kernels_for_other_channels(self, old: int, new: int) -> None:
        kernel = torch.randn(8, old, 4, 4)
        changed = for_channels(kernel, new)
        assert changed.shape == (8, new, 4, 4)
        # A grey image, the same in all channels, gives the same patches.
        assert torch.allclose(changed.sum(1), kernel.sum(1), atol=1e-5)

    def test_training_scores_and_continues_with_another_number(self, tmp_path: Path) -> None:
        spec = image_folder(tmp_path / "data", ramp(4, 4095))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "model: eomt\ntask: semantic\nimage_size: 64\naugmentation: eomt_semantic\nsteps: 2\nbatch_size: 2\n"
            "learning_rate: 1e-3\nwarmup_steps: [1]\nnum_workers: 0\ntrackers: []\nlog_every: 1\nloss_mask: true\n"
            "model_config: {hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 48, "
            "patch_size: 16, num_queries: 7, num_query_layers: 2, train_num_points: 32, num_channels: 4}\n"
        )
        run = tmp_path / "run"
        assert main(["train", str(recipe), f"output={run}", f"data={spec}?range=0-4095"]) == 0
        processor = EoMTImageProcessor.from_pretrained(run / "model")
        assert len(processor.image_mean) == len(processor.image_std) == 4
        assert checked_range(processor.value_range) == (0, 4095)
        rgb = image_folder(tmp_path / "rgb", ramp(3, 250, np.uint8))
        again = tmp_path / "again"
        tuned = [f"output={again}", f"data={rgb}", f"init={run / 'model'}", "model_config={num_channels: 3}"]
        assert main(["train", str(recipe), *tuned]) == 0
        kernels = [
            EoMTForUniversalSegmentation.from_pretrained(folder).base_model.state_dict()[PATCH_KERNEL].shape[1]
            for folder in (run / "model", again / "model")
        ]
        assert kernels == [4, 3]

    def test_training_with_the_wrong_number_names_the_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spec = image_folder(tmp_path / "data", ramp(4, 4095))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "model: eomt\ntask: semantic\nimage_size: 64\naugmentation: eomt_semantic\nsteps: 2\nbatch_size: 2\n"
            "learning_rate: 1e-3\nwarmup_steps: [1]\nnum_workers: 0\ntrackers: []\n"
            "model_config: {hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 48, "
            "patch_size: 16, num_queries: 7, num_query_layers: 2, train_num_points: 32}\n"
        )
        assert main(["train", str(recipe), f"output={tmp_path / 'run'}", f"data={spec}"]) != 0
        assert ".tif: 4 bands of 16 bits (uint16), but the model takes 3 channels" in capsys.readouterr().err


RECIPE = (
    "steps: 2\nbatch_size: 2\nlearning_rate: 1e-3\nwarmup_steps: [1]\nnum_workers: 0\ntrackers: []\nimage_size: 64\n"
)
SMALL = "hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 48, patch_size: 16"


class TestBandsOfAModel:
    """What the data of a training says about files is stored with the model, and read from it."""

    def trained(self, root: Path, recipe: str, spec: str) -> Path:
        (root / "recipe.yaml").write_text(RECIPE + recipe)
        assert main(["train", str(root / "recipe.yaml"), f"output={root / 'run'}", f"data={spec}"]) == 0
        return root / "run" / "model"

    def test_segment_reads_new_images_as_training_did(self, tmp_path: Path) -> None:
        values = ramp(5, 4095)
        spec = image_folder(tmp_path / "data", values)
        recipe = (
            "model: eomt\ntask: semantic\naugmentation: eomt_semantic\nloss_mask: true\n"
            f"model_config: {{{SMALL}, num_queries: 7, num_query_layers: 2, train_num_points: 32}}\n"
        )
        model = self.trained(tmp_path, recipe, f"{spec}?range=0-4095&bands=4,3,1")
        processor = EoMTImageProcessor.from_pretrained(model)
        assert list(processor.bands) == [4, 3, 1]
        path = tmp_path / "data" / "images" / "val" / "0.tif"
        out = tmp_path / "out"
        assert main(["segment", str(path), "--model", str(model), "--output", str(out), "--device", "cpu"]) == 0
        pixels = np.rint(np.roll(values, 1, axis=1) / 4095 * 255).astype(np.uint8)[..., [3, 2, 0]]
        segmenter = Segmenter.from_pretrained(str(model), device="cpu")
        (answer,) = segmenter([Image.fromarray(np.ascontiguousarray(pixels))])
        with Image.open(out / "0.semantic.png") as written:
            assert np.array_equal(np.asarray(written), answer.segment_map)
        # The overlay shows the bands that the model saw; images in memory are taken as they are.
        expected = processor(Image.fromarray(np.ascontiguousarray(pixels)))["pixel_values"]
        assert torch.equal(processor(path)["pixel_values"], expected)
        with pytest.raises(ValueError, match=r"bands=\[1, 2\], but image_mean is for 3 channels"):
            EoMTImageProcessor(bands=[1, 2])
        # Data that are read otherwise do not inherit the bands of the model that training starts from.
        rgb = image_folder(tmp_path / "rgb", ramp(3, 250, np.uint8))
        arguments = [f"output={tmp_path / 'again'}", f"data={rgb}", f"init={model}"]
        assert main(["train", str(tmp_path / "recipe.yaml"), *arguments]) == 0
        assert EoMTImageProcessor.from_pretrained(tmp_path / "again" / "model").bands is None

    def test_classify_points_reads_them_too(self, tmp_path: Path) -> None:
        values = ramp(5, 4095)
        spec = image_folder(tmp_path / "data", values)
        recipe = f"model: vit_p\ntask: points\nmodel_config: {{{SMALL}, num_channels: 4}}\n"
        model = self.trained(tmp_path, recipe, f"{spec}?range=0-4095&bands=5,4,2,1")
        path = tmp_path / "data" / "images" / "val" / "0.tif"
        files = ["--output", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
        words = ["classify-points", str(path), "--points", "10,20", "50,30", "--model", str(model), "--device", "cpu"]
        assert main([*words, *files]) == 0
        answer = json.loads((tmp_path / "a.json").read_text())
        assert (answer["width"], answer["height"]) == (64, 48)
        classifier = PointClassifier.from_pretrained(str(model), device="cpu")
        assert (classifier.file_settings.channels, classifier.file_settings.bands) == (4, (5, 4, 2, 1))
        pixels = np.rint(np.roll(values, 1, axis=1) / 4095 * 255).astype(np.uint8)[..., [4, 3, 1, 0]]
        expected = classifier.classify(np.ascontiguousarray(pixels), [(10, 20), (50, 30)], top_k=3)
        assert [row["classes"] for row in answer["prompts"]] == expected


def test_vit_p_and_fusion_take_four_channels() -> None:
    statistics = {"image_mean": [0.5] * 4, "image_std": [0.25] * 4}
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    expected = (torch.from_numpy(values).permute(2, 0, 1) / 255 - 0.5) / 0.25
    classifier = ViTPImageProcessor(size=64, patch_size=16, **statistics)
    given = classifier(values, input_points=[[[3, 4]]])
    assert torch.allclose(given["pixel_values"][0], expected, atol=1e-5)
    generator = EoMTImageProcessor(size=64, **statistics)
    fused = ViTPFusionImageProcessor(generator=generator, classifier=classifier)
    both = fused(values)
    assert torch.allclose(both["pixel_values"][0], expected, atol=1e-5)
    for name, tensor in both.items():
        if "pixel" in name:
            assert tensor.shape[1] == 4, name


class TestPages:
    def test_segment_writes_every_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pages = [Image.fromarray(np.full((*SIZE, 3), 60 * index, np.uint8)) for index in range(3)]
        images = tmp_path / "images"
        images.mkdir()
        pages[0].save(images / "stack.tif", save_all=True, append_images=pages[1:])
        pages[0].save(images / "film.gif", save_all=True, append_images=pages[1:])
        assert [count_pages(images / name) for name in ("stack.tif", "film.gif")] == [3, 3]
        out = tmp_path / "out"
        model = tiny_model(tmp_path / "model", 3)
        assert main(["segment", str(images), "--model", str(model), "--output", str(out), "--device", "cpu"]) == 0
        names = {path.name.removesuffix(".segments.json") for path in out.glob("*.segments.json")}
        assert names == {f"{name}{page}" for name in ("stack", "film") for page in ("", ".page-2", ".page-3")}
        captured = capsys.readouterr()
        assert "2 files have 6 pages" in captured.err
        assert "6 of 6 images" in captured.out
        assert np.asarray(open_image(images / "stack.tif", page=2)).max() == 120

    def test_overviews_are_no_pages(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        page, overview = Image.new("L", (64, 48)), Image.new("L", (32, 24))
        overview.encoderinfo = {"tiffinfo": {254: 1}}
        page.save(path, save_all=True, append_images=[overview])
        assert count_pages(path) == 1


def test_the_limit_of_pixels_names_what_raises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (64, 48)).save(path)
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "1000")
    with pytest.raises(
        ValueError, match=r"64x48 pixels, more than the limit of 1,000.*HF_SEGVIT_MAX_PIXELS.*--max-pixels"
    ):
        open_image(path)
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "3072")
    assert open_image(path).size == (64, 48)
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match=r"HF_SEGVIT_MAX_PIXELS='many'"):
        open_image(path)
    monkeypatch.setenv("HF_SEGVIT_MAX_PIXELS", "1000")
    images = ["segment", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    model = tiny_model(tmp_path / "model", 3)
    assert main([*images, "--model", str(model)]) == 1
    assert main([*images, "--model", str(model), "--max-pixels", "6000"]) == 0
    assert os.environ["HF_SEGVIT_MAX_PIXELS"] == "6000"
