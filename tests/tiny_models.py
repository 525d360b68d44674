"""Tiny models that every test file may build: small enough for milliseconds, random enough to notice a mistake."""

from pathlib import Path

import torch
from torch import nn

from hf_segvit.hub.remote_code import code_files, with_auto_map
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.configuration_mask2former_vit import Mask2FormerViTConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation

DINOV2 = {"position_embedding_type": "learned"}
DINOV2_GIANT = {"position_embedding_type": "learned", "mlp_type": "swiglu"}
DINOV3 = {"position_embedding_type": "rope", "key_bias": False, "layer_norm_eps": 1e-5}
FAMILIES = {"dinov2": DINOV2, "dinov2_giant": DINOV2_GIANT, "dinov3": DINOV3}


def tiny_config(**overrides) -> EoMTConfig:
    """An EoMT of 4 blocks, the last 2 with queries, for 64 x 64 pixels and 5 classes."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 64,
        "patch_size": 16,
        "num_queries": 7,
        "num_query_layers": 2,
        "num_labels": 5,
        "train_num_points": 64,
    }
    if "id2label" in overrides:
        settings.pop("num_labels")
    return EoMTConfig(**{**settings, **overrides})


def tiny_eomt(**overrides) -> EoMTForUniversalSegmentation:
    """A tiny EoMT in evaluation mode whose weights are all random, LayerScale, norms and biases included."""
    torch.manual_seed(0)
    return randomize(EoMTForUniversalSegmentation(tiny_config(**overrides))).eval()


def tiny_mask2former_vit_config(removed: str = "nothing", **overrides) -> Mask2FormerViTConfig:
    """A Mask2Former on a ViT of 4 blocks, with 3 decoder layers, for 64 x 64 pixels and 5 classes."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 64,
        "num_queries": 7,
        "num_labels": 5,
        "train_num_points": 64,
        "decoder_hidden_size": 32,
        "num_decoder_layers": 3,
        "num_decoder_attention_heads": 4,
        "decoder_intermediate_size": 48,
        "num_pixel_decoder_layers": 2,
        "pixel_decoder_intermediate_size": 40,
        "adapter_stem_channels": 8,
    }
    if "id2label" in overrides:
        settings.pop("num_labels")
    return Mask2FormerViTConfig(removed=removed, **{**settings, **overrides})


def tiny_mask2former_vit(removed: str = "nothing", **overrides) -> Mask2FormerViTForUniversalSegmentation:
    """A tiny Mask2Former on a ViT, in evaluation mode, whose weights are all random."""
    torch.manual_seed(0)
    config = tiny_mask2former_vit_config(removed, **overrides)
    return randomize(Mask2FormerViTForUniversalSegmentation(config)).eval()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Shift every parameter by noise, so that no initial zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save_with_code(model, processor, folder: Path, **kwargs) -> list[Path]:
    """Save a model as a push publishes it, with the code that loads it; gives the files of the code."""
    model_type = model.config.model_type
    files = code_files(model_type)
    model.save_pretrained(folder, **kwargs)
    processor.save_pretrained(folder)
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text(with_auto_map((folder / name).read_text(), model_type))
    for source in files:
        (folder / source.name).write_bytes(source.read_bytes())
    return [folder / source.name for source in files]
