"""Loading any universal segmentation model with its image processor, and joining one with a ViT-P.

`load_universal_model` takes this package's models, fused ones too, and those of Transformers; `load_own_model` only the
former. `load_fused_model` makes a fused model of a generator and a classifier, or loads one that was saved as such. As
in `model_loading.py`, whatever is wrong becomes a `ValueError` with a remedy.
"""

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor, PreTrainedConfig

from .model_loading import (
    SEGMENTATION_TYPES,
    load_fused_checkpoint,
    load_point_classifier,
    load_segmentation_model,
    quiet_transformers,
    refuse_missing_folder,
    refuse_non_finite_weights,
)
from .models.configuration_vit_p_fusion import ViTPFusionConfig
from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation


def load_universal_model(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a model whose outputs have class and mask logits of queries, ours or Transformers', for inference.

    Args:
        source: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        dtype: of the weights.

    Returns:
        The model, in evaluation mode on the CPU, and its image processor (of a OneFormer, its OneFormerProcessor).

    Raises:
        ValueError: it cannot be loaded, or is of another kind; the message says why.
    """
    model_type = _model_type(source, revision)
    if model_type in (None, *SEGMENTATION_TYPES, ViTPFusionConfig.model_type):
        return load_own_model(source, revision=revision, dtype=dtype)
    try:
        with quiet_transformers():
            model = AutoModelForUniversalSegmentation.from_pretrained(source, revision=revision, dtype=dtype)
        loader = AutoProcessor if model_type == "oneformer" else AutoImageProcessor
        processor = loader.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load {source}, a model of type {model_type!r}, for universal segmentation: {error}"
        ) from error
    refuse_non_finite_weights(model, source)
    return model.eval(), processor


def load_own_model(source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a segmentation model of this package, which may be a fused one; see `load_segmentation_model`."""
    model_type = _model_type(source, revision)
    own = (*SEGMENTATION_TYPES, ViTPFusionConfig.model_type)
    if model_type not in (None, *own):
        raise ValueError(
            f"{source} is a model of type {model_type!r}; alone, those of type {', '.join(own)} segment, and "
            "with a ViT-P as classifier (--classifier) also Mask2Former, MaskFormer and OneFormer"
        )
    load = load_fused_checkpoint if model_type == ViTPFusionConfig.model_type else load_segmentation_model
    return load(source, revision=revision, dtype=dtype)  # which says what is wrong with a source of no type


def load_fused_model(
    generator: str,
    classifier: str | None = None,
    *,
    alpha: float | None = None,
    label_mismatch: str = "error",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor]:
    """Join a generator and a ViT-P, or load a checkpoint of both.

    Args:
        generator: folder or Hub id of a universal segmentation model, or, without classifier, of a fused one.
        classifier: folder or Hub id of a ViT-P.
        alpha: weight of ViT-P in all tasks; `None`: the checkpoint's, or 0.4.
        label_mismatch: `"error"`, or `"keep"` to fuse the classes that both know.
        revision: branch, tag or commit of the generator's repository.
        dtype: of the weights of both.

    Returns:
        The model, in evaluation mode on the CPU, and its image processor.

    Raises:
        ValueError: a part cannot be loaded or is of another kind, or their classes differ; the message says why.
    """
    if classifier is None:
        if _model_type(generator, revision) != ViTPFusionConfig.model_type:
            raise ValueError(f"{generator} is no fused model ({ViTPFusionConfig.model_type}); name a classifier too")
        model, processor = load_fused_checkpoint(generator, revision=revision, dtype=dtype)
        if alpha is not None:
            model.config.alpha = alpha
            model.config.check()
    else:
        generator_model, generator_processor = load_universal_model(generator, revision=revision, dtype=dtype)
        if isinstance(generator_model, ViTPFusionForUniversalSegmentation):
            raise ValueError(
                f"{generator} is a fused model, which has a classifier already; name its generator instead"
            )
        classifier_model, classifier_processor = load_point_classifier(classifier, dtype=dtype)
        model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
            generator_model,
            classifier_model,
            0.4 if alpha is None else alpha,
            generator_processor=generator_processor,
            label_mismatch=label_mismatch,
            task=getattr(generator_processor, "task", "panoptic"),
        )
        processor = ViTPFusionImageProcessor.from_generator_and_classifier(
            generator_processor, classifier_processor, config=model.config
        )
    return model, processor


def is_fused(model: Any) -> bool:
    """Whether a model is one of generator and classifier."""
    return getattr(getattr(model, "config", None), "model_type", None) == ViTPFusionConfig.model_type


def with_alpha(model: ViTPFusionForUniversalSegmentation, outputs: Any, alpha: float) -> Any:
    """Outputs of a fused model for another alpha, from the logits of its parts; 0 is the generator alone.

    Args:
        model: the fused model.
        outputs: of the model, with all queries classified unless alpha is 0.
        alpha: weight of ViT-P.
    """
    generated = outputs.generator_class_queries_logits
    fused = generated.float() if alpha == 0 else model.fuse(generated, outputs.prompt_logits, alpha=alpha)
    return type(outputs)(**{**outputs, "class_queries_logits": fused})


def _model_type(source: str, revision: str | None) -> str | None:
    refuse_missing_folder(source)
    try:
        return PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    except OSError:
        return None
