"""Initial weights of the ViT-P models of the benchmarks: new (`place_aware`), or an EoMT's (`from_eomt`)."""

import math
from typing import Any

import torch
from torch import Tensor

from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification


@torch.no_grad()
def place_aware(model: Any) -> Any:
    """A new model in which a prompt looks at the patches near it from the start.

    Without pretraining, most of the run passes until prompts find their patches: position embeddings are random and
    drown in the content of the patches. So every patch gets the prompt encoder's code of its centre, plus waves of
    several lengths that distinguish neighbours; queries and keys start equal, so that tokens with similar codes attend
    to each other. All of it is trained like the rest.
    """
    vit_p = model.vit_p
    vit_p.embeddings.position_embeddings.weight.copy_(_new_prompt_codes(model))
    for layer in vit_p.layers:
        layer.attention.k_proj.weight.copy_(layer.attention.q_proj.weight)
    return model


@torch.no_grad()
def from_eomt(folder: str, config: ViTPConfig) -> ViTPForPointClassification:
    """A new model on the blocks of a trained EoMT, which has seen the same images.

    The changes of `place_aware` are added to the position embeddings, and made to the first two blocks only.

    Args:
        folder: of the EoMT.
        config: classes and kind of prompts; everything else is the EoMT's.
    """
    eomt = EoMTForUniversalSegmentation.from_pretrained(folder)
    shared = {name: getattr(eomt.config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    shared |= {name: getattr(eomt.config, name) for name in ("intermediate_size", "image_size", "patch_size")}
    model = ViTPForPointClassification(type(config)(**{**config.to_dict(), **shared}))
    wanted = {name: value.shape for name, value in model.vit_p.state_dict().items() if value.numel()}
    blocks = {name: value for name, value in eomt.eomt.state_dict().items() if wanted.get(name) == value.shape}
    missing = model.vit_p.load_state_dict(blocks, strict=False).missing_keys
    if unexpected := [name for name in missing if name in wanted and not name.startswith("prompt_")]:
        raise ValueError(f"{folder} has no {', '.join(unexpected)}; give an EoMT of a plain ViT without registers")
    model.vit_p.embeddings.position_embeddings.weight.add_(_new_prompt_codes(model))
    for layer in model.vit_p.layers[:2]:
        layer.attention.k_proj.weight.copy_(layer.attention.q_proj.weight)
    return model


def patch_centers(config: ViTPConfig) -> Tensor:
    """x and y of the centre of every patch, (h * w, 2) in [0, 1]."""
    rows, columns = ((torch.arange(length) + 0.5) / length for length in config.grid_size)
    return torch.cartesian_prod(rows, columns).flip(1)


def _new_prompt_codes(model: ViTPForPointClassification) -> Tensor:
    """Draw a prompt encoder; return its codes of the patch centres (h * w, D), and waves."""
    vit_p, config = model.vit_p, model.config
    vit_p.prompt_encoder.weight.normal_()
    vit_p.prompt_position_embedding.normal_()
    centers = patch_centers(config)
    prompts = torch.cat([centers, torch.zeros_like(centers)], dim=1)
    waves = torch.logspace(0, math.log10(config.grid_size[0]), config.hidden_size // 4) * math.pi / 2
    phases = (2 * centers - 1)[:, :, None] * waves
    codes = vit_p.prompt_encoder(prompts) + vit_p.prompt_position_embedding
    return codes + 0.5 * torch.cat([phases.sin(), phases.cos()], 2).flatten(1)
