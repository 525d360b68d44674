"""Register the models with Transformers' Auto classes and pipeline.

The package calls `register` once Transformers is imported, and imports its public names from here.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto import modeling_auto

# Those that are not registered are here for `hf_segvit.__getattr__`.
from .models.class_fusion import fuse_class_logits  # noqa: F401
from .models.configuration_eomt import EoMTConfig
from .models.configuration_mask2former_vit import Mask2FormerViTConfig
from .models.configuration_plain_vit import PlainViTConfig
from .models.configuration_vit_p import ViTPConfig
from .models.configuration_vit_p_fusion import ViTPFusionConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.image_processing_vit_p import ViTPImageProcessor
from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from .models.mask2former_annealing import enable_mask_annealing  # noqa: F401
from .models.mask_points import points_from_masks  # noqa: F401
from .models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from .models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation, Mask2FormerViTModel
from .models.modeling_plain_vit import PlainViTModel
from .models.modeling_vit_p import ViTPForPointClassification, ViTPModel  # noqa: F401
from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation


def register() -> None:
    """Make Transformers' Auto classes and image-segmentation pipeline know this package's models."""
    AutoConfig.register(PlainViTConfig.model_type, PlainViTConfig, exist_ok=True)
    AutoModel.register(PlainViTConfig, PlainViTModel, exist_ok=True)
    AutoConfig.register(EoMTConfig.model_type, EoMTConfig, exist_ok=True)
    AutoModel.register(EoMTConfig, EoMTModel, exist_ok=True)
    AutoModelForUniversalSegmentation.register(EoMTConfig, EoMTForUniversalSegmentation, exist_ok=True)
    # The pipeline looks among semantic models, not among universal ones. The outputs have no `.logits`: like those of
    # every mask classification model they hold class and mask logits, which the image processor merges.
    AutoModelForSemanticSegmentation.register(EoMTConfig, EoMTForUniversalSegmentation, exist_ok=True)
    AutoImageProcessor.register(EoMTConfig, image_processor_classes={"torchvision": EoMTImageProcessor}, exist_ok=True)
    AutoConfig.register(Mask2FormerViTConfig.model_type, Mask2FormerViTConfig, exist_ok=True)
    AutoModel.register(Mask2FormerViTConfig, Mask2FormerViTModel, exist_ok=True)
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
        auto_class.register(Mask2FormerViTConfig, Mask2FormerViTForUniversalSegmentation, exist_ok=True)
    AutoImageProcessor.register(
        Mask2FormerViTConfig, image_processor_classes={"torchvision": EoMTImageProcessor}, exist_ok=True
    )
    AutoConfig.register(ViTPConfig.model_type, ViTPConfig, exist_ok=True)
    AutoModel.register(ViTPConfig, ViTPModel, exist_ok=True)
    AutoImageProcessor.register(ViTPConfig, image_processor_classes={"torchvision": ViTPImageProcessor}, exist_ok=True)
    AutoConfig.register(ViTPFusionConfig.model_type, ViTPFusionConfig, exist_ok=True)
    AutoModelForUniversalSegmentation.register(ViTPFusionConfig, ViTPFusionForUniversalSegmentation, exist_ok=True)
    AutoModelForSemanticSegmentation.register(ViTPFusionConfig, ViTPFusionForUniversalSegmentation, exist_ok=True)
    AutoImageProcessor.register(
        ViTPFusionConfig, image_processor_classes={"torchvision": ViTPFusionImageProcessor}, exist_ok=True
    )
    # The pipeline looks for class names in this static table, which registration does not change, and logs an error if
    # a name is missing.
    names = modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    names[EoMTConfig.model_type] = EoMTForUniversalSegmentation.__name__
    names[Mask2FormerViTConfig.model_type] = Mask2FormerViTForUniversalSegmentation.__name__
    names[ViTPFusionConfig.model_type] = ViTPFusionForUniversalSegmentation.__name__
