"""The plain Vision Transformer that EoMT and ViT-P stand on.

In here, in this order: the model and its base class, the embeddings, one block, attention with optional masks for the
leading tokens, the MLPs. Every family is the same code under another `PlainViTConfig`: DINOv2 (Oquab et al., arXiv
2304.07193; registers, SwiGLU for giant) and DINOv3 (Simeoni et al., arXiv 2508.10104; rotary embeddings). Any input whose sides are multiples
of the patch size is served, square or not.

Shapes: B batch, T tokens, D hidden size, H W pixels, h w patch grid, E channels of one head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_plain_vit import PlainViTConfig


class LayerScale(nn.Module):
    """A learned factor per channel on the output of a branch (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale (..., D)."""
        return hidden_states * self.lambda1


class DropPath(nn.Module):
    """Stochastic depth: in training, the branch of a sample is left out with probability `rate` (arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Keep or drop whole samples of (B, T, D); the kept ones are scaled so that the mean stays."""
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * keep.to(hidden_states.dtype) / (1.0 - self.rate)


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed a picture.

        Args:
            pixel_values: (B, channels, H, W), H and W multiples of the patch size.

        Returns:
            (B, h * w, D), row by row.

        Raises:
            ValueError: wrong number of dimensions or channels, or a side that is no multiple of the patch size.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} must be (batch, {self.num_channels}, height, width)"
            )
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size or height == 0 or width == 0:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels: both sides must be multiples of patch_size="
                f"{self.patch_size}; resize or pad the picture, as EoMTImageProcessor does"
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class PlainViTEmbeddings(nn.Module):
    """Patches with their position embedding, behind the CLS and register tokens."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid_size = config.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings: nn.Embedding | None = None
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(math.prod(config.grid_size), config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, 1 + registers + h * w, D) of `pixel_values` (B, channels, H, W)."""
        patches = self.patch_embeddings(pixel_values)
        if self.position_embeddings is not None:
            grid_size = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)
            patches = patches + resample_position_embeddings(self.position_embeddings.weight, self.grid_size, grid_size)
        batch_size = patches.shape[0]
        return torch.cat(
            (
                self.cls_token.expand(batch_size, -1, -1),
                self.register_tokens.expand(batch_size, -1, -1),
                patches,
            ),
            dim=1,
        )


def resample_position_embeddings(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample learned position embeddings to another patch grid: bicubic with antialiasing, in fp32, as timm does.

    Args:
        table: (rows * columns of `old_grid`, D).
        old_grid: rows and columns of the table.
        new_grid: rows and columns wanted.

    Returns:
        (rows * columns of `new_grid`, D); the table itself where the grids are the same.
    """
    if old_grid == new_grid:
        return table
    grid = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True)
    return grid.flatten(2)[0].transpose(0, 1).to(table.dtype)


def rotary_embeddings(
    grid_size: tuple[int, int], head_size: int, theta: float, num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate the queries and keys of the patches by their place in the picture (DINOv3).

    Patch centres are mapped to [-1, 1] along each axis; a quarter of the channels turns with the row, a quarter with
    the column, and both are used twice, for the halves that `rotate` pairs. Tokens before the patches keep angle 0.

    Args:
        grid_size: patch rows and columns.
        head_size: E, channels of a head; a multiple of 4.
        theta: base of the frequencies.
        num_prefix_tokens: tokens before the patches.
        device: where to make them.

    Returns:
        Two fp32 tensors (num_prefix_tokens + h * w, E).
    """
    # Angles are always worked out in fp32: in bf16 neighbouring patches would share one.
    rows, columns = ((2.0 * torch.arange(n, device=device, dtype=torch.float32) + 1.0) / n - 1.0 for n in grid_size)
    exponents = torch.arange(head_size // 4, device=device, dtype=torch.float32) * (4.0 / head_size)
    frequencies = 2.0 * math.pi * theta**-exponents
    row_angles = (rows[:, None] * frequencies)[:, None, :].expand(-1, grid_size[1], -1)
    column_angles = (columns[:, None] * frequencies)[None, :, :].expand(grid_size[0], -1, -1)
    angles = torch.cat((row_angles, column_angles), dim=-1).flatten(0, 1).repeat(1, 2)
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate channel i with channel i + E/2 of (B, heads, T, E) by the angles of each token."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.to(states.dtype) + torch.cat((-second, first), dim=-1) * sines.to(states.dtype)


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
    """Attention written out, which also returns its weights.

    Args:
        module: the attention module, asked whether it trains.
        query: (B, heads, rows, E).
        key: (B, heads, T, E).
        value: (B, heads, T, E).
        attention_mask: boolean, broadcastable to (B, heads, rows, T), True where attention is allowed; no row may be
            all False.
        scaling: factor on the scores.
        dropout: probability in training.
        kwargs: arguments of other back-ends, unused.

    Returns:
        (B, rows, heads, E) and the weights (B, heads, rows, T).
    """
    scores = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PlainViTAttention(nn.Module):
    """Multi-head self-attention through Transformers' attention interface; leading tokens may carry a mask."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        leading_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, T, D).
            position_embeddings: cosines and sines (T, E) of `rotary_embeddings`.
            leading_mask: boolean (B, 1, rows, T), True where the first `rows` tokens may attend; the tokens after
                them attend to everything.

        Returns:
            (B, T, D), and the weights (B, heads, T, T) where the back-end gives them.
        """
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_size)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)

        back_end = self.config._attn_implementation
        if leading_mask is None:
            context, weights = self._attend(back_end, query, key, value, None)
        else:
            # Only the rows that carry a mask leave the fast kernel: one in nine at 640 pixels and 200 queries.
            rows = leading_mask.shape[-2]
            masked_back_end = "eager" if back_end == "eager" else "sdpa"
            led, led_weights = self._attend(masked_back_end, query[:, :, :rows], key, value, leading_mask)
            rest, rest_weights = self._attend(back_end, query[:, :, rows:], key, value, None)
            context = torch.cat((led, rest), dim=1)
            weights = None
            if led_weights is not None and rest_weights is not None:
                weights = torch.cat((led_weights, rest_weights), dim=2)
        return self.out_proj(context.flatten(2)), weights

    def _attend(
        self, back_end: str | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
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
    """A linear layer gated by the activation (SiLU) of another (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.gate_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform (..., D)."""
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PlainViTLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention and MLP, each with LayerScale and stochastic depth."""

    def __init__(self, config: PlainViTConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PlainViTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if config.mlp_type == "swiglu" else PlainMLP(config)
        scaled = config.layer_scale_init_value is not None
        self.layer_scale1 = LayerScale(config.hidden_size) if scaled else nn.Identity()
        self.layer_scale2 = LayerScale(config.hidden_size) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        leading_mask: Tensor | None = None,
    ) -> Tensor:
        """Transform (B, T, D); the other arguments are those of `PlainViTAttention`."""
        attended, _ = self.attention(self.norm1(hidden_states), position_embeddings, leading_mask)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))


class PlainViTPreTrainedModel(PreTrainedModel):
    """What every model on the plain ViT shares: initial weights, and what Transformers may do with it."""

    config: PlainViTConfig
    base_model_prefix = "plain_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PlainViTEmbeddings", "PlainViTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PlainViTLayer, "attentions": PlainViTAttention}  # noqa: RUF012

    def __init__(self, config: PlainViTConfig, *args: Any, **kwargs: Any):
        # Fields set after the config was made (from_pretrained's keyword arguments) were not checked yet.
        config.check()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            init.constant_(module.lambda1, self.config.layer_scale_init_value)
        elif isinstance(module, PlainViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.register_tokens, std=std)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings.weight, std=std)


class PlainViTModel(PlainViTPreTrainedModel):
    """The plain Vision Transformer without a head."""

    def __init__(self, config: PlainViTConfig):
        super().__init__(config)
        self.embeddings = PlainViTEmbeddings(config)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            PlainViTLayer(config, config.drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if type(self) is PlainViTModel:  # a model that adds modules finishes when it has them all
            self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.embeddings.patch_embeddings

    def position_embeddings_for(self, pixel_values: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings for a batch of pictures (B, channels, H, W), or `None` where positions are learned."""
        config = self.config
        if config.position_embedding_type != "rope":
            return None
        grid_size = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
        head_size = config.hidden_size // config.num_attention_heads
        return rotary_embeddings(grid_size, head_size, config.rope_theta, num_prefix_tokens, pixel_values.device)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode pictures.

        Args:
            pixel_values: (B, channels, H, W), normalised; H and W multiples of the patch size.
            kwargs: `output_hidden_states`, `output_attentions` (needs the eager back-end) and `return_dict`.

        Returns:
            `last_hidden_state` (B, 1 + registers + h * w, D) after the final norm, and what was asked for.

        Raises:
            ValueError: the picture's shape does not fit; see `PatchEmbeddings.forward`.
        """
        hidden_states = self.embeddings(pixel_values)
        position_embeddings = self.position_embeddings_for(pixel_values, self.config.num_prefix_tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))
