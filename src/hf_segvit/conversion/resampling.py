"""Weights that depend on a size: patch kernels for another patch size, position embeddings for another grid.

Both follow timm exactly, so that a backbone converted for another size is the one that timm would give.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.modeling_plain_vit import resample_position_embeddings
from .key_maps import PATCH_KERNEL, POSITION_TABLE


def resample_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Resize the kernel of a patch embedding so that resized patches give the tokens of the original ones.

    FlexiViT (Beyer et al., arXiv 2212.08013, section 3.4): with R the matrix that resizes a patch (bicubic with
    antialiasing), the new kernel is pinv(R)^T times the old one; upwards, tokens are unchanged for resized pictures.
    Worked out in fp32, as in timm's `resample_patch_embed`.

    Args:
        kernel: (D, channels, old, old).
        patch_size: side of the new patches in pixels.

    Returns:
        (D, channels, patch_size, patch_size) in the kernel's dtype; the kernel itself where the size is the same.
    """
    old_size = kernel.shape[-1]
    if old_size == patch_size:
        return kernel
    basis = torch.eye(old_size**2, device=kernel.device).reshape(-1, 1, old_size, old_size)
    resized = F.interpolate(basis, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    # Row i of the transposed R is what basis picture i becomes.
    inverse = torch.linalg.pinv(resized.flatten(1).T)
    return (kernel.float().flatten(2) @ inverse).unflatten(-1, (patch_size, patch_size)).to(kernel.dtype)


def fit_to_size(
    state_dict: dict[str, Tensor],
    grid_size: tuple[int, int],
    image_size: tuple[int, int] | None,
    patch_size: int | None,
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Give a plain ViT another patch size and another grid of position embeddings.

    Args:
        state_dict: weights of a `PlainViTModel`.
        grid_size: patch rows and columns that they were made for.
        image_size: height and width in pixels wanted; `None` keeps the grid.
        patch_size: side of a patch in pixels wanted; `None` keeps it.

    Returns:
        The weights, and the height and width in pixels that they are made for now.

    Raises:
        ValueError: `image_size` is not a multiple of the patch size.
    """
    fitted = dict(state_dict)
    if patch_size is not None:
        fitted[PATCH_KERNEL] = resample_patch_kernel(fitted[PATCH_KERNEL], patch_size)
    patch_size = fitted[PATCH_KERNEL].shape[-1]
    if image_size is None:
        image_size = (grid_size[0] * patch_size, grid_size[1] * patch_size)
    if any(side < patch_size or side % patch_size for side in image_size):
        nearest = [max(patch_size, round(side / patch_size) * patch_size) for side in image_size]
        raise ValueError(
            f"image_size={list(image_size)} is not a multiple of patch_size={patch_size}; nearest that is: {nearest}"
        )
    if POSITION_TABLE in fitted:
        new_grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        fitted[POSITION_TABLE] = resample_position_embeddings(fitted[POSITION_TABLE], grid_size, new_grid)
    return fitted, image_size
