"""Geometry of images: scaling to the model's input and back to the results.

An image is scaled and either padded to the input or cut into windows of it. First sizes and windows, then scaling,
cutting and one normalised batch; last, what post-processing needs: where the images lie in a model's outputs
(`whole_geometry`, `window_geometry`). A model that passes on the image processor's `content_sizes` (of the scaled
images) and `patch_offsets` (windows) answers that; for others it follows from `target_sizes`, taken as the images' own.

Images are (C, H, W), uint8 or float32. Sizes are (height, width) in pixels, windows rows (image, start, end), end
exclusive, along the longer side. The arithmetic is that of the official EoMT evaluation (Python's `round`, truncated
starts), except that a side never becomes 0 and the last window ends where the image ends.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import pil_torch_interpolation_mapping

from .image_claims import max_image_pixels
from .image_tensors import check_unit_range

Size = tuple[int, int]
Window = tuple[int, int, int]


def padded_content_size(image_size: Size, input_size: Size) -> Size:
    """Size of an image scaled to fit into the input, its proportions kept."""
    height, width = image_size
    factor = min(input_size[0] / height, input_size[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def windowed_content_size(image_size: Size, input_size: Size) -> Size:
    """Size of an image scaled to cover the input, its proportions kept: one side matches, the other may exceed."""
    height, width = image_size
    factor = max(input_size[0] / height, input_size[1] / width)
    return max(input_size[0], round(height * factor)), max(input_size[1], round(width * factor))


def window_axis(content_size: Size, input_size: Size) -> int:
    """Axis along which the windows of a scaled image lie: 0 (rows) or 1 (columns, also for a single window)."""
    return 0 if content_size[0] > input_size[0] else 1


def windows_of(content_sizes: Sequence[Size], input_size: Size) -> list[Window]:
    """The windows of a batch of scaled images, image by image: as few as cover each image, evenly spread."""
    windows = []
    for image, content_size in enumerate(content_sizes):
        axis = window_axis(content_size, input_size)
        length, window = content_size[axis], input_size[axis]
        count = math.ceil(length / window)
        overlap = (count * window - length) / (count - 1) if count > 1 else 0.0
        # Beyond 7:1 a rounding error of the official formula can lose the last column, so the last start is exact.
        starts = [int(index * (window - overlap)) for index in range(count - 1)] + [length - window]
        windows += [(image, start, start + window) for start in starts]
    return windows


def content_size(image_size: Size, input_size: Size, *, windowed: bool, do_resize: bool, name: str) -> Size:
    """Size that an image is scaled to: to fit into the input, or if `windowed` to cover it.

    Without `do_resize` it is the image's own; a ValueError if that does not fit, or scaling would take too much memory.
    """
    if do_resize:
        size = (windowed_content_size if windowed else padded_content_size)(image_size, input_size)
        if size[0] * size[1] > (limit := max_image_pixels()):
            raise ValueError(
                f"{name}: {image_size[0]}x{image_size[1]} (height x width) would be scaled to {size[0]}x{size[1]}, "
                f"above the limit of {limit:,} pixels; crop it, pass do_split_image=False, or raise the limit with "
                "HF_SEGVIT_MAX_PIXELS=NUMBER in the environment"
            )
        return size
    height, width = image_size
    if windowed and (min(height - input_size[0], width - input_size[1]) != 0):
        need = "match it on one side and cover it on the other"
    elif not windowed and (height > input_size[0] or width > input_size[1]):
        need = "fit into it"
    else:
        return image_size
    raise ValueError(
        f"{name}: {height}x{width} (height x width) with do_resize=False, but the input is "
        f"{input_size[0]}x{input_size[1]} and the image must {need}; pass do_resize=True or another size="
    )


def scale_image(image: Tensor, size: Size, *, resample: int, do_rescale: bool, name: str) -> Tensor:
    """Resize an image (C, H, W), antialiased, with the filter of Pillow's number `resample`.

    With `do_rescale`, floating-point images in [0, 1] come out in [0, 255] like 8-bit ones.
    """
    if do_rescale and image.is_floating_point():
        check_unit_range(image, name)
        image = image * 255  # like 8-bit values, so that the same factor of 1/255 follows
    return tvF.resize(
        image, list(size), interpolation=pil_torch_interpolation_mapping[Resampling(resample)], antialias=True
    )


def views(scaled: Sequence[Tensor], windows: Sequence[Window] | None, input_size: Size) -> list[Tensor]:
    """What the model sees of each image or map (..., H, W): all of it, or its windows in turn."""
    if windows is None:
        return list(scaled)
    cut = []
    for index, start, end in windows:
        height, width = scaled[index].shape[-2:]
        axis = window_axis((height, width), input_size)
        cut.append(scaled[index][..., start:end, :] if axis == 0 else scaled[index][..., start:end])
    return cut


def normalized_batch(
    images: Sequence[Tensor], input_size: Size, rescale_factor: float, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """One batch (B, C, height, width) float32 of (value * rescale_factor - mean) / std.

    Images may be smaller than the input; they are padded right and below with the value of black.
    """
    device = images[0].device
    channels = images[0].shape[0]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"images of {channels} channels, but image_mean has {len(mean)} and image_std {len(std)} values; give one "
            "of each for every channel"
        )
    batch = torch.zeros(len(images), channels, *input_size, dtype=torch.float32, device=device)
    shift, scale = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std))
    factor, offset = rescale_factor / scale, shift / scale
    # The whole row is normalised, with its zeros: padding is black, as in the official code, not the mean colour.
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
        # One image fits into a processor's cache, a batch does not: this takes a quarter of the time.
        row.mul_(factor).sub_(offset)
    return batch


def whole_geometry(
    outputs: Any, target_sizes: Any, input_size: Size, *, do_resize: bool = True, do_pad: bool = True
) -> dict[str, Any]:
    """Geometry of images that were padded to the input: `target_sizes`, `content_sizes` and `input_size`.

    Args:
        outputs: the model's, with `class_queries_logits` (B, Q, C+1) and perhaps `content_sizes`.
        target_sizes: (height, width) of each image, as pairs or a (B, 2) tensor; `None`: no result at image size.
        input_size: size of the model's input.
        do_pad: if False, the input is as large as the images.
    """
    batch_size = len(outputs.class_queries_logits)
    targets = _sizes(target_sizes, "target_sizes", batch_size)
    contents = _sizes(getattr(outputs, "content_sizes", None), "content_sizes", batch_size)
    if contents is None and targets is not None:
        contents = [padded_content_size(target, input_size) for target in targets] if do_resize else targets
    if contents is not None and not do_pad:
        input_size = contents[0]
    if any(content[axis] > input_size[axis] for content in contents or () for axis in (0, 1)):
        raise ValueError(
            f"content_sizes {contents} exceed the input size {input_size}; if the images were prepared with another "
            "size, pass the same size= here"
        )
    return {"target_sizes": targets, "content_sizes": contents if targets else None, "input_size": input_size}


def window_geometry(outputs: Any, target_sizes: Any, input_size: Size) -> dict[str, Any]:
    """Geometry of images that were cut into windows: `windows`, `image_sizes` (scaled), `target_sizes`, `window_size`.

    Args:
        outputs: the model's, with `class_queries_logits` (windows, Q, C+1) and perhaps `content_sizes` (B, 2) and
            `patch_offsets` (windows, 3).
        target_sizes: (height, width) of each image, as pairs or a (B, 2) tensor; `None`: the scaled sizes.
        input_size: size of a window.
    """
    num_outputs = len(outputs.class_queries_logits)
    windows = patch_offsets(outputs)
    contents = _sizes(getattr(outputs, "content_sizes", None), "content_sizes")
    num_images = len(contents) if contents else windows[-1][0] + 1 if windows else None
    targets = _sizes(target_sizes, "target_sizes", num_images)
    if contents is not None:
        image_sizes = contents
    elif targets is not None:
        image_sizes = [windowed_content_size(target, input_size) for target in targets]
    elif windows is None:
        image_sizes = [input_size] * num_outputs  # nothing is known: each output is an image of its own
    else:
        raise ValueError(
            "the outputs hold patch_offsets but no content_sizes, so the shape of the images is unknown; pass "
            "target_sizes="
        )
    expected = windows_of(image_sizes, input_size)
    windows = windows or expected
    # A pipeline may split the windows of one image over two batches; merged, they would leave holes.
    if [row[0] for row in windows] != [row[0] for row in expected] or len(windows) != num_outputs:
        raise ValueError(
            f"{len(image_sizes)} images, scaled to {image_sizes}, are cut into {len(expected)} windows of "
            f"{input_size[0]}x{input_size[1]}, but there are {num_outputs} outputs and {len(windows)} patch_offsets. "
            "All windows of an image must come together: use batch_size=1 in a pipeline, or give the model all that "
            "the processor returned"
        )
    if contents is None:
        # Other processors round the longer side down; their last window says where the image ends.
        for index, _, end in windows:
            height, width = image_sizes[index]
            by_rows = window_axis((height, width), input_size) == 0
            image_sizes[index] = (end, width) if by_rows else (height, end)
    return {
        "windows": windows,
        "image_sizes": image_sizes,
        "target_sizes": targets or image_sizes,
        "window_size": input_size,
    }


def patch_offsets(outputs: Any) -> list[Window] | None:
    """The windows that the outputs name, as rows (image, start, end); `None` if they name none."""
    rows = getattr(outputs, "patch_offsets", None)
    if rows is None or len(rows) == 0:
        return None
    rows = _as_lists(rows)  # a tensor (one copy from the device), or a list of tensors as in Transformers' EoMT
    return [(int(index), int(start), int(end)) for index, start, end in rows]


def _sizes(sizes: Any, name: str, num_images: int | None = None) -> list[Size] | None:
    if sizes is None:
        return None
    rows = _as_lists(sizes)
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or any(side != int(side) or side < 1 for side in row):
            raise ValueError(f"{name}: {row} is not a pair of positive integers (height, width)")
    if num_images is not None and len(rows) != num_images:
        raise ValueError(f"{name} has {len(rows)} entries for {num_images} images; give one (height, width) each")
    return [(int(height), int(width)) for height, width in rows]


def _as_lists(rows: Any) -> list[Any]:
    if isinstance(rows, Tensor | np.ndarray):
        return rows.tolist()
    return [_as_lists(row) if hasattr(row, "__len__") else row for row in rows]
