"""Rename, unpack and resize backbone weights for `PlainViTModel`.

A key map is a table of (regular expression, replacement). `rename` applies it and refuses unknown names; `unpack`,
`fold_prefix_positions`, `fill_absent` and `reorder_rotary` rearrange what other libraries store differently, so that
the function stays the same. `resample_patch_kernel` and `fit_to_size` change patch and image size exactly as timm does.
No function changes its input.
"""

import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.modeling_plain_vit import resample_position_embeddings

KeyMap = Iterable[tuple[str, str]]

CLS_TOKEN = "embeddings.cls_token"
REGISTER_TOKENS = "embeddings.register_tokens"
# A parameter of ViT-P, not of the plain ViT: prompts replace the CLS token and share its position.
CLS_POSITION = "prompt_position_embedding"
POSITION_TABLE = "embeddings.position_embeddings.weight"
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
# What key maps call packed matrices, for `unpack` to split.
PACKED = {
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def rename(state_dict: Mapping[str, Tensor], key_map: KeyMap, dropped: Iterable[str], family: str) -> dict[str, Tensor]:
    """Rename all weights, and drop the heads that a segmentation model does not use.

    Args:
        state_dict: the source's names to tensors.
        key_map: (pattern, replacement); a pattern must match a whole name, and the first match counts.
        dropped: patterns of the names to leave out.

    Raises:
        ValueError: neither table knows a name, or there is no backbone among them.
    """
    by_our_names: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in dropped):
            continue
        # A name that no pattern knows is an error below: a dropped weight would change the model unnoticed.
        ours = renamed(name, key_map)
        if ours is None:
            unknown.append(name)
            continue
        by_our_names[ours] = tensor
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise ValueError(f"this {family} has weights that the plain ViT lacks: {', '.join(unknown[:8])}{more}")
    if PATCH_KERNEL not in by_our_names or "layers.0.norm1.weight" not in by_our_names:
        raise ValueError(f"these weights of a {family} hold no patch embedding or no blocks")
    return by_our_names


def renamed(name: str, key_map: KeyMap) -> str | None:
    """Our name of a weight; `None` if the key map does not know it."""
    matches = ((re.fullmatch(pattern, name), replacement) for pattern, replacement in key_map)
    return next((match.expand(replacement) for match, replacement in matches if match), None)


def unpack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split packed query-key-value and gate-value matrices and biases, whose rows come in this order."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        packed = next((key for key in PACKED if f".{key}." in name), None)
        if packed is None:
            unpacked[name] = tensor
            continue
        names = PACKED[packed]
        for part, rows in zip(names, tensor.chunk(len(names)), strict=True):
            unpacked[name.replace(packed, part)] = rows
    return unpacked


def fold_prefix_positions(state_dict: Mapping[str, Tensor], num_prefix_positions: int) -> dict[str, Tensor]:
    """Add the position embeddings of CLS and registers to those tokens, to which they are always added anyway.

    Args:
        state_dict: weights with a position table (1, prefix + h * w, D) or (h * w, D).
        num_prefix_positions: rows of the table before those of the patches: 0, 1 (CLS), or 1 + registers.

    Returns:
        The weights with a position table (h * w, D) of the patches alone, and the row (1, D) that was added to the CLS
        token as `CLS_POSITION`.
    """
    if POSITION_TABLE not in state_dict:
        raise ValueError("these weights hold no position embeddings, which the backbone has")
    folded = dict(state_dict)
    table = folded[POSITION_TABLE].flatten(0, -2)
    folded[POSITION_TABLE] = table[num_prefix_positions:]
    prefix = table[:num_prefix_positions]
    if len(prefix) and CLS_TOKEN in folded:
        folded[CLS_POSITION] = prefix[:1]
    for name in (CLS_TOKEN, REGISTER_TOKENS):
        if len(prefix) and name in folded:
            count = folded[name].shape[1]
            folded[name] = folded[name] + prefix[:count]
            prefix = prefix[count:]
    return folded


def fill_absent(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add zero biases of queries, values and patches that the source lacks, and token tables of length 0."""
    # A zero bias is the same function as no bias; DINOv3's authors publish such zeros themselves. Keys need none, as
    # the config has `key_bias`.
    filled = dict(state_dict)
    weights = [name for name in state_dict if re.fullmatch(r"layers\.\d+\.attention\.[qv]_proj\.weight", name)]
    for name in (*weights, PATCH_KERNEL):
        filled.setdefault(name.removesuffix("weight") + "bias", filled[name].new_zeros(len(filled[name])))
    for name in (CLS_TOKEN, REGISTER_TOKENS):
        filled.setdefault(name, filled[PATCH_KERNEL].new_zeros(1, 0, len(filled[PATCH_KERNEL])))
    return filled


def reorder_rotary(
    state_dict: Mapping[str, Tensor], num_heads: int, interleaved: bool, columns_first: bool
) -> dict[str, Tensor]:
    """Permute the channels of queries and keys in each head into the order of our `rotary_embeddings`.

    Args:
        state_dict: weights with separate query and key projections.
        num_heads: heads of each block.
        interleaved: whether the source rotates channel 2i with 2i + 1, instead of i with i + E/2 as we do.
        columns_first: whether the first half of the source's frequencies encodes the column, instead of the row.
    """
    permuted = dict(state_dict)  # attention scores stay the same, as queries and keys are permuted alike
    for name, tensor in state_dict.items():
        if not re.fullmatch(r"layers\.\d+\.attention\.[qk]_proj\.(weight|bias)", name):
            continue
        heads = tensor.unflatten(0, (num_heads, -1))
        channels = torch.arange(heads.shape[1], device=tensor.device)
        pairs = (
            channels.view(-1, 2).T if interleaved else channels.view(2, -1)
        )  # (2, E/2): the pairs that are rotated together
        if columns_first:
            pairs = pairs.roll(pairs.shape[1] // 2, dims=1)
        permuted[name] = heads[:, pairs.flatten()].flatten(0, 1)
    return permuted


def resample_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Resize a patch embedding's kernel so that resized patches give the tokens of the original ones.

    FlexiViT (Beyer et al., arXiv 2212.08013, section 3.4): with R the matrix that resizes a patch (bicubic with
    antialiasing), the new kernel is pinv(R)^T times the old one; when upsampling, resized images keep their tokens.

    Args:
        kernel: (D, channels, old, old).
        patch_size: side of the new patches in pixels.

    Returns:
        (D, channels, patch_size, patch_size) in the kernel's dtype; the kernel itself if the size is the same.
    """
    old_size = kernel.shape[-1]
    if old_size == patch_size:
        return kernel
    basis = torch.eye(old_size**2, device=kernel.device).reshape(-1, 1, old_size, old_size)
    resized = F.interpolate(basis, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    # Basis image i, resized, is column i of R; timm's `resample_patch_embed` also computes in fp32.
    inverse = torch.linalg.pinv(resized.flatten(1).T)
    return (kernel.float().flatten(2) @ inverse).unflatten(-1, (patch_size, patch_size)).to(kernel.dtype)


def for_channels(kernel: Tensor, channels: int) -> Tensor:
    """A patch kernel (D, C, h, w) for another number of input channels; unchanged for its own.

    Channels that both have keep their weights, further ones start as the mean of all, and of fewer each is that mean.
    """
    old = kernel.shape[1]
    if channels == old:
        return kernel
    mean = kernel.mean(1, keepdim=True)
    kept = kernel if channels > old else mean.expand(-1, channels, -1, -1)
    # Scaled, so that the sum over channels, which the layers above know, stays as large as before.
    return torch.cat([kept, mean.expand(-1, channels - kept.shape[1], -1, -1)], dim=1) * (old / channels)


def fit_to_size(
    state_dict: dict[str, Tensor],
    grid_size: tuple[int, int],
    image_size: tuple[int, int] | None,
    patch_size: int | None,
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Give a plain ViT another patch size and another grid of position embeddings.

    Args:
        state_dict: weights of a `PlainViTModel`.
        grid_size: patch rows and columns of its position table.
        image_size: wanted height and width in pixels, multiples of the patch size; `None` keeps the grid.
        patch_size: wanted side of a patch in pixels; `None` keeps it.

    Returns:
        The weights, and the height and width in pixels that they now fit.
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
