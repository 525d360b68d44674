"""How the pictures of a backbone's pre-training were normalised, for the image processor of a model built on it.

Backbones differ (ImageNet's statistics for DINO and MAE, 0.5 for SigLIP and ViT augreg, CLIP's for EVA-02, others for
satellite pictures), and a mismatch costs accuracy without any error.
"""

import json
import os
from typing import Any

import timm
from transformers.image_processing_base import ImageProcessingMixin

from ..models.image_processing_plain_vit import unit_normalization
from .published_backbones import unknown_backbone


def image_normalization(source: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels scaled to [0, 1], that a backbone expects.

    Args:
        source: as for `convert_backbone`: `"timm/<name>"`, a timm model, or the Hub id or folder of a timm or
            Transformers checkpoint. A Transformers model in memory counts as where it was loaded from.

    Returns:
        `image_mean` and `image_std` for `EoMTImageProcessor`.

    Raises:
        ValueError: the source does not say.
        OSError: the checkpoint has no `preprocessor_config.json`.
    """
    if not isinstance(source, str | os.PathLike):
        if hasattr(source, "pretrained_cfg"):
            return _of_timm(source.pretrained_cfg)
        source = getattr(getattr(source, "config", None), "name_or_path", "")
        if not source:
            raise ValueError("this model does not say where it comes from; set image_mean and image_std yourself")
    name = os.fspath(source)
    if name.startswith("timm/"):
        published = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        if published is None:
            raise unknown_backbone(name)
        return list(published.mean), list(published.std)
    config_file = os.path.join(name, "config.json")
    if os.path.isfile(config_file):
        with open(config_file, encoding="utf-8") as file:
            config = json.load(file)
        if "model_type" not in config and "architecture" in config:
            return _of_timm(config.get("pretrained_cfg", config))  # older versions of timm do not nest it
    settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    settings = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **settings}
    if settings["do_normalize"] and not (settings.get("image_mean") and settings.get("image_std")):
        raise ValueError(f"the image processor's settings in {name} hold no image_mean and image_std; add them there")
    return unit_normalization({"image_mean": 0.0, "image_std": 1.0, **settings})


def _of_timm(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    if not (settings.get("mean") and settings.get("std")):
        raise ValueError("timm's settings of this model hold no mean and std; add them to its pretrained_cfg")
    return list(settings["mean"]), list(settings["std"])
