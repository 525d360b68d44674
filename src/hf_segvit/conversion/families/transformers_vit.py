"""ViT and MAE of Transformers, which differ only in what follows the blocks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import POSITION_TABLE, fill_absent, fold_prefix_positions, rename
from .source import SourceBackbone, common_settings, last_hidden_state, patch_grid

FAMILY = "Transformers ViT"
MODELS = ("vit", "vit_mae")
KEY_MAP = (
    (r"embeddings\.position_embeddings", POSITION_TABLE),
    (r"(embeddings\.(?:cls_token|patch_embeddings\.projection\..+)|layernorm\..+)", r"\1"),
    (r"layers\.(\d+)\.layernorm_before\.(.+)", r"layers.\1.norm1.\2"),
    (r"layers\.(\d+)\.layernorm_after\.(.+)", r"layers.\1.norm2.\2"),
    (r"(layers\.\d+\.(?:attention\.[qkv]_proj|mlp\.fc[12])\..+)", r"\1"),
    (r"layers\.(\d+)\.attention\.o_proj\.(.+)", r"layers.\1.attention.out_proj.\2"),
)
DROPPED = (r"pooler\..+", r"embeddings\.mask_token")


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `ViTModel` or `ViTMAEModel` as a plain ViT that sees all patches."""
    weights = fold_prefix_positions(rename(state_dict, KEY_MAP, DROPPED, FAMILY), 1)  # 1: the CLS token's row
    return SourceBackbone(fill_absent(weights), patch_grid(model.config), common_settings(model.config))


def features(model: Any, pixel_values: Tensor) -> Tensor | None:
    """All tokens; `None` for an MAE, which sees only some patches, in random order."""
    return None if model.config.model_type == "vit_mae" else last_hidden_state(model, pixel_values)
