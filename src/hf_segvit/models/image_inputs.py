"""From picture tensors to the model's input: sizes, scaling, cutting, and one normalised batch.

Pictures are (3, H, W), uint8 or float32; sizes are (height, width). `views` are what the model sees: the scaled picture
itself, to be padded, or its windows. The geometry is in `image_windows.py`.
"""

from collections.abc import Sequence

import torch
from PIL.Image import Resampling
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import pil_torch_interpolation_mapping

from .image_windows import Size, Window, padded_content_size, window_axis, windowed_content_size
from .picture_decoding import MAX_PICTURE_PIXELS, check_unit_range


def content_size(picture_size: Size, input_size: Size, *, windowed: bool, do_resize: bool, name: str) -> Size:
    """Size that a picture is scaled to, or has already if it is not to be scaled.

    Args:
        picture_size: the picture's own.
        input_size: the model's.
        windowed: cover the input (windows are cut) instead of fitting into it (padding is added).
        do_resize: without, the picture must fit as it is.
        name: what to call the picture in errors.

    Returns:
        (height, width) before cutting or padding.

    Raises:
        ValueError: the picture does not fit as it is, or is so long that scaling it would take excessive memory.
    """
    if do_resize:
        size = (windowed_content_size if windowed else padded_content_size)(picture_size, input_size)
        if size[0] * size[1] > MAX_PICTURE_PIXELS:
            raise ValueError(
                f"{name}: {picture_size[0]}x{picture_size[1]} (height x width) would be scaled to {size[0]}x{size[1]}, "
                f"above the limit of {MAX_PICTURE_PIXELS:,} pixels; crop it, or pass do_split_image=False"
            )
        return size
    height, width = picture_size
    if windowed and (min(height - input_size[0], width - input_size[1]) != 0):
        need = "match it on one side and cover it on the other"
    elif not windowed and (height > input_size[0] or width > input_size[1]):
        need = "fit into it"
    else:
        return picture_size
    raise ValueError(
        f"{name}: {height}x{width} (height x width) with do_resize=False, but the input is "
        f"{input_size[0]}x{input_size[1]} and the picture must {need}; pass do_resize=True or another size="
    )


def scale_picture(picture: Tensor, size: Size, *, resample: int, do_rescale: bool, name: str) -> Tensor:
    """Resize, antialiased; floating-point pictures come out in [0, 255] like 8-bit ones, unless `do_rescale` is off.

    Args:
        picture: (3, H, W).
        size: of the result.
        resample: Pillow's number of the filter.
        do_rescale: whether the values will be multiplied by 1/255; floats must then be in [0, 1].
        name: what to call the picture in errors.

    Returns:
        (3, height, width) of the picture's type.

    Raises:
        ValueError: floats outside [0, 1].
    """
    if do_rescale and picture.is_floating_point():
        check_unit_range(picture, name)
        picture = picture * 255
    return tvF.resize(
        picture, list(size), interpolation=pil_torch_interpolation_mapping[Resampling(resample)], antialias=True
    )


def views(scaled: Sequence[Tensor], windows: Sequence[Window] | None, input_size: Size) -> list[Tensor]:
    """What the model sees of each picture or map: all of it, or its windows in turn.

    Args:
        scaled: tensors (..., H, W).
        windows: rows (index into `scaled`, start, end); `None`: no cutting.
        input_size: size of a window.

    Returns:
        Views of the tensors.
    """
    if windows is None:
        return list(scaled)
    cut = []
    for index, start, end in windows:
        height, width = scaled[index].shape[-2:]
        axis = window_axis((height, width), input_size)
        cut.append(scaled[index][..., start:end, :] if axis == 0 else scaled[index][..., start:end])
    return cut


def normalized_batch(
    pictures: Sequence[Tensor], input_size: Size, rescale_factor: float, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """One batch of (value * rescale_factor - mean) / std, padded right and below with what black becomes.

    Args:
        pictures: (3, H, W) each, at most of the input's size.
        input_size: of the batch.
        rescale_factor: multiplies the values.
        mean: of each channel, after rescaling.
        std: of each channel, after rescaling.

    Returns:
        (B, 3, height, width) float32.
    """
    device = pictures[0].device
    batch = torch.zeros(len(pictures), 3, *input_size, dtype=torch.float32, device=device)
    for row, picture in zip(batch, pictures, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    shift, scale = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))
    return batch.mul_(rescale_factor / scale).sub_(shift / scale)
