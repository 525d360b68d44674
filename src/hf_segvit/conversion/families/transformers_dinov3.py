"""DINOv3 of Transformers, with a plain or a gated MLP."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import fill_absent, rename
from .source import SourceBackbone, common_settings, last_hidden_state, patch_grid

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
# The two layers of a plain MLP have the names of a gated MLP's outer layers, so the config must decide.
PLAIN_MLP_KEY_MAP = (
    (r"(?:model\.)?layer\.(\d+)\.mlp\.up_proj\.(.+)", r"layers.\1.mlp.fc1.\2"),
    (r"(?:model\.)?layer\.(\d+)\.mlp\.down_proj\.(.+)", r"layers.\1.mlp.fc2.\2"),
)
GATED_MLP_KEY_MAP = ((r"(?:model\.)?layer\.(\d+\.mlp\.(?:gate|up|down)_proj\..+)", r"layers.\1"),)
DROPPED = (r"embeddings\.mask_token",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `DINOv3ViTModel` as a plain ViT."""
    config = model.config
    mlp_key_map = GATED_MLP_KEY_MAP if config.use_gated_mlp else PLAIN_MLP_KEY_MAP
    settings = {**common_settings(config), "rope_theta": config.rope_theta}
    if config.use_gated_mlp:
        settings["gate_act"] = settings.pop("hidden_act")  # its one field for both
    weights = fill_absent(rename(state_dict, KEY_MAP + mlp_key_map, DROPPED, FAMILY))
    return SourceBackbone(weights, patch_grid(config), settings)
