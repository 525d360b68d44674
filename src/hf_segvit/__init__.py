"""Image segmentation with plain Vision Transformers for the Hugging Face ecosystem.

Importing the package registers its models with Transformers' Auto classes and image-segmentation pipeline.
"""

from .auto import register
from .models.class_fusion import fuse_class_logits
from .models.configuration_eomt import EoMTConfig
from .models.configuration_plain_vit import PlainViTConfig
from .models.configuration_vit_p import ViTPConfig
from .models.configuration_vit_p_fusion import ViTPFusionConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.image_processing_vit_p import ViTPImageProcessor
from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from .models.mask_points import points_from_masks
from .models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from .models.modeling_plain_vit import PlainViTModel
from .models.modeling_vit_p import ViTPForPointClassification, ViTPModel
from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation

__version__ = "0.1.0"

__all__ = [
    "EoMTConfig",
    "EoMTForUniversalSegmentation",
    "EoMTImageProcessor",
    "EoMTModel",
    "PlainViTConfig",
    "PlainViTModel",
    "ViTPConfig",
    "ViTPForPointClassification",
    "ViTPFusionConfig",
    "ViTPFusionForUniversalSegmentation",
    "ViTPFusionImageProcessor",
    "ViTPImageProcessor",
    "ViTPModel",
    "fuse_class_logits",
    "points_from_masks",
]

register()
