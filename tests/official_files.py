"""Checkpoints as the official EoMT code would write them, made from tiny models of ours."""

import re

import torch

from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEADS = (
    ("eomt.query.weight", "q.weight"),
    ("class_predictor.", "class_head."),
    ("eomt.mask_head.fc1.", "mask_head.0."),
    ("eomt.mask_head.fc2.", "mask_head.2."),
    ("eomt.mask_head.fc3.", "mask_head.4."),
    ("eomt.upscale_block.block.", "upscale."),
)
_TIMM = (
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings\.weight", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.out_proj\.", ".attn.proj."),
    (r"\.layer_scale1\.lambda1", ".ls1.gamma"),
    (r"\.layer_scale2\.lambda1", ".ls2.gamma"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^layers\.", "blocks."),
)
_DINOV3 = (
    (r"patch_embeddings\.projection\.", "patch_embeddings."),
    (r"^embeddings\.", "patch_embed."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.out_proj\.", ".attention.o_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    (r"^layers\.", "blocks."),
)


def official_state_dict(model: EoMTForUniversalSegmentation) -> dict[str, torch.Tensor]:
    """The state dict of the official code's Lightning module with the weights of a model of ours."""
    rotary = model.config.position_embedding_type == "rope"
    official: dict[str, torch.Tensor] = {}
    ours = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.numel()}
    for name, tensor in ours.items():
        head = next((pair for pair in _HEADS if name.startswith(pair[0])), None)
        if head is not None:
            renamed = name.replace(*head).replace(".layernorm2d.", ".norm.")
            official[f"network.{renamed}"] = tensor
            continue
        name = name.removeprefix("eomt.")
        packed = re.fullmatch(r"layers\.(\d+)\.(attention\.q_proj|mlp\.gate_proj)\.(.+)", name)
        if packed and not rotary:
            rest = ("k_proj", "v_proj") if "q_proj" in packed[2] else ("up_proj",)
            prefix = f"eomt.layers.{packed[1]}.{packed[2].split('.')[0]}"
            parts = [tensor, *(ours[f"{prefix}.{part}.{packed[3]}"] for part in rest)]
            target = "attn.qkv" if "q_proj" in packed[2] else "mlp.fc1"
            official[f"network.encoder.backbone.blocks.{packed[1]}.{target}.{packed[3]}"] = torch.cat(parts)
            continue
        if not rotary and re.search(r"\.(k_proj|v_proj|up_proj)\.", name):
            continue
        for old, new in _DINOV3 if rotary else _TIMM:
            name = re.sub(old, new, name)
        official[f"network.encoder.backbone.{name}"] = tensor[None] if name == "pos_embed" else tensor
    official["network.attn_mask_probs"] = torch.tensor(model.config.masked_attention_probabilities)
    official["network.encoder.pixel_mean"] = torch.tensor(MEAN).view(1, 3, 1, 1)
    official["network.encoder.pixel_std"] = torch.tensor(STD).view(1, 3, 1, 1)
    official["criterion.empty_weight"] = torch.ones(model.config.num_labels + 1)
    return official
