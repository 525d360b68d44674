"""Rotary position embeddings of a patch grid: the angles of every token, and the rotation by them.

Two conventions are in use. DINOv3 (Simeoni et al., arXiv 2508.10104) maps patch centres to [-1, 1]; EVA-02 (Fang et
al., arXiv 2303.11331) counts patches on the grid of its pre-training, onto which every other grid is stretched.

Shapes: B batch, T tokens, E channels of one head, h w patch grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_embeddings(
    grid_size: tuple[int, int],
    head_size: int,
    theta: float,
    num_prefix_tokens: int,
    device: torch.device,
    reference_grid: int | None = None,
    offset: float = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate the queries and keys of the patches by their place in the picture.

    A quarter of the channels turns with the row, a quarter with the column, and both are used twice, for the halves
    that `rotate` pairs. Tokens before the patches keep angle 0.

    Args:
        grid_size: patch rows and columns.
        head_size: E, channels of a head; a multiple of 4.
        theta: base of the frequencies.
        num_prefix_tokens: tokens before the patches.
        device: where to make them.
        reference_grid: `None` maps patch centres to [-1, 1], where one unit is a full turn of the fastest channel; else
            patches are counted along each axis, scaled as if there were that many, in radians.
        offset: what the count begins with, with `reference_grid`.

    Returns:
        Two fp32 tensors (num_prefix_tokens + h * w, E).
    """
    # Angles are always worked out in fp32: in bf16 neighbouring patches would share one.
    numbers = [torch.arange(n, device=device, dtype=torch.float32) for n in grid_size]
    frequencies = theta ** -(torch.arange(head_size // 4, device=device, dtype=torch.float32) * (4.0 / head_size))
    if reference_grid is None:
        rows, columns = ((2.0 * i + 1.0) / n - 1.0 for i, n in zip(numbers, grid_size, strict=True))
        frequencies = 2.0 * math.pi * frequencies
    else:
        rows, columns = ((i + offset) / n * reference_grid for i, n in zip(numbers, grid_size, strict=True))
    row_angles = (rows[:, None] * frequencies)[:, None, :].expand(-1, grid_size[1], -1)
    column_angles = (columns[:, None] * frequencies)[None, :, :].expand(grid_size[0], -1, -1)
    angles = torch.cat((row_angles, column_angles), dim=-1).flatten(0, 1).repeat(1, 2)
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate channel i with channel i + E/2 of (B, heads, T, E) by the angles of each token."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.to(states.dtype) + torch.cat((-second, first), dim=-1) * sines.to(states.dtype)
