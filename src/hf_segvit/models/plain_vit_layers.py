"""Layers of the plain ViT: self-attention, rotary position embeddings, MLPs.

In order: the attention module, in which leading tokens may carry a mask (EoMT's queries); attention written out, for
its weights; rotary embeddings of a patch grid; the two kinds of MLP. Kernels for CPUs are in `cpu_kernels.py`.

Shapes: B batch, T tokens, D hidden size, E channels of one head, h w patch grid.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_plain_vit import PlainViTConfig
from .cpu_kernels import (
    Linear,
    attention_products,
    autocast_type,
    in_autocast_type,
    is_bare,
    is_plain,
    linear,
    products_are_faster,
    two_layers,
)


class PlainViTAttention(nn.Module):
    """Multi-head self-attention through Transformers' attention interface."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, bias=config.key_bias)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        normed = config.attention_norm
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        # Weight and bias of the three projections in one tensor each, of which theirs are views; see `set_fused`.
        self.fused: tuple[Tensor, Tensor] | None = None

    def set_fused(self, fused: bool) -> None:
        """Compute queries, keys and values in one product, for inference; parameters and their names stay."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        self.fused = None
        # Adapters and quantised weights are no plain layers.
        if not fused or not all(type(layer) is Linear and is_plain(layer.weight) for layer in layers):
            return
        with torch.no_grad():
            weight, bias = self._joined()
            for layer, rows, values in zip(layers, weight.chunk(3), bias.chunk(3), strict=True):
                layer.weight.data = rows
                if layer.bias is not None:
                    layer.bias.data = values
        self.fused = weight, bias

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        # To another device or type each parameter goes by itself, away from the tensor that they share.
        result = super()._apply(fn, recurse)
        if self.fused is not None:
            self.set_fused(True)
        return result

    @property
    def _uses_fused(self) -> bool:
        if self.fused is None or self.training or torch.is_grad_enabled() or type(self.q_proj) is not Linear:
            return False
        # A deep copy has its own parameters, and is as it was before.
        return torch.compiler.is_compiling() or self.fused[0].data_ptr() == self.q_proj.weight.data_ptr()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        leading_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Transform (B, T, D), and return the weights (B, heads, T, T) if the back-end gives them.

        Args:
            hidden_states: (B, T, D).
            position_embeddings: cosines and sines (T, E) of `rotary_embeddings`, or (B, 1, T, E) of merged tokens.
            leading_mask: boolean (B, 1, rows, T), True where the first `rows` tokens may attend; later tokens attend
                to everything.
        """
        query, key, value = self._project(hidden_states, position_embeddings)
        back_end = self.config._attn_implementation or "eager"
        if leading_mask is None:
            context, weights = self._attend(back_end, query, key, value, None)
        else:
            # Only rows with a mask leave the fast kernel: one in nine at 640 pixels and 200 queries. Flash attention
            # takes no such mask, hence SDPA.
            rows = leading_mask.shape[-2]
            masked_back_end = "eager" if back_end == "eager" else "sdpa"
            leading, leading_weights = self._attend(masked_back_end, query[:, :, :rows], key, value, leading_mask)
            rest, rest_weights = self._attend(back_end, query[:, :, rows:], key, value, None)
            context = torch.cat((leading, rest), dim=1)
            weights = None
            if leading_weights is not None and rest_weights is not None:
                weights = torch.cat((leading_weights, rest_weights), dim=2)
        return self.out_proj(self.norm(context.flatten(2))), weights

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the three projections."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        zeros = (
            None
            if all(layer.bias is not None for layer in layers)
            else self.q_proj.weight.new_zeros(layers[0].out_features)
        )
        biases = [zeros if layer.bias is None else layer.bias for layer in layers]
        return torch.cat([layer.weight for layer in layers]), torch.cat(biases)  # type: ignore[arg-type]

    def _project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, E); queries and keys rotated if there are rotary embeddings."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_size)
        hidden_states = in_autocast_type(hidden_states)  # or each of the three products would have a copy of its own
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self._uses_fused:
            assert self.fused is not None
            parts = linear(hidden_states, *self.fused).chunk(3, dim=-1)
        elif joins_projections(hidden_states) and all(is_bare(layer) and is_plain(layer.weight) for layer in layers):
            parts = F.linear(hidden_states, *self._joined()).chunk(3, dim=-1)
        else:
            parts = tuple(layer(hidden_states) for layer in layers)
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        return query, key, value

    def _attend(
        self, back_end: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if back_end == "sdpa" and mask is None and not self.training and products_are_faster(query):
            return attention_products(query, key, value, self.scaling), None
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(back_end, eager_attention_forward)
        return attend(
            self,
            query,
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )


def joins_projections(hidden_states: Tensor) -> bool:
    """Whether queries, keys and values are computed in one product in training.

    On accelerators: their steps wait for the host, which has a third of the kernels to start then. Under autocast only,
    which copies the weights anyway; elsewhere the joined ones would be kept for the backward pass besides.
    """
    if hidden_states.device.type == "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return autocast_type(hidden_states.device) is not None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention (B, rows, heads, E) written out, which also returns its weights (B, heads, rows, T).

    Args:
        module: the attention module; dropout applies only while it trains.
        query: (B, heads, rows, E).
        key: (B, heads, T, E).
        value: (B, heads, T, E).
        attention_mask: boolean, broadcastable to (B, heads, rows, T), True where attention is allowed.
        kwargs: arguments of other back-ends, unused.
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        # The least finite number rather than -inf, which would turn a fully masked row into NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)  # sums in fp32 whatever the type of the scores
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotary_embeddings(
    grid_size: tuple[int, int],
    head_size: int,
    theta: float,
    num_prefix_tokens: int,
    device: torch.device,
    reference_grid: int | None = None,
    offset: float = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (num_prefix_tokens + h * w, E), fp32, that rotate queries and keys by their patch's position.

    Args:
        grid_size: patch rows and columns.
        head_size: E, channels of a head; a multiple of 4.
        theta: base of the frequencies.
        num_prefix_tokens: tokens before the patches, which keep angle 0.
        reference_grid: `None` maps patch centres to [-1, 1]. A number counts patches, scaled as if each axis had that
            many.
        offset: coordinate of the first patch, with `reference_grid`.
    """
    angles = rotary_angles(grid_size, head_size, theta, device, reference_grid, offset)
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    return angles.cos(), angles.sin()


def rotary_angles(
    grid_size: tuple[int, int],
    head_size: int,
    theta: float,
    device: torch.device,
    reference_grid: int | None = None,
    offset: float = 0,
) -> Tensor:
    """Angles (h * w, E), fp32, linear in a patch's position; arguments as for `rotary_embeddings`."""
    # Angles need fp32: in bf16 neighbouring patches would share one.
    indices = [torch.arange(n, device=device, dtype=torch.float32) for n in grid_size]
    frequencies = theta ** -(torch.arange(head_size // 4, device=device, dtype=torch.float32) * (4.0 / head_size))
    if reference_grid is None:
        # DINOv3 (Simeoni et al., arXiv 2508.10104): one unit is a full turn of the fastest channel.
        rows, columns = ((2.0 * i + 1.0) / n - 1.0 for i, n in zip(indices, grid_size, strict=True))
        frequencies = 2.0 * math.pi * frequencies
    else:
        # EVA-02 (Fang et al., arXiv 2303.11331): radians, on the pre-training grid that every other is stretched onto.
        rows, columns = ((i + offset) / n * reference_grid for i, n in zip(indices, grid_size, strict=True))
    row_angles = (rows[:, None] * frequencies)[:, None, :].expand(-1, grid_size[1], -1)
    column_angles = (columns[:, None] * frequencies)[None, :, :].expand(grid_size[0], -1, -1)
    # A quarter of the channels turns with the row, a quarter with the column; twice, for the halves `rotate` pairs.
    return torch.cat((row_angles, column_angles), dim=-1).flatten(0, 1).repeat(1, 2)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate channel i with channel i + E/2 of (B, heads, T, E) by the angles of each token."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.to(states.dtype) + torch.cat((-second, first), dim=-1) * sines.to(states.dtype)


class PlainMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform (..., D)."""
        return two_layers(self.fc1, self.activation, self.fc2, hidden_states)


class SwiGLU(nn.Module):
    """Linear layer gated by the activation of another (Shazeer, arXiv 2002.05202), with a norm in EVA-02."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        normed = config.mlp_norm
        self.norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.gate_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform (..., D)."""
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.norm(gated))
