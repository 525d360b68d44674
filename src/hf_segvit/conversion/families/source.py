"""What every family hands over: a backbone in our parameter names, with the settings that tensors cannot tell."""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..key_maps import CLS_POSITION, CLS_TOKEN, PATCH_KERNEL, POSITION_TABLE, REGISTER_TOKENS


@dataclass
class SourceBackbone:
    """A backbone in our names.

    Args:
        state_dict: weights of a `PlainViTModel`.
        grid_size: patch rows and columns that it was made for.
        settings: fields of `PlainViTConfig` that shapes do not tell: heads, activation, epsilon, rotary embeddings.
        cls_position: (1, D) position embedding that is part of the CLS token in `state_dict`, from which it is taken;
            `None` where there is none.
    """

    state_dict: dict[str, Tensor]
    grid_size: tuple[int, int]
    settings: dict[str, Any]
    cls_position: Tensor | None = None

    def __post_init__(self) -> None:
        self.cls_position = self.state_dict.pop(CLS_POSITION, self.cls_position)

    def config_fields(self) -> dict[str, Any]:
        """Fields of `PlainViTConfig`: the settings, and what is there to be read from names and shapes."""
        weights = self.state_dict
        layers = {int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}
        first = {name.removeprefix("layers.0."): tensor for name, tensor in weights.items()}
        gated = "mlp.gate_proj.weight" in first
        inner = first.get("mlp.gate_proj.weight" if gated else "mlp.fc1.weight")
        rotary, learned = "rope_theta" in self.settings, POSITION_TABLE in weights
        return {
            "hidden_size": weights[PATCH_KERNEL].shape[0],
            "num_channels": weights[PATCH_KERNEL].shape[1],
            "patch_size": weights[PATCH_KERNEL].shape[-1],
            "num_hidden_layers": max(layers) + 1,
            "intermediate_size": 0 if inner is None else inner.shape[0],
            "use_cls_token": weights[CLS_TOKEN].shape[1] > 0,
            "num_register_tokens": weights[REGISTER_TOKENS].shape[1],
            "position_embedding_type": "learned_rope" if rotary and learned else "rope" if rotary else "learned",
            "mlp_type": "swiglu" if gated else "mlp",
            "mlp_norm": "mlp.norm.weight" in first,
            "attention_norm": "attention.norm.weight" in first,
            "key_bias": "attention.k_proj.bias" in first,
            "layer_scale_init_value": 1.0 if "layer_scale1.lambda1" in first else None,
            "embedding_norm": "embeddings.layernorm.weight" in weights,
            "final_norm": "layernorm.weight" in weights,
            **self.settings,
        }


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
