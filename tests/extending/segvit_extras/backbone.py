"""A family of backbones: the Vision Transformers of torchvision."""

import torch

from hf_segvit.conversion.families.source import SourceBackbone
from hf_segvit.conversion.key_maps import CLS_TOKEN, POSITION_TABLE, fill_absent, fold_prefix_positions, rename, unpack

FAMILY = "torchvision VisionTransformer"
MODELS = ("torchvision.models.vision_transformer.VisionTransformer",)
KEY_MAP = (
    (r"class_token", CLS_TOKEN),
    (r"conv_proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"encoder\.pos_embedding", POSITION_TABLE),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12]\..+)", r"layers.\1.norm\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.+)", r"layers.\1.attention.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.(out_proj\..+)", r"layers.\1.attention.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(.+)", r"layers.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(.+)", r"layers.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.+)", r"layernorm.\1"),
)
DROPPED = (r"heads\..+",)


def convert(model, state_dict):
    """The weights under our names, with the settings that do not follow from them."""
    weights = unpack(rename(state_dict, KEY_MAP, DROPPED, FAMILY))
    side = model.image_size // model.patch_size
    settings = {
        "num_attention_heads": model.encoder.layers[0].num_heads,
        "layer_norm_eps": model.encoder.ln.eps,
        "hidden_act": "gelu",
    }
    return SourceBackbone(fill_absent(fold_prefix_positions(weights, 1)), (side, side), settings)


def features(model, pixel_values):
    """All tokens after the last norm, which a conversion must reproduce."""
    patches = model.conv_proj(pixel_values).flatten(2).transpose(1, 2)
    return model.encoder(torch.cat([model.class_token.expand(len(patches), -1, -1), patches], dim=1))
