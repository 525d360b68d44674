"""Position embeddings resampled by matrix products, for models that are exported.

PyTorch's bicubic interpolation gives the same numbers, but few runtimes have its antialiasing, and an exported graph
needs sizes that are only known when it runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def is_traced_grid(grid_size: tuple[int, int]) -> bool:
    """Whether an export is going on in which this patch grid is not known yet."""
    return torch.compiler.is_exporting() and any(isinstance(length, torch.SymInt) for length in grid_size)


def resample_by_products(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    weights: Callable[[int, int, torch.device], Tensor],
) -> Tensor:
    """Resample (rows * columns, D) to another grid, with `weights` for (old, new) lengths of each axis."""
    rows, columns = (weights(old, new, table.device) for old, new in zip(old_grid, new_grid, strict=True))
    grid = table.float().reshape(*old_grid, -1)  # (rows, columns, D)
    grid = (rows @ grid.flatten(1)).view(new_grid[0], old_grid[1], -1)
    return (columns @ grid).flatten(0, 1).to(table.dtype)


def antialiased_weights(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old) weights of `F.interpolate(mode="bicubic", antialias=True)` along an axis."""
    # Tensors rather than numbers, as `new` is a symbol.
    scale = torch.full((), float(old), device=device) / new
    centers = (torch.arange(new, device=device) + 0.5) * scale
    cells = torch.arange(old, device=device) + 0.5
    values = _cubic((cells - centers[:, None]) / scale.clamp(min=1.0), -0.5)
    return values / values.sum(1, keepdim=True)


def official_weights(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old) weights of `F.interpolate(mode="bicubic")` along an axis, scaled as the official ViT-P code does."""
    positions = (torch.arange(new, device=device) + 0.5) * old / (new + 0.1) - 0.5
    first = positions.floor()
    cells = torch.arange(old, device=device)
    taps = []
    for offset in range(-1, 3):
        cell = first + offset
        # Beyond the border, the outermost cell counts again.
        hit = (cell.clamp(0, old - 1)[:, None] == cells).float()
        taps.append(hit * _cubic(positions - cell, -0.75)[:, None])
    return torch.stack(taps).sum(0)


def _cubic(distances: Tensor, a: float) -> Tensor:
    """Keys' cubic kernel with parameter `a`."""
    x = distances.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
