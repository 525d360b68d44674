"""Image segmentation with plain Vision Transformers for the Hugging Face ecosystem.

Importing the package registers its models with Transformers' Auto classes and image-segmentation pipeline.
"""

from .auto import register
from .models.configuration_eomt import EoMTConfig
from .models.configuration_plain_vit import PlainViTConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
from .models.modeling_plain_vit import PlainViTModel

__version__ = "0.1.0"

__all__ = [
    "EoMTConfig",
    "EoMTForUniversalSegmentation",
    "EoMTImageProcessor",
    "EoMTModel",
    "PlainViTConfig",
    "PlainViTModel",
]

register()
