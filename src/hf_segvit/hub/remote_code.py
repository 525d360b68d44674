"""Checkpoints with their code, which load without this package.

`code_files` lists the files of `models/` that a model and its image processor need, and `with_auto_map` writes their
classes into `auto_map`. A push applies both, since `save_pretrained` saves no code. Transformers then loads the
repository with `trust_remote_code=True`; if the package is installed and imported, its classes win over the copies.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .. import models

# By model type, what each Auto class loads, as "module.Class" in models/. AutoModelForSemanticSegmentation is listed
# because the image-segmentation pipeline looks there, and not under universal segmentation.
AUTO_CLASSES: dict[str, dict[str, str]] = {
    "segvit_eomt": {
        "AutoConfig": "configuration_eomt.EoMTConfig",
        "AutoModel": "modeling_eomt.EoMTModel",
        "AutoModelForUniversalSegmentation": "modeling_eomt.EoMTForUniversalSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_eomt.EoMTForUniversalSegmentation",
        "AutoImageProcessor": "image_processing_eomt.EoMTImageProcessor",
    },
    "segvit_mask2former_vit": {
        "AutoConfig": "configuration_mask2former_vit.Mask2FormerViTConfig",
        "AutoModel": "modeling_mask2former_vit.Mask2FormerViTModel",
        "AutoModelForUniversalSegmentation": "modeling_mask2former_vit.Mask2FormerViTForUniversalSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_mask2former_vit.Mask2FormerViTForUniversalSegmentation",
        "AutoImageProcessor": "image_processing_eomt.EoMTImageProcessor",
    },
    "segvit_vit_p": {
        "AutoConfig": "configuration_vit_p.ViTPConfig",
        "AutoModel": "modeling_vit_p.ViTPModel",
        "AutoImageProcessor": "image_processing_vit_p.ViTPImageProcessor",
    },
    "segvit_vit_p_fusion": {
        "AutoConfig": "configuration_vit_p_fusion.ViTPFusionConfig",
        "AutoModelForUniversalSegmentation": "modeling_vit_p_fusion.ViTPFusionForUniversalSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_vit_p_fusion.ViTPFusionForUniversalSegmentation",
        "AutoImageProcessor": "image_processing_vit_p_fusion.ViTPFusionImageProcessor",
    },
}
# Complete models without an Auto class: Transformers has none for point classification.
_WHOLE_MODELS = {"segvit_vit_p": "modeling_vit_p.ViTPForPointClassification"}


def code_files(model_type: str) -> list[Path]:
    """The files of `models/` that a model type and its image processor need, sorted by name."""
    package = Path(models.__path__[0])
    entries = {package / (reference.split(".")[0] + ".py") for reference in _auto_classes(model_type).values()}
    # By Transformers' own function, so that exactly the files that its loader asks for are published.
    imported = {Path(file) for entry in entries for file in get_relative_import_files(entry)}
    return sorted(entries | imported)


def with_auto_map(settings: str, model_type: str, code: bool = True) -> str:
    """Set `auto_map` in the text of config.json or preprocessor_config.json, or remove it where `code` is False."""
    values = json.loads(settings)
    values.pop("auto_map", None)
    if code:
        is_processor = "image_processor_type" in values
        values["auto_map"] = {
            auto_class: reference
            for auto_class, reference in _auto_classes(model_type).items()
            if (auto_class == "AutoImageProcessor") == is_processor
        }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def installed_class(model_type: str, auto_class: str) -> Any:
    """This package's own class for a model type, such as `installed_class("segvit_eomt", "AutoConfig")`."""
    return _class(_auto_classes(model_type)[auto_class])


def whole_model_class(model_type: str) -> Any:
    """This package's own class of the complete model, heads included, for a model type."""
    auto_classes = _auto_classes(model_type)
    return _class(_WHOLE_MODELS.get(model_type) or auto_classes["AutoModelForUniversalSegmentation"])


def _class(reference: str) -> Any:
    module, name = reference.split(".")
    return getattr(import_module(f"{models.__name__}.{module}"), name)


def _auto_classes(model_type: str) -> dict[str, str]:
    # Every public function of this module comes through here, so an unknown type is refused in one place.
    if model_type not in AUTO_CLASSES:
        raise ValueError(f"model_type {model_type!r} is none of this package's: {', '.join(sorted(AUTO_CLASSES))}")
    return AUTO_CLASSES[model_type]
