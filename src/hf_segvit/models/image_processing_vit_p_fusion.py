"""Image processor of ViT-P fusion: images to inputs, outputs to segments.

It holds the image processors of both parts and saves them in one preprocessor_config.json. An image is decoded once;
the generator sees it as its own processor prepares it, ViT-P sees it whole and without padding. Post-processing is
that of EoMT, in `image_post_processing.py`.

The functions before the class find the processors of the parts, from ids, folders, objects or saved settings.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from .checkpoint_json import errors_name, hub_arguments, shown, stored_config
from .configuration_eomt import EoMTConfig
from .configuration_mask2former_vit import Mask2FormerViTConfig
from .configuration_vit_p_fusion import OFFICIAL_GEOMETRIES
from .image_geometry import Size, normalized_batch
from .image_post_processing import PostProcessingSettings, SegmentationPostProcessing, refuse_for_one_call
from .image_processing_eomt import EoMTImageProcessor
from .image_processing_plain_vit import (
    PROCESSOR,
    PlainViTImageProcessor,
    as_requested,
    check_settings,
    normalization,
    read_images,
    stored_settings,
)
from .image_processing_vit_p import ViTPImageProcessor
from .image_tensors import check_unit_range
from .published_labels import find_published_labels
from .transformers_eomt import (
    TRANSFORMERS_EOMT_TYPES,
    is_transformers_eomt_processor,
    translated_settings,
)

logger = logging.get_logger(__name__)

ProcessorSource = Any  # an image processor, its settings, a folder or a Hub id

CLASSIFIER_SOURCES = ("picture", "input")
_MASKING_PROCESSORS = ("Mask2FormerImageProcessor", "MaskFormerImageProcessor", "OneFormerImageProcessor")
# Settings that only OneFormer's training needs; the first two make its processor ask the Hub for class names.
_TRAINING_SETTINGS = ("class_info_file", "repo_path", "metadata", "num_text")


def generator_processor_of(source: ProcessorSource, config: Any = None, **kwargs: Any) -> Any:
    """The generator's image processor.

    Args:
        source: the processor (for OneFormer also its OneFormerProcessor), its settings, a folder or a Hub id.
        config: of the fused model, to check that the processor belongs to the generator.
        kwargs: where to find a folder or id, such as `revision`.
    """
    source = getattr(source, "image_processor", source)
    settings = _settings(source, "generator", kwargs)
    kind = _kind(settings)
    # Transformers' own EoMT processor does not return where an image lies in the input; ours does. For the masking
    # processors it follows from the pixel mask.
    if is_transformers_eomt_processor(settings):
        processor: Any = _translated(source, config, kwargs)
    elif kind == "EoMTImageProcessor":
        processor = source if isinstance(source, EoMTImageProcessor) else EoMTImageProcessor(**settings)
    elif kind in _MASKING_PROCESSORS:
        used = {name: value for name, value in settings.items() if name not in _TRAINING_SETTINGS}
        with errors_name(f"generator of {PROCESSOR}"):
            processor = getattr(transformers, kind).from_dict(used)
    else:
        raise ValueError(
            f"the generator's image processor is of type {kind!r}; fusion knows EoMTImageProcessor, "
            f"EomtImageProcessor, {', '.join(_MASKING_PROCESSORS)} (is the order generator, classifier?)"
        )
    if config is not None:
        model_type = config.generator_config.model_type
        types = (EoMTConfig.model_type, Mask2FormerViTConfig.model_type, *TRANSFORMERS_EOMT_TYPES)
        if (model_type in types) != isinstance(processor, EoMTImageProcessor):
            raise ValueError(
                f"the generator is a model of type {model_type!r}, but the processor given for it is a {kind}; take "
                "the processor that was saved with the model"
            )
    return processor


def classifier_processor_of(source: ProcessorSource, **kwargs: Any) -> ViTPImageProcessor:
    """The classifier's image processor, from the processor, its settings, a folder or a Hub id."""
    if isinstance(source, ViTPImageProcessor):
        return source
    settings = _settings(source, "classifier", kwargs)
    if _kind(settings) != "ViTPImageProcessor":
        raise ValueError(
            f"the classifier's image processor is of type {_kind(settings)!r}; it must be a ViTPImageProcessor (is the "
            "order generator, classifier?)"
        )
    return ViTPImageProcessor(**settings)


def stuff_classes_of(source: ProcessorSource, processor: Any, config: Any = None, **kwargs: Any) -> list[int]:
    """The classes to merge in panoptic segmentation: of the fused config, else the generator's processor.

    Without either, the stuff classes of the published label set that the generator was trained on.
    """
    if config is not None and config.stuff_classes:
        return list(config.stuff_classes)
    stored = getattr(processor, "stuff_classes", None)
    # A config without stuff classes means none; only without a config is it worth guessing.
    if stored or config is not None:
        return list(stored or [])
    labels = None
    if isinstance(source, str | os.PathLike):
        settings = stored_config(source, **kwargs)
        labels = find_published_labels(settings.get("id2label") or {})
    if labels is None:
        logger.warning_once(
            "which classes are stuff is not known, so stuff is not fused in panoptic segmentation; pass "
            "config=model.config or stuff_classes=[...]"
        )
    return list(labels.stuff_classes) if labels else []


def _settings(source: ProcessorSource, part: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        ours = {"EoMTImageProcessor": EoMTImageProcessor, "ViTPImageProcessor": ViTPImageProcessor}
        check_settings(ours.get(_kind(source), PlainViTImageProcessor), source, f"{part} of {PROCESSOR}")
        return source
    if isinstance(source, str | os.PathLike):
        return stored_settings(source, **kwargs)
    if isinstance(source, ImageProcessingMixin):
        return source.to_dict()
    raise ValueError(
        f"the {part}'s image processor is missing: {type(source).__name__} is none; pass an image processor, or the "
        "folder or Hub id of one"
    )


def _kind(settings: dict[str, Any]) -> str:
    # Older files name a feature extractor, and processors of one model are saved under the names of several back-ends.
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "unknown"
    if not isinstance(kind, str):
        raise ValueError(f"{PROCESSOR}: image_processor_type is {shown(kind)}, not the name of an image processor")
    return kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _translated(source: ProcessorSource, config: Any, kwargs: dict[str, Any]) -> EoMTImageProcessor:
    """Transformers' EoMT processor as ours; the classes follow from the config.json beside it, or from `config`."""
    if isinstance(source, str | os.PathLike):
        return EoMTImageProcessor.from_pretrained(source, **kwargs)
    id2label = {} if config is None else config.generator_config.id2label or {}
    return EoMTImageProcessor(**translated_settings(source if isinstance(source, dict) else source.to_dict(), id2label))


class ViTPFusionImageProcessorKwargs(PostProcessingSettings, total=False):
    """The settings of `ViTPFusionImageProcessor`, as stored in preprocessor_config.json."""

    generator: Any
    classifier: Any
    classifier_source: str
    official_geometry: str | None


_POST_PROCESSING = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "instance_threshold", "num_instances")


class ViTPFusionImageProcessor(SegmentationPostProcessing, PlainViTImageProcessor):
    """Prepares images for `ViTPFusionForUniversalSegmentation` and turns its outputs into segments.

    Args:
        generator: image processor of the generator, or its settings: an EoMTImageProcessor, or Transformers' processor
            of EoMT, Mask2Former, MaskFormer or OneFormer.
        classifier: the ViTPImageProcessor, or its settings.
        task: `"panoptic"` serves all three kinds of post-processing, `"instance"` and `"semantic"` only their own;
            `None`: the generator's task, or panoptic.
        classifier_source: what ViT-P's image is made from: the `"picture"` as it was given, or the generator's
            `"input"`, which is on the device already and as sharp where it is larger than ViT-P's input.
        official_geometry: as in the model's config. With `"oneformer"` ViT-P's image is the generator's padded input.
        stuff_classes: classes whose segments panoptic post-processing merges; `None`: the generator's.
        threshold, mask_threshold, overlap_mask_area_threshold, instance_threshold, num_instances: as in
            `EoMTImageProcessor`; `None`: the generator's, if it has one.
        temperature: as in `EoMTImageProcessor`; that of a part alone would not fit the fused scores.
    """

    valid_kwargs = ViTPFusionImageProcessorKwargs  # type: ignore[assignment] # only what this processor heeds
    model_input_names = ["pixel_values", "classifier_pixel_values"]  # noqa: RUF012

    generator: Any = None
    classifier: Any = None
    task: str = None  # type: ignore[assignment] # filled in by __init__
    classifier_source = "picture"
    official_geometry: str | None = None
    stuff_classes: list[int] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = generator_processor_of(self.generator)
        self.classifier = classifier_processor_of(self.classifier)
        self.task = self.task or getattr(self.generator, "task", "panoptic")
        if self.stuff_classes is None:
            self.stuff_classes = getattr(self.generator, "stuff_classes", None)
        # Transformers' processors store no thresholds; EoMT's are as good for their masks.
        for name in _POST_PROCESSING:
            if kwargs.get(name) is None:
                setattr(self, name, getattr(self.generator, name, getattr(EoMTImageProcessor, name)))
        self.check_post_processing()
        for name, choices in (
            ("classifier_source", CLASSIFIER_SOURCES),
            ("official_geometry", (None, *OFFICIAL_GEOMETRIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        if self.do_split_image and self.task != "semantic":
            raise ValueError(
                f"the generator's processor cuts images into windows, which can be merged into a semantic map only, "
                f"but task={self.task!r}; pass task='semantic'"
            )
        if self.do_split_image and (self.classifier_source == "input" or self.official_geometry == "oneformer"):
            raise ValueError(
                "the generator's processor cuts images into windows, so no input holds a whole image for ViT-P; "
                "use classifier_source='picture' and no official_geometry='oneformer'"
            )

    @classmethod
    def from_generator_and_classifier(
        cls,
        generator: ProcessorSource,
        classifier: ProcessorSource,
        *,
        config: Any = None,
        generator_kwargs: dict[str, Any] | None = None,
        classifier_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "ViTPFusionImageProcessor":
        """Join the image processors of two models.

        Args:
            generator: the generator's image processor (or OneFormerProcessor), or a folder or Hub id of one.
            classifier: the ViTPImageProcessor, or a folder or Hub id of one.
            config: of the fused model, which knows the classes, task and geometry; recommended.
            generator_kwargs: as given to the model; those that locate the generator, such as `revision`, are used.
            classifier_kwargs: the same for the classifier.
            settings: other settings; they override the config's.

        Raises:
            ValueError: a processor that cannot be used, or does not belong to the model in `config`.
        """
        where = hub_arguments(generator_kwargs or {})
        processors = (
            generator_processor_of(generator, config, **where),
            classifier_processor_of(classifier, **hub_arguments(classifier_kwargs or {})),
        )
        if config is not None:
            settings = {"task": config.task, "official_geometry": config.official_geometry} | settings
            height, width = _height_width(processors[1])
            patch_size = config.classifier_config.patch_size
            if height % patch_size or width % patch_size:
                raise ValueError(
                    f"the classifier's processor makes images of {height}x{width}, but its patches have {patch_size} "
                    "pixels; set its size to multiples of that"
                )
        if settings.get("stuff_classes") is None:
            settings["stuff_classes"] = stuff_classes_of(generator, processors[0], config, **where)
        # A generator of masks for one kind of segmentation cannot serve the others, whatever the config asks for.
        if getattr(processors[0], "task", None) in ("semantic", "instance"):
            settings["task"] = processors[0].task
        return cls(generator=processors[0], classifier=processors[1], **settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as saved, with those of both parts."""
        settings = super().to_dict()
        for part in ("generator", "classifier"):
            settings[part] = getattr(self, part).to_dict()
        return settings

    # Post-processing reads these; properties, so that they follow the generator's processor when it is changed.

    @property
    def size(self) -> Any:
        """Input size of the generator, or its rule for one."""
        return self.generator.size

    @property
    def do_resize(self) -> bool:  # type: ignore[override]
        """Whether the generator's images are scaled to the input."""
        return self.generator.do_resize

    @property
    def do_pad(self) -> bool:  # type: ignore[override]
        """Whether the generator's images are padded to the input."""
        return getattr(self.generator, "do_pad", True) is not False

    @property
    def do_split_image(self) -> bool:  # type: ignore[override]
        """Whether the generator's images are cut into windows."""
        return bool(getattr(self.generator, "do_split_image", False))

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = "pt",
        device: Any = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: an image or a list of them: Pillow images, paths, URLs, arrays or tensors; see `image_tensor`.
            return_tensors, device, input_data_format: as in `EoMTImageProcessor.preprocess`.
            kwargs: settings of the generator's processor for this call only, such as `size`.

        Returns:
            `pixel_values` and what else the generator takes (`pixel_mask`, `patch_offsets`), `classifier_pixel_values`
            (B, 3, height, width) float32, and `content_sizes` (B, 2) int64, the size of each scaled image in pixels
            of the generator's input, before padding or cutting. With `official_geometry="oneformer"` also
            `original_sizes` (B, 2) int64.

        Raises:
            ValueError: images that cannot be read or brought to an input; the message names the image.
        """
        refuse_for_one_call(sorted(kwargs.keys() & self.valid_kwargs.__annotations__.keys()))
        unknown = sorted(kwargs.keys() - self.generator.valid_kwargs.__annotations__.keys())
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: neither understood here nor by the generator's {type(self.generator).__name__}"
                "; label maps are not accepted either, since fused models are not trained"
            )
        tensors = read_images(images, vars(self.generator), device, input_data_format)
        data = self._generator_inputs(tensors, kwargs)
        if self.official_geometry == "oneformer":
            data["classifier_pixel_values"] = self._views_of_input(data["pixel_values"], None)
            sizes = [image.shape[1:] for image in tensors]
            data["original_sizes"] = torch.tensor(sizes, dtype=torch.int64, device=data["pixel_values"].device)
        elif self.classifier_source == "input":
            data["classifier_pixel_values"] = self._views_of_input(data["pixel_values"], data["content_sizes"])
        else:
            views = self.classifier(tensors, device=device, input_data_format="channels_first")
            data["classifier_pixel_values"] = views["pixel_values"]
        return BatchFeature(data=as_requested(data, return_tensors))

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return kwargs  # the parts check their own sizes

    def _generator_inputs(self, images: list[Tensor], settings: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.generator, EoMTImageProcessor):
            return dict(self.generator(images, input_data_format="channels_first", **settings))
        if self.generator.do_rescale:
            # Transformers' processors divide by 255 whatever the type, ours takes floats to be in [0, 1].
            for index, image in enumerate(images):
                if image.is_floating_point():
                    check_unit_range(image, f"images[{index}]")
            images = [image * 255 if image.is_floating_point() else image for image in images]
        inputs = self.generator(images=images, return_tensors="pt", input_data_format="channels_first", **settings)
        data = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        height, width = data["pixel_values"].shape[-2:]
        mask = data.get("pixel_mask")
        if mask is None:
            data["content_sizes"] = torch.tensor([[height, width]] * len(images), device=data["pixel_values"].device)
        else:
            real = mask.bool()  # a rectangle at the top left: count the rows and columns that it reaches
            data["content_sizes"] = torch.stack([real.any(dim=2).sum(dim=1), real.any(dim=1).sum(dim=1)], dim=1)
        return data

    def _views_of_input(self, pixel_values: Tensor, content_sizes: Tensor | None) -> Tensor:
        """ViT-P's images, made from the generator's input: the contents, or all of it with its padding (`None`)."""
        size = list(_height_width(self.classifier))
        if content_sizes is None:
            # As the official code does it: the generator's padded input, its normalisation included.
            return tvF.resize(pixel_values, size, antialias=True)
        contents = [
            row[:, :height, :width] for row, (height, width) in zip(pixel_values, content_sizes.tolist(), strict=True)
        ]
        contents = [tvF.resize(content, size, antialias=True) for content in contents]
        # Undo the generator's normalisation, then apply the classifier's.
        generator, classifier = (normalization(vars(part)) for part in (self.generator, self.classifier))
        shift, scale = (
            pixel_values.new_tensor(generator[name]).view(-1, 1, 1) / generator["rescale_factor"]
            for name in ("mean", "std")
        )
        return normalized_batch(
            [content * scale + shift for content in contents],
            _height_width(self.classifier),
            classifier["rescale_factor"],
            classifier["mean"],
            classifier["std"],
        )

    def _geometry(self, outputs: Any, target_sizes: Any, size: Any) -> dict[str, Any]:
        return super()._geometry(outputs, target_sizes, self._size_of(outputs) if size is None else size)

    def _size_of(self, outputs: Any) -> Sequence[int]:
        """Input size that outputs were made from."""
        sizes = getattr(outputs, "input_sizes", None)
        if sizes is not None:
            return tuple(int(side) for side in sizes[0])
        if isinstance(self.generator, EoMTImageProcessor):
            return self._input_size(None)
        # Transformers' generators pad to the largest image of a batch and predict masks at a quarter of that.
        return tuple(4 * side for side in outputs.masks_queries_logits.shape[-2:])


def _height_width(processor: Any) -> Size:
    return processor.size["height"], processor.size["width"]
