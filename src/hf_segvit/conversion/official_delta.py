"""DINOv3 in official EoMT checkpoints, and files that hold the difference to its published weights.

The weights of DINOv3 may not be passed on, so the released files hold, for the backbone, what training added to them;
queries and heads are whole. Such a file loaded as it is would be noise: `is_delta` tells the two kinds apart.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..weight_checks import check_weights
from .checkpoint_files import SAFETENSORS_NAMES, find_checkpoint, read_checkpoint
from .families import transformers_dinov3
from .key_maps import rename

# A complete file holds about 0.22 as pixel_std and about 1 in the final norm; a delta holds 0 and nearly 0.
_ZERO = 1e-3
_SMALL_NORM = 0.1


def is_delta(state_dict: Mapping[str, Tensor], place: str, base: str | None, usual_base: str | None = None) -> bool:
    """Whether a checkpoint is a delta, which must agree with whether a base is given.

    Args:
        state_dict: the official checkpoint, prefixes stripped.
        place: the file, for errors.
        base: folder or Hub id of the backbone, if one is given.
        usual_base: Hub id of the backbone that the file is known to need, for the error.

    Raises:
        ValueError: a delta without base, or a base for a file that is complete.
    """
    delta = _holds_differences(state_dict)
    if delta is None:
        delta = base is not None
    if delta and base is None:
        raise ValueError(
            f"{place} holds the difference to a backbone, not its weights, and is noise by itself; give it "
            f"with --base {usual_base or 'facebook/dinov3-vitl16-pretrain-lvd1689m or the like'}"
        )
    if base is not None and not delta:
        raise ValueError(f"{place} holds whole weights, not the difference to a backbone; convert it without --base")
    return delta


def _holds_differences(state_dict: Mapping[str, Tensor]) -> bool | None:
    """True for a delta, False for a complete file, `None` where it cannot be seen."""
    std = state_dict.get("encoder.pixel_std")
    if std is not None:
        return bool(std.float().abs().max() < _ZERO)
    probabilities = state_dict.get("attn_mask_probs")
    if probabilities is not None and bool((probabilities < 0).any()):
        return True
    norm = state_dict.get("encoder.backbone.norm.weight")
    if norm is not None and bool(norm.float().abs().median() < _SMALL_NORM):
        return True
    return None


def dinov3_names(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official code's names of a DINOv3 backbone as Transformers has them."""
    renamed = {re.sub(r"^patch_embed\.", "embeddings.", name): tensor for name, tensor in backbone.items()}
    return {re.sub(r"^blocks\.", "layer.", name): tensor for name, tensor in renamed.items()}


def rename_dinov3(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Transformers' DINOv3 ViT as `PlainViTModel` names them.

    Raises:
        ValueError: a name that is not of DINOv3.
    """
    dinov3 = transformers_dinov3
    gated = any(".mlp.gate_proj." in name for name in backbone)
    mlp_key_map = dinov3.GATED_MLP_KEY_MAP if gated else dinov3.PLAIN_MLP_KEY_MAP
    return rename(backbone, dinov3.KEY_MAP + mlp_key_map, dinov3.DROPPED, dinov3.FAMILY)


def backbone_of_base(base: str, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The published backbone that a delta is to be added to.

    Args:
        base: folder or Hub id of a Transformers `dinov3_vit` checkpoint.
        max_bytes: cap on the size of its files.

    Returns:
        Its weights as `PlainViTModel` names them, and the config fields that its config.json tells: heads, epsilon of
        the norms, base of the rotary frequencies.

    Raises:
        ValueError: it is no DINOv3 ViT, or damaged.
    """
    config, _ = PreTrainedConfig.get_config_dict(base)
    if config.get("model_type") != "dinov3_vit":
        raise ValueError(
            f"--base {base} is of type {config.get('model_type')!r}, but deltas are made for Transformers' dinov3_vit"
        )
    path = find_checkpoint(base, SAFETENSORS_NAMES)
    state_dict = read_checkpoint(path, max_bytes)
    check_weights(state_dict, str(path))
    settings: dict[str, Any] = {
        name: config[name] for name in ("num_attention_heads", "layer_norm_eps") if name in config
    }
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        settings["rope_theta"] = theta
    return rename_dinov3(state_dict), settings
