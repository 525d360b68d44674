"""Layers of ViT-P: attention of prompts and image, and their embeddings.

In order: attention, joint or with isolated prompts, and its block; the prompt encoder; position embeddings resampled as
the weights expect. Isolated prompts see themselves and the image, which does not see them: its tokens are those of a
plain ViT, so their keys and values can be kept for later prompts.

Shapes: B batch, N prompts, S image tokens (registers and patches), T = N + S, D hidden size, E channels of one head,
G prompts of a group, h w patch grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vit_p import ViTPConfig
from .modeling_plain_vit import PlainViTEmbeddings, PlainViTLayer
from .plain_vit_layers import PlainViTAttention
from .position_resampling import official_weights, resample_by_products

KeysValues = tuple[Tensor, Tensor]

# Isolated prompts that share a masked product. Of their mutual scores only the diagonal counts, so a group is small
# beside an image's thousand patches.
PROMPTS_PER_GROUP = 256


class PromptAttention(PlainViTAttention):
    """Self-attention of prompts, which come first, and image tokens."""

    def forward(  # type: ignore[override] # also returns keys and values
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        key_mask: Tensor | None = None,
        isolation: Tensor | None = None,
        image_keys_values: KeysValues | None = None,
    ) -> tuple[Tensor, Tensor | None, KeysValues]:
        """Transform (B, T, D); also returns weights (B, heads, T, T), or `None`, and keys and values (B, heads, T, E).

        Args:
            hidden_states: (B, T, D); only prompts with `image_keys_values`, only image tokens to encode an image.
            position_embeddings: cosines and sines (T, E) of `rotary_embeddings`.
            key_mask: boolean (B, 1, 1, T), True for tokens that may be seen (joint prompts).
            isolation: `isolation_mask`, for isolated prompts.
            image_keys_values: keys and values (B, heads, S, E) that this block made of the image earlier.
        """
        query, key, value = self._project(hidden_states, position_embeddings)
        back_end = self.config._attn_implementation or "eager"
        masked_back_end = "eager" if back_end == "eager" else "sdpa"
        if isolation is None:
            context, weights = self._attend(
                back_end if key_mask is None else masked_back_end, query, key, value, key_mask
            )
        else:
            num_image_tokens = isolation.shape[1] - isolation.shape[0]
            num_prompts = query.shape[2] - (num_image_tokens if image_keys_values is None else 0)
            image_keys, image_values = image_keys_values or (key[:, :, num_prompts:], value[:, :, num_prompts:])
            contexts, weights = [], None
            # An exported graph has one group, as the number of prompts is not known yet.
            starts = (0,) if torch.compiler.is_exporting() else range(0, num_prompts, isolation.shape[0])
            for start in starts:
                group = slice(start, min(start + isolation.shape[0], num_prompts))
                count = group.stop - group.start
                answer, weights = self._attend(
                    masked_back_end,
                    query[:, :, group],
                    torch.cat((key[:, :, group], image_keys), dim=2),
                    torch.cat((value[:, :, group], image_values), dim=2),
                    # The lower right corner of the mask is the mask of a smaller group.
                    isolation[None, None, -count:, -count - num_image_tokens :],
                )
                contexts.append(answer)
            if image_keys_values is None:
                # The image attends without a mask, so in the fastest back-end.
                answer, image_weights = self._attend(
                    back_end, query[:, :, num_prompts:], image_keys, image_values, None
                )
                contexts.append(answer)
                if weights is not None and image_weights is not None:
                    weights = torch.cat((weights, F.pad(image_weights, (num_prompts, 0))), dim=2)
            context = torch.cat(contexts, dim=1)
        return self.out_proj(self.norm(context.flatten(2))), weights, (key, value)


class ViTPLayer(PlainViTLayer):
    """Block of the plain ViT for prompts and image."""

    attention_class = PromptAttention
    attention: PromptAttention

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, return_keys_values: bool = False, **attention_arguments: Any
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """Transform (B, T, D), and return the keys and values if asked. See `PromptAttention.forward`."""
        attended, _, keys_values = self.attention(self.norm1(hidden_states), **attention_arguments)
        hidden_states = self._add(hidden_states, attended, self.layer_scale1)
        hidden_states = self._add(hidden_states, self.mlp(self.norm2(hidden_states)), self.layer_scale2)
        return (hidden_states, keys_values) if return_keys_values else hidden_states


def isolation_mask(num_prompts: int, num_image_tokens: int, device: torch.device, one_group: bool = False) -> Tensor:
    """Keys that a group of isolated prompts may see, boolean (G, G + S): each its own and all of the image's."""
    # A back-end that returns weights needs all prompts in one group.
    group = num_prompts if one_group else min(num_prompts, PROMPTS_PER_GROUP)
    own = torch.eye(group, dtype=torch.bool, device=device)
    return torch.cat((own, own.new_ones(group, num_image_tokens)), dim=1)


class PromptEncoder(nn.Linear):
    """Linear map from a prompt to a token."""

    def forward(self, prompts: Tensor) -> Tensor:
        """Tokens (B, N, D) of prompts (B, N, 4)."""
        # fp32, since half precision would blur a point by pixels. The unit is half the image, from its middle.
        prompts = prompts.float()
        prompts = torch.cat((2.0 * prompts[..., :2] - 1.0, prompts[..., 2:]), dim=-1)
        with torch.autocast(prompts.device.type, enabled=False):
            return F.linear(prompts, self.weight.float())


class ViTPEmbeddings(PlainViTEmbeddings):
    """Registers and patches; position embeddings may be resampled like the official code's."""

    def __init__(self, config: ViTPConfig):
        super().__init__(config)
        self.position_interpolation = config.position_interpolation

    def resample(self, table: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Learned position embeddings (h * w, D) for a patch grid."""
        if self.position_interpolation == "official":
            return resample_as_official(table, self.grid_size, grid_size)
        return super().resample(table, grid_size)


def resample_as_official(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings (rows * columns, D) to another grid as the official ViT-P code does."""
    if torch.compiler.is_exporting():
        return resample_by_products(table, old_grid, new_grid, official_weights)
    # Even to its own grid: the official code's shortcut for that never fires with two prompts or more.
    grid = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    # The official code adds 0.1 patches, as DINOv2 did to keep rounding from losing a row.
    factors = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
    return grid.flatten(2)[0].transpose(0, 1).to(table.dtype)
