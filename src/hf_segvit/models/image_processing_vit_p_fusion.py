"""Image processor of ViT-P fusion: pictures in, inputs of generator and ViT-P out, and fused outputs to segments.

It holds the image processors of both parts and writes them into one preprocessor_config.json. A picture is decoded
once; the generator sees it as its own processor prepares it, ViT-P sees the same picture whole and without padding.
Post-processing is that of EoMT, in `image_post_processing.py`.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_utils import BatchFeature

from .configuration_vit_p_fusion import OFFICIAL_GEOMETRIES
from .fusion_processors import ProcessorSource, classifier_processor_of, generator_processor_of, stuff_classes_of
from .image_inputs import normalized_batch
from .image_post_processing import SegmentationPostProcessing
from .image_processing_eomt import TASKS, EoMTImageProcessor
from .image_processing_plain_vit import PlainViTImageProcessor, as_requested, normalization
from .image_windows import Size
from .picture_decoding import as_list, check_unit_range, picture_tensor
from .transformers_eomt_processor import hub_arguments

CLASSIFIER_SOURCES = ("picture", "input")


class ViTPFusionImageProcessorKwargs(TypedDict, total=False):
    """The settings of `ViTPFusionImageProcessor`, as stored in preprocessor_config.json."""

    generator: Any
    classifier: Any
    task: str
    classifier_source: str
    official_geometry: str | None
    stuff_classes: list[int] | None
    threshold: float
    mask_threshold: float
    overlap_mask_area_threshold: float
    instance_threshold: float
    num_instances: int


_POST_PROCESSING = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "instance_threshold", "num_instances")


class ViTPFusionImageProcessor(SegmentationPostProcessing, PlainViTImageProcessor):
    """Prepares pictures for `ViTPFusionForUniversalSegmentation` and turns its outputs into segments.

    Args:
        generator: image processor of the generator, or its settings: an EoMTImageProcessor, or Transformers' processor
            of EoMT, Mask2Former, MaskFormer or OneFormer.
        classifier: the ViTPImageProcessor, or its settings.
        task: `"panoptic"` serves all three kinds of post-processing, `"instance"` and `"semantic"` their own; `None`:
            the generator's task, or panoptic.
        classifier_source: what ViT-P's picture is made from: the `"picture"` as it was given, or the generator's
            `"input"`, which is there already on the device; it is as sharp where the input is larger than ViT-P's.
        official_geometry: as in the model's config. With `"oneformer"` ViT-P's picture is the generator's padded input.
        stuff_classes: classes whose segments panoptic post-processing merges; `None`: the generator's.
        threshold: as in `EoMTImageProcessor`; `None`: the generator's, if it has one. So are those below.
        mask_threshold: as in `EoMTImageProcessor`.
        overlap_mask_area_threshold: as in `EoMTImageProcessor`.
        instance_threshold: as in `EoMTImageProcessor`.
        num_instances: as in `EoMTImageProcessor`.

    Raises:
        ValueError: processors of another kind, or settings that contradict each other or are out of range.
    """

    valid_kwargs = ViTPFusionImageProcessorKwargs  # type: ignore[assignment] # only what this processor heeds
    model_input_names = ["pixel_values", "classifier_pixel_values"]  # noqa: RUF012

    generator: Any = None
    classifier: Any = None
    task: str = None  # type: ignore[assignment] # until the generator has said
    classifier_source = "picture"
    official_geometry: str | None = None
    stuff_classes: list[int] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = generator_processor_of(self.generator)
        self.classifier = classifier_processor_of(self.classifier)
        self.task = self.task or getattr(self.generator, "task", "panoptic")
        if self.stuff_classes is None:
            self.stuff_classes = getattr(self.generator, "stuff_classes", None) or []
        self.stuff_classes = sorted({int(label) for label in self.stuff_classes})
        for name in _POST_PROCESSING:
            if kwargs.get(name) is None:
                setattr(self, name, getattr(self.generator, name, getattr(EoMTImageProcessor, name)))
        for name in _POST_PROCESSING[:-1]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name, choices in (
            ("task", TASKS),
            ("classifier_source", CLASSIFIER_SOURCES),
            ("official_geometry", (None, *OFFICIAL_GEOMETRIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        if self.do_split_image and self.task != "semantic":
            raise ValueError(
                f"the generator's processor cuts pictures into windows, which can be merged into a semantic map only, "
                f"but task={self.task!r}; pass task='semantic'"
            )
        if self.do_split_image and (self.classifier_source == "input" or self.official_geometry == "oneformer"):
            raise ValueError(
                "the generator's processor cuts pictures into windows, so no input holds a whole picture for ViT-P; "
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
            config: of the fused model, which says the classes, task and geometry; recommended.
            generator_kwargs: as the model was given; what says where the generator is, such as `revision`, counts here.
            classifier_kwargs: the same for the classifier.
            settings: other settings; they win over the config's.

        Raises:
            ValueError: a processor of another kind, or of another kind than the model in `config`.
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
                    f"the classifier's processor makes pictures of {height}x{width}, but its patches have {patch_size} "
                    "pixels; set its size to multiples of that"
                )
        if settings.get("stuff_classes") is None:
            settings["stuff_classes"] = stuff_classes_of(generator, processors[0], config, **where)
        if getattr(processors[0], "task", None) in ("semantic", "instance"):
            settings["task"] = processors[0].task
        return cls(generator=processors[0], classifier=processors[1], **settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as saved, with those of both parts."""
        settings = super().to_dict()
        for part in ("generator", "classifier"):
            settings[part] = getattr(self, part).to_dict()
        return settings

    # What post-processing asks of a processor follows from the generator's.

    @property
    def size(self) -> Any:
        """Input size of the generator, or its rule for one."""
        return self.generator.size

    @property
    def do_resize(self) -> bool:  # type: ignore[override]
        """Whether the generator's pictures are scaled to the input."""
        return self.generator.do_resize

    @property
    def do_pad(self) -> bool:  # type: ignore[override]
        """Whether the generator's pictures are padded to the input."""
        return getattr(self.generator, "do_pad", True) is not False

    @property
    def do_split_image(self) -> bool:  # type: ignore[override]
        """Whether the generator's pictures are cut into windows."""
        return bool(getattr(self.generator, "do_split_image", False))

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare pictures; see `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = "pt",
        device: Any = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare pictures.

        Args:
            images: a picture or a list of them: Pillow images, paths, URLs, arrays or tensors; see `picture_tensor`.
            return_tensors: `"pt"`, or `"np"` for NumPy arrays.
            device: where to work and leave the tensors; `None` is the CPU, or where a tensor is.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
            kwargs: settings of the generator's processor for this call only, such as `size`.

        Returns:
            `pixel_values` and what else the generator wants (`pixel_mask`, `patch_offsets`), `classifier_pixel_values`
            (B, 3, height, width) float32, and `content_sizes` (B, 2) int64, the size of each scaled picture in pixels
            of the generator's input, before padding or cutting. With `official_geometry="oneformer"` also
            `original_sizes` (B, 2) int64.

        Raises:
            ValueError: pictures that cannot be read or brought to an input; the message names the picture.
        """
        fixed = sorted(kwargs.keys() & self.valid_kwargs.__annotations__.keys())
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)}: cannot be set for one call; set it when the processor is made, "
                "or pass thresholds and stuff_classes to post-processing"
            )
        unknown = sorted(kwargs.keys() - self.generator.valid_kwargs.__annotations__.keys())
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: neither understood here nor by the generator's {type(self.generator).__name__}"
                "; label maps are not, since fused models are joined of trained ones"
            )
        pictures = [
            picture_tensor(picture, f"images[{index}]", device=device, input_data_format=input_data_format)
            for index, picture in enumerate(as_list(images, 3))
        ]
        if not pictures:
            raise ValueError("images is empty; give at least one picture")
        data = self._generator_inputs(pictures, kwargs)
        if self.official_geometry == "oneformer":
            data["classifier_pixel_values"] = self._views_of_input(data["pixel_values"], None)
            sizes = [picture.shape[1:] for picture in pictures]
            data["original_sizes"] = torch.tensor(sizes, dtype=torch.int64, device=data["pixel_values"].device)
        elif self.classifier_source == "input":
            data["classifier_pixel_values"] = self._views_of_input(data["pixel_values"], data["content_sizes"])
        else:
            views = self.classifier(pictures, device=device, input_data_format="channels_first")
            data["classifier_pixel_values"] = views["pixel_values"]
        return BatchFeature(data=as_requested(data, return_tensors))

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return kwargs  # sizes and the like are the parts' own

    def _generator_inputs(self, pictures: list[Tensor], settings: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.generator, EoMTImageProcessor):
            return dict(self.generator(pictures, input_data_format="channels_first", **settings))
        if self.generator.do_rescale:
            # Theirs divides by 255 whatever the type.
            for index, picture in enumerate(pictures):
                if picture.is_floating_point():
                    check_unit_range(picture, f"images[{index}]")
            pictures = [picture * 255 if picture.is_floating_point() else picture for picture in pictures]
        made = self.generator(images=pictures, return_tensors="pt", input_data_format="channels_first", **settings)
        data = {name: made[name] for name in ("pixel_values", "pixel_mask") if name in made}
        height, width = data["pixel_values"].shape[-2:]
        mask = data.get("pixel_mask")
        if mask is None:
            data["content_sizes"] = torch.tensor([[height, width]] * len(pictures), device=data["pixel_values"].device)
        else:
            real = mask.bool()
            data["content_sizes"] = torch.stack([real.any(dim=2).sum(dim=1), real.any(dim=1).sum(dim=1)], dim=1)
        return data

    def _views_of_input(self, pixel_values: Tensor, content_sizes: Tensor | None) -> Tensor:
        """ViT-P's pictures, made from the generator's input: the contents, or all of it with its padding."""
        size = list(_height_width(self.classifier))
        if content_sizes is None:
            return tvF.resize(pixel_values, size, antialias=True)
        contents = [
            row[:, :height, :width] for row, (height, width) in zip(pixel_values, content_sizes.tolist(), strict=True)
        ]
        contents = [tvF.resize(content, size, antialias=True) for content in contents]
        generator, classifier = (normalization(vars(part)) for part in (self.generator, self.classifier))
        shift, scale = (
            pixel_values.new_tensor(generator[name]).view(3, 1, 1) / generator["rescale_factor"]
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
        """Input size that outputs were made from: generators of Transformers pad to the largest picture of a batch."""
        sizes = getattr(outputs, "input_sizes", None)
        if sizes is not None:
            return tuple(int(side) for side in sizes[0])
        if isinstance(self.generator, EoMTImageProcessor):
            return self._input_size(None)
        return tuple(4 * side for side in outputs.masks_queries_logits.shape[-2:])


def _height_width(processor: Any) -> Size:
    return processor.size["height"], processor.size["width"]
