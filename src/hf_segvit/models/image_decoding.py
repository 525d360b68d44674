"""Open images as RGB, or with the bands that a model takes.

`open_image` reads a file as a viewer would show it, `to_rgb` and `to_pixels` convert what has been opened. Orientation
(EXIF) is applied, transparency is composed over white as in Transformers, values of more than 8 bits are scaled by
their full range or by the one that `ImageSettings` names, and of an animation or a multi-page file the first page
counts unless another is asked for. Colour profiles are not applied: models are trained without them. H W pixels, C
channels.
"""

from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from .image_bands import Bands, described, nodata_of
from .image_claims import FREE_PIXELS
from .image_files import decode, file_name, open_image_file, upright
from .image_tiff import is_tiff
from .image_values import RGB, ImageSettings, eight_bits, few_values_note

_MAX_DOWNLOAD = 2**30  # bytes

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_RAW_MODES = ("1", "L", "LA", "RGB", "RGBA", "I", "F")  # whose samples are values of bands


def open_image(
    source: Any, name: str | None = None, settings: ImageSettings = RGB, page: int = 0, free_pixels: int = FREE_PIXELS
) -> Any:
    """Read an image file as upright RGB, decoded; with other settings perhaps as (H, W, C) uint8, see `to_pixels`.

    Args:
        source: a path, an http(s) URL, the file's bytes or a binary file object.
        name: what errors call the image; the path if there is one.
        settings: channels, bands and range of values.
        page: of an animation or a multi-page file, from 0.
        free_pixels: as many may be in a file however small it is, see image_claims.py.

    Raises:
        ValueError: the file is missing, empty, truncated, too large, or no image of `IMAGE_FORMATS`, or it has other
            channels.
    """
    if is_address(source):
        name, source = source, _download(source)
    name = name or file_name(source)
    return to_pixels(open_image_file(source, name, page, free_pixels), name, settings)


def is_address(source: Any) -> bool:
    """Whether a source of an image is on the network."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def to_rgb(image: Any, name: str = "image", value_range: tuple[float, float] | None = None) -> Image.Image:
    """Convert a Pillow image of any mode, or an (H, W, 3) uint8 array, to upright RGB.

    Transparent parts are composed over white. Modes `I` and `I;16` are divided by 257, so that 65535 is white. Mode `F`
    is read as [0, 1], or as Pillow's own [0, 255] if it exceeds 1. An upright RGB image is returned as it is.

    Raises:
        ValueError: too many pixels, damaged data, a mode that has no RGB form, or values outside its range.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    decode(image, name)  # may still be lazy: Pillow opens a file without reading it
    nodata = nodata_of(image)
    image = upright(image)
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
        decode(image, name)
        image = upright(image)
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


def _download(address: str) -> bytes:
    try:
        # Some hosts refuse urllib's default user agent.
        with urlopen(Request(address, headers={"User-Agent": "hf_segvit"}), timeout=60) as response:
            content = response.read(_MAX_DOWNLOAD + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"{address}: cannot be downloaded ({error}); check the address and the connection") from error
    if len(content) > _MAX_DOWNLOAD:
        raise ValueError(f"{address}: more than {_MAX_DOWNLOAD:,} bytes; no image is that large")
    return content


def few_values(content: bytes) -> str:
    """What to say of a 16-bit file that uses less than a sixteenth of its range; "" of any other, or a damaged one."""
    try:
        if not is_tiff(content) and not (content.startswith(b"\x89PNG") and content[24:25] == b"\x10"):
            return ""
        image = open_image_file(content, "image")
    except ValueError:
        return ""
    values = image.values if isinstance(image, Bands) else np.asarray(image)
    is_deep = values.dtype == np.uint16 or (values.dtype == np.int32 and values.min(initial=0) >= 0)
    return few_values_note(int(values.max(initial=0))) if is_deep else ""
