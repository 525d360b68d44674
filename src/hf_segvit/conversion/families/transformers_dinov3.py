"""DINOv3 of Transformers; its plain MLP has the names that the outer layers of a gated one have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import fill_absent, rename
from .source import SourceBackbone, last_hidden_state, pair

FAMILY = "Transformers DINOv3"
MODELS = ("dinov3_vit",)
features = last_hidden_state
KEY_MAP = (
    (r"(embeddings\.(?:cls_token|register_tokens))", r"\1"),
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(.+)", r"layernorm.\1"),
    (r"(?:model\.)?layer\.(\d+\.(?:norm[12]|layer_scale[12]|attention\.[qkv]_proj)\..+)", r"layers.\1"),
    (r"(?:model\.)?layer\.(\d+)\.attention\.o_proj\.(.+)", r"layers.\1.attention.out_proj.\2"),
)
PLAIN_MLP_KEY_MAP = (
    (r"(?:model\.)?layer\.(\d+)\.mlp\.up_proj\.(.+)", r"layers.\1.mlp.fc1.\2"),
    (r"(?:model\.)?layer\.(\d+)\.mlp\.down_proj\.(.+)", r"layers.\1.mlp.fc2.\2"),
)
GATED_MLP_KEY_MAP = ((r"(?:model\.)?layer\.(\d+\.mlp\.(?:gate|up|down)_proj\..+)", r"layers.\1"),)
DROPPED = (r"embeddings\.mask_token",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `DINOv3ViTModel` as a plain ViT.

    Args:
        model: the module; says what the weights do not.
        state_dict: its weights, or others of the same names.

    Raises:
        ValueError: a weight that the plain ViT has no place for; the message names it.
    """
    config = model.config
    mlp_key_map = GATED_MLP_KEY_MAP if config.use_gated_mlp else PLAIN_MLP_KEY_MAP
    height, width = pair(config.image_size)
    patch_size, _ = pair(config.patch_size)
    return SourceBackbone(
        fill_absent(rename(state_dict, KEY_MAP + mlp_key_map, DROPPED, FAMILY)),
        (height // patch_size, width // patch_size),
        {
            "num_attention_heads": config.num_attention_heads,
            "layer_norm_eps": config.layer_norm_eps,
            "gate_act" if config.use_gated_mlp else "hidden_act": config.hidden_act,
            "rope_theta": config.rope_theta,
        },
    )
