"""Where the pictures lie in a model's outputs, and at which sizes to answer: what post-processing needs to know.

A model that passes the image processor's `content_sizes` (size of the scaled picture) and `patch_offsets` (windows)
through says it all. From others the same follows from `target_sizes`, taken as the pictures' own sizes, by the rules of
`image_windows.py`. Sizes are (height, width).
"""

from typing import Any

import numpy as np
from torch import Tensor

from .image_windows import Size, Window, padded_content_size, window_axis, windowed_content_size, windows_of


def whole_geometry(
    outputs: Any, target_sizes: Any, input_size: Size, *, do_resize: bool = True, do_pad: bool = True
) -> dict[str, Any]:
    """Geometry of pictures that were padded to the input.

    Args:
        outputs: the model's, with `class_queries_logits` (B, Q, C+1) and perhaps `content_sizes`.
        target_sizes: (height, width) of each picture, as pairs or a (B, 2) tensor; `None`: no answer at picture size.
        input_size: size of the model's input.
        do_resize: whether the pictures were scaled to the input.
        do_pad: whether they were padded to it; without, the input is as large as they are.

    Returns:
        `target_sizes`, `content_sizes` (both `None` without target sizes) and `input_size`.

    Raises:
        ValueError: sizes that are none, are not as many as the pictures, or exceed the input.
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
            f"content_sizes {contents} exceed the input size {input_size}; if the pictures were prepared with another "
            "size, pass the same size= here"
        )
    return {"target_sizes": targets, "content_sizes": contents if targets else None, "input_size": input_size}


def window_geometry(outputs: Any, target_sizes: Any, input_size: Size) -> dict[str, Any]:
    """Geometry of pictures that were cut into windows.

    Args:
        outputs: the model's, with `class_queries_logits` (windows, Q, C+1) and perhaps `content_sizes` (B, 2) and
            `patch_offsets` (windows, 3).
        target_sizes: (height, width) of each picture, as pairs or a (B, 2) tensor; `None`: those of the scaled
            pictures.
        input_size: size of a window.

    Returns:
        `windows`, rows (picture, start, end), `image_sizes` of the scaled pictures, `target_sizes` and `window_size`.

    Raises:
        ValueError: sizes that are none or not as many as the pictures, or windows that do not belong together.
    """
    num_outputs = len(outputs.class_queries_logits)
    windows = patch_offsets(outputs)
    contents = _sizes(getattr(outputs, "content_sizes", None), "content_sizes")
    num_pictures = len(contents) if contents else windows[-1][0] + 1 if windows else None
    targets = _sizes(target_sizes, "target_sizes", num_pictures)
    if contents is not None:
        image_sizes = contents
    elif targets is not None:
        image_sizes = [windowed_content_size(target, input_size) for target in targets]
    elif windows is None:
        image_sizes = [input_size] * num_outputs  # nothing is known: each output is a picture of its own
    else:
        raise ValueError(
            "the outputs hold patch_offsets but no content_sizes, so the shape of the pictures is not known; "
            "pass target_sizes="
        )
    expected = windows_of(image_sizes, input_size)
    windows = windows or expected
    if [row[0] for row in windows] != [row[0] for row in expected] or len(windows) != num_outputs:
        raise ValueError(
            f"{len(image_sizes)} pictures, scaled to {image_sizes}, are cut into {len(expected)} windows of "
            f"{input_size[0]}x{input_size[1]}, but there are {num_outputs} outputs and {len(windows)} patch_offsets. "
            "All windows of a picture must come together: use batch_size=1 in a pipeline, or give the model all that "
            "the processor returned"
        )
    if contents is None:
        # Other processors round the longer side down; their last window says where the picture ends.
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
    """The windows that the outputs name, as rows (picture, start, end); `None` if they name none.

    Args:
        outputs: the model's; `patch_offsets` may be a tensor (windows, 3) or a list of tensors, as Transformers' EoMT
            has it.

    Returns:
        The rows, with one copy from the device.
    """
    rows = getattr(outputs, "patch_offsets", None)
    if rows is None or len(rows) == 0:
        return None
    rows = _as_lists(rows)
    return [(int(index), int(start), int(end)) for index, start, end in rows]


def _sizes(sizes: Any, name: str, num_pictures: int | None = None) -> list[Size] | None:
    if sizes is None:
        return None
    rows = _as_lists(sizes)
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or any(side != int(side) or side < 1 for side in row):
            raise ValueError(f"{name}: {row} is not a pair of positive integers (height, width)")
    if num_pictures is not None and len(rows) != num_pictures:
        raise ValueError(f"{name} has {len(rows)} entries for {num_pictures} pictures; give one (height, width) each")
    return [(int(height), int(width)) for height, width in rows]


def _as_lists(rows: Any) -> list[Any]:
    if isinstance(rows, Tensor | np.ndarray):
        return rows.tolist()
    return [_as_lists(row) if hasattr(row, "__len__") else row for row in rows]
