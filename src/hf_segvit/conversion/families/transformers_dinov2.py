"""DINOv2 of Transformers, with and without registers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import POSITION_TABLE, fill_absent, fold_prefix_positions, rename, unpack
from .source import SourceBackbone, common_settings, last_hidden_state, patch_grid

FAMILY = "Transformers DINOv2"
MODELS = ("dinov2", "dinov2_with_registers")
features = last_hidden_state
# Parameter names of Transformers 5.17 to 5.23, which renamed them once.
KEY_MAP = (
    (r"embeddings\.position_embeddings", POSITION_TABLE),
    (r"(embeddings\.(?:cls_token|register_tokens|patch_embeddings\.projection\..+)|layernorm\..+)", r"\1"),
    (r"encoder\.layer\.(\d+\.(?:norm[12]|layer_scale[12])\..+)", r"layers.\1"),
    (r"encoder\.layer\.(\d+\.attention\.[qkv]_proj\..+)", r"layers.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.(.+)", r"layers.\1.attention.\2_proj.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.(?:o_proj|output\.dense)\.(.+)", r"layers.\1.attention.out_proj.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(.+)", r"layers.\1.mlp.gate_up_proj.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(.+)", r"layers.\1.mlp.down_proj.\2"),
    (r"encoder\.layer\.(\d+\.mlp\.(?:fc[12]|gate_proj|up_proj|down_proj)\..+)", r"layers.\1"),
)
DROPPED = (r"embeddings\.mask_token",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `Dinov2Model` or `Dinov2WithRegistersModel` as a plain ViT."""
    weights = unpack(rename(state_dict, KEY_MAP, DROPPED, FAMILY))
    weights = fill_absent(fold_prefix_positions(weights, 1))  # the position table covers the CLS token, not registers
    return SourceBackbone(weights, patch_grid(model.config), common_settings(model.config))
