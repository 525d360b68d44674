"""Image processor of EoMT: images and label maps in, tensors for the model out, and its outputs back to segments.

Two ways to bring an image to the model's input, both as in the official evaluation. Padded (panoptic and instance):
scaled to fit, padded right and below with black. Windowed (semantic): scaled to cover, cut into overlapping windows
along the longer side. Resizing is antialiased bilinear on 8-bit values. Post-processing is in
`image_post_processing.py`, a folder of Transformers' own processor is understood by `transformers_eomt_processor.py`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from PIL.Image import Resampling
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

from .image_decoding import as_list, image_tensor
from .image_geometry import Size, content_size, normalized_batch, scale_image, views, windows_of
from .image_post_processing import SegmentationPostProcessing
from .image_processing_plain_vit import PlainViTImageProcessor, as_requested, normalization
from .mask_labels import masks_of_label_maps, pad_label_map, read_label_maps, resize_label_map
from .published_labels import TASKS
from .transformers_eomt import is_transformers_eomt_processor, translate_image_processor


class EoMTImageProcessorKwargs(TypedDict, total=False):
    """The settings of `EoMTImageProcessor`, as stored in preprocessor_config.json."""

    task: str
    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict
    do_resize: bool
    resample: int | Resampling
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    do_pad: bool
    do_split_image: bool | None
    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    stuff_classes: list[int] | None
    threshold: float
    mask_threshold: float
    overlap_mask_area_threshold: float
    instance_threshold: float
    num_instances: int


# Settings that only post-processing heeds: a call that prepares images cannot change them for itself.
_FIXED_SETTINGS = (
    "task",
    "stuff_classes",
    "threshold",
    "mask_threshold",
    "overlap_mask_area_threshold",
    "instance_threshold",
    "num_instances",
)


class EoMTImageProcessor(SegmentationPostProcessing, PlainViTImageProcessor):
    """Prepares images for `EoMTForUniversalSegmentation` and turns its outputs into segments.

    Args:
        task: `"panoptic"` serves all three kinds of post-processing, `"instance"` and `"semantic"` their own.
        size: height and width of the model's input: `{"height": ..., "width": ...}`, a pair, or one integer.
        do_resize: scale images to the input; without, they must fit into it as they are.
        resample: Pillow's number of the filter; 2 is bilinear.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 takes 8-bit values to [0, 1].
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: mean of each channel in [0, 1].
        image_std: standard deviation of each channel in [0, 1].
        do_pad: pad to `size`; without, all images of a call must come out at one size.
        do_split_image: cut into windows; `None`: for task `"semantic"`.
        ignore_index: value of a label map that belongs to no mask; `None`: no such value.
        do_reduce_labels: labels are counted from 1 and 0 is ignored (ADE20K's files); class k becomes k - 1.
        num_labels: number of classes, for checking label maps; `None` does not check.
        stuff_classes: classes whose segments panoptic post-processing merges.
        threshold: panoptic post-processing keeps queries whose class probability is above it.
        mask_threshold: probability from which a pixel belongs to a mask.
        overlap_mask_area_threshold: share of its own mask that a panoptic segment must keep.
        instance_threshold: score from which instance post-processing keeps an object.
        num_instances: most objects of an image in instance post-processing.

    Raises:
        ValueError: settings that contradict each other or are out of range.
    """

    valid_kwargs = EoMTImageProcessorKwargs  # type: ignore[assignment] # only what this processor heeds
    model_input_names = ["pixel_values"]  # noqa: RUF012 - a plain list in every Transformers processor

    task = "panoptic"
    size = {"height": 640, "width": 640}  # noqa: RUF012
    do_resize = True
    resample = Resampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    do_split_image: bool | None = None
    ignore_index = 255
    do_reduce_labels = False
    num_labels = None
    stuff_classes: list[int] | None = None
    threshold = 0.8
    mask_threshold = 0.5
    overlap_mask_area_threshold = 0.8
    instance_threshold = 0.5
    num_instances = 100

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}; it is one of {', '.join(map(repr, TASKS))}")
        if self.do_split_image is None:
            self.do_split_image = self.task == "semantic"
        if self.do_split_image and self.task != "semantic":
            raise ValueError(
                f"do_split_image=True with task={self.task!r}: windows can be merged into a semantic map only; pass "
                "do_split_image=False or task='semantic'"
            )
        self.stuff_classes = sorted({int(label) for label in self.stuff_classes or ()})
        for name in ("threshold", "mask_threshold", "overlap_mask_area_threshold", "instance_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name in ("num_instances", "num_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if any(not 0 <= label < (self.num_labels or label + 1) for label in self.stuff_classes):
            raise ValueError(
                f"stuff_classes={self.stuff_classes} are not all classes of num_labels={self.num_labels}; pass the "
                "stuff_classes of this label set, [] for none"
            )

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The stored settings of a folder or Hub repository; those of Transformers' own EoMT processor translated."""
        settings, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if is_transformers_eomt_processor(settings):
            settings = translate_image_processor(settings, pretrained_model_name_or_path, **kwargs)
        return settings, unused

    def __call__(self, images: Any, segmentation_maps: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare images, and label maps where given; see `preprocess`."""
        return self.preprocess(images, segmentation_maps, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        *,
        return_loss_mask: bool = False,
        return_tensors: str | None = "pt",
        device: Any = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, and label maps where given.

        Args:
            images: an image or a list of them: Pillow images, paths, URLs, arrays or tensors; see `image_tensor`.
            segmentation_maps: for each image its map of labels, or of segment ids; see `label_map_tensor`.
            instance_id_to_semantic_id: segment id to class, one mapping or one for each image; `None` where the maps
                hold classes.
            return_loss_mask: also return which pixels count; padding and ignored ones do not.
            return_tensors: `"pt"`, or `"np"` for NumPy arrays.
            device: where to work and leave the tensors; `None` is the CPU, or where a tensor is.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
            kwargs: settings for this call only.

        Returns:
            `pixel_values` (B, 3, height, width) float32, and `content_sizes` (B, 2) int64, the size of each scaled
            image in model pixels, before padding or cutting. Windowed: `pixel_values` holds the windows of all
            images in turn, and `patch_offsets` (windows, 3) int64 says for each the image's index and the first
            pixel and the one behind the last along the longer side. With maps: `mask_labels`, a list of (n, height,
            width) bool, and `class_labels`, a list of (n,) int64, an entry for each row of `pixel_values`; on request
            `loss_mask` (B, height, width) bool.

        Raises:
            ValueError: images or maps that cannot be read, do not belong together or hold unknown labels, and
                settings that do not fit; the message names the image.
        """
        fixed = [name for name in _FIXED_SETTINGS if name in kwargs]
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)}: cannot be set for one call; set it when the processor is made, "
                "or pass thresholds and stuff_classes to post-processing"
            )
        reading = {"device": device, "input_data_format": input_data_format}
        data = super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, reading, **kwargs)
        if not return_loss_mask:
            data.pop("loss_mask", None)
        return BatchFeature(data=as_requested(data, return_tensors))

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any,
        instance_id_to_semantic_id: Any,
        reading: dict[str, Any],
        **settings: Any,
    ) -> dict[str, Any]:
        tensors = [image_tensor(image, f"images[{index}]", **reading) for index, image in enumerate(as_list(images, 3))]
        if not tensors:
            raise ValueError("images is empty; give at least one image")
        image_sizes = [(image.shape[1], image.shape[2]) for image in tensors]
        input_size = (settings["size"].height, settings["size"].width)
        windowed = settings["do_split_image"]
        content_sizes = [
            content_size(size, input_size, windowed=windowed, do_resize=settings["do_resize"], name=f"images[{index}]")
            for index, size in enumerate(image_sizes)
        ]
        windows = windows_of(content_sizes, input_size) if windowed else None
        if not windowed and not settings["do_pad"]:
            input_size = _only_size(content_sizes)
        scaled = [
            scale_image(
                image,
                content_sizes[index],
                resample=settings["resample"],
                do_rescale=settings["do_rescale"],
                name=f"images[{index}]",
            )
            for index, image in enumerate(tensors)
        ]
        pixel_values = normalized_batch(views(scaled, windows, input_size), input_size, **normalization(settings))
        device = pixel_values.device
        data: dict[str, Any] = {
            "pixel_values": pixel_values,
            "content_sizes": torch.tensor(content_sizes, dtype=torch.int64, device=device),
        }
        if windows is not None:
            data["patch_offsets"] = torch.tensor(windows, dtype=torch.int64, device=device)
        if segmentation_maps is not None:
            maps = read_label_maps(segmentation_maps, image_sizes, device)
            maps = [resize_label_map(*pair) for pair in zip(maps, content_sizes, strict=True)]
            masks, classes, counted = masks_of_label_maps(
                [pad_label_map(label_map, input_size) for label_map in views(maps, windows, input_size)],
                range(len(maps)) if windows is None else [index for index, _, _ in windows],
                instance_id_to_semantic_id,
                ignore_index=settings["ignore_index"],
                do_reduce_labels=settings["do_reduce_labels"],
                num_labels=settings["num_labels"],
            )
            data |= {"mask_labels": masks, "class_labels": classes, "loss_mask": torch.stack(counted)}
        return data


def _only_size(sizes: list[Size]) -> Size:
    if len(set(sizes)) > 1:
        raise ValueError(f"with do_pad=False all images must come out at one size, but they are {sizes}")
    return sizes[0]
