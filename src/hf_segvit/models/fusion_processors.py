"""The image processors of a fused model's parts, from ids, folders, objects or saved settings.

Transformers' own EoMT processor is translated into ours, which does the same and says where a picture lies in the
input; those of Mask2Former, MaskFormer and OneFormer say it with their pixel mask, and are kept.
"""

import os
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from .configuration_eomt import EoMTConfig
from .image_processing_eomt import EoMTImageProcessor
from .image_processing_vit_p import ViTPImageProcessor
from .published_labels import find_published_labels
from .transformers_eomt import TRANSFORMERS_EOMT_TYPES
from .transformers_eomt_processor import is_transformers_eomt_processor, translated_settings

logger = logging.get_logger(__name__)

ProcessorSource = Any  # an image processor, its settings, a folder or a Hub id

_MASKING_PROCESSORS = ("Mask2FormerImageProcessor", "MaskFormerImageProcessor", "OneFormerImageProcessor")
# Of OneFormer's processor, what only its training needs; the first two make it ask the Hub for class names.
_TRAINING_SETTINGS = ("class_info_file", "repo_path", "metadata", "num_text")


def generator_processor_of(source: ProcessorSource, config: Any = None, **kwargs: Any) -> Any:
    """The generator's image processor.

    Args:
        source: the processor (of a OneFormer also its OneFormerProcessor), its settings, a folder or a Hub id.
        config: of the fused model, to check that the processor belongs to the generator.
        kwargs: where to find a folder or id, such as `revision`.

    Raises:
        ValueError: there is none, or it is of a kind that fusion cannot use or another than the generator's.
    """
    source = getattr(source, "image_processor", source)
    settings = _settings(source, "generator", kwargs)
    kind = _kind(settings)
    if is_transformers_eomt_processor(settings):
        processor: Any = _translated(source, config, kwargs)
    elif kind == "EoMTImageProcessor":
        processor = source if isinstance(source, EoMTImageProcessor) else EoMTImageProcessor(**settings)
    elif kind in _MASKING_PROCESSORS:
        kept = {name: value for name, value in settings.items() if name not in _TRAINING_SETTINGS}
        processor = getattr(transformers, kind).from_dict(kept)
    else:
        raise ValueError(
            f"the generator's image processor is of type {kind!r}; fusion knows EoMTImageProcessor, "
            f"EomtImageProcessor, {', '.join(_MASKING_PROCESSORS)} (is the order generator, classifier?)"
        )
    if config is not None:
        model_type = config.generator_config.model_type
        is_eomt = model_type in (EoMTConfig.model_type, *TRANSFORMERS_EOMT_TYPES)
        if is_eomt != isinstance(processor, EoMTImageProcessor):
            raise ValueError(
                f"the generator is a model of type {model_type!r}, but the processor given for it is a {kind}; take "
                "the processor that was saved with the model"
            )
    return processor


def classifier_processor_of(source: ProcessorSource, **kwargs: Any) -> ViTPImageProcessor:
    """The classifier's image processor.

    Args:
        source: the processor, its settings, a folder or a Hub id.
        kwargs: where to find a folder or id, such as `revision`.

    Raises:
        ValueError: it is no ViTPImageProcessor.
    """
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
    """The classes to merge in panoptic segmentation: as the fused config or the generator's processor says.

    Without either, those of the published label set that the generator's classes are.
    """
    if config is not None and config.stuff_classes:
        return list(config.stuff_classes)
    stored = getattr(processor, "stuff_classes", None)
    if stored or config is not None:
        return list(stored or [])
    labels = None
    if isinstance(source, str | os.PathLike):
        settings, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
        labels = find_published_labels(settings.get("id2label") or {})
    if labels is None:
        logger.warning_once(
            "which classes are stuff is not known, so stuff is not fused in panoptic segmentation; pass "
            "config=model.config or stuff_classes=[...]"
        )
    return list(labels.stuff_classes) if labels else []


def _settings(source: ProcessorSource, part: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    if isinstance(source, str | os.PathLike):
        return ImageProcessingMixin.get_image_processor_dict(source, **kwargs)[0]
    if isinstance(source, ImageProcessingMixin):
        return source.to_dict()
    raise ValueError(
        f"the {part}'s image processor is missing: {type(source).__name__} is none; pass an image processor, or the "
        "folder or Hub id of one"
    )


def _kind(settings: dict[str, Any]) -> str:
    """Class name of the processor, whichever back-end it was saved from; older files name a feature extractor."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "unknown"
    return kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _translated(source: ProcessorSource, config: Any, kwargs: dict[str, Any]) -> EoMTImageProcessor:
    """Transformers' EoMT processor as ours; of a folder or repository, its config.json says what the classes are."""
    if isinstance(source, str | os.PathLike):
        return EoMTImageProcessor.from_pretrained(source, **kwargs)
    id2label = {} if config is None else config.generator_config.id2label or {}
    return EoMTImageProcessor(**translated_settings(source if isinstance(source, dict) else source.to_dict(), id2label))
