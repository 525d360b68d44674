"""Image processor of ViT-P: images, points and boxes in, tensors for the model out, and its logits back to names.

Images are squashed to the input, their aspect not kept, as in the official code; prompts are given in pixels of the
original image and scaled with it. Resizing is antialiased bilinear on 8-bit values.

Points and boxes in pixels of images to the prompts that ViT-P reads, with every mistake refused by its place.

`prompts_of` takes what a user gives for a batch of images and makes padded tensors of it. N prompts of an image:
its points, then its boxes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

from .configuration_vit_p import POINT_ORIGINS
from .image_decoding import as_list, image_tensor
from .image_geometry import Size, normalized_batch, scale_image
from .image_processing_plain_vit import PlainViTImageProcessor, as_requested, normalization


class ViTPImageProcessorKwargs(TypedDict, total=False):
    """The settings of `ViTPImageProcessor`, as stored in preprocessor_config.json."""

    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict
    do_resize: bool
    resample: int | Resampling
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    patch_size: int | None
    point_origin: str
    id2label: dict[int, str] | dict[str, str] | None


class ViTPImageProcessor(PlainViTImageProcessor):
    """Prepares images and prompts for `ViTPForPointClassification` and names its answers.

    Args:
        size: height and width of the model's input: `{"height": ..., "width": ...}`, a pair, or one integer.
        do_resize: squash images to the input; without, they must have its size.
        resample: Pillow's number of the filter; 2 is bilinear.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 takes 8-bit values to [0, 1].
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: mean of each channel in [0, 1].
        image_std: standard deviation of each channel in [0, 1].
        patch_size: of the model, for checking `size`; `None` does not check.
        point_origin: what a point (x, y) means: `"center"`, the middle of the pixel of that number, or `"corner"`, its
            upper left corner (official weights). It is that of the model's config.
        id2label: names of the classes, for post-processing and for checking labels.

    Raises:
        ValueError: settings that contradict each other or are out of range.
    """

    valid_kwargs = ViTPImageProcessorKwargs  # type: ignore[assignment] # only what this processor heeds
    model_input_names = ["pixel_values", "prompts", "prompt_mask"]  # noqa: RUF012

    size = {"height": 518, "width": 518}  # noqa: RUF012
    do_resize = True
    resample = Resampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    patch_size: int | None = 14
    point_origin = "center"
    id2label: Mapping[Any, str] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.id2label is not None:  # keys of JSON are strings
            self.id2label = {int(index): name for index, name in self.id2label.items()}

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare images, and prompts where given; see `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

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
            input_points: for each image its points (x, y) in pixels of the image, as in `[[[x, y], ...], ...]`; of
                a single image `[[x, y], ...]` will do.
            input_boxes: for each image its boxes (x0, y0, x1, y1), edges in pixels. One without area is a point.
            input_labels: for each image the classes of its points, then of its boxes; -100 for those without.
            return_tensors: `"pt"`, or `"np"` for NumPy arrays.
            device: where to work and leave the tensors; `None` is the CPU, or where a tensor is.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
            kwargs: settings for this call only.

        Returns:
            `pixel_values` (B, 3, height, width) float32 and `original_sizes` (B, 2) int64, height and width of the
            images. With prompts: `prompts` (B, N, 4) float32, the points of each image before its boxes, and
            `prompt_mask` (B, N) bool, False for padding; with labels: `labels` (B, N) int64.

        Raises:
            ValueError: images that cannot be read, prompts that lie outside, are not numbers, of the wrong shape or
                none, unknown labels, and settings that do not fit; the message names image and prompt.
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
            input_points: as in `preprocess`.
            input_boxes: as in `preprocess`.
            input_labels: as in `preprocess`.

        Returns:
            `prompts` and `prompt_mask`, and `labels` where given, as in `preprocess`; where the sizes are.

        Raises:
            ValueError: as in `preprocess`.
        """
        sizes = original_sizes.tolist() if isinstance(original_sizes, Tensor) else original_sizes
        device = original_sizes.device if isinstance(original_sizes, Tensor) else None
        num_labels = len(self.id2label) if self.id2label else None
        data = prompts_of(
            [(int(height), int(width)) for height, width in sizes],
            input_points,
            input_boxes,
            input_labels,
            point_origin=self.point_origin,
            num_labels=num_labels,
        )
        return {name: tensor.to(device) for name, tensor in data.items()}

    def post_process_point_classification(
        self, outputs: Any, top_k: int = 1, id2label: Mapping[Any, str] | None = None
    ) -> list[dict[str, Any]]:
        """The most probable classes of every prompt.

        Args:
            outputs: the model's, with `logits` (B, N, C) and, where prompts were padded, `prompt_mask` (B, N).
            top_k: how many classes a prompt, best first; at most C are there.
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
        num_labels = logits.shape[-1]
        if names is not None and (missing := [index for index in range(num_labels) if index not in names]):
            raise ValueError(f"id2label has no name for class {missing[0]} of the {num_labels} that the model knows")
        scores, label_ids = logits.float().softmax(dim=-1).topk(min(top_k, num_labels), dim=-1)
        mask = getattr(outputs, "prompt_mask", None)
        answers = []
        for index in range(len(logits)):
            real = slice(None) if mask is None else mask[index].bool().to(scores.device)
            ids = label_ids[index][real]
            answers.append(
                {
                    "label_ids": ids,
                    "scores": scores[index][real],
                    "labels": [[f"LABEL_{i}" if names is None else names[i] for i in row] for row in ids.tolist()],
                }
            )
        return answers

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
        tensors = [image_tensor(image, f"images[{index}]", **reading) for index, image in enumerate(as_list(images, 3))]
        if not tensors:
            raise ValueError("images is empty; give at least one image")
        image_sizes = [(image.shape[1], image.shape[2]) for image in tensors]
        input_size = (settings["size"].height, settings["size"].width)
        if not settings["do_resize"]:
            _check_sizes(image_sizes, input_size)
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
        scaled = [
            scale_image(
                image,
                input_size,
                resample=settings["resample"],
                do_rescale=settings["do_rescale"],
                name=f"images[{index}]",
            )
            for index, image in enumerate(tensors)
        ]
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


IGNORED_LABEL = -100


def prompts_of(
    image_sizes: Sequence[Size],
    input_points: Any = None,
    input_boxes: Any = None,
    input_labels: Any = None,
    *,
    point_origin: str = "center",
    num_labels: int | None = None,
) -> dict[str, Tensor]:
    """Prompts of a batch of images.

    Args:
        image_sizes: (height, width) of every image in pixels, B of them.
        input_points: for each image its points (x, y), counted in pixels from 0; of a single image, its points.
        input_boxes: for each image its boxes (x0, y0, x1, y1), edges in pixels from 0 to width or height; of a single
            image, its boxes. A box without area is a point at that place.
        input_labels: for each image the classes of its points, then of its boxes; -100 for those without.
        point_origin: `"center"`: a point names a pixel and means its middle; `"corner"`: its upper left corner.
        num_labels: number of classes, for checking labels; `None` does not check.

    Returns:
        `prompts` (B, N, 4) float32, centre x, centre y, width and height in [0, 1], with zeros behind the last one of
        each image; `prompt_mask` (B, N) bool, True for real ones; with labels `labels` (B, N) int64.

    Raises:
        ValueError: an image without prompts, or a prompt or label of the wrong shape or outside of its range; the
            message names image and prompt.
    """
    points = _by_image(input_points, "input_points", len(image_sizes), ("x", "y"))
    boxes = _by_image(input_boxes, "input_boxes", len(image_sizes), ("x0", "y0", "x1", "y1"))
    rows = []
    for index, size in enumerate(image_sizes):
        _check_points(points[index], size, f"input_points[{index}]")
        _check_boxes(boxes[index], size, f"input_boxes[{index}]")
        row = np.concatenate([_from_points(points[index], size, point_origin), _from_boxes(boxes[index], size)])
        if not len(row):
            raise ValueError(f"images[{index}] has no prompt; give every image at least one point or box")
        rows.append(torch.from_numpy(row.astype(np.float32)))
    data = {
        "prompts": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "prompt_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True
        ),
    }
    if input_labels is not None:
        labels = _labels_by_image(input_labels, [len(row) for row in rows], num_labels)
        data["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
    return data


def _by_image(given: Any, name: str, num_images: int, fields: tuple[str, ...]) -> list[np.ndarray]:
    """(n, fields) float64 of each image."""
    if given is None:
        return [np.zeros((0, len(fields)))] * num_images
    if num_images == 1 and _depth(given) == 2:
        given = [given]
    what = f"({', '.join(fields)})"
    nothing = isinstance(given, list | tuple) and all(isinstance(row, list | tuple) and not row for row in given)
    if (_depth(given) != 3 and not nothing) or len(given) != num_images:
        raise ValueError(
            f"{name} of shape {_shape_of(given)} for {num_images} images; give a list for each image with its "
            f"{what}, such as {name}=[[{list(range(10, 10 + 10 * len(fields), 10))}]]"
        )
    arrays = []
    for index, of_image in enumerate(given):
        try:
            array = np.asarray(_plain(of_image), dtype=np.float64)
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
                f"{name}[{index}] is ({x:g}, {y:g}), outside the image of {width} x {height} pixels (width x "
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
                f"{place}, outside the image of {width} x {height} pixels (width x height); clip it to the image"
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
        for number, label in enumerate(of_image):
            known = isinstance(label, int) and (label == IGNORED_LABEL or 0 <= label < (num_labels or label + 1))
            if not known:
                classes = "0" if num_labels is None else f"0 to {num_labels - 1}"
                raise ValueError(
                    f"input_labels[{index}][{number}] is {label!r}; classes are whole numbers from {classes}"
                    f"{' on' if num_labels is None else ''}, and {IGNORED_LABEL} means none"
                )
    return [torch.tensor(of_image, dtype=torch.int64) for of_image in values]
