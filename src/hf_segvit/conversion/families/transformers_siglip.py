"""SigLIP and SigLIP 2 vision towers of Transformers, fixed-size and NaFlex.

They have no CLS token. Transformers resamples the position table of a NaFlex model bilinearly, this package every table
bicubically; at the size of the table, which is the default, the results are the same.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import PATCH_KERNEL, POSITION_TABLE, fill_absent, rename
from .source import SourceBackbone, common_settings, last_hidden_state, pair, patch_grid

FAMILY = "Transformers SigLIP"
MODELS = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
KEY_MAP = (
    (r"embeddings\.position_embedding\.weight", POSITION_TABLE),
    (r"embeddings\.patch_embedding\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"post_layernorm\.(.+)", r"layernorm.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"layers.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"layers.\1.attention.\2"),
    (r"encoder\.layers\.(\d+\.mlp\.fc[12]\..+)", r"layers.\1"),
)
DROPPED = (r"head\..+",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `SiglipVisionModel` or `Siglip2VisionModel` as a plain ViT."""
    config = model.config
    weights = fill_absent(rename(state_dict, KEY_MAP, DROPPED, FAMILY))
    if weights[PATCH_KERNEL].ndim == 2:
        # NaFlex flattens patches beforehand, pixel by pixel with the channels last, so its kernel is a matrix.
        rows = weights[PATCH_KERNEL].unflatten(1, (*pair(config.patch_size), config.num_channels))
        weights[PATCH_KERNEL] = rows.permute(0, 3, 1, 2)
        grid_size = pair(math.isqrt(config.num_patches))
    else:
        grid_size = patch_grid(config)
    return SourceBackbone(weights, grid_size, common_settings(config))


def features(model: Any, pixel_values: Tensor) -> Tensor | None:
    """All tokens; `None` for a NaFlex model, which takes patches and not images."""
    return last_hidden_state(model, pixel_values) if hasattr(model.config, "image_size") else None
