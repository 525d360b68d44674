"""Open images and convert them to RGB, as a viewer would show them.

`open_image` reads a file, `to_rgb` converts what Pillow has opened, and `image_tensor` takes whatever an image
processor is given (Pillow, NumPy, torch, path, URL) to a (3, H, W) tensor. Orientation (EXIF) is applied, transparency
is composed over white as in Transformers, 16-bit values are scaled by their full range, and of an animation or a
multi-page file the first frame counts. Colour profiles are not applied: models are trained without them. Whatever
cannot be read is a `ValueError` with the file, the fault and the remedy.
"""

import os
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Pillow has many more decoders; those that data sets do not need would only widen the attack surface.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Pillow's own limit for an error; checked here too, since any library in the process can switch Pillow's off.
MAX_IMAGE_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112  # EXIF
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")


def open_image(source: Any, name: str | None = None) -> Image.Image:
    """Read an image file as upright RGB, decoded.

    Args:
        source: a path, an http(s) URL, the file's bytes or a binary file object.
        name: what errors call the image; the path if there is one.

    Raises:
        ValueError: the file is missing, empty, truncated, too large, or no image of `IMAGE_FORMATS`.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        name, source = source, _download(source)
    name = name or _file_name(source)
    return to_rgb(open_image_file(source, name), name)


def open_image_file(source: Any, name: str | None = None) -> Image.Image:
    """Decode the first frame of a file, bytes or file object, neither converted nor upright; see `open_image`."""
    name = name or _file_name(source)
    if isinstance(source, bytes | bytearray):
        source = BytesIO(source)
        if not source.getbuffer().nbytes:
            raise ValueError(f"{name}: empty (0 bytes); copy or download it again")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"{name}: is a folder; name the image files in it")
        if not path.is_file():
            raise ValueError(f"{name}: no such file; check the path (it is read from {Path.cwd()})")
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty (0 bytes); copy or download it again")
    # A path is checked above, so what Pillow raises is about the content; its own messages name no remedy.
    try:
        image = Image.open(source, formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; scale the image down with an image editor first") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: not an image of the formats {', '.join(IMAGE_FORMATS)}, whatever its name ends in; "
            "convert it to one of them, or copy it again if it is damaged"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}); copy or download it again, and check its permissions"
        ) from error
    with image:
        _decode(image, name)
    return image


def to_rgb(image: Image.Image | np.ndarray, name: str = "image") -> Image.Image:
    """Convert a Pillow image of any mode, or an (H, W, 3) uint8 array, to upright RGB.

    Transparent parts are composed over white. Modes `I` and `I;16` are divided by 257, so that 65535 is white. Mode `F`
    is read as [0, 1], or as Pillow's own [0, 255] if it exceeds 1. An upright RGB image is returned as it is.

    Raises:
        ValueError: too many pixels, damaged data, a mode that has no RGB form, or values outside its range.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    _decode(image, name)  # may still be lazy: Pillow opens a file without reading it
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
    if mode == "I" or mode.startswith("I;16"):
        return Image.fromarray(_eight_bit(np.asarray(image).astype(np.int64), name)).convert("RGB")
    if mode == "F":
        return Image.fromarray(_eight_bit_from_float(np.asarray(image), name)).convert("RGB")
    raise ValueError(f"{name}: images of mode {mode!r} have no RGB form here; save it as an RGB PNG or JPEG first")


def as_list(images: Any, num_dims: int) -> list[Any]:
    """One image or map, a list of them, or a batch in one array (`num_dims` + 1 axes), as a list."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == num_dims + 1:
        return list(images)
    return list(images) if isinstance(images, list | tuple) else [images]


def image_tensor(image: Any, name: str = "image", input_data_format: str | None = None, device: Any = None) -> Tensor:
    """The image as an RGB tensor (3, H, W), uint8 or float32.

    Args:
        image: a Pillow image, a path, URL, bytes or file object, or a NumPy array or tensor: (H, W), or 1, 3 or 4
            channels first or last; uint8, uint16 (full range), bool, or floating point in [0, 1] (for grey and RGB, the
            range is checked only by the caller that scales them).
        name: what errors call the image.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
        device: of the tensor; `None` leaves tensors where they are.
    """
    if isinstance(image, np.ndarray | Tensor):
        return _array_tensor(image, name, input_data_format, device)
    if isinstance(image, Image.Image):
        image = to_rgb(image, name)
    elif isinstance(image, str | os.PathLike):
        image = open_image(image)
    elif isinstance(image, bytes | bytearray) or hasattr(image, "read"):
        image = open_image(image, name)
    else:
        raise ValueError(
            f"{name}: got {type(image).__name__}; an image is a Pillow image, an array, a tensor, a path or a URL"
        )
    # A view, so memory stays channels-last, in which resizing is several times faster.
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)


def _array_tensor(array: Any, name: str, input_data_format: str | None, device: Any) -> Tensor:
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype == "uint16":
        array = torch.from_numpy(array.astype(np.int32)) if isinstance(array, np.ndarray) else array.int()
        tensor = ((array + 128) // 257).to(torch.uint8)  # rounded; 65535 / 255 = 257
    elif dtype == "bool":
        tensor = torch.as_tensor(array).to(torch.uint8) * 255
    elif dtype == "uint8":
        tensor = torch.as_tensor(array)
    elif dtype.startswith(("float", "bfloat")):
        tensor = torch.as_tensor(array).to(torch.float32)
    else:
        raise ValueError(
            f"{name}: values of type {dtype}; convert to uint8 (0 to 255), uint16 (full range) or float in [0, 1]"
        )
    tensor = tensor.to(device)
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    elif tensor.ndim != 3:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; an image is (H, W), (H, W, C) or (C, H, W)")
    elif _channels_last(tuple(tensor.shape), name, input_data_format):
        tensor = tensor.permute(2, 0, 1)
    if 0 in tensor.shape:
        raise ValueError(f"{name}: shape {tuple(array.shape)} holds no pixels")
    if tensor.shape[0] == 4:
        return _over_white(tensor, name)
    return tensor.expand(3, -1, -1)


def _channels_last(shape: tuple[int, ...], name: str, input_data_format: str | None) -> bool:
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if input_data_format is not None:
        wanted = str(getattr(input_data_format, "value", input_data_format))
        if wanted in ("channels_first", "channels_last") and (last if wanted == "channels_last" else first):
            return wanted == "channels_last"
        raise ValueError(
            f"{name}: shape {shape} does not have 1, 3 or 4 channels where input_data_format={wanted!r} puts them; "
            "it is 'channels_first' or 'channels_last'"
        )
    if first and last:
        if (shape[0] == 3) != (shape[2] == 3):  # an image 1 or 4 pixels high or wide
            return shape[2] == 3
        raise ValueError(f"{name}: shape {shape} could have its channels first or last; pass input_data_format=")
    if not first and not last:
        raise ValueError(f"{name}: shape {shape}; an image has 1, 3 or 4 channels, first or last")
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


def _decode(image: Image.Image, name: str) -> None:
    # Before any pixel is decoded.
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: {width}x{height} pixels, more than the limit of {MAX_IMAGE_PIXELS:,}; such a file can be an "
            "attack (decompression bomb). If it is not, scale it down with an image editor first"
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


def _eight_bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{name}: integer values from {values.min()} to {values.max()}, outside 16 bits; scale them to 0..65535"
        )
    return ((values + 128) // 257).astype(np.uint8)


def _eight_bit_from_float(values: np.ndarray, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{name}: floating-point values from {low} to {high}; scale them to [0, 1] or [0, 255]")
    return np.rint(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
