"""From prompts and patches to the tokens of ViT-P: prompt encoder, and position embeddings as the weights expect them.

Shapes: B batch, N prompts, D hidden size, h w patch grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vit_p import ViTPConfig
from .modeling_plain_vit import PlainViTEmbeddings


class PromptEncoder(nn.Linear):
    """The linear map of a prompt to a token; in fp32, since half precision would blur a point by pixels."""

    def forward(self, prompts: Tensor) -> Tensor:
        """Tokens (B, N, D) of prompts (B, N, 4); the encoder's unit is half the picture, from its middle."""
        prompts = prompts.float()
        prompts = torch.cat((2.0 * prompts[..., :2] - 1.0, prompts[..., 2:]), dim=-1)
        with torch.autocast(prompts.device.type, enabled=False):
            return F.linear(prompts, self.weight.float())


class ViTPEmbeddings(PlainViTEmbeddings):
    """Registers and patches, whose position embeddings may be resampled as the official code does it."""

    def __init__(self, config: ViTPConfig):
        super().__init__(config)
        self.position_interpolation = config.position_interpolation

    def resample(self, table: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """The learned position embeddings (h * w, D) of a patch grid."""
        if self.position_interpolation == "official":
            return resample_as_official(table, self.grid_size, grid_size)
        return super().resample(table, grid_size)


def resample_as_official(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings as the official ViT-P code does: bicubic, with 0.1 patches added to the factor.

    The table's own grid is resampled too, as the official code's shortcut for it never fires with two prompts or more.

    Args:
        table: (rows * columns of `old_grid`, D).
        old_grid: rows and columns of the table.
        new_grid: rows and columns wanted.

    Returns:
        (rows * columns of `new_grid`, D).
    """
    grid = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    factors = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
    return grid.flatten(2)[0].transpose(0, 1).to(table.dtype)
