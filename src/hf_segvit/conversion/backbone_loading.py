"""From a name, a folder or a model in memory to the source of a conversion: the model, its weights, its family.

Weights come from safetensors, read with the checks of `checkpoint_files`; `timm/...` names are downloaded by timm,
after the architecture was found to be one that converts. What is missing or left over is an error, never a warning.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..models.configuration_plain_vit import PlainViTConfig
from ..models.modeling_plain_vit import PlainViTModel
from .checkpoint_files import SAFETENSORS_NAMES, find_checkpoint, read_checkpoint
from .families import (
    plain_vit,
    timm_eva,
    timm_vit,
    transformers_dinov2,
    transformers_dinov3,
    transformers_siglip,
    transformers_vit,
)
from .families.source import SourceBackbone
from .published_backbones import TRANSFORMERS_BACKBONES, unknown_backbone

Converter = Callable[[Any, Mapping[str, Tensor]], SourceBackbone]
TIMM_CLASSES: dict[str, Converter] = {"VisionTransformer": timm_vit.convert, "Eva": timm_eva.convert}
MODEL_TYPES: dict[str, Converter] = {
    "dinov2": transformers_dinov2.convert,
    "dinov2_with_registers": transformers_dinov2.convert,
    "dinov3_vit": transformers_dinov3.convert,
    "vit": transformers_vit.convert,
    "vit_mae": transformers_vit.convert,
    "siglip": transformers_siglip.convert,
    "siglip_vision_model": transformers_siglip.convert,
    "siglip2": transformers_siglip.convert,
    "siglip2_vision_model": transformers_siglip.convert,
    PlainViTConfig.model_type: plain_vit.convert,
}
# Parameters of a Transformers checkpoint that are known not to be the backbone's.
OUTSIDE_THE_BACKBONE = r"(^|\.)(classifier|decoder|pooler|head|mask_token|position_ids)(\.|$)"


def load_backbone(name: str, with_weights: bool) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The model that a name or folder means, and its weights where the model does not hold just these.

    Args:
        name: as for `convert_backbone`.
        with_weights: whether weights are wanted; else the model may hold any.

    Raises:
        ValueError: nothing is known of that name, it is of no supported family, or its files are broken.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"the folder {name} holds no config.json; save the model with its library's own function")
        with open(os.path.join(name, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        if "model_type" not in config and "architecture" in config:
            model = timm.create_model(f"local-dir:{name}", pretrained=False)
            return model, _read_safetensors(name) if with_weights else None
        return _load_transformers(name, config.get("model_type"), with_weights)
    if name.startswith("timm/"):
        return _load_timm(name, with_weights), None
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        if name in TRANSFORMERS_BACKBONES:
            raise  # it exists; what failed is said in there
        raise unknown_backbone(name) from error
    return _load_transformers(name, config.get("model_type"), with_weights)


def _load_timm(name: str, with_weights: bool) -> nn.Module:
    timm_name = name.removeprefix("timm/")
    architecture = timm_name.partition(".")[0]
    if not timm.is_model(architecture) or (with_weights and timm_name not in timm.list_pretrained(f"{architecture}*")):
        raise unknown_backbone(name)
    with torch.device("meta"):
        convert, model, _ = converter_for(timm.create_model(architecture, num_classes=0))
        convert(model, model.state_dict())  # what cannot be expressed is refused before anything is downloaded
    return timm.create_model(timm_name, pretrained=with_weights, num_classes=0)


def _load_transformers(
    name: str, model_type: str | None, with_weights: bool
) -> tuple[PreTrainedModel, Mapping[str, Tensor] | None]:
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name} is a model of type {model_type!r}, no backbone that becomes a plain ViT; known types are "
            f"{sorted(MODEL_TYPES)} (EoMT checkpoints load with from_pretrained)"
        )
    own = model_type == PlainViTConfig.model_type
    config = (PlainViTConfig if own else AutoConfig).from_pretrained(name)
    cls: Any = PlainViTModel if own else MODEL_MAPPING[type(config)]
    if not with_weights:
        return cls(config), None
    weights = _read_safetensors(name)
    try:
        with quiet():  # what is missing or left over is no warning here but an error
            model, report = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {name} do not fit its config.json: {error}") from error
    left_over = sorted(key for key in report["unexpected_keys"] if not re.search(OUTSIDE_THE_BACKBONE, key))
    if left_over:
        raise ValueError(f"{name} has {len(left_over)} weights that its model has no place for, such as {left_over[0]}")
    missing = set(report["missing_keys"])
    return model, {key: tensor for key, tensor in model.state_dict().items() if key not in missing}


def _read_safetensors(name: str) -> dict[str, Tensor]:
    file = find_checkpoint(name, SAFETENSORS_NAMES)
    if ".safetensors" not in file.suffixes:
        raise ValueError(f"{name} holds no safetensors weights; pickled ones are read only by `hf-segvit convert`")
    return read_checkpoint(file)


def converter_for(model: Any) -> tuple[Converter, Any, str]:
    """The family's converter, the part of the model that it takes, and what this part's names begin with.

    Raises:
        ValueError: the model is of no supported family.
    """
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        # Classifiers and decoders hold the backbone as their base model, SigLIP as one of two towers; what a bare
        # DINOv3 calls its base model are the blocks alone.
        inner: Any = getattr(model, "vision_model", model.base_model)
        backbone: Any = inner if hasattr(inner, "embeddings") else model
        prefix = next(name for name, module in model.named_modules() if module is backbone)
        if backbone.config.model_type in MODEL_TYPES:
            return MODEL_TYPES[backbone.config.model_type], backbone, prefix and f"{prefix}."
    elif kind in TIMM_CLASSES and type(model).__module__.startswith("timm."):
        return TIMM_CLASSES[kind], model, ""
    raise ValueError(
        f"{kind} is of no family that becomes a plain ViT; known are timm's {sorted(TIMM_CLASSES)} and Transformers' "
        f"{sorted(MODEL_TYPES)}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers from reporting weights that are new or left over, which is for the caller to judge."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
