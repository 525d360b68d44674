"""Points and boxes in pixels of pictures to the prompts that ViT-P reads, with every mistake refused by its place.

`prompts_of` takes what a user gives for a batch of pictures and makes padded tensors of it. N prompts of a picture:
its points, then its boxes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image_windows import Size

IGNORED_LABEL = -100


def prompts_of(
    picture_sizes: Sequence[Size],
    input_points: Any = None,
    input_boxes: Any = None,
    input_labels: Any = None,
    *,
    point_origin: str = "center",
    num_labels: int | None = None,
) -> dict[str, Tensor]:
    """Prompts of a batch of pictures.

    Args:
        picture_sizes: (height, width) of every picture in pixels, B of them.
        input_points: for each picture its points (x, y), counted in pixels from 0; of a single picture, its points.
        input_boxes: for each picture its boxes (x0, y0, x1, y1), edges in pixels from 0 to width or height; of a single
            picture, its boxes. A box without area is a point at that place.
        input_labels: for each picture the classes of its points, then of its boxes; -100 for those without.
        point_origin: `"center"`: a point names a pixel and means its middle; `"corner"`: its upper left corner.
        num_labels: number of classes, for checking labels; `None` does not check.

    Returns:
        `prompts` (B, N, 4) float32, centre x, centre y, width and height in [0, 1], with zeros behind the last one of
        each picture; `prompt_mask` (B, N) bool, True for real ones; with labels `labels` (B, N) int64.

    Raises:
        ValueError: a picture without prompts, or a prompt or label of the wrong shape or outside of its range; the
            message names picture and prompt.
    """
    points = _by_picture(input_points, "input_points", len(picture_sizes), ("x", "y"))
    boxes = _by_picture(input_boxes, "input_boxes", len(picture_sizes), ("x0", "y0", "x1", "y1"))
    rows = []
    for index, size in enumerate(picture_sizes):
        _check_points(points[index], size, f"input_points[{index}]")
        _check_boxes(boxes[index], size, f"input_boxes[{index}]")
        row = np.concatenate([_from_points(points[index], size, point_origin), _from_boxes(boxes[index], size)])
        if not len(row):
            raise ValueError(f"images[{index}] has no prompt; give every picture at least one point or box")
        rows.append(torch.from_numpy(row.astype(np.float32)))
    data = {
        "prompts": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "prompt_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True
        ),
    }
    if input_labels is not None:
        labels = _labels_by_picture(input_labels, [len(row) for row in rows], num_labels)
        data["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
    return data


def _by_picture(given: Any, name: str, num_pictures: int, fields: tuple[str, ...]) -> list[np.ndarray]:
    """(n, fields) float64 of each picture."""
    if given is None:
        return [np.zeros((0, len(fields)))] * num_pictures
    if num_pictures == 1 and _depth(given) == 2:
        given = [given]
    what = f"({', '.join(fields)})"
    nothing = isinstance(given, list | tuple) and all(isinstance(row, list | tuple) and not row for row in given)
    if (_depth(given) != 3 and not nothing) or len(given) != num_pictures:
        raise ValueError(
            f"{name} of shape {_shape_of(given)} for {num_pictures} pictures; give a list for each picture with its "
            f"{what}, such as {name}=[[{list(range(10, 10 + 10 * len(fields), 10))}]]"
        )
    arrays = []
    for index, of_picture in enumerate(given):
        try:
            array = np.asarray(_plain(of_picture), dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}[{index}] is not a list of numbers {what}: {error}") from error
        if array.size == 0:
            array = array.reshape(0, len(fields))
        if array.ndim != 2 or array.shape[1] != len(fields):
            raise ValueError(f"{name}[{index}] has shape {array.shape}; every entry is {what}")
        arrays.append(array)
    return arrays


def _plain(values: Any) -> Any:
    """Lists of numbers, whatever mixture of lists, arrays and tensors was given."""
    if isinstance(values, Tensor | np.ndarray):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _depth(values: Any) -> int:
    if isinstance(values, Tensor | np.ndarray):
        return values.ndim
    if isinstance(values, list | tuple):
        return 1 + max((_depth(value) for value in values), default=0)
    return 0


def _shape_of(values: Any) -> str:
    if isinstance(values, Tensor | np.ndarray):
        return str(tuple(values.shape))
    return f"{len(values)} entries, nested {_depth(values)} deep" if isinstance(values, list | tuple) else repr(values)


def _check_points(points: np.ndarray, size: Size, name: str) -> None:
    height, width = size
    for index, (x, y) in enumerate(points.tolist()):
        if not (0 <= x < width and 0 <= y < height):  # NaN neither
            raise ValueError(
                f"{name}[{index}] is ({x:g}, {y:g}), outside the picture of {width} x {height} pixels (width x "
                f"height): x is from 0 to {width - 1}, y from 0 to {height - 1}"
            )


def _check_boxes(boxes: np.ndarray, size: Size, name: str) -> None:
    height, width = size
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        place = f"{name}[{index}] is ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{place}: its right or lower edge comes before the other one; give (x0, y0, x1, y1), not width and "
                "height"
            )
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(
                f"{place}, outside the picture of {width} x {height} pixels (width x height); clip it to the picture"
            )


def _from_points(points: np.ndarray, size: Size, point_origin: str) -> np.ndarray:
    height, width = size
    offset = 0.5 if point_origin == "center" else 0.0
    places = np.minimum((points + offset) / (width, height), 1.0)
    return np.concatenate([places, np.zeros_like(places)], axis=1)


def _from_boxes(boxes: np.ndarray, size: Size) -> np.ndarray:
    height, width = size
    scaled = boxes / (width, height, width, height)
    return np.concatenate([(scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]], axis=1)


def _labels_by_picture(given: Any, counts: Sequence[int], num_labels: int | None) -> list[Tensor]:
    values = _plain(given)
    if len(counts) == 1 and _depth(values) == 1:
        values = [values]
    if _depth(values) != 2 or [len(of_picture) for of_picture in values] != list(counts):
        raise ValueError(
            f"input_labels must hold one class for every prompt, points before boxes: {list(counts)} classes for the "
            f"{len(counts)} pictures, not {_shape_of(given)}"
        )
    for index, of_picture in enumerate(values):
        for number, label in enumerate(of_picture):
            known = isinstance(label, int) and (label == IGNORED_LABEL or 0 <= label < (num_labels or label + 1))
            if not known:
                classes = "0" if num_labels is None else f"0 to {num_labels - 1}"
                raise ValueError(
                    f"input_labels[{index}][{number}] is {label!r}; classes are whole numbers from {classes}"
                    f"{' on' if num_labels is None else ''}, and {IGNORED_LABEL} means none"
                )
    return [torch.tensor(of_picture, dtype=torch.int64) for of_picture in values]
