"""Images of any form as tensors: Pillow, NumPy, torch, paths, URLs, files.

H W pixels, C channels.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_decoding import open_image, to_pixels
from .image_values import RGB, ImageSettings, warn_of_few_values


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
        image = to_pixels(image, name, replace(settings, bands=None))  # bands are chosen of files
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
        warn_of_few_values(int(array.max()) if array.numel() else 0)
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
