"""The plain Vision Transformer behind EoMT and ViT-P.

In order: embeddings, block, base class, model. Every family is the same code under another `PlainViTConfig`: DINOv2
(Oquab et al., arXiv 2304.07193), DINOv3 (Simeoni et al., arXiv 2508.10104), EVA-02 (Fang et al., arXiv 2303.11331),
DeiT-III, MAE, SigLIP and others. Inputs need not be square; their sides are multiples of the patch size.

Shapes: B batch, T tokens, D hidden size, H W pixels, h w patch grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_guard import checked_arguments, exported_model
from .configuration_plain_vit import PlainViTConfig
from .inference_optimization import fuse_projections, set_channels_last
from .plain_vit_layers import PlainMLP, PlainViTAttention, SwiGLU, rotary_embeddings
from .position_resampling import antialiased_weights, is_traced_grid, resample_by_products


class LayerScale(nn.Module):
    """A learned factor per channel on the output of a branch (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor, branch: Tensor) -> Tensor:
        """Add the scaled branch (..., D) to the residual stream."""
        if branch.dtype != hidden_states.dtype:
            # Under autocast one pass would first convert the branch, and keep the copy for the backward pass.
            return hidden_states + branch * self.lambda1
        # One pass over memory; a product and a sum would take two.
        return torch.addcmul(hidden_states, branch, self.lambda1)


class DropPath(nn.Module):
    """Stochastic depth: training drops a sample's branch with probability `rate` (Huang et al., arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zero or keep whole samples of (B, T, D)."""
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        # Scaled so that the expected value is the same as in evaluation.
        return hidden_states * keep.to(hidden_states.dtype) / (1.0 - self.rate)


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches as tokens."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, h * w, D), row by row, of `pixel_values` (B, channels, H, W)."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} must be (batch, {self.num_channels}, height, width)"
            )
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size or height == 0 or width == 0:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels: both sides must be multiples of patch_size="
                f"{self.patch_size}; resize or pad the image, as EoMTImageProcessor does"
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class PlainViTEmbeddings(nn.Module):
    """CLS and register tokens, followed by patches with their position embeddings."""

    def __init__(self, config: PlainViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid_size = config.grid_size
        # Parameters without elements take no gradient, because FSDP2 cannot exchange an empty one.
        cls_token = torch.empty(1, int(config.use_cls_token), config.hidden_size)
        self.cls_token = nn.Parameter(cls_token, requires_grad=cls_token.numel() > 0)
        register_tokens = torch.empty(1, config.num_register_tokens, config.hidden_size)
        self.register_tokens = nn.Parameter(register_tokens, requires_grad=register_tokens.numel() > 0)
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings: nn.Embedding | None = None
        if config.has_learned_positions:
            self.position_embeddings = nn.Embedding(math.prod(config.grid_size), config.hidden_size)
        normed = config.embedding_norm
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if normed else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, prefix + h * w, D) of `pixel_values` (B, channels, H, W)."""
        patches = self.patch_embeddings(pixel_values)
        if self.position_embeddings is not None:
            grid_size = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)
            patches = patches + self.resample(self.position_embeddings.weight, grid_size)
        batch_size = patches.shape[0]
        prefix = (self.cls_token.expand(batch_size, -1, -1), self.register_tokens.expand(batch_size, -1, -1))
        return self.layernorm(torch.cat((*prefix, patches), dim=1))

    def resample(self, table: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Learned position embeddings (h * w, D) for a patch grid."""
        return resample_position_embeddings(table, self.grid_size, grid_size)


def resample_position_embeddings(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample learned position embeddings (rows * columns, D) to another patch grid."""
    # Comparing a grid that is not known yet would export a graph for all sizes but this one.
    if not is_traced_grid(new_grid) and old_grid == new_grid:
        return table
    if torch.compiler.is_exporting():
        return resample_by_products(table, old_grid, new_grid, antialiased_weights)
    # Bicubic with antialiasing and in fp32, as timm does.
    grid = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True)
    return grid.flatten(2)[0].transpose(0, 1).to(table.dtype)


class PlainViTLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention and MLP, each with LayerScale and stochastic depth."""

    attention_class: type[PlainViTAttention] = PlainViTAttention

    def __init__(self, config: PlainViTConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = self.attention_class(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if config.mlp_type == "swiglu" else PlainMLP(config)
        scale = config.layer_scale_init_value
        self.layer_scale1 = None if scale is None else LayerScale(config.hidden_size, scale)
        self.layer_scale2 = None if scale is None else LayerScale(config.hidden_size, scale)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        leading_mask: Tensor | None = None,
        merge: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Transform (B, T, D), merging tokens before the MLP; see `PlainViTAttention.forward` for other arguments."""
        attended, _ = self.attention(self.norm1(hidden_states), position_embeddings, leading_mask)
        hidden_states = self._add(hidden_states, attended, self.layer_scale1)
        if merge is not None:
            hidden_states = merge(hidden_states)
        return self._add(hidden_states, self.mlp(self.norm2(hidden_states)), self.layer_scale2)

    def _add(self, hidden_states: Tensor, branch: Tensor, scale: LayerScale | None) -> Tensor:
        branch = self.drop_path(branch)
        return hidden_states + branch if scale is None else scale(hidden_states, branch)


@contextmanager
def misfits_name_the_flag(source: Any) -> Iterator[None]:
    """Turn Transformers' error about weights of another shape into a ValueError that says how to change the classes."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"the weights of {source} do not fit the configuration (see the report above); for a new label set pass "
            "id2label=... or num_labels=... together with ignore_mismatched_sizes=True, which resets the class head "
            "only"
        ) from error


class PlainViTPreTrainedModel(PreTrainedModel):
    """Base of all models on the plain ViT: initial weights, and the features that Transformers may use."""

    config: PlainViTConfig
    base_model_prefix = "plain_vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["PlainViTEmbeddings", "PlainViTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PlainViTLayer, "attentions": PlainViTAttention}  # noqa: RUF012

    def __init__(self, config: PlainViTConfig, *args: Any, **kwargs: Any):
        # `from_pretrained` sets fields given as keyword arguments after the config was made and checked.
        config.check()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; see Transformers.

        For a new label set pass `num_labels=...` or `id2label=...` with `ignore_mismatched_sizes=True`, which resets
        only the class head.
        """
        exported = exported_model(cls, pretrained_model_name_or_path, kwargs)
        if exported is not None:
            return exported
        kwargs = checked_arguments(cls, pretrained_model_name_or_path, kwargs)
        with misfits_name_the_flag(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_backbone(
        cls, source: Any, image_size: int | Sequence[int] | None = None, patch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """Start from the weights of another library's backbone; layers that it lacks are newly initialised.

        The model is in evaluation mode, and in fp32 unless `dtype` says otherwise.

        Args:
            source: `"timm/<name>"`, a Hub id or folder of a Transformers or `PlainViTModel` checkpoint, or such a model
                in memory. Supported families: `hf_segvit.conversion.backbones`.
            image_size: pixels, an int or `[height, width]`, to whose grid position embeddings are resampled.
            patch_size: size to which the patch kernel is resampled.
            kwargs: fields of the configuration, arguments of `from_pretrained` such as `dtype` or `device_map`, and
                `family`, a `hf_segvit.conversion.families.source.BackboneFamily` for a backbone of an unknown family.
        """
        # Inside `try`, as a checkpoint that carries this file as remote code has to load without the package.
        try:
            from hf_segvit.conversion.backbones import model_from_backbone
        except ImportError as error:
            raise ImportError(
                f"{cls.__name__}.from_backbone needs the package hf-segvit and timm, not this checkpoint's code alone"
            ) from error
        return model_from_backbone(cls, source, image_size, patch_size, **kwargs)

    def optimize_for_inference(self, *, fuse_qkv: bool | None = None, channels_last: bool | None = None) -> Any:
        """Make inference faster without another checkpoint; the model itself, in evaluation mode.

        Args:
            fuse_qkv: compute queries, keys and values in one product; `None`: where that is faster.
            channels_last: lay out the kernels of convolutions channels-last; `None`: on accelerators.
        """
        self.eval()
        fuse_projections(self, fuse_qkv)
        set_channels_last(self, channels_last)
        return self

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
            init.constant_(module.lambda1, module.init_value)
        elif isinstance(module, PlainViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.register_tokens, std=std)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings.weight, std=std)


class PlainViTModel(PlainViTPreTrainedModel):
    """The plain Vision Transformer without a head."""

    embeddings_class: type[PlainViTEmbeddings] = PlainViTEmbeddings
    layer_class: type[PlainViTLayer] = PlainViTLayer

    def __init__(self, config: PlainViTConfig):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            self.layer_class(config, config.drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )
        normed = config.final_norm
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if normed else nn.Identity()
        # Subclasses add modules and call this themselves once all of them exist.
        if type(self) is PlainViTModel:
            self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns pixels into tokens."""
        return self.embeddings.patch_embeddings

    def position_embeddings_for(self, pixel_values: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings for images (B, channels, H, W), or `None` if positions are only learned."""
        config = self.config
        if not config.has_rotary_positions:
            return None
        return rotary_embeddings(
            (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size),
            config.hidden_size // config.num_attention_heads,
            config.rope_theta,
            num_prefix_tokens,
            pixel_values.device,
            config.rope_reference_grid,
            config.rope_offset,
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode normalised images (B, channels, H, W) as (B, prefix + h * w, D) after the final norm.

        `kwargs` are `output_hidden_states`, `output_attentions` (needs the eager back-end) and `return_dict`.
        """
        hidden_states = self.embeddings(pixel_values)
        position_embeddings = self.position_embeddings_for(pixel_values, self.config.num_prefix_tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))
