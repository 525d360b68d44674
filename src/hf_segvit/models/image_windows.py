"""Where a scaled picture lies in the model's input: padded to it, or cut into windows of it.

Sizes are (height, width) in pixels, windows rows (picture, start, end) along the longer side. The arithmetic is that
of the official EoMT evaluation (Python's `round`, starts cut off to integers), with two additions: a side never
becomes 0, and the last window ends where the picture ends (in pictures longer than 7:1 a rounding error of the
official formula can lose the last column).
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
Window = tuple[int, int, int]


def padded_content_size(picture_size: Size, input_size: Size) -> Size:
    """Size of a picture scaled to fit into the input, its proportions kept."""
    height, width = picture_size
    factor = min(input_size[0] / height, input_size[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def windowed_content_size(picture_size: Size, input_size: Size) -> Size:
    """Size of a picture scaled to cover the input, its proportions kept: one side matches, the other may exceed."""
    height, width = picture_size
    factor = max(input_size[0] / height, input_size[1] / width)
    return max(input_size[0], round(height * factor)), max(input_size[1], round(width * factor))


def window_axis(content_size: Size, input_size: Size) -> int:
    """0 if the windows of a scaled picture follow each other from top to bottom, 1 if from left to right."""
    return 0 if content_size[0] > input_size[0] else 1


def windows_of(content_sizes: Sequence[Size], input_size: Size) -> list[Window]:
    """The windows of a batch of scaled pictures, picture by picture.

    Args:
        content_sizes: what `windowed_content_size` gave for each picture.
        input_size: size of a window.

    Returns:
        Rows (index of the picture, first pixel, pixel behind the last) along the axis that exceeds the window. As few
        windows as cover the picture, evenly spread.
    """
    windows = []
    for index, content_size in enumerate(content_sizes):
        axis = window_axis(content_size, input_size)
        length, window = content_size[axis], input_size[axis]
        count = math.ceil(length / window)
        overlap = (count * window - length) / (count - 1) if count > 1 else 0.0
        starts = [int(number * (window - overlap)) for number in range(count - 1)] + [length - window]
        windows += [(index, start, start + window) for start in starts]
    return windows
