"""Translation of Transformers' own `eomt` and `eomt_dinov3` checkpoints.

Config fields, parameter names, and the settings of the image processor, so that a folder of either type loads
directly. Giant checkpoints come with two generations of SwiGLU names, `weights_in` (gate and value in one matrix) and
`weights_out`, later `gate_proj`, `up_proj` and `down_proj`; both are understood. Weights are read from safetensors
only; names change on loading, so what is saved afterwards has this package's own names.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from .checkpoint_guard import WEIGHTS, checked_weights, refuse_growth
from .checkpoint_json import HUB_ARGUMENTS, check_fields, errors_name, hub_arguments, path_of, shown, stored_config
from .published_labels import find_published_labels

logger = logging.get_logger(__name__)

TRANSFORMERS_EOMT_TYPES = ("eomt", "eomt_dinov3")

# Fields that mean the same under the same name.
SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "drop_path_rate",
    "num_upscale_blocks",
    "attention_dropout",
    "no_object_weight",
    "class_weight",
    "mask_weight",
    "dice_weight",
    "train_num_points",
    "oversample_ratio",
    "importance_sample_ratio",
    "num_queries",
    "num_register_tokens",
)
# Fields of every Transformers config, kept unchanged.
_GENERAL_FIELDS = ("id2label", "label2id", "num_labels", "dtype", "torch_dtype", "name_or_path")

# Transformers' defaults of fields that a config.json may omit, where ours differ or another field follows from them.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": 640,
    "patch_size": 16,
    "layerscale_value": 1.0,
    "num_blocks": 4,
    "mlp_ratio": 4,
    "num_upscale_blocks": 2,
}

_RENAMED_KEYS = (
    (r"embeddings\.patch_embeddings\.(weight|bias)$", r"embeddings.patch_embeddings.projection.\1"),
    (r"\.attention\.o_proj\.", r".attention.out_proj."),
    (r"(layers\.\d+)\.mlp\.weights_out\.", r"\1.mlp.down_proj."),
)
# eomt_dinov3 gives the two layers of a plain MLP the names of a gated one's outer layers.
_PLAIN_MLP_KEYS = ((r"\.mlp\.up_proj\.", r".mlp.fc1."), (r"\.mlp\.down_proj\.", r".mlp.fc2."))


def is_transformers_eomt(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json is of Transformers' own `eomt` or `eomt_dinov3`."""
    return config_dict.get("model_type") in TRANSFORMERS_EOMT_TYPES


def translate_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `EoMTConfig` from the config.json of an `eomt` or `eomt_dinov3` checkpoint."""
    where = path_of(config_dict)
    check_fields(CONFIG_MAPPING[config_dict["model_type"]], config_dict, where)
    with errors_name(where):
        return _translated(config_dict)


def _translated(config_dict: dict[str, Any]) -> dict[str, Any]:
    theirs = {**_DEFAULTS, **config_dict}
    ours = {name: theirs[name] for name in (*SHARED_FIELDS, *_GENERAL_FIELDS) if name in theirs}
    ours["model_type"] = "segvit_eomt"
    ours["image_size"] = theirs["image_size"]
    ours["patch_size"] = _single_patch_size(theirs["patch_size"])
    ours["num_query_layers"] = theirs["num_blocks"]
    ours["layer_scale_init_value"] = theirs["layerscale_value"]
    if theirs["model_type"] == "eomt":
        ours["position_embedding_type"] = "learned"
        width = int(theirs["hidden_size"] * theirs["mlp_ratio"])
        gated = bool(theirs.get("use_swiglu_ffn", False))
        # Two thirds of the plain MLP's width, rounded up to a multiple of 8: as many weights in three matrices.
        ours["intermediate_size"] = (int(width * 2 / 3) + 7) // 8 * 8 if gated else width
    else:
        ours["position_embedding_type"] = "rope"
        ours["intermediate_size"] = theirs.get("intermediate_size", 4096)
        ours["rope_theta"] = (theirs.get("rope_parameters") or {}).get("rope_theta", 100.0)
        ours["key_bias"] = bool(theirs.get("key_bias", False))
        gated = bool(theirs.get("use_gated_mlp", False))
        ours["gate_act"] = theirs.get("hidden_act", "gelu")
        for name in ("query_bias", "value_bias", "proj_bias", "mlp_bias"):
            if not theirs.get(name, True):
                raise ValueError(f"this eomt_dinov3 checkpoint has {name}=False, which EoMTConfig cannot express")
    ours["mlp_type"] = "swiglu" if gated else "mlp"
    return ours


def translate_state_dict(
    state_dict: dict[str, Tensor], prefix: str = "eomt."
) -> tuple[dict[str, Tensor], list[float] | None]:
    """Rename the weights of a Transformers `eomt` or `eomt_dinov3` checkpoint.

    `prefix` is where our model keeps everything but the class head; "" for a bare `EoMTModel`. Returns the renamed
    weights, and `attn_mask_probs` as floats, one per query layer (`None` if the checkpoint holds none).
    """
    renamed_keys = _RENAMED_KEYS if _is_gated(state_dict) else _RENAMED_KEYS + _PLAIN_MLP_KEYS
    ours: dict[str, Tensor] = {}
    probabilities: list[float] | None = None
    for name, tensor in state_dict.items():
        if name == "attn_mask_probs":  # a buffer there, a config field here
            probabilities = [float(p) for p in tensor]
            continue
        if name == "criterion.empty_weight" or name.endswith((".position_ids", ".inv_freq")):
            continue  # buffers that follow from the config
        if name.startswith("class_predictor."):
            ours[name] = tensor
            continue
        packed = re.fullmatch(r"(layers\.\d+)\.mlp\.weights_in\.(weight|bias)", name)
        if packed:
            gate, value = tensor.chunk(2, dim=0)
            ours[f"{prefix}{packed[1]}.mlp.gate_proj.{packed[2]}"] = gate.contiguous()
            ours[f"{prefix}{packed[1]}.mlp.up_proj.{packed[2]}"] = value.contiguous()
            continue
        for pattern, replacement in renamed_keys:
            name = re.sub(pattern, replacement, name)
        ours[prefix + name] = tensor
    return ours, probabilities


def _is_gated(state_dict: dict[str, Tensor]) -> bool:
    return any(".mlp.gate_proj." in name or ".mlp.weights_in." in name for name in state_dict)


def _single_patch_size(patch_size: Any) -> int:
    if isinstance(patch_size, int):
        return patch_size
    if len(set(patch_size)) == 1:
        return int(patch_size[0])
    raise ValueError(f"patch_size={patch_size}: only square patches are supported")


def transformers_eomt_arguments(cls: Any, source: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments to load a Transformers checkpoint by `from_pretrained(None, ...)`, or `None` for another source.

    Args:
        cls: `EoMTModel` or `EoMTForUniversalSegmentation`.
        source: folder or Hub id, as given to `from_pretrained`.
        kwargs: the keyword arguments of `from_pretrained`.

    Raises:
        OSError: the source has no safetensors weights.
        ValueError: a field or a weight of the checkpoint cannot be expressed.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    where = hub_arguments(kwargs)
    if not is_transformers_eomt(stored_config(source, **where)):
        return None

    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    # Probabilities that the user passed take precedence over the checkpoint's.
    given = "masked_attention_probabilities" in kwargs or isinstance(config, PreTrainedConfig)
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
    weights = checked_weights(source, {**kwargs, **where})  # `where` again: reading the config used it up
    if weights is None:
        raise OSError(f"{source} holds no file named {WEIGHTS}")
    refuse_growth(cls, config, source, weights[1])
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}

    state_dict, probabilities = translate_state_dict(
        {name: tensor for path in weights[0] for name, tensor in load_state_dict(path).items()}
    )
    if probabilities is not None and not given:
        config.masked_attention_probabilities = probabilities
    return {**kwargs, "config": config, "state_dict": state_dict}


_PROCESSOR_TYPES = ("EomtImageProcessor", "EomtImageProcessorFast", "EomtImageProcessorPil")
# Settings that mean the same under the same name.
SHARED_SETTINGS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_split_image",
)


def is_transformers_eomt_processor(settings: dict[str, Any]) -> bool:
    """Whether a preprocessor_config.json is of Transformers' own EoMT image processor."""
    return settings.get("image_processor_type") in _PROCESSOR_TYPES


def translate_image_processor(
    settings: dict[str, Any], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
) -> dict[str, Any]:
    """`translated_settings` of a folder or Hub repository, with a warning if its stuff classes are unknown.

    `settings` are its preprocessor_config.json; the classes come from the config.json beside it. Of `kwargs`, what
    `from_pretrained` was given, the arguments that concern the Hub are used.
    """
    id2label = _id2label(pretrained_model_name_or_path, kwargs)
    ours = translated_settings(settings, id2label)
    if ours["task"] == "panoptic" and find_published_labels(id2label) is None:
        logger.warning_once(
            f"{pretrained_model_name_or_path}: its classes are those of no published data set known here, so stuff is "
            "not fused in panoptic segmentation; pass stuff_classes=[...] to from_pretrained to say which classes are"
        )
    return ours


def translated_settings(settings: Mapping[str, Any], id2label: Mapping[Any, str]) -> dict[str, Any]:
    """Settings of `EoMTImageProcessor` from those of Transformers' processor and the names of the model's classes.

    The task is semantic if images are cut into windows, instance if the classes are the things of a published data
    set, else panoptic; `stuff_classes` are those of the published set, or empty. A ValueError if the size cannot be
    expressed here.
    """
    ours = {name: settings[name] for name in SHARED_SETTINGS if settings.get(name) is not None}
    windowed = bool(settings.get("do_split_image"))
    ours["size"] = _input_size(settings.get("size") or {"shortest_edge": 640, "longest_edge": 640}, windowed)
    # In Transformers an `ignore_index` also means that labels are counted from 1.
    ignore_index = settings.get("ignore_index")
    ours["do_reduce_labels"] = bool(settings.get("do_reduce_labels", ignore_index is not None))
    if ignore_index is not None:
        ours["ignore_index"] = ignore_index

    labels = find_published_labels(id2label)
    ours["num_labels"] = len(id2label) or None
    ours["stuff_classes"] = list(labels.stuff_classes) if labels else []
    ours["task"] = "semantic" if windowed else "panoptic"
    if not windowed and labels is not None and not labels.stuff_classes:
        ours["task"] = "instance"
    return ours


def _input_size(size: Any, windowed: bool) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    if size.get("height") and size.get("width"):
        return {"height": size["height"], "width": size["width"]}
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    # Windows take their side from the shortest edge; padding needs to know both sides, so they must agree.
    if shortest is None or (not windowed and longest not in (None, shortest)):
        raise ValueError(
            f"size={size}: images that are padded need one input size; pass size={{'height': H, 'width': W}} of the "
            "model's input to from_pretrained"
        )
    return {"height": shortest, "width": shortest}


def _id2label(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> dict[str, str]:
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    try:
        config = stored_config(folder, **hub_arguments(kwargs))
    except OSError:
        return {}  # a processor may be kept without its model
    labels = config.get("id2label") or {}
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"{path_of(config)}: id2label is {shown(labels)}, not a table of names")
    return labels
