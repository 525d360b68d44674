"""Image processor of EoMT: images and maps to tensors, outputs to segments.

Two ways to bring an image to the model's input, both as in the official evaluation. Padded (panoptic and instance):
scaled to fit, padded right and below with black. Windowed (semantic): scaled to cover, cut into overlapping windows
along the longer side. Resizing is antialiased bilinear on 8-bit values. Post-processing is in
`image_post_processing.py`; settings of Transformers' own processor are translated by `transformers_eomt.py`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature

from .checkpoint_json import errors_name
from .image_geometry import content_size, normalized_batch, views, windows_of
from .image_post_processing import PostProcessingSettings, SegmentationPostProcessing, refuse_for_one_call
from .image_processing_plain_vit import (
    PROCESSOR,
    PixelSettings,
    PlainViTImageProcessor,
    as_requested,
    normalization,
    read_images,
    scaled_images,
)
from .mask_labels import masks_of_label_maps, pad_label_map, read_label_maps, resize_label_map
from .published_labels import TASKS as TASKS  # re-exported
from .transformers_eomt import is_transformers_eomt_processor, translate_image_processor


class EoMTImageProcessorKwargs(PixelSettings, PostProcessingSettings, total=False):
    """The settings of `EoMTImageProcessor`, as stored in preprocessor_config.json."""

    do_pad: bool
    do_split_image: bool | None
    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None


class EoMTImageProcessor(SegmentationPostProcessing, PlainViTImageProcessor):
    """Prepares images for `EoMTForUniversalSegmentation` and turns its outputs into segments.

    Args:
        task: `"panoptic"` serves all three kinds of post-processing, `"instance"` and `"semantic"` only their own.
        size: height and width of the model's input: `{"height": ..., "width": ...}`, a pair, or one integer.
        do_resize: scale images to the input; if False, they must fit as they are.
        resample: Pillow's number of the filter; 2 is bilinear.
        rescale_factor: 1/255 takes 8-bit values to [0, 1]; applied with `do_rescale`.
        image_mean, image_std: of each channel in [0, 1]; applied with `do_normalize`. Their length is the number of
            channels that images must have; grey ones become RGB where it is 3.
        value_range: the values of black and white in images of more than 8 bits, such as (0, 4095).
        bands: numbers of the bands to take of image files, from 1, such as (4, 3, 2); images in memory are taken whole.
        do_pad: pad to `size`; if False, all images of a call must come out at one size.
        do_split_image: cut into windows; `None`: for task `"semantic"` only.
        ignore_index: value of a label map that belongs to no mask; `None`: no such value.
        do_reduce_labels: labels are counted from 1 and 0 is ignored (ADE20K's files); class k becomes k - 1.
        num_labels: number of classes, to check label maps against; `None` does not check.
        stuff_classes: classes whose segments panoptic post-processing merges.
        threshold: panoptic post-processing keeps queries whose class probability exceeds it.
        mask_threshold: probability from which a pixel belongs to a mask.
        overlap_mask_area_threshold: share of its own mask that a panoptic segment must keep.
        instance_threshold: score from which instance post-processing keeps an object.
        num_instances: maximum number of objects per image in instance post-processing.
        temperature: calibrates the scores of segments and the confidence `maxscore`, but changes no segment, see
            `calibrated` in confidence.py; `None`: scores are as the model gives them.
    """

    valid_kwargs = EoMTImageProcessorKwargs  # only what this processor heeds
    model_input_names = ["pixel_values"]  # noqa: RUF012 - a plain list in every Transformers processor

    task = "panoptic"
    size = {"height": 640, "width": 640}  # noqa: RUF012
    do_pad = True
    do_split_image: bool | None = None
    ignore_index = 255
    do_reduce_labels = False
    num_labels = None
    stuff_classes: list[int] | None = None
    # The official evaluation's values for panoptic segmentation; the instance threshold is for showing objects, as
    # AP is computed from all candidates.
    threshold = 0.8
    mask_threshold = 0.5
    overlap_mask_area_threshold = 0.8
    instance_threshold = 0.5
    num_instances = 100
    temperature: float | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check_post_processing()
        if self.do_split_image is None:
            self.do_split_image = self.task == "semantic"
        if self.do_split_image and self.task != "semantic":
            raise ValueError(
                f"do_split_image=True with task={self.task!r}: windows can be merged into a semantic map only; pass "
                "do_split_image=False or task='semantic'"
            )
        for name in ("num_instances", "num_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        # The usual cause: a checkpoint's stuff classes with another label set's num_labels.
        if any(not 0 <= label < (self.num_labels or label + 1) for label in self.stuff_classes or ()):
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
            with errors_name(f"{pretrained_model_name_or_path}: {PROCESSOR}"):
                settings = translate_image_processor(settings, pretrained_model_name_or_path, **kwargs)
            settings["image_processor_type"] = cls.__name__
        return settings, unused

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
            device: where to compute and leave the tensors; `None`: the CPU, or where a tensor already is.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
            kwargs: settings for this call only.

        Returns:
            `pixel_values` (B, C, height, width) float32, and `content_sizes` (B, 2) int64, the size of each scaled
            image in model pixels, before padding or cutting. Windowed: `pixel_values` holds all windows, image by
            image, and `patch_offsets` (windows, 3) int64 their rows (image, start, end) along the longer side. With
            maps: `mask_labels`, a list of (n, height, width) bool, and `class_labels`, a list of (n,) int64, one entry
            for each row of `pixel_values`; on request `loss_mask` (B, height, width) bool.

        Raises:
            ValueError: unreadable images or maps, maps that do not match, unknown labels or settings that do not fit.
        """
        # Only post-processing uses these, so a call that prepares images would ignore them.
        refuse_for_one_call([name for name in PostProcessingSettings.__annotations__ if name in kwargs])
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
        tensors = read_images(images, settings, **reading)
        image_sizes = [(image.shape[1], image.shape[2]) for image in tensors]
        input_size = (settings["size"].height, settings["size"].width)
        windowed = settings["do_split_image"]
        content_sizes = [
            content_size(size, input_size, windowed=windowed, do_resize=settings["do_resize"], name=f"images[{index}]")
            for index, size in enumerate(image_sizes)
        ]
        windows = windows_of(content_sizes, input_size) if windowed else None
        if not windowed and not settings["do_pad"]:
            if len(set(content_sizes)) > 1:
                raise ValueError(
                    f"with do_pad=False all images must come out at one size, but they are {content_sizes}"
                )
            input_size = content_sizes[0]
        scaled = scaled_images(tensors, content_sizes, settings)
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
            # Maps are cut and padded as single channels: a bool mask for each segment takes far more memory.
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
