"""EoMT's mask head: query and patch tokens to mask logits.

In order: the MLP on the queries, the upscaling of the patches, the product of both, and attention masks from it.
Everything stays channels-last from the tokens on, so that no step transposes the largest tensors of the model.

Shapes: B batch, Q queries, D hidden size, h w patch grid, s = 2 ** number of upscaling steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cpu_kernels import (
    Linear,
    in_autocast_type,
    linear,
    linear_and_activation,
    takes_onednn,
    trains_through_onednn,
)


def initialize_by_default(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    """PyTorch's default initial weights, which the official heads keep: uniform in +-1/sqrt(fan in)."""
    bound = layer.weight[0].numel() ** -0.5
    init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        init.uniform_(layer.bias, -bound, bound)


class EoMTMaskHead(nn.Module):
    """Three linear layers from a query token to its mask embedding."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = Linear(hidden_size, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)
        self.fc3 = Linear(hidden_size, hidden_size)
        self.activation = ACT2FN[hidden_act]

    def forward(self, queries: Tensor) -> Tensor:
        """Mask embeddings (B, Q, D) of query tokens (B, Q, D)."""
        hidden = linear_and_activation(self.fc1, self.activation, queries)
        return self.fc3(linear_and_activation(self.fc2, self.activation, hidden))


class TransposedConv2x2(nn.ConvTranspose2d):
    """Transposed convolution with stride equal to its kernel, on channels-last features."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size=2, stride=2)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Upscale (B, h, w, D) to (B, 2h, 2w, D)."""
        # Without gradient a CPU is faster with the convolution, which writes children in place (0.75 of the time). Its
        # backward pass takes almost twice as long.
        if features.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return super().forward(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Windows do not overlap, so this is one linear layer from a cell to its 2 x 2 children and a shuffle of pixels:
        # matrix products in both directions instead of a strided scatter.
        batch_size, height, width, channels = features.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(4 * channels, channels)
        bias = None if self.bias is None else self.bias.repeat(4)
        children = linear(features, weight, bias).view(batch_size, height, width, 2, 2, channels)
        return children.transpose(2, 3).reshape(batch_size, 2 * height, 2 * width, channels)


class EoMTScaleLayer(nn.Module):
    """Twofold upscaling: transposed convolution, activation, depth-wise 3 x 3 convolution, LayerNorm."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.conv1 = TransposedConv2x2(hidden_size)
        self.activation = ACT2FN[hidden_act]
        self.conv2 = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1, groups=hidden_size, bias=False)
        self.layernorm2d = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Upscale (B, h, w, D) to (B, 2h, 2w, D)."""
        features = self.activation(self.conv1(features))
        features = self.conv2(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        norm = self.layernorm2d
        if features.dtype == norm.weight.dtype or type(norm) is not nn.LayerNorm:
            # Only products follow, each of which would make and keep a copy under autocast.
            return in_autocast_type(norm(features))
        # Autocast would keep these, the largest features of the model, in single precision before and after the norm,
        # which computes in it anyway.
        weight, bias = norm.weight.to(features.dtype), norm.bias.to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            return F.layer_norm(features, norm.normalized_shape, weight, bias, norm.eps)


class EoMTScaleBlock(nn.Module):
    """A chain of `num_upscale_blocks` twofold upscalings."""

    def __init__(self, hidden_size: int, hidden_act: str, num_upscale_blocks: int):
        super().__init__()
        self.block = nn.ModuleList(EoMTScaleLayer(hidden_size, hidden_act) for _ in range(num_upscale_blocks))

    def forward(self, features: Tensor) -> Tensor:
        """Upscale (B, h, w, D) to (B, s * h, s * w, D)."""
        for layer in self.block:
            features = layer(features)
        return features


def mask_logits(mask_queries: Tensor, mask_features: Tensor) -> Tensor:
    """Logits (B, Q, height, width) of embeddings (B, Q, D) with upscaled patches (B, height, width, D)."""
    height, width = mask_features.shape[1:3]
    features = mask_features.flatten(1, 2)
    if trains_through_onednn(features, mask_queries) or (
        takes_onednn(features, mask_queries) and features.dtype == torch.float32
    ):
        logits = torch.stack([linear(*pair, None) for pair in zip(mask_queries, features, strict=True)])
    elif features.device.type == "cpu" and features.dtype != torch.float32:
        # In half precision oneDNN would first copy the transposed features, the largest tensor of the model. The other
        # way round it copies nothing; the logits are a view.
        logits = (features @ mask_queries.transpose(1, 2)).transpose(1, 2)
    else:
        logits = mask_queries @ features.transpose(1, 2)
    return logits.unflatten(2, (height, width))


def attention_mask_from(
    logits: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int, keep: Tensor | None
) -> Tensor:
    """Keys that each query may see, boolean (B, 1, Q, Q + num_prefix_tokens + h * w): all but patches outside its mask.

    Args:
        logits: (B, Q, s * h, s * w) mask logits of the layer.
        grid_size: (h, w).
        num_prefix_tokens: CLS and register tokens, between queries and patches.
        keep: boolean (B, Q), True for queries that are confined to their mask; `None` confines all.
    """
    # A logit above 0 is a mask probability above 1/2.
    inside = F.interpolate(logits, size=grid_size, mode="bilinear").flatten(2) > 0
    if keep is not None:
        inside = inside | ~keep[..., None]
    # Other queries and prefix tokens are always visible, so that no row is empty.
    always = inside.new_ones(()).expand(*inside.shape[:2], inside.shape[1] + num_prefix_tokens)
    return torch.cat((always, inside), dim=-1)[:, None]
