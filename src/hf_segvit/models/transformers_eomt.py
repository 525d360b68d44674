"""What Transformers calls things in its own `eomt` and `eomt_dinov3`, in our words.

Config fields and parameter names, so that a folder of either type loads directly. Giant checkpoints come with two
generations of SwiGLU names: `weights_in` (gate and value in one matrix) and `weights_out` were renamed to `gate_proj`,
`up_proj` and `down_proj`; both are understood.
"""

import re
from typing import Any

import torch

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
# Fields of every Transformers config that travel along unchanged.
_GENERAL_FIELDS = ("id2label", "label2id", "num_labels", "dtype", "torch_dtype", "name_or_path")

# Their defaults where a config.json may leave a field out and ours differs, or we need it to translate another.
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
# eomt_dinov3 calls the two layers of a plain MLP what a gated one calls its outer ones.
_PLAIN_MLP_KEYS = ((r"\.mlp\.up_proj\.", r".mlp.fc1."), (r"\.mlp\.down_proj\.", r".mlp.fc2."))


def is_transformers_eomt(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json is of Transformers' own `eomt` or `eomt_dinov3`."""
    return config_dict.get("model_type") in TRANSFORMERS_EOMT_TYPES


def translate_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The fields of `EoMTConfig` that describe the same model.

    Args:
        config_dict: the config.json of an `eomt` or `eomt_dinov3` checkpoint.

    Returns:
        Keyword arguments for `EoMTConfig`. Masked-attention probabilities are not among them: upstream keeps them in
        the weights (`attn_mask_probs`), where `EoMTForUniversalSegmentation.from_pretrained` reads them.

    Raises:
        ValueError: the model uses something that ours does not have; the message names it.
    """
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
    state_dict: dict[str, torch.Tensor], prefix: str = "eomt."
) -> tuple[dict[str, torch.Tensor], list[float] | None]:
    """Rename the weights of a Transformers `eomt` or `eomt_dinov3` checkpoint.

    Args:
        state_dict: upstream's flat names to tensors.
        prefix: where our model keeps everything but the class head; "" for a bare `EoMTModel`.

    Returns:
        Our names to the same tensors, and upstream's `attn_mask_probs` as floats, one per query layer (`None` if the
        checkpoint holds none).
    """
    renamed_keys = _RENAMED_KEYS if _is_gated(state_dict) else _RENAMED_KEYS + _PLAIN_MLP_KEYS
    ours: dict[str, torch.Tensor] = {}
    probabilities: list[float] | None = None
    for name, tensor in state_dict.items():
        if name == "attn_mask_probs":
            probabilities = [float(p) for p in tensor]
            continue
        if name == "criterion.empty_weight" or name.endswith((".position_ids", ".inv_freq")):
            continue  # derived from the config
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


def _is_gated(state_dict: dict[str, torch.Tensor]) -> bool:
    return any(".mlp.gate_proj." in name or ".mlp.weights_in." in name for name in state_dict)


def _single_patch_size(patch_size: Any) -> int:
    if isinstance(patch_size, int):
        return patch_size
    if len(set(patch_size)) == 1:
        return int(patch_size[0])
    raise ValueError(f"patch_size={patch_size}: only square patches are supported")
