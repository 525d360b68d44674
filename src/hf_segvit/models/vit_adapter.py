"""ViT-Adapter: convolutional features of four scales beside a plain ViT.

In order: the spatial prior, deformable attention, injector, extractor, one interaction, the adapter (Chen et al., arXiv
2205.08534). Features of strides 8, 16 and 32 are one sequence; each interaction injects them into the patches, runs a
group of blocks, and extracts from the patches again. CLS and register tokens take part in the blocks only.

Shapes: B batch, D hidden size, H W pixels, multiples of 32; N patches of a grid h w; M cells of strides 8, 16 and 32.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as TransformersDeformableAttention,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderOnly as TransformersDeformableEncoder,
)

from .configuration_mask2former_vit import NUM_INTERACTIONS, Mask2FormerViTConfig

Size = tuple[int, int]
NUM_POINTS = 4  # that a head reads from each scale
NUM_SCALES = 3  # of the sequence
NUM_LAST_EXTRACTORS = 3  # of the last interaction, where the others have one


class SpatialPrior(nn.Module):
    """Convolutions from the image to features of strides 4, 8, 16 and 32."""

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__()
        width = config.adapter_stem_channels
        self.stem: Any = nn.Sequential(
            *_convolution(config.num_channels, width, stride=2),
            *_convolution(width, width, stride=1),
            *_convolution(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_convolution(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_convolution(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_convolution(4 * width, 4 * width, stride=2))
        self.projections = nn.ModuleList(
            nn.Conv2d(factor * width, config.hidden_size, kernel_size=1) for factor in (1, 2, 4, 4)
        )

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Four maps (B, D, H / stride, W / stride) of images (B, channels, H, W), the finest first."""
        maps = [self.stem(pixel_values.to(self.stem[0].weight.dtype))]
        for convolution in (self.conv2, self.conv3, self.conv4):
            maps.append(convolution(maps[-1]))
        return [projection(each) for projection, each in zip(self.projections, maps, strict=True)]


def _convolution(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    kernel = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return kernel, nn.BatchNorm2d(out_channels), nn.ReLU()


class DeformableAttention(TransformersDeformableAttention):
    """Transformers' deformable attention, with values of a width of their own."""

    def __init__(self, config: Mask2FormerViTConfig, num_scales: int):
        width, heads = config.hidden_size, config.num_adapter_attention_heads
        assert heads is not None  # set by the configuration
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of head widths that a CUDA extension, which is not used, takes longer for
            super().__init__(width, heads, num_scales, NUM_POINTS)
        self.value_proj = nn.Linear(width, config.adapter_value_size)
        self.output_proj = nn.Linear(config.adapter_value_size, width)
        self.d_model = config.adapter_value_size  # by which the forward pass splits values among the heads


class Injector(nn.Module):
    """Patches attend to the features."""

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeformableAttention(config, NUM_SCALES)
        self.gamma = nn.Parameter(torch.empty(config.hidden_size))  # starts at 0: the ViT as it was pre-trained

    def forward(self, patches: Tensor, features: Tensor, references: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Patches (B, N, D) with what was read from features (B, M, D) of `sizes` around `references` (1, N, 3, 2)."""
        attended, _ = self.attention(
            self.query_norm(patches),
            encoder_hidden_states=self.feature_norm(features),
            reference_points=references,
            spatial_shapes_list=list(sizes),
        )
        return torch.addcmul(patches, self.gamma.to(attended.dtype), attended)


class ConvolutionalMLP(nn.Module):
    """Two linear layers with a depth-wise 3 x 3 convolution, shared by the scales, between them."""

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__()
        width = int(config.hidden_size * config.adapter_mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.convolution = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, features: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Transform features (B, M, D), the concatenated cells of maps of `sizes`."""
        maps = [self.convolution(each) for each in split_maps(self.fc1(features), sizes)]
        return self.fc2(self.activation(join_maps(maps)))


class Extractor(nn.Module):
    """Features attend to the patches, then pass an MLP."""

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeformableAttention(config, num_scales=1)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ConvolutionalMLP(config)

    def forward(
        self, features: Tensor, patches: Tensor, references: Tensor, sizes: Sequence[Size], grid_size: Size
    ) -> Tensor:
        """Features (B, M, D) with what was read from patches (B, N, D) around `references` (1, M, 1, 2)."""
        attended, _ = self.attention(
            self.query_norm(features),
            encoder_hidden_states=self.feature_norm(patches),
            reference_points=references,
            spatial_shapes_list=[grid_size],
        )
        features = features + attended
        return features + self.mlp(self.mlp_norm(features), sizes)


class Interaction(nn.Module):
    """An injector before a group of blocks, and extractors after it."""

    def __init__(self, config: Mask2FormerViTConfig, num_extractors: int):
        super().__init__()
        self.injector = Injector(config)
        self.extractors = nn.ModuleList(Extractor(config) for _ in range(num_extractors))


class ViTAdapter(nn.Module):
    """Runs the blocks of a ViT, with interactions, and gives features of four scales."""

    def __init__(self, config: Mask2FormerViTConfig):
        super().__init__()
        self.spatial_prior = SpatialPrior(config)
        self.level_embed = nn.Parameter(torch.empty(NUM_SCALES, config.hidden_size))
        extractors = [1] * (NUM_INTERACTIONS - 1) + [NUM_LAST_EXTRACTORS]
        self.interactions: Any = nn.ModuleList(Interaction(config, count) for count in extractors)
        self.upscaling = nn.ConvTranspose2d(config.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(config.hidden_size) for _ in range(NUM_SCALES + 1))

    def forward(
        self,
        pixel_values: Tensor,
        tokens: Tensor,
        layers: nn.ModuleList,
        position_embeddings: tuple[Tensor, Tensor] | None,
        grid_size: Size,
    ) -> tuple[list[Tensor], Tensor]:
        """Features (B, D, H / stride, W / stride) of strides 4, 8, 16 and 32, and the tokens after the last block.

        Args:
            pixel_values: (B, channels, H, W).
            tokens: (B, prefix + N, D), before the first block.
            layers: the blocks.
            position_embeddings: of `rotary_embeddings`, for all tokens.
            grid_size: patch rows and columns.
        """
        finest, *maps = self.spatial_prior(pixel_values)
        sizes = [(each.shape[-2], each.shape[-1]) for each in maps]
        features = torch.cat(
            [each.flatten(2).transpose(1, 2) + level for each, level in zip(maps, self.level_embed, strict=True)], dim=1
        )
        of_patches = _reference_points([grid_size], features).expand(-1, -1, NUM_SCALES, -1)
        of_features = _reference_points(sizes, features)
        num_prefix_tokens = tokens.shape[1] - grid_size[0] * grid_size[1]
        prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
        taps = []
        for index, interaction in enumerate(self.interactions):
            patches = interaction.injector(patches, features, of_patches, sizes)
            tokens = torch.cat((prefix, patches), dim=1)
            # As equal groups as possible: the depth of every published ViT but SigLIP's of 27 blocks is a multiple.
            first, end = (len(layers) * number // NUM_INTERACTIONS for number in (index, index + 1))
            for layer in layers[first:end]:
                tokens = layer(tokens, position_embeddings)
            prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
            for extractor in interaction.extractors:
                features = extractor(features, patches, of_features, sizes, grid_size)
            taps.append(patches.transpose(1, 2).unflatten(2, grid_size))
        maps = split_maps(features, sizes)
        maps = [self.upscaling(maps[0]) + finest, *maps]
        return [
            norm(each + F.interpolate(tap, size=each.shape[-2:], mode="bilinear", align_corners=False))
            for norm, each, tap in zip(self.norms, maps, taps, strict=True)
        ], tokens


def split_maps(features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Maps (B, D, rows, columns) of `sizes` whose cells are a sequence (B, M, D)."""
    parts = features.split([rows * columns for rows, columns in sizes], dim=1)
    return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """The cells of maps (B, D, rows, columns) as one sequence (B, M, D)."""
    return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)


def _reference_points(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """Centres (1, M, 1, 2) of the cells of maps of `sizes`, as (x, y) in [0, 1]."""
    ratios = torch.ones(1, len(sizes), 2, device=like.device)  # in fp32, so that centres are rounded once
    points = TransformersDeformableEncoder.get_reference_points(list(sizes), ratios, like.device)
    return points[:, :, :1].to(like.dtype)


@torch.no_grad()
def initialize_adapter(module: nn.Module, std: float) -> None:
    """Initial weights of one module of an adapter, except deformable attention, for which Transformers has a rule."""
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=std)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # As the authors: normal by fan-out, a channel's share of it for depth-wise kernels.
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        init.ones_(module.weight)
        init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
    elif isinstance(module, Injector):
        init.zeros_(module.gamma)
    elif isinstance(module, ViTAdapter):
        init.normal_(module.level_embed)
