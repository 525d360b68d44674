"""EoMT's mask head: what turns query and patch tokens into mask logits.

In here: the MLP on the queries, the upscaling of the patches, and the product of the two. Everything stays
channels-last from the tokens on, so that no step transposes the largest tensors of the model.

Shapes: B batch, Q queries, D hidden size, h w patch grid, s = 2 ** number of upscaling steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN


class EoMTMaskHead(nn.Module):
    """Three linear layers from a query token to its mask embedding."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)
        self.activation = ACT2FN[hidden_act]

    def forward(self, queries: Tensor) -> Tensor:
        """Mask embeddings (B, Q, D) of query tokens (B, Q, D)."""
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(queries)))))


class TransposedConv2x2(nn.ConvTranspose2d):
    """A transposed convolution whose stride is its kernel, on channels-last features.

    Its windows do not overlap, so it is one linear layer from a cell to its 2 x 2 children and a shuffle of pixels,
    with the same weights: matrix products in both directions instead of a strided scatter. Only a CPU that needs no
    gradient does better with the convolution, which writes the children in place (0.75 of the time; its backward
    pass takes almost twice as long).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size=2, stride=2)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Upscale (B, h, w, D) to (B, 2h, 2w, D)."""
        if features.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return super().forward(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        batch_size, height, width, channels = features.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(4 * channels, channels)
        bias = None if self.bias is None else self.bias.repeat(4)
        children = F.linear(features, weight, bias).view(batch_size, height, width, 2, 2, channels)
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
        return self.layernorm2d(features)


class EoMTScaleBlock(nn.Module):
    """As many twofold upscalings as the config asks for."""

    def __init__(self, hidden_size: int, hidden_act: str, num_upscale_blocks: int):
        super().__init__()
        self.block = nn.ModuleList(EoMTScaleLayer(hidden_size, hidden_act) for _ in range(num_upscale_blocks))

    def forward(self, features: Tensor) -> Tensor:
        """Upscale (B, h, w, D) to (B, s * h, s * w, D)."""
        for layer in self.block:
            features = layer(features)
        return features


def mask_logits(mask_queries: Tensor, mask_features: Tensor) -> Tensor:
    """Agreement of every query with every cell.

    Args:
        mask_queries: (B, Q, D) mask embeddings.
        mask_features: (B, height, width, D) upscaled patches.

    Returns:
        (B, Q, height, width) logits, no sigmoid.
    """
    batch_size, height, width, _ = mask_features.shape
    logits = mask_queries @ mask_features.flatten(1, 2).transpose(1, 2)
    return logits.view(batch_size, -1, height, width)


def attention_mask_from(
    logits: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int, keep: Tensor | None
) -> Tensor:
    """Where each query may look: other queries, the tokens before the patches, and patches inside its own mask.

    Args:
        logits: (B, Q, s * h, s * w) mask logits of the layer.
        grid_size: (h, w).
        num_prefix_tokens: CLS and register tokens, between queries and patches.
        keep: boolean (B, Q), True for queries that are confined to their mask; `None` confines all.

    Returns:
        Boolean (B, 1, Q, Q + num_prefix_tokens + h * w), True where attention is allowed; broadcast over heads.
    """
    inside = F.interpolate(logits, size=grid_size, mode="bilinear").flatten(2) > 0
    if keep is not None:
        inside = inside | ~keep[..., None]
    always = inside.new_ones(()).expand(*inside.shape[:2], inside.shape[1] + num_prefix_tokens)
    return torch.cat((always, inside), dim=-1)[:, None]
