"""A checkpoint as the start of a training with other settings: what has another size is resampled, or said to be new.

Pixels stay as the starting weights know them: `pixel_settings` and `backbone_pixel_settings` are what the new image
processor takes over. The class head, whose rows have names, is the matter of class_head.py. h w patches along the sides
of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..conversion.backbones import image_normalization
from ..conversion.key_maps import PATCH_KERNEL, POSITION_TABLE, fit_to_size
from ..inference.loading import quiet_transformers

_PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def pixel_settings(processor: Any) -> dict[str, Any]:
    """The settings of an image processor that say what becomes of a pixel's values, by name."""
    return {name: getattr(processor, name) for name in _PIXEL_SETTINGS}


def backbone_pixel_settings(backbone: str) -> tuple[dict[str, Any], list[str]]:
    """`image_mean` and `image_std` for an image processor, as a backbone was pre-trained.

    Args:
        backbone: a name or folder, as `from_backbone` takes it.

    Returns:
        The settings, and lines for people; where the backbone does not say, no settings and a line about that.
    """
    try:
        mean, std = image_normalization(backbone)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return {}, [
            f"normalisation: that of {backbone} is not known, and pixels are normalised by ImageNet's mean and "
            f"standard deviation; if it was pre-trained with others, put its preprocessor_config.json beside its "
            f"config.json ({reason})"
        ]
    return {"image_mean": mean, "image_std": std}, []


def load_changed(
    cls: Any, source: str, before: Any, class_head: str, fields: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """A checkpoint with other fields in its configuration, in float32.

    Position embeddings are resampled to another grid of patches, and the patch kernel to another patch size, as where a
    backbone is taken over.

    Args:
        cls: of the model.
        source: folder or Hub id of the checkpoint.
        before: the checkpoint as it is.
        class_head: beginning of the names of the class head, which the caller fills.
        fields: of the configuration.

    Returns:
        The model, and lines for people about what else had another size and is new.

    Raises:
        ValueError: the input size is no multiple of the patch size.
    """
    with quiet_transformers():
        model, report = cls.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
        )
    weights = before.base_model.state_dict()
    size, patch_size = model.config.image_size, model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    fitted, _ = fit_to_size(
        {name: weights[name] for name in (PATCH_KERNEL, POSITION_TABLE) if name in weights},
        before.config.grid_size,
        (height, width),
        patch_size,
    )
    with torch.no_grad():
        for name, tensor in fitted.items():
            model.base_model.get_parameter(name).copy_(tensor)
    remarks = []
    if before.config.grid_size != model.config.grid_size and POSITION_TABLE in fitted:
        old, new = ("{}x{}".format(*config.grid_size) for config in (before.config, model.config))
        remarks.append(f"position embeddings: resampled from {old} to {new} patches")
    done = tuple(f"{model.base_model_prefix}.{name}" for name in fitted)
    for name, *shapes in sorted(map(tuple, report["mismatched_keys"])):
        if name not in done and not name.startswith(class_head):
            old, new = ("x".join(map(str, shape)) for shape in shapes)
            remarks.append(f"{name}: new, as its size is {new} and the checkpoint's {old}")
    return model, remarks
