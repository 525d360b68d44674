"""timm's `Eva`: DINOv3, EVA-02 and Perception Encoder.

They share rotary embeddings and little else. The facts are timm's (`timm/models/eva.py`,
`timm/layers/pos_embed_sincos.py`, Apache-2.0): DINOv3 rotates channel i with i + E/2 by coordinates in [-1, 1]; EVA-02
and Perception Encoder rotate 2i with 2i + 1 by patch numbers on the grid of their pre-training, the latter with columns
before rows and counting from 1.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..key_maps import fill_absent, fold_prefix_positions, rename, reorder_rotary, unpack
from .source import SourceBackbone
from .timm_vit import DROPPED, check_modules, features, key_map_for, module_settings

__all__ = ["FAMILY", "MODELS", "convert", "features", "rotary_settings"]

FAMILY = "timm Eva"
MODELS = ("timm.models.eva.Eva",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """An `Eva` of timm as a plain ViT."""
    check_modules(model, FAMILY, blocks=("EvaBlock",), attentions=("EvaAttention", "AttentionRope"))
    if model.pos_embed is None and model.rope is None:
        raise ValueError(f"this {FAMILY} has no position embeddings, so its patches have no position")
    settings = module_settings(model)
    if model.rope is not None:
        settings |= rotary_settings(model.rope)
    weights = unpack(rename(state_dict, key_map_for(model), DROPPED, FAMILY))
    if model.pos_embed is not None:
        weights = fold_prefix_positions(weights, 0 if model.no_embed_class else model.num_prefix_tokens)
    if model.rope is not None:
        # Our rotary embeddings rotate channel i with i + E/2, rows before columns.
        weights = reorder_rotary(
            weights,
            settings["num_attention_heads"],
            interleaved=not model.blocks[0].attn.rotate_half,
            columns_first=model.rope.grid_indexing == "xy",
        )
    return SourceBackbone(fill_absent(weights), tuple(model.patch_embed.grid_size), settings)


def rotary_settings(rope: Any) -> dict[str, Any]:
    """Fields of `PlainViTConfig` for a rotary module of timm."""
    kind = type(rope).__name__
    if kind == "RotaryEmbeddingDinoV3":
        if rope.normalize_coords != "separate" or rope.grid_offset or rope.temperature is None or rope.min_period:
            raise ValueError(f"{kind} is supported only with its default coordinates and periods")
        return {"rope_theta": rope.temperature}
    reference = getattr(rope, "ref_feat_shape", None)
    if kind != "RotaryEmbeddingCat" or rope.in_pixels or reference is None or len(set(reference)) > 1:
        raise ValueError(
            f"rotary embeddings of class {kind} on the reference grid {reference} are not supported; known are those "
            "of DINOv3 and, on a square grid, of EVA-02"
        )
    return {"rope_theta": rope.temperature, "rope_reference_grid": reference[0], "rope_offset": rope.grid_offset}
