"""Opening images: what a viewer would show, and clear errors for what cannot be shown."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_segvit.models import image_claims, image_decoding
from hf_segvit.models.image_decoding import open_image, to_rgb
from hf_segvit.models.image_tensors import image_tensor


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def colours() -> Image.Image:
    """3x2 pixels, all different."""
    return Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14)


class TestOrientation:
    # EXIF: which corner the stored first row and column belong to; as what Pillow operation undoes it.
    UNDO = (
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: a.transpose(1, 0, 2)[:, ::-1]),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: a.transpose(1, 0, 2)[::-1]),
    )

    @pytest.mark.parametrize(("orientation", "undo"), UNDO)
    def test_is_applied(self, orientation: int, undo, colours: Image.Image, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "turned.png"
        colours.save(path, exif=exif)
        expected = undo(np.asarray(colours))
        assert np.array_equal(values(open_image(path)), expected)
        # An image that its owner opened is turned as well, and turning is not repeated.
        image = to_rgb(Image.open(path))
        assert np.array_equal(values(image), expected)
        assert np.array_equal(values(to_rgb(image)), expected)

    def test_of_every_mode(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        grey = Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint8))
        for mode in ("L", "P", "LA", "RGBA"):
            path = tmp_path / f"{mode}.png"
            grey.convert(mode).save(path, exif=exif)
            assert values(open_image(path))[:, 0, 0].tolist() == [0, 100, 200], mode

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_malformed_exif_is_ignored(self, colours: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "odd.png"
        colours.save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff rubbish")
        assert np.array_equal(values(open_image(path)), np.asarray(colours))


class TestModes:
    def test_grey_and_binary(self) -> None:
        grey = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8))
        assert values(to_rgb(grey)).tolist() == [[[0] * 3, [7] * 3, [255] * 3]]
        binary = Image.fromarray(np.array([[False, True]]))
        assert binary.mode == "1"
        assert values(to_rgb(binary)).tolist() == [[[0] * 3, [255] * 3]]

    def test_transparency_lies_on_white(self) -> None:
        rgba = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8))
        assert values(to_rgb(rgba)).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
        grey = Image.fromarray(np.array([[[0, 51], [90, 255]]], dtype=np.uint8), mode="LA")
        assert values(to_rgb(grey)).tolist() == [[[204] * 3, [90] * 3]]

    def test_palette(self, tmp_path: Path) -> None:
        palette = Image.new("P", (3, 1))
        palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        palette.putdata([2, 0, 1])
        assert values(to_rgb(palette)).tolist() == [[[0, 0, 255], [255, 0, 0], [0, 255, 0]]]
        path = tmp_path / "transparent.png"
        palette.save(path, transparency=0)
        assert values(open_image(path)).tolist() == [[[0, 0, 255], [255, 255, 255], [0, 255, 0]]]

    def test_rgb_with_a_transparent_colour(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
        path = tmp_path / "key.png"
        image.save(path, transparency=(1, 2, 3))
        assert values(open_image(path)).tolist() == [[[255, 255, 255], [4, 5, 6]]]

    def test_sixteen_bits_are_scaled_by_their_full_range(self, tmp_path: Path) -> None:
        deep = np.array([[0, 257, 128, 129, 257 * 100, 65535]], dtype=np.uint16)
        expected = [0, 1, 0, 1, 100, 255]
        path = tmp_path / "deep.png"
        Image.fromarray(deep).save(path)
        assert values(open_image(path))[0, :, 0].tolist() == expected
        assert values(to_rgb(Image.fromarray(deep.astype(np.int32))))[0, :, 0].tolist() == expected
        assert image_tensor(deep)[0, 0].tolist() == expected
        assert image_tensor(torch.from_numpy(deep))[0, 0].tolist() == expected

    def test_floating_point(self) -> None:
        unit = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
        assert values(to_rgb(unit))[0, :, 0].tolist() == [0, 128, 255]
        # What Pillow's own convert("F") gives.
        assert values(to_rgb(Image.fromarray(np.array([[0, 9, 255]], np.uint8)).convert("F")))[0, :, 0].tolist() == [
            0,
            9,
            255,
        ]

    def test_cmyk(self, tmp_path: Path) -> None:
        blocks = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 240], [5, 5, 5]], dtype=np.uint8)
        rgb = Image.fromarray(np.kron(blocks[None], np.ones((16, 16, 1), np.uint8)))
        for name in ("inks.jpg", "inks.tif"):  # Adobe's JPEGs hold inverted values, TIFFs do not
            rgb.convert("CMYK").save(tmp_path / name, **({"quality": 100} if name.endswith("jpg") else {}))
            found = values(open_image(tmp_path / name))[8, 8::16]
            assert np.abs(found.astype(int) - blocks).max() <= 3, name  # JPEG's own rounding

    def test_the_first_frame_counts(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
        for name in ("film.gif", "pages.tif", "film.webp"):
            keywords = {"lossless": True} if name.endswith("webp") else {}
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **keywords)
            assert (values(open_image(tmp_path / name)) == (255, 0, 0)).all(), name

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match=r"sky\.tif: images of mode 'LAB'.*save it as an RGB"):
            to_rgb(Image.new("LAB", (2, 2)), "sky.tif")

    def test_integers_beyond_sixteen_bits(self) -> None:
        with pytest.raises(ValueError, match="from 0 to 70000, outside 16 bits"):
            to_rgb(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))


class TestBadFiles:
    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nowhere\.png: no such file"):
            open_image(tmp_path / "nowhere.png")
        with pytest.raises(ValueError, match="is a folder"):
            open_image(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.jpg"
        path.touch()
        with pytest.raises(ValueError, match=r"empty\.jpg: the file is empty"):
            open_image(path)
        with pytest.raises(ValueError, match=r"0 bytes"):
            open_image(b"")

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
    def test_truncated(self, form: str, tmp_path: Path) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        whole = tmp_path / f"whole.{form.lower()}"
        noise.save(whole, form)
        open_image(whole)
        cut = tmp_path / "cut"
        for share in (0.02, 0.5, 0.9):
            data = whole.read_bytes()
            cut.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(ValueError, match=r"cut: .*(again|convert)"):
                open_image(cut)

    def test_damaged_png(self, colours: Image.Image) -> None:
        buffer = BytesIO()
        colours.save(buffer, "PNG")
        damaged = bytearray(buffer.getvalue())
        damaged[damaged.index(b"IDAT") + 8] ^= 0xFF
        with pytest.raises(ValueError, match="truncated or damaged"):
            open_image(bytes(damaged))

    @pytest.mark.parametrize(
        "content", [b"just text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\x80\x04."]
    )
    def test_no_image_whatever_its_name(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "renamed.jpg"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"renamed\.jpg: not an image of the formats JPEG, PNG"):
            open_image(path)

    def test_formats_outside_the_list_are_not_even_tried(self, colours: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        colours.save(path, "PPM")
        with pytest.raises(ValueError, match="convert it to one of them"):
            open_image(path)

    def test_a_wrong_extension_does_not_matter(self, colours: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "image.txt"
        colours.save(path, "PNG")
        assert np.array_equal(values(open_image(path)), np.asarray(colours))

    @pytest.mark.parametrize("side", [13_400, 60_000])
    def test_decompression_bomb_is_not_decoded(self, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ValueError, match=r"limit.*scale .*down"):
                open_image(bomb, "bomb.png")
            # The limit is ours: it holds where Pillow's was switched off.
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            with pytest.raises(ValueError, match=r"bomb\.png: .* more than the limit of 178,956,970"):
                open_image(bomb, "bomb.png")

    def test_the_limit_holds_for_images_that_others_opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_claims, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"images\[3\]: 20x10 pixels"):
            image_tensor(Image.new("RGB", (20, 10)), "images[3]")


class TestSources:
    def test_bytes_and_file_objects(self, colours: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        colours.save(path)
        with path.open("rb") as file:
            assert np.array_equal(values(open_image(file)), np.asarray(colours))
        assert np.array_equal(values(open_image(path.read_bytes())), np.asarray(colours))
        assert np.array_equal(values(open_image(str(path))), np.asarray(colours))
        with path.open("rb") as file:
            assert torch.equal(image_tensor(file), image_tensor(colours))

    def test_address(self, colours: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = BytesIO()
        colours.convert("RGBA").save(buffer, "PNG")
        asked = []

        def urlopen(request, timeout):
            asked.append(request.full_url)
            return BytesIO(buffer.getvalue())

        monkeypatch.setattr(image_decoding, "urlopen", urlopen)
        assert np.array_equal(values(open_image("https://example.org/a.png")), np.asarray(colours))
        assert asked == ["https://example.org/a.png"]

        def offline(request, timeout):
            raise OSError("Name or service not known")

        monkeypatch.setattr(image_decoding, "urlopen", offline)
        with pytest.raises(ValueError, match=r"https://example\.org/a\.png: cannot be downloaded .*connection"):
            open_image("https://example.org/a.png")

    def test_no_image_at_all(self) -> None:
        with pytest.raises(ValueError, match=r"images\[1\]: got dict"):
            image_tensor({}, "images[1]")


class TestArrays:
    def test_channels_first_and_last(self) -> None:
        array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        expected = torch.from_numpy(array).permute(2, 0, 1)
        assert torch.equal(image_tensor(array), expected)
        assert torch.equal(image_tensor(np.ascontiguousarray(array.transpose(2, 0, 1))), expected)
        assert torch.equal(image_tensor(expected), expected)
        assert torch.equal(image_tensor(Image.fromarray(array)), expected)

    def test_grey(self) -> None:
        grey = np.array([[1, 2], [3, 4]], dtype=np.uint8)
        expected = torch.from_numpy(grey).expand(3, 2, 2)
        for array in (grey, grey[None], grey[:, :, None]):
            assert torch.equal(image_tensor(array), expected)
        assert image_tensor(np.array([[True, False]]))[:, 0].tolist() == [[255, 0]] * 3

    def test_alpha_is_composed_as_pillow_does(self) -> None:
        rgba = np.zeros((256, 256, 4), dtype=np.uint8)
        rgba[..., :3], rgba[..., 3] = np.arange(256)[:, None, None], np.arange(256)
        expected = np.asarray(to_rgb(Image.fromarray(rgba))).transpose(2, 0, 1)
        assert np.abs(image_tensor(rgba).numpy().astype(int) - expected).max() <= 1  # Pillow's rounding of 255ths
        floats = image_tensor(rgba.astype(np.float32) / 255).numpy() * 255
        assert np.abs(floats - expected).max() <= 1

    def test_floats_are_left_alone(self) -> None:
        array = np.random.default_rng(0).normal(size=(8, 5, 3))
        found = image_tensor(array)
        assert found.dtype == torch.float32
        assert np.allclose(found.permute(1, 2, 0), array)
        assert image_tensor(torch.rand(3, 8, 5, dtype=torch.bfloat16)).dtype == torch.float32

    def test_shapes_that_could_be_either(self) -> None:
        array = np.zeros((3, 8, 3), dtype=np.uint8)
        with pytest.raises(
            ValueError, match=r"\(3, 8, 3\) could have its channels first or last; pass input_data_format"
        ):
            image_tensor(array)
        assert image_tensor(array, input_data_format="channels_first").shape == (3, 8, 3)
        assert image_tensor(array, input_data_format="channels_last").shape == (3, 3, 8)
        with pytest.raises(ValueError, match="input_data_format='channels_first'"):
            image_tensor(np.zeros((8, 8, 3), np.uint8), input_data_format="channels_first")
        # Where one reading has three channels and the other 1 or 4, it is the one.
        assert image_tensor(np.zeros((4, 8, 3), np.uint8)).shape == (3, 4, 8)
        assert image_tensor(np.zeros((3, 8, 1), np.uint8)).shape == (3, 8, 1)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((4, 5, 3), np.int64), "type int64; convert to uint8"),
            (np.zeros((9, 5, 2), np.uint8), "1, 3 or 4 channels"),
            (np.zeros(5, np.uint8), r"shape \(5,\)"),
            (np.zeros((2, 4, 5, 3), np.uint8), r"shape \(2, 4, 5, 3\)"),
            (np.zeros((0, 5, 3), np.uint8), "no pixels"),
            (torch.zeros(3, 4, 5, dtype=torch.complex64), "type complex64"),
        ],
    )
    def test_bad_arrays(self, array, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            image_tensor(array)


def test_images_of_the_sample_data(sample_data: Path) -> None:
    paths = sorted((sample_data / "coco_train100" / "train2017").glob("*.jpg"))[:10]
    for path in paths:
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(values(open_image(path)), expected)
