"""The two kinds of MLP in a block of the plain ViT: two linear layers, or three of which one gates another."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_plain_vit import PlainViTConfig


class PlainMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform (..., D)."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SwiGLU(nn.Module):
    """A linear layer gated by the activation (SiLU) of another (Shazeer, arXiv 2002.05202), with a norm in EVA-02."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        normed = config.mlp_norm
        self.norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.gate_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform (..., D)."""
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.norm(gated))
