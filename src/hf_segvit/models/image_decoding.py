"""Open images and convert them to RGB, as a viewer would show them, or to the bands that a model takes.

`open_image` reads a file, `to_rgb` and `to_pixels` convert what has been opened, and `image_tensor` takes whatever an
image processor is given (Pillow, NumPy, torch, path, URL) to a (C, H, W) tensor. Orientation (EXIF) is applied,
transparency is composed over white as in Transformers, values of more than 8 bits are scaled by their full range or by
the one that `ImageSettings` names, and of an animation or a multi-page file the first page counts unless another is
asked for. Colour profiles are not applied: models are trained without them. Whatever cannot be read is a `ValueError`
with the file, the fault and the remedy. H W pixels, C channels.
"""

import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.utils import logging

from .image_bands import Bands, described, is_tiff, nodata_of, read_bands, tiff_pages

logger = logging.get_logger(__name__)

# Pillow has many more decoders; those that data sets do not need would only widen the attack surface.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Pillow's own limit for an error; checked here too, since any library in the process can switch Pillow's off.
MAX_IMAGE_PIXELS = 178_956_970
MAX_PIXELS_VARIABLE = "HF_SEGVIT_MAX_PIXELS"

_ORIENTATION_TAG = 0x0112  # EXIF
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_RAW_MODES = ("1", "L", "LA", "RGB", "RGBA", "I", "F")  # whose samples are values of bands
_FEW_VALUES = 65536 // 16  # 16-bit images below it use a sixteenth of their range: most likely 12 bits or fewer


@dataclass(frozen=True)
class ImageSettings:
    """How files become pixels.

    Attributes:
        channels: number that a model takes; 3 makes RGB of grey. `None`: as many as the file has, grey as RGB.
        value_range: the values that become black and white, in images of more than 8 bits; others are clipped. `None`:
            0 to 65535, or 0 to 1 for floating point.
        bands: numbers of the bands to use, from 1, in this order; transparency counts as a band then.
    """

    channels: int | None = None
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None


RGB = ImageSettings(channels=3)
AS_STORED = ImageSettings()


def checked_range(value: Any, name: str = "value_range") -> tuple[float, float] | None:
    """A range of values from a pair or from text such as "0-4095" or "-1024-3071"; `None` stays."""
    if value is None:
        return None
    if isinstance(value, str):
        number = r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*"
        found = re.fullmatch(f"{number}[-,:]{number}", value, re.IGNORECASE)
        value = found.groups() if found else value
    try:
        low, high = (float(part) for part in value)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high < float("inf"):
        raise ValueError(f"{name}={value}: give the values of black and of white, the lower first, such as 0-4095")
    return low, high


def checked_bands(value: Any, name: str = "bands") -> tuple[int, ...] | None:
    """Numbers of bands from a sequence or from text such as "4,3,2"; `None` stays."""
    if value is None:
        return None
    parts = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    try:
        bands = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        bands = ()
    if not bands or min(bands) < 1:
        raise ValueError(f"{name}={value}: give the numbers of bands, from 1, such as 4,3,2")
    return bands


def max_image_pixels() -> int:
    """The most pixels that an image may have: `MAX_IMAGE_PIXELS`, or what `HF_SEGVIT_MAX_PIXELS` says."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, "").strip().replace("_", "")
    if not text:
        return MAX_IMAGE_PIXELS
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{MAX_PIXELS_VARIABLE}={text!r}: give a number of pixels, such as {2 * MAX_IMAGE_PIXELS}")
    return int(text)


def open_image(source: Any, name: str | None = None, settings: ImageSettings = RGB, page: int = 0) -> Any:
    """Read an image file as upright RGB, decoded; with other settings perhaps as (H, W, C) uint8, see `to_pixels`.

    Args:
        source: a path, an http(s) URL, the file's bytes or a binary file object.
        name: what errors call the image; the path if there is one.
        settings: channels, bands and range of values.
        page: of an animation or a multi-page file, from 0.

    Raises:
        ValueError: the file is missing, empty, truncated, too large, or no image of `IMAGE_FORMATS`, or it has other
            channels.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        name, source = source, _download(source)
    name = name or _file_name(source)
    return to_pixels(open_image_file(source, name, page), name, settings)


def open_image_file(source: Any, name: str | None = None, page: int = 0) -> Any:
    """Decode a page of a file, bytes or file object, neither converted nor upright; see `open_image`.

    A Pillow image, or `Bands` where Pillow has no mode that holds the samples.
    """
    name = name or _file_name(source)
    if isinstance(source, bytes | bytearray) and not source:
        raise ValueError(f"{name}: empty (0 bytes); copy or download it again")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"{name}: is a folder; name the image files in it")
        if not path.is_file():
            raise ValueError(f"{name}: no such file; check the path (it is read from {Path.cwd()})")
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty (0 bytes); copy or download it again")
    limit = max_image_pixels()
    try:
        content = _content(source)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error}); check its permissions") from error
    pages = tiff_pages_of(content) if is_tiff(content) else None
    directory = pages[page] if pages and page < len(pages) else page
    bands = read_bands(content, name, directory, limit)
    if bands is not None:
        return bands
    # Whoever raised our limit has decided about Pillow's as well, whose error comes at twice this number.
    if limit > MAX_IMAGE_PIXELS and (Image.MAX_IMAGE_PIXELS or limit) < limit:
        Image.MAX_IMAGE_PIXELS = limit
    # A path is checked above, so what Pillow raises is about the content; its own messages name no remedy.
    try:
        image = Image.open(BytesIO(content), formats=IMAGE_FORMATS)
        if directory:
            image.seek(directory)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; {_limit_remedy()}") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: not an image of the formats {', '.join(IMAGE_FORMATS)}, whatever its name ends in; "
            "convert it to one of them, or copy it again if it is damaged"
        ) from error
    except EOFError as error:
        raise ValueError(f"{name}: has no page {page + 1}; ask for one that is there") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}); copy or download it again, and check its permissions"
        ) from error
    with image:
        _decode(image, name)
    return image


def tiff_pages_of(content: bytes) -> list[int]:
    """`tiff_pages` of a whole file; the first page alone if its directories are damaged."""
    try:
        return tiff_pages(BytesIO(content))
    except Exception:  # Pillow's parser raises many kinds; opening the file will say what is wrong
        return [0]


def count_pages(path: str | os.PathLike[str]) -> int:
    """Pages of a TIFF, or frames of an animation; 1 for anything else, also for what cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            if is_tiff(start):
                return len(tiff_pages(file))
            if not start.startswith((b"GIF8", b"RIFF", b"\x89PNG")):  # no other format has frames
                return 1
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return int(getattr(image, "n_frames", 1))
    except Exception:  # whatever is wrong with the file is reported when it is read
        return 1


def to_rgb(image: Any, name: str = "image", value_range: tuple[float, float] | None = None) -> Image.Image:
    """Convert a Pillow image of any mode, or an (H, W, 3) uint8 array, to upright RGB.

    Transparent parts are composed over white. Modes `I` and `I;16` are divided by 257, so that 65535 is white. Mode `F`
    is read as [0, 1], or as Pillow's own [0, 255] if it exceeds 1. An upright RGB image is returned as it is.

    Raises:
        ValueError: too many pixels, damaged data, a mode that has no RGB form, or values outside its range.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    _decode(image, name)  # may still be lazy: Pillow opens a file without reading it
    nodata = nodata_of(image)
    image = _upright(image)
    mode = image.mode
    if mode in _ALPHA_MODES or (mode in _OPAQUE_MODES and "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if mode == "RGB":
        return image
    if mode in _OPAQUE_MODES:
        return image.convert("RGB")
    if mode in ("I", "F") or mode.startswith("I;"):
        return Image.fromarray(eight_bits(np.asarray(image), name, value_range, nodata)).convert("RGB")
    raise ValueError(f"{name}: images of mode {mode!r} have no RGB form here; save it as an RGB PNG or JPEG first")


def to_pixels(image: Any, name: str = "image", settings: ImageSettings = RGB) -> Any:
    """An opened image as upright RGB (Pillow), or where it has another number of channels as (H, W, C) uint8.

    Args:
        image: a Pillow image, `Bands`, or (H, W, C) uint8, which is returned as it is.
        name: what errors call the image.
        settings: channels, bands and range of values.

    Raises:
        ValueError: as for `to_rgb`, or the image has not the channels or bands that are asked for.
    """
    if isinstance(image, np.ndarray):
        if settings.channels not in (None, image.shape[2]):
            raise _other_channels(name, described(image.shape[2], str(image.dtype)), settings.channels)
        return Image.fromarray(image) if image.shape[2] == 3 else image
    wanted, value_range, nodata = settings.channels, settings.value_range, nodata_of(image)
    if not isinstance(image, Bands):
        raw = settings.bands is not None or (wanted not in (None, 3) and len(image.getbands()) == wanted)
        if not raw and wanted in (None, 3):
            return to_rgb(image, name, value_range)
        _decode(image, name)
        image = _upright(image)
        kind = f"an image of mode {image.mode}"
        if image.mode not in _RAW_MODES and not image.mode.startswith("I;"):
            raise ValueError(f"{name}: {kind} has no bands to choose from; save it as a TIFF or an RGB PNG")
        values = np.atleast_3d(np.asarray(image) * np.uint8(255) if image.mode == "1" else np.asarray(image))
        has_alpha = False
    else:
        kind, image = image.mode, image.upright()
        values, has_alpha = image.values, image.has_alpha
    if settings.bands is not None:
        if max(settings.bands) > values.shape[2]:
            raise ValueError(f"{name}: there is no band {max(settings.bands)}, only {kind}; name others with bands=")
        values, has_alpha = values[..., [band - 1 for band in settings.bands]], False
    pixels = eight_bits(values, name, value_range, nodata)
    if has_alpha and wanted != pixels.shape[2]:
        # The file's own alpha covers the full range of its type, whatever the range of the colours.
        alpha = eight_bits(values[..., -1:], name).astype(np.int32)
        pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    count = pixels.shape[2]
    if count == 1 and wanted in (None, 3):
        return Image.fromarray(pixels[..., 0]).convert("RGB")
    if wanted not in (None, count):
        raise _other_channels(name, kind, wanted)
    return Image.fromarray(np.ascontiguousarray(pixels)) if count == 3 else np.ascontiguousarray(pixels)


def _other_channels(name: str, kind: str, wanted: int | None) -> ValueError:
    return ValueError(
        f"{name}: {kind}, but the model takes {wanted} channel{'s' if wanted != 1 else ''}; choose bands (readers: "
        "?bands=4,3,2, segment: --bands 4,3,2), or take a model whose num_channels is that of the images"
    )


def image_size(image: Any) -> tuple[int, int]:
    """(H, W) of a Pillow image, an (H, W, C) array or a tensor (C, H, W)."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return height, width


def shown_rgb(image: Any) -> Image.Image:
    """An RGB image to draw on: of more bands the first three, of fewer the first one as grey."""
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] != 3:
        image = image[..., :3] if image.shape[2] > 3 else image[..., 0]
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    return to_rgb(image)


def as_list(images: Any, num_dims: int) -> list[Any]:
    """One image or map, a list of them, or a batch in one array (`num_dims` + 1 axes), as a list."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == num_dims + 1:
        return list(images)
    return list(images) if isinstance(images, list | tuple) else [images]


def image_tensor(
    image: Any,
    name: str = "image",
    input_data_format: str | None = None,
    device: Any = None,
    settings: ImageSettings = RGB,
) -> Tensor:
    """The image as an RGB tensor (3, H, W), or one of as many channels as asked for; uint8 or float32.

    Args:
        image: a Pillow image, a path, URL, bytes or file object, or a NumPy array or tensor: (H, W), or 1, 3 or 4
            channels first or last; uint8, uint16 (full range), bool, or floating point in [0, 1] (for grey and RGB, the
            range is checked only by the caller that scales them). Where other than 3 channels are asked for, arrays
            must have just these.
        name: what errors call the image.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
        device: of the tensor; `None` leaves tensors where they are.
        settings: channels, and the range of values, which arrays of any other type than uint8 and bool are scaled by.
    """
    if isinstance(image, np.ndarray | Tensor):
        return _array_tensor(image, name, input_data_format, device, settings)
    if isinstance(image, Image.Image):
        image = to_pixels(image, name, settings)
    elif isinstance(image, str | os.PathLike):
        image = open_image(image, settings=settings)
    elif isinstance(image, bytes | bytearray) or hasattr(image, "read"):
        image = open_image(image, name, settings)
    else:
        raise ValueError(
            f"{name}: got {type(image).__name__}; an image is a Pillow image, an array, a tensor, a path or a URL"
        )
    # A view, so memory stays channels-last, in which resizing is several times faster.
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)


def _array_tensor(array: Any, name: str, input_data_format: str | None, device: Any, settings: ImageSettings) -> Tensor:
    dtype = str(array.dtype).removeprefix("torch.")
    if settings.value_range is not None and dtype not in ("uint8", "bool"):
        low, high = settings.value_range
        values = torch.from_numpy(array.astype(np.float32)) if isinstance(array, np.ndarray) else array.float()
        tensor = ((values - low) * (255 / (high - low))).nan_to_num(0.0).clamp(0, 255).round().to(torch.uint8)
    elif dtype == "uint16":
        array = torch.from_numpy(array.astype(np.int32)) if isinstance(array, np.ndarray) else array.int()
        _warn_of_few_values(int(array.max()) if array.numel() else 0)
        tensor = ((array + 128) // 257).to(torch.uint8)  # rounded; 65535 / 255 = 257
    elif dtype == "bool":
        tensor = torch.as_tensor(array).to(torch.uint8) * 255
    elif dtype == "uint8":
        tensor = torch.as_tensor(array)
    elif dtype.startswith(("float", "bfloat")):
        tensor = torch.as_tensor(array).to(torch.float32)
    else:
        raise ValueError(
            f"{name}: values of type {dtype}; convert to uint8 (0 to 255), uint16 (full range) or float in [0, 1], or "
            "say which values are black and white with value_range="
        )
    tensor = tensor.to(device)
    wanted = settings.channels or 3
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    elif tensor.ndim != 3:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; an image is (H, W), (H, W, C) or (C, H, W)")
    elif _channels_last(tuple(tensor.shape), name, input_data_format, wanted):
        tensor = tensor.permute(2, 0, 1)
    if 0 in tensor.shape:
        raise ValueError(f"{name}: shape {tuple(array.shape)} holds no pixels")
    if tensor.shape[0] == wanted:
        return tensor
    if wanted != 3:
        raise ValueError(
            f"{name}: shape {tuple(array.shape)} has {tensor.shape[0]} channels, but this image processor takes "
            f"{wanted}, the length of its image_mean; give images of {wanted} channels, or another model"
        )
    if tensor.shape[0] == 4:
        return _over_white(tensor, name)
    return tensor.expand(3, -1, -1)


def _channels_last(shape: tuple[int, ...], name: str, input_data_format: str | None, wanted: int) -> bool:
    # Also what is not wanted, so that the error can say how many channels there are.
    known = sorted({1, 3, 4, wanted})
    numbers = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
    first, last = shape[0] in known, shape[2] in known
    if input_data_format is not None:
        asked = str(getattr(input_data_format, "value", input_data_format))
        if asked in ("channels_first", "channels_last") and (last if asked == "channels_last" else first):
            return asked == "channels_last"
        raise ValueError(
            f"{name}: shape {shape} does not have {numbers} channels where input_data_format={asked!r} puts them; "
            "it is 'channels_first' or 'channels_last'"
        )
    if first and last:
        if (shape[0] == wanted) != (shape[2] == wanted):  # an image 1 or 4 pixels high or wide
            return shape[2] == wanted
        raise ValueError(f"{name}: shape {shape} could have its channels first or last; pass input_data_format=")
    if not first and not last:
        raise ValueError(
            f"{name}: shape {shape}; an image has {numbers} channels, first or last (a model for others has an "
            "image_mean of that length in its image processor)"
        )
    return last


def _over_white(rgba: Tensor, name: str) -> Tensor:
    if rgba.is_floating_point():
        check_unit_range(rgba, name)
        colour, alpha = rgba[:3], rgba[3:]
        return colour * alpha + (1 - alpha)
    colour, alpha = rgba[:3].int(), rgba[3:].int()
    # Rounded division by 255, as Pillow composes.
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def check_unit_range(image: Tensor, name: str) -> None:
    """Refuse a floating-point image with values outside [0, 1], or NaN."""
    low, high = (float(v) for v in torch.aminmax(image))
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(
            f"{name}: floating-point values from {low:g} to {high:g}, but [0, 1] is expected; convert to uint8, "
            "divide by 255, or pass do_rescale=False if they are scaled as the model wants them"
        )


def _download(address: str) -> bytes:
    try:
        # Some hosts refuse urllib's default user agent.
        with urlopen(Request(address, headers={"User-Agent": "hf_segvit"}), timeout=60) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{address}: cannot be downloaded ({error}); check the address and the connection") from error


def _file_name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", "image"))


def _content(source: Any) -> bytes:
    """All bytes of a path, of bytes or of a file object."""
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return bytes(source) if isinstance(source, bytes | bytearray) else source.read()


def _limit_remedy() -> str:
    return (
        f"if it is to be read, raise the limit with {MAX_PIXELS_VARIABLE}=NUMBER in the environment (segment: "
        "--max-pixels NUMBER), or scale it down with an image editor first"
    )


def _decode(image: Image.Image, name: str) -> None:
    # Before any pixel is decoded.
    width, height = image.size
    limit = max_image_pixels()
    if width * height > limit:
        raise ValueError(
            f"{name}: {width}x{height} pixels, more than the limit of {limit:,}; such a file can be an "
            f"attack (decompression bomb); {_limit_remedy()}"
        )
    try:
        image.load()
    # Pillow's decoders raise these, and a few of their own, on damaged data.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"{name}: the image is truncated or damaged ({error}); copy or download it again") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION_TAG, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is often malformed, in many ways, and viewers ignore it then
        return image


def eight_bits(
    values: np.ndarray, name: str, value_range: tuple[float, float] | None = None, nodata: float | None = None
) -> np.ndarray:
    """Samples of any type as uint8; NaN and the value for "no data" become black.

    Raises:
        ValueError: integers outside of 16 bits, or floating-point values outside of [0, 255], without a range.
    """
    if values.dtype == np.uint8:
        return values
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
    if nodata is not None:
        missing |= values == nodata
    if value_range is not None:
        low, high = value_range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.rint(np.clip(np.where(missing, 0, scaled), 0, 255)).astype(np.uint8)
    values = np.where(missing, values.dtype.type(0), values) if missing.any() else values
    lowest, highest = values.min(), values.max()
    remedy = f"say which values are black and white, for all images alike: {_range_hint(lowest, highest)}"
    if values.dtype.kind == "f":
        if not (lowest >= 0 and highest <= 255):
            raise ValueError(
                f"{name}: floating-point values from {lowest:g} to {highest:g}; scale them to [0, 1] or [0, 255], or "
                f"{remedy}"
            )
        return np.rint(values * (255.0 if highest <= 1 else 1.0)).astype(np.uint8)
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"{name}: integer values from {lowest} to {highest}, outside 16 bits; scale them to 0..65535, or {remedy}"
        )
    _warn_of_few_values(int(highest))
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def few_values(content: bytes) -> str:
    """What to say of a 16-bit file that uses less than a sixteenth of its range; "" of any other, or a damaged one."""
    try:
        if not is_tiff(content) and not (content.startswith(b"\x89PNG") and content[24] == 16):
            return ""
        image = open_image_file(content, "image")
    except ValueError:
        return ""
    values = image.values if isinstance(image, Bands) else np.asarray(image)
    is_deep = values.dtype == np.uint16 or (values.dtype == np.int32 and values.min(initial=0) >= 0)
    return _few_values_note(int(values.max(initial=0))) if is_deep else ""


def _few_values_note(highest: int) -> str:
    if not 0 < highest < _FEW_VALUES:
        return ""
    # The usual cause is a sensor of 10 or 12 bits, whose white is the last value of its own range.
    white = 2 ** highest.bit_length() - 1
    return (
        f"16-bit values that fill less than a sixteenth of their range come out nearly black; most likely {white} is "
        f"white: {_range_hint(0, white)}"
    )


def _range_hint(low: Any, high: Any) -> str:
    return f"?range={low:g}-{high:g} for readers, --value-range {low:g}-{high:g} or value_range=({low:g}, {high:g})"


def _warn_of_few_values(highest: int) -> None:
    if note := _few_values_note(highest):
        logger.warning_once(note)  # without the name of the image, or it would be said for each one
