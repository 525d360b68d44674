"""DINOv2 of Transformers, with and without registers; parameter names of 5.17 to 5.23, which renamed them once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import POSITION_TABLE, fill_absent, fold_prefix_positions, rename, unpack
from .source import SourceBackbone, last_hidden_state, pair

FAMILY = "Transformers DINOv2"
MODELS = ("dinov2", "dinov2_with_registers")
features = last_hidden_state
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
    """A `Dinov2Model` or `Dinov2WithRegistersModel` as a plain ViT.

    Args:
        model: the module; says what the weights do not.
        state_dict: its weights, or others of the same names.

    Raises:
        ValueError: a weight that the plain ViT has no place for; the message names it.
    """
    config = model.config
    weights = unpack(rename(state_dict, KEY_MAP, DROPPED, FAMILY))
    height, width = pair(config.image_size)
    return SourceBackbone(
        fill_absent(fold_prefix_positions(weights, 1)),
        (height // config.patch_size, width // config.patch_size),
        {
            "num_attention_heads": config.num_attention_heads,
            "layer_norm_eps": config.layer_norm_eps,
            "hidden_act": config.hidden_act,
        },
    )
