"""Backbones of timm and Transformers as plain ViTs, the start of every fine-tuning run.

`convert_backbone` returns configuration and weights of a `PlainViTModel` that computes what the source does,
`model_from_backbone` is behind every model's `from_backbone`, and `image_normalization` returns the mean and standard
deviation of the pre-training. Nothing is guessed: a part or weight that the plain ViT lacks, and a parameter without a
weight, are errors. Only what is outside the backbone (classifier, pooling, MAE's decoder, SigLIP's text tower) is
dropped. The names of published backbones at the end are for suggestions, documentation and tests; other weights of the
same families convert too.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.modeling_utils import PreTrainedModel

from ..inference.loading import quiet_transformers
from ..lookup import suggestion
from ..models.checkpoint_guard import refuse_growth
from ..models.checkpoint_json import (
    check_foreign_fields,
    check_type,
    errors_name,
    read_table,
    shown,
    stored_config,
)
from ..models.configuration_plain_vit import PlainViTConfig
from ..models.configuration_vit_p import ViTPConfig
from ..models.image_processing_plain_vit import (
    PlainViTImageProcessor,
    check_settings,
    stored_settings,
    unit_normalization,
)
from ..models.modeling_plain_vit import PlainViTModel
from ..weight_checks import check_complete, check_weights
from .checkpoint_files import SAFETENSORS_NAMES, find_checkpoint, read_checkpoint
from .families import family_of, known_models, offered_families
from .families.source import BackboneFamily, SourceBackbone, checked_family, pair
from .key_maps import CLS_POSITION, CLS_TOKEN, PATCH_KERNEL, fit_to_size, for_channels


def convert_backbone(
    source: Any,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    family: BackboneFamily | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A backbone as the configuration and the weights of a `PlainViTModel`.

    Args:
        source: `"timm/<name>"` (downloaded by timm), the Hub id or folder of a Transformers, timm or `PlainViTModel`
            checkpoint, or one of these models in memory.
        image_size: pixels, an int or `[height, width]`, to whose grid position embeddings are resampled. `None` keeps
            the source's grid.
        patch_size: the patch kernel is resampled to it. `None` keeps the source's.
        state_dict: weights to use instead of the source's, under the source's names; for `"timm/<name>"` nothing is
            downloaded then.
        family: converts the source; by default the family of the model's type or class, also of other packages.

    Returns:
        Keyword arguments for `PlainViTConfig`, and the weights, which share no memory with the source.

    Raises:
        ValueError: the name is unknown, the source is of another family, has a part or a weight that cannot be
            expressed, a weight is NaN or infinite, or sizes do not fit.
    """
    fields, weights, _ = _converted(source, image_size, patch_size, state_dict, family)
    return fields, weights


def _converted(
    source: Any,
    image_size: int | Sequence[int] | None,
    patch_size: int | None,
    state_dict: Mapping[str, Tensor] | None,
    family: BackboneFamily | None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """As `convert_backbone`, with the position embedding (1, D) of the CLS token if the source has one."""
    named = isinstance(source, str | os.PathLike)
    origin = os.fspath(source) if named else type(source).__name__
    model, weights = load_backbone(origin, state_dict is None, family) if named else (source, None)
    family, backbone, prefix = family_for(model, family)
    complete = _under(prefix, model.state_dict())
    given = complete if state_dict is None and weights is None else _under(prefix, state_dict or weights or {})
    check_weights(given, origin)
    converted = family.convert(backbone, given)
    if not isinstance(converted, SourceBackbone):
        raise ValueError(f"convert of the {family.FAMILY} family gives a {type(converted).__name__}, no SourceBackbone")
    # Other weights than the model's own: converted, they must have the same names and shapes.
    if given is not complete:
        own_weights = family.convert(backbone, complete).state_dict
        check_complete(converted.state_dict, own_weights, f"{origin} needs exactly its own weights")
    size = None if image_size is None else pair(image_size)
    fitted, size = fit_to_size(converted.state_dict, converted.grid_size, size, patch_size)
    fields = {
        **converted.config_fields(),
        "patch_size": fitted[PATCH_KERNEL].shape[-1],
        "image_size": size[0] if size[0] == size[1] else list(size),
    }
    check_complete(fitted, _expected(PlainViTModel, PlainViTConfig(**fields)), f"{origin} is not converted")
    # Copies, since some are views of the source's tensors, which its model may still use.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in fitted.items()}
    return fields, own, None if converted.cls_position is None else converted.cls_position.clone()


def model_from_backbone(
    cls: Any, source: Any, image_size: int | Sequence[int] | None, patch_size: int | None, **kwargs: Any
) -> Any:
    """A model of class `cls` with the weights of a backbone; see `PlainViTPreTrainedModel.from_backbone`.

    Args:
        source, image_size, patch_size: as for `convert_backbone`.
        kwargs: `state_dict` and `family`, see there; fields of the model's configuration; arguments of
            `from_pretrained`.

    Raises:
        ValueError: as `convert_backbone`, or a field contradicts the backbone's weights.
    """
    given = kwargs.pop("state_dict", None), kwargs.pop("family", None)
    fields, weights, cls_position = _converted(source, image_size, patch_size, *given)
    takes_prompts = issubclass(cls.config_class, ViTPConfig)
    if takes_prompts:  # ViT-P has no CLS token: prompts replace it
        fields["use_cls_token"] = False
        weights[CLS_TOKEN] = weights[CLS_TOKEN][:, :0]
    # `dtype` is an argument of `from_pretrained`; `num_labels` is a property and no field.
    names = {field.name for field in dataclasses.fields(cls.config_class)} - {"dtype"} | {"num_labels"}
    asked = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    config = cls.config_class(**{**fields, **asked})
    weights[PATCH_KERNEL] = for_channels(weights[PATCH_KERNEL], config.num_channels)

    expected = _expected(PlainViTModel, config)
    if not fields["final_norm"]:  # one that the config adds is initialised like the heads
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("layernorm.")}
    check_complete(weights, expected, f"the fields {sorted(asked)} do not go with this backbone")

    if takes_prompts:
        zeros = torch.zeros(1, config.hidden_size)  # no position, as none was learned
        weights[CLS_POSITION] = zeros if cls_position is None else cls_position
    prefix = next(name.removesuffix(PATCH_KERNEL) for name in _expected(cls, config) if name.endswith(PATCH_KERNEL))
    kwargs.setdefault("dtype", torch.float32)  # training starts in fp32, whatever precision was published
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    with quiet_transformers():  # its warning about new heads is expected here
        return cls.from_pretrained(None, config=config, state_dict=weights, **kwargs)


def _expected(cls: Any, config: PlainViTConfig) -> dict[str, Tensor]:
    """Names and shapes of a model's parameters, without allocating them."""
    with torch.device("meta"):
        return cls(config).state_dict()


def _under(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights below a prefix, without the prefix."""
    return {
        name.removeprefix(prefix): tensor.detach() for name, tensor in state_dict.items() if name.startswith(prefix)
    }


# Parameters in Transformers checkpoints that do not belong to the backbone.
OUTSIDE_THE_BACKBONE = r"(^|\.)(classifier|decoder|pooler|head|mask_token|position_ids)(\.|$)"


def load_backbone(
    name: str, with_weights: bool, family: BackboneFamily | None = None
) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The model of a name or folder, and its weights if they differ from those that the model holds.

    With `with_weights=False` the model may hold any; `name` and `family` are as for `convert_backbone`.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"the folder {name} holds no config.json; save the model with its library's own function")
        config: Mapping[str, Any] = read_table(os.path.join(name, "config.json"))
        if "model_type" not in config and "architecture" in config:
            return _load_timm_folder(name, with_weights)
        return _load_transformers(name, config.get("model_type"), with_weights, family)
    if name.startswith("timm/"):
        return _load_timm(name, with_weights, family), None
    try:
        config = stored_config(name)
    except OSError as error:
        if name in TRANSFORMERS_BACKBONES:
            raise  # it exists, so the error states what failed
        raise unknown_backbone(name) from error
    return _load_transformers(name, config.get("model_type"), with_weights, family)


def _load_timm_folder(folder: str, with_weights: bool) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    """A model from its config.json as timm writes it, and the weights beside it."""
    where = f"{folder}: config.json"
    check_foreign_fields(read_table(os.path.join(folder, "config.json")), where, local=True)
    weights = _read_safetensors(folder) if with_weights else None
    with errors_name(where):
        with torch.device("meta"):  # first without memory, as the file may describe any size
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        if weights is not None:
            check_complete(weights, model.state_dict(), f"{folder} is no complete model of timm")
        return timm.create_model(f"local-dir:{folder}", pretrained=False), weights


def _load_timm(name: str, with_weights: bool, family: BackboneFamily | None) -> nn.Module:
    timm_name = name.removeprefix("timm/")
    architecture = timm_name.partition(".")[0]
    if not is_timm_model(architecture) or (with_weights and timm_name not in timm.list_pretrained(f"{architecture}*")):
        raise unknown_backbone(name)
    with torch.device("meta"):
        family, model, _ = family_for(timm.create_model(architecture, num_classes=0), family)
        family.convert(model, model.state_dict())  # refuses what cannot be expressed before the download
    return timm.create_model(timm_name, pretrained=with_weights, num_classes=0)


def is_timm_model(architecture: str) -> bool:
    """Whether timm builds a model of that name, including those that packages of other families register."""
    if not timm.is_model(architecture):
        offered_families()  # imports them
    return timm.is_model(architecture)


def _load_transformers(
    name: str, model_type: str | None, with_weights: bool, family: BackboneFamily | None
) -> tuple[PreTrainedModel, Mapping[str, Tensor] | None]:
    # Before the config is read: finding the family imports its package, which may register the type.
    if family is None and (model_type is None or family_of(model_type) is None):
        raise ValueError(
            f"{name} is a model of type {model_type!r}, no backbone that becomes a plain ViT; known are "
            f"{known_models()} (EoMT checkpoints load with from_pretrained)"
        )
    own = model_type == PlainViTConfig.model_type
    if own:
        config = PlainViTConfig.from_pretrained(name)
    else:
        where = f"{name}: config.json"
        check_foreign_fields(stored_config(name), where, local=os.path.isdir(name))
        with errors_name(where):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    cls: Any = PlainViTModel if own else MODEL_MAPPING[type(config)]
    if not with_weights:
        return cls(config), None
    weights = _read_safetensors(name)
    headers = {key: {"shape": list(tensor.shape)} for key, tensor in weights.items()}
    refuse_growth(cls, config, name, headers)
    try:
        with quiet_transformers():  # missing and unexpected weights are errors, below
            model, report = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {name} do not fit its config.json: {error}") from error
    left_over = sorted(key for key in report["unexpected_keys"] if not re.search(OUTSIDE_THE_BACKBONE, key))
    if left_over:
        raise ValueError(f"{name} has {len(left_over)} weights that its model has no place for, such as {left_over[0]}")
    # `from_pretrained` initialised these at random; without them, the family's check names what is missing.
    missing = set(report["missing_keys"])
    return model, {key: tensor for key, tensor in model.state_dict().items() if key not in missing}


def _read_safetensors(name: str) -> dict[str, Tensor]:
    file = find_checkpoint(name, SAFETENSORS_NAMES)
    if ".safetensors" not in file.suffixes:
        raise ValueError(f"{name} holds no safetensors weights; pickled ones are read only by `hf-segvit convert`")
    return read_checkpoint(file)


def family_for(model: Any, family: BackboneFamily | None = None) -> tuple[BackboneFamily, Any, str]:
    """The family of a model in memory, the part of the model that it converts, and the prefix of that part's names."""
    backbone, prefix, kind = model, "", f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, PreTrainedModel):
        # Classifiers and decoders hold the backbone as their base model, SigLIP as one of two towers; the base model
        # of a bare DINOv3 is only its blocks.
        inner: Any = getattr(model, "vision_model", model.base_model)
        backbone = inner if hasattr(inner, "embeddings") else model
        prefix = next(name for name, module in model.named_modules() if module is backbone)
        prefix, kind = prefix and f"{prefix}.", backbone.config.model_type
    known_family = family_of(kind) if family is None else checked_family(family, f"family={family!r}")
    if known_family is None:
        raise ValueError(f"{type(model).__name__} is of no family that becomes a plain ViT; known are {known_models()}")
    return known_family, backbone, prefix


def image_normalization(source: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels scaled to [0, 1], that a backbone expects.

    Args:
        source: as for `convert_backbone`; a Transformers model in memory stands for its checkpoint.

    Raises:
        ValueError: the source does not state them.
        OSError: the checkpoint has no `preprocessor_config.json`.
    """
    if not isinstance(source, str | os.PathLike):
        if hasattr(source, "pretrained_cfg"):
            return _of_timm(source.pretrained_cfg)
        source = getattr(getattr(source, "config", None), "name_or_path", "")
        if not source:
            raise ValueError(
                "this model does not state where it was loaded from; set image_mean and image_std yourself"
            )
    name = os.fspath(source)
    if name.startswith("timm/"):
        published = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        if published is None:
            raise unknown_backbone(name)
        return list(published.mean), list(published.std)
    config_file = os.path.join(name, "config.json")
    if os.path.isfile(config_file):
        config = read_table(config_file)
        if "model_type" not in config and "architecture" in config:
            settings = config.get("pretrained_cfg", config)
            if not isinstance(settings, dict):
                raise ValueError(f"{config_file}: pretrained_cfg is {shown(settings)}, not a table")
            return _of_timm(settings)  # older versions of timm have the settings at the top
    # Files may leave these settings out.
    settings = stored_settings(name)
    kind = {"image_processor_type": "ImageProcessor"}  # which one does not matter here
    check_settings(PlainViTImageProcessor, {**kind, **settings}, f"{name}: preprocessor_config.json")
    settings = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **settings}
    if settings["do_normalize"] and not (settings.get("image_mean") and settings.get("image_std")):
        raise ValueError(f"the image processor's settings in {name} hold no image_mean and image_std; add them there")
    return unit_normalization({"image_mean": 0.0, "image_std": 1.0, **settings})


def _of_timm(settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    if not (settings.get("mean") and settings.get("std")):
        raise ValueError("timm's settings of this model hold no mean and std; add them to its pretrained_cfg")
    for name in ("mean", "std"):
        check_type("timm's settings of this model", name, settings[name], list[float | int] | tuple[float | int, ...])
    return list(settings["mean"]), list(settings["std"])


# Family to patterns of timm's names, tags included.
TIMM_FAMILIES = {
    "DINOv2": ("vit_*_patch14_dinov2.*", "vit_*_patch14_reg4_dinov2.*"),
    "DINOv3": ("vit_*_patch16_dinov3*",),
    "EVA-02": ("eva02_*",),
    "DeiT-III": ("deit3_*",),
    "ViT augreg": ("vit_*_patch*.augreg*",),
    "MAE": ("vit_*.mae",),
    "SigLIP": ("vit_*_siglip_*",),
    "Perception Encoder": ("vit_pe_*",),
}
# Its blocks have their norms after the branches, ours before.
NOT_EXPRESSED = "eva02_enormous_*"

TRANSFORMERS_BACKBONES = (
    *(f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov3-vit{size}16-pretrain-lvd1689m" for size in ("s", "splus", "b", "l", "hplus", "7b")),
    *(f"facebook/dinov3-vit{size}16-pretrain-sat493m" for size in ("l", "7b")),
    *(f"facebook/vit-mae-{size}" for size in ("base", "large", "huge")),
    *(f"google/vit-{size}-patch16-224-in21k" for size in ("base", "large")),
    *(f"google/siglip-{size}" for size in ("base-patch16-224", "large-patch16-256", "so400m-patch14-384")),
    *(f"google/siglip2-{size}" for size in ("base-patch16-512", "large-patch16-512", "so400m-patch16-512")),
    *(f"google/siglip2-{size}-naflex" for size in ("base-patch16", "so400m-patch16")),
)


def supported_backbones() -> list[str]:
    """Names that `from_backbone` takes, of timm (`timm/...`) and of Transformers, sorted."""
    patterns = [pattern for patterns in TIMM_FAMILIES.values() for pattern in patterns]
    names = timm.list_pretrained(patterns, exclude_filters=[NOT_EXPRESSED])
    return sorted((*(f"timm/{name}" for name in names), *TRANSFORMERS_BACKBONES))


def unknown_backbone(name: str) -> ValueError:
    """The error for an unknown name, with similar names."""
    known = supported_backbones()
    resembled = name if "/" in name else f"timm/{name}"
    hint = suggestion(resembled, known, 3, "hf_segvit.conversion.backbones.supported_backbones lists names")
    return ValueError(f"{name!r} is not a known backbone, a folder, or a model on the Hub; {hint}")
