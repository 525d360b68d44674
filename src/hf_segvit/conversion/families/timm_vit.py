"""timm's `VisionTransformer`: DINOv2, DeiT-III, ViT augreg, MAE, SigLIP and SigLIP 2.

The conversion, the key map that it shares with timm's `Eva`, and what is read from timm's modules. The facts are timm's
(`timm/models/vision_transformer.py`, Apache-2.0).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..key_maps import POSITION_TABLE, fill_absent, fold_prefix_positions, rename, unpack
from .source import SourceBackbone

FAMILY = "timm VisionTransformer"
MODELS = ("timm.models.vision_transformer.VisionTransformer",)


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `VisionTransformer` of timm as a plain ViT."""
    check_modules(model, FAMILY, blocks=("Block",), attentions=("Attention",))
    if model.pos_embed is None:
        raise ValueError(f"this {FAMILY} has no position embeddings, so its patches have no position")
    weights = unpack(rename(state_dict, key_map_for(model), DROPPED, FAMILY))
    # The position table covers CLS and registers unless `no_embed_class`.
    weights = fold_prefix_positions(weights, 0 if model.no_embed_class else model.num_prefix_tokens)
    return SourceBackbone(fill_absent(weights), tuple(model.patch_embed.grid_size), module_settings(model))


def features(model: Any, pixel_values: Tensor) -> Tensor:
    """All tokens after the last norm."""
    tokens = model.forward_features(pixel_values)
    # Models that average the patches keep the last norm behind the average.
    norm = getattr(model, "fc_norm", None)
    return tokens if norm is None else norm(tokens)


# Without the MLP, whose names mean different things in timm's three classes.
KEY_MAP = (
    (r"cls_token", r"embeddings.cls_token"),
    (r"reg_token", r"embeddings.register_tokens"),
    (r"pos_embed", POSITION_TABLE),
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm_pre\.(.+)", r"embeddings.layernorm.\1"),
    # Where the classifier averages the patches, the only norm after the blocks comes after the average.
    (r"(?:fc_)?norm\.(.+)", r"layernorm.\1"),
    (r"blocks\.(\d+\.norm[12]\..+)", r"layers.\1"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"layers.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.([qkv])_proj\.(.+)", r"layers.\1.attention.\2_proj.\3"),
    (r"blocks\.(\d+)\.attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
    (r"blocks\.(\d+)\.attn\.norm\.(.+)", r"layers.\1.attention.norm.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"layers.\1.attention.out_proj.\2"),
    (r"blocks\.(\d+)\.(?:ls([12])\.gamma|gamma_([12]))", r"layers.\1.layer_scale\2\3.lambda1"),
)
# timm packs gate and value into fc1, the gate first; EVA-02 keeps them apart as fc1_g and fc1_x.
_GLU_KEY_MAP = (
    (r"blocks\.(\d+\.mlp\.norm\..+)", r"layers.\1"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.+)", r"layers.\1.mlp.gate_up_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1_g\.(.+)", r"layers.\1.mlp.gate_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1_x\.(.+)", r"layers.\1.mlp.up_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.+)", r"layers.\1.mlp.down_proj.\2"),
)
MLP_KEY_MAPS = {
    "Mlp": ((r"blocks\.(\d+\.mlp\.fc[12]\..+)", r"layers.\1"),),
    "GluMlp": _GLU_KEY_MAP,
    "SwiGLU": _GLU_KEY_MAP,
}
DROPPED = (r"head\..+", r"attn_pool\..+")  # classifier and attention pooling


def key_map_for(model: Any) -> tuple[tuple[str, str], ...]:
    """The key map of a timm model, which depends on the class of its MLPs."""
    return KEY_MAP + MLP_KEY_MAPS[type(model.blocks[0].mlp).__name__]


def check_modules(model: Any, family: str, blocks: tuple[str, ...], attentions: tuple[str, ...]) -> None:
    """Refuse modules that have the right parameter names but compute something else.

    Args:
        model: a timm model with `patch_embed`, `blocks` and `norm`.
        blocks: class names of blocks that compute what ours do.
        attentions: class names of attention modules that do.
    """
    for block in model.blocks:
        _check_class(block, "block", blocks, family)  # first: other blocks may lack the parts below
        _check_class(block.attn, "attention", attentions, family)
        _check_class(block.mlp, "MLP", tuple(MLP_KEY_MAPS), family)
        _check_class(block.norm1, "norm", ("LayerNorm",), family)
    if type(model.patch_embed).__name__ != "PatchEmbed" or len(set(model.patch_embed.patch_size)) > 1:
        raise ValueError(
            f"this {family} makes tokens with {type(model.patch_embed).__name__} of patches "
            f"{model.patch_embed.patch_size}; the plain ViT has one convolution over square patches"
        )


def _check_class(module: nn.Module, part: str, known: tuple[str, ...], family: str) -> None:
    name = type(module).__name__
    if name not in known:
        raise ValueError(f"this {family} has a {part} of class {name}; the plain ViT expresses {', '.join(known)}")


def module_settings(model: Any) -> dict[str, Any]:
    """Heads, epsilon and activation, which a timm model's weights do not show."""
    block = model.blocks[0]
    activation = activation_name(block.mlp.act)
    gated = type(block.mlp).__name__ != "Mlp"
    if getattr(block.mlp, "gate_last", False):
        raise ValueError("this timm model has a GLU whose second half is the gate; the plain ViT's gate comes first")
    return {
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        **({"gate_act": activation} if gated else {"hidden_act": activation}),
    }


def activation_name(activation: nn.Module) -> str:
    """Transformers' name of an activation of timm."""
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_pytorch_tanh"
    names = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
    name = type(activation).__name__
    if name not in names:
        raise ValueError(f"this timm model's MLP uses {name}; known are {sorted(names)}")
    return names[name]
