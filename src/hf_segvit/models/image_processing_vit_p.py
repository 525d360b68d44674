"""Image processor of ViT-P: images and prompts to tensors, logits to names.

`ViTPImageProcessor`, then `prompts_of`, which turns points and boxes in pixels of the original image into the padded
prompts that ViT-P reads. Images are resized to the input without keeping their aspect ratio, as in the official code
(antialiased bilinear on 8-bit values). N prompts of an image: its points, then its boxes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature

from .confidence import check_temperature
from .configuration_vit_p import POINT_ORIGINS
from .image_geometry import Size, normalized_batch
from .image_processing_plain_vit import (
    PixelSettings,
    PlainViTImageProcessor,
    as_requested,
    normalization,
    read_images,
    scaled_images,
)

IGNORED_LABEL = -100  # PyTorch's cross entropy ignores it by default


class ViTPImageProcessorKwargs(PixelSettings, total=False):
    """The settings of `ViTPImageProcessor`, as stored in preprocessor_config.json."""

    patch_size: int | None
    point_origin: str
    id2label: dict[int, str] | dict[str, str] | None
    temperature: float | int | None


class ViTPImageProcessor(PlainViTImageProcessor):
    """Prepares images and prompts for `ViTPForPointClassification` and names its answers.

    Args:
        size: height and width of the model's input: `{"height": ..., "width": ...}`, a pair, or one integer.
        do_resize: resize images to the input; if False, they must have its size.
        resample: Pillow's number of the filter; 2 is bilinear.
        rescale_factor: 1/255 takes 8-bit values to [0, 1]; applied with `do_rescale`.
        image_mean, image_std: of each channel in [0, 1]; applied with `do_normalize`. Their length is the number of
            channels that images must have; grey ones become RGB where it is 3.
        value_range: the values of black and white in images of more than 8 bits, such as (0, 4095).
        bands: numbers of the bands to take of image files, from 1, such as (4, 3, 2); images in memory are taken whole.
        patch_size: of the model, to check `size` against; `None` does not check.
        point_origin: what a point (x, y) means: `"center"`, the middle of that pixel, or `"corner"`, its upper left
            corner (official weights); must equal that of the model's config.
        id2label: names of the classes, for post-processing and for checking labels.
        temperature: post-processing divides logits by it, as `hf-segvit evaluate --calibration` finds it; `None`: 1.
    """

    valid_kwargs = ViTPImageProcessorKwargs  # only what this processor heeds
    model_input_names = ["pixel_values", "prompts", "prompt_mask"]  # noqa: RUF012

    size = {"height": 518, "width": 518}  # noqa: RUF012
    patch_size: int | None = 14
    point_origin = "center"
    id2label: Mapping[Any, str] | None = None
    temperature: float | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.temperature is not None:
            check_temperature(self.temperature)
        if self.id2label is not None:  # keys read from JSON are strings
            self.id2label = {int(index): name for index, name in self.id2label.items()}

    def preprocess(
        self,
        images: Any,
        input_points: Any = None,
        input_boxes: Any = None,
        input_labels: Any = None,
        *,
        return_tensors: str | None = "pt",
        device: Any = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, and prompts where given.

        Args:
            images: an image or a list of them: Pillow images, paths, URLs, arrays or tensors; see `image_tensor`.
            input_points: for each image its points (x, y) in pixels of the image, as in `[[[x, y], ...], ...]`; for a
                single image `[[x, y], ...]` will do.
            input_boxes: for each image its boxes (x0, y0, x1, y1), edges in pixels. One without area is a point.
            input_labels: for each image the classes of its points, then of its boxes; -100 for those without.
            return_tensors: `"pt"`, or `"np"` for NumPy arrays.
            device: where to compute and leave the tensors; `None`: the CPU, or where a tensor already is.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
            kwargs: settings for this call only.

        Returns:
            `pixel_values` (B, C, height, width) float32 and `original_sizes` (B, 2) int64, height and width of the
            images. With prompts: `prompts` (B, N, 4) float32 and `prompt_mask` (B, N) bool, False for padding; with
            labels: `labels` (B, N) int64.

        Raises:
            ValueError: unreadable images, malformed prompts or prompts outside the image, unknown labels, or settings
                that do not fit; the message names image and prompt.
        """
        reading = {"device": device, "input_data_format": input_data_format}
        data = super().preprocess(images, input_points, input_boxes, input_labels, reading, **kwargs)
        return BatchFeature(data=as_requested(data, return_tensors))

    def prepare_prompts(
        self,
        original_sizes: Tensor | Sequence[Size],
        input_points: Any = None,
        input_boxes: Any = None,
        input_labels: Any = None,
    ) -> dict[str, Tensor]:
        """Prompts for images that were prepared, and perhaps encoded, before.

        Args:
            original_sizes: (height, width) of each image in pixels, as a call of the processor returns them.
            input_points, input_boxes, input_labels: as in `preprocess`.

        Returns:
            `prompts`, `prompt_mask` and, if given, `labels`, as in `preprocess`, on the device of `original_sizes`.
        """
        sizes = original_sizes.tolist() if isinstance(original_sizes, Tensor) else original_sizes
        device = original_sizes.device if isinstance(original_sizes, Tensor) else None
        data = prompts_of(
            [(int(height), int(width)) for height, width in sizes],
            input_points,
            input_boxes,
            input_labels,
            point_origin=self.point_origin,
            num_labels=len(self.id2label) if self.id2label else None,
        )
        return {name: tensor.to(device) for name, tensor in data.items()}

    def post_process_point_classification(
        self, outputs: Any, top_k: int = 1, id2label: Mapping[Any, str] | None = None
    ) -> list[dict[str, Any]]:
        """The most probable classes of every prompt.

        Args:
            outputs: the model's, with `logits` (B, N, C) and, where prompts were padded, `prompt_mask` (B, N).
            top_k: classes per prompt, best first; K = min(top_k, C).
            id2label: names of the classes; `None`: the processor's, or `LABEL_0` and so on where it has none.

        Returns:
            For each image a dict with `label_ids` (n, K) int64 and `scores` (n, K) float32, probabilities, of its n
            real prompts, on the logits' device, and `labels`, for each prompt a list of K names.

        Raises:
            ValueError: `top_k` is below 1, or a class has no name.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        names = id2label if id2label is not None else self.id2label
        logits = outputs.logits
        # A name that is missing is refused now: it would be looked up only once its class is among the best.
        num_labels = logits.shape[-1]
        if names is not None and (missing := [index for index in range(num_labels) if index not in names]):
            raise ValueError(f"id2label has no name for class {missing[0]} of the {num_labels} that the model knows")
        # In float32, since bfloat16 has too few digits to rank probabilities near 1.
        scaled = logits.float() if self.temperature is None else logits.float() / self.temperature
        scores, label_ids = scaled.softmax(dim=-1).topk(min(top_k, num_labels), dim=-1)
        mask = getattr(outputs, "prompt_mask", None)
        results = []
        for index in range(len(logits)):
            real = slice(None) if mask is None else mask[index].bool().to(scores.device)
            ids = label_ids[index][real]
            results.append(
                {
                    "label_ids": ids,
                    "scores": scores[index][real],
                    "labels": [[f"LABEL_{i}" if names is None else names[i] for i in row] for row in ids.tolist()],
                }
            )
        return results

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        settings = super()._standardize_kwargs(**kwargs)
        patch_size, size = settings["patch_size"], settings["size"]
        if patch_size is not None and (size.height % patch_size or size.width % patch_size):
            nearest = [max(round(side / patch_size), 1) * patch_size for side in (size.height, size.width)]
            raise ValueError(
                f"size {size.height} x {size.width} is no multiple of patch_size={patch_size}; the nearest that is: "
                f"{{'height': {nearest[0]}, 'width': {nearest[1]}}}"
            )
        if settings["point_origin"] not in POINT_ORIGINS:
            raise ValueError(f"point_origin={settings['point_origin']!r} is not one of {POINT_ORIGINS}")
        return settings

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        input_points: Any,
        input_boxes: Any,
        input_labels: Any,
        reading: dict[str, Any],
        **settings: Any,
    ) -> dict[str, Any]:
        tensors = read_images(images, settings, **reading)
        image_sizes = [(image.shape[1], image.shape[2]) for image in tensors]
        input_size = (settings["size"].height, settings["size"].width)
        if not settings["do_resize"]:
            _check_sizes(image_sizes, input_size)
        # Prompts before pixels: they are cheap to check and more often wrong.
        prompts: dict[str, Tensor] = {}
        if input_points is not None or input_boxes is not None:
            names = settings["id2label"]
            prompts = prompts_of(
                image_sizes,
                input_points,
                input_boxes,
                input_labels,
                point_origin=settings["point_origin"],
                num_labels=len(names) if names else None,
            )
        elif input_labels is not None:
            raise ValueError("input_labels came without input_points or input_boxes, whose classes they are")
        scaled = scaled_images(tensors, [input_size] * len(tensors), settings)
        pixel_values = normalized_batch(scaled, input_size, **normalization(settings))
        device = pixel_values.device
        return {
            "pixel_values": pixel_values,
            "original_sizes": torch.tensor(image_sizes, dtype=torch.int64, device=device),
            **{name: tensor.to(device) for name, tensor in prompts.items()},
        }


def _check_sizes(image_sizes: Sequence[Size], input_size: Size) -> None:
    for index, size in enumerate(image_sizes):
        if size != input_size:
            raise ValueError(
                f"images[{index}] is {size[0]} x {size[1]} pixels (height x width) with do_resize=False, but the input "
                f"is {input_size[0]} x {input_size[1]}; pass do_resize=True or another size="
            )


def prompts_of(
    image_sizes: Sequence[Size],
    input_points: Any = None,
    input_boxes: Any = None,
    input_labels: Any = None,
    *,
    point_origin: str = "center",
    num_labels: int | None = None,
) -> dict[str, Tensor]:
    """Padded prompts of a batch of B images; points, boxes and labels are as in `ViTPImageProcessor.preprocess`.

    Args:
        image_sizes: (height, width) of every image in pixels.
        point_origin: `"center"`: a point names a pixel and means its middle; `"corner"`: its upper left corner.
        num_labels: number of classes, for checking labels; `None` does not check.

    Returns:
        `prompts` (B, N, 4) float32, centre x, centre y, width and height in [0, 1], zero-padded to the most prompts of
        an image; `prompt_mask` (B, N) bool, True for real ones; with labels `labels` (B, N) int64.
    """
    points = _by_image(input_points, "input_points", len(image_sizes), ("x", "y"))
    boxes = _by_image(input_boxes, "input_boxes", len(image_sizes), ("x0", "y0", "x1", "y1"))
    rows = []
    for index, size in enumerate(image_sizes):
        _check_points(points[index], size, f"input_points[{index}]")
        _check_boxes(boxes[index], size, f"input_boxes[{index}]")
        # In float64 up to here: in float32 a box at the far edge of a large image could reach past 1.
        row = np.concatenate([_from_points(points[index], size, point_origin), _from_boxes(boxes[index], size)])
        if not len(row):
            raise ValueError(f"images[{index}] has no prompt; give every image at least one point or box")
        rows.append(torch.from_numpy(row.astype(np.float32)))
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    data = {"prompts": pad_sequence(rows, batch_first=True), "prompt_mask": pad_sequence(real, batch_first=True)}
    if input_labels is not None:
        labels = _labels_by_image(input_labels, [len(row) for row in rows], num_labels)
        data["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
    return data


def _by_image(given: Any, name: str, num_images: int, fields: tuple[str, ...]) -> list[np.ndarray]:
    """(n, fields) float64 for each image."""
    if given is None:
        return [np.zeros((0, len(fields)))] * num_images
    if num_images == 1 and _depth(given) == 2:
        given = [given]
    shape = f"({', '.join(fields)})"
    # [[], []], where no image has any, is one level short of the usual nesting, but valid.
    all_empty = isinstance(given, list | tuple) and all(isinstance(row, list | tuple) and not row for row in given)
    if (_depth(given) != 3 and not all_empty) or len(given) != num_images:
        raise ValueError(
            f"{name} of shape {_shape_of(given)} for {num_images} images; give a list for each image with its "
            f"{shape}, such as {name}=[[{list(range(10, 10 + 10 * len(fields), 10))}]]"
        )
    arrays = []
    for index, of_image in enumerate(given):
        try:
            array = np.asarray(_plain(of_image), dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}[{index}] is not a list of numbers {shape}: {error}") from error
        if array.size == 0:
            array = array.reshape(0, len(fields))
        if array.ndim != 2 or array.shape[1] != len(fields):
            raise ValueError(f"{name}[{index}] has shape {array.shape}; every entry is {shape}")
        arrays.append(array)
    return arrays


def _plain(values: Any) -> Any:
    """Lists of numbers from any mixture of lists, arrays and tensors."""
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
        if not (0 <= x < width and 0 <= y < height):  # also refuses NaN
            raise ValueError(
                f"{name}[{index}] is ({x:g}, {y:g}), outside the image of {width} x {height} pixels (width x "
                f"height): give x from 0 to {width - 1}, y from 0 to {height - 1}"
            )


def _check_boxes(boxes: np.ndarray, size: Size, name: str) -> None:
    height, width = size
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        box = f"{name}[{index}] is ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{box}: its right or lower edge comes before the other one; give (x0, y0, x1, y1), not width and "
                "height"
            )
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(
                f"{box}, outside the image of {width} x {height} pixels (width x height); clip it to the image"
            )


def _from_points(points: np.ndarray, size: Size, point_origin: str) -> np.ndarray:
    height, width = size
    offset = 0.5 if point_origin == "center" else 0.0
    # A fractional point in the last half pixel would lie outside once the offset is added.
    centers = np.minimum((points + offset) / (width, height), 1.0)
    return np.concatenate([centers, np.zeros_like(centers)], axis=1)


def _from_boxes(boxes: np.ndarray, size: Size) -> np.ndarray:
    height, width = size
    scaled = boxes / (width, height, width, height)
    return np.concatenate([(scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]], axis=1)


def _labels_by_image(given: Any, counts: Sequence[int], num_labels: int | None) -> list[Tensor]:
    values = _plain(given)
    if len(counts) == 1 and _depth(values) == 1:
        values = [values]
    if _depth(values) != 2 or [len(of_image) for of_image in values] != list(counts):
        raise ValueError(
            f"input_labels must hold one class for every prompt, points before boxes: {list(counts)} classes for the "
            f"{len(counts)} images, not {_shape_of(given)}"
        )
    for index, of_image in enumerate(values):
        for position, label in enumerate(of_image):
            known = isinstance(label, int) and (label == IGNORED_LABEL or 0 <= label < (num_labels or label + 1))
            if not known:
                classes = "0" if num_labels is None else f"0 to {num_labels - 1}"
                raise ValueError(
                    f"input_labels[{index}][{position}] is {label!r}; classes are whole numbers from {classes}"
                    f"{' on' if num_labels is None else ''}, and {IGNORED_LABEL} means none"
                )
    return [torch.tensor(of_image, dtype=torch.int64) for of_image in values]
