"""From another library's parameter names to those of `PlainViTModel`: what every family's key map is made of.

A key map is a table of (regular expression, replacement). `rename` applies it, refusing what it does not know; the
others take apart what is packed and rearrange what another library computes in another order, so that the function
stays the same. All work on flat names to tensors and leave their input alone.

Weights that depend on a size: patch kernels for another patch size, position embeddings for another grid.

Both follow timm exactly, so that a backbone converted for another size is the one that timm would give.
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
# Not a parameter of the plain ViT, but of ViT-P, whose prompts stand in the place of the CLS token.
CLS_POSITION = "prompt_position_embedding"
POSITION_TABLE = "embeddings.position_embeddings.weight"
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
# Names of packed matrices between `rename` and `unpack`.
PACKED = {
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def rename(state_dict: Mapping[str, Tensor], key_map: KeyMap, dropped: Iterable[str], family: str) -> dict[str, Tensor]:
    """Rename all weights, except the heads that a segmentation model has no use for.

    Args:
        state_dict: the source's names to tensors.
        key_map: (pattern, replacement); a pattern must match a whole name, and the first that does counts.
        dropped: patterns of the names to leave out.
        family: what the source is, for messages.

    Returns:
        Our names to the same tensors.

    Raises:
        ValueError: names that neither table knows, which the message lists, or no backbone among them.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in dropped):
            continue
        matches = ((re.fullmatch(pattern, name), replacement) for pattern, replacement in key_map)
        ours = next((match.expand(replacement) for match, replacement in matches if match), None)
        if ours is None:
            unknown.append(name)
            continue
        renamed[ours] = tensor
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise ValueError(
            f"this {family} has weights that the plain ViT has no place for: {', '.join(unknown[:8])}{more}"
        )
    if PATCH_KERNEL not in renamed or "layers.0.norm1.weight" not in renamed:
        raise ValueError(f"these weights of a {family} hold no patch embedding or no blocks")
    return renamed


def unpack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take packed query-key-value and gate-value matrices (and biases) apart, in this order of rows."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        packed = next((key for key in PACKED if f".{key}." in name), None)
        if packed is None:
            unpacked[name] = tensor
        else:
            parts = PACKED[packed]
            for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
                unpacked[name.replace(packed, part)] = rows
    return unpacked


def fold_prefix_positions(state_dict: Mapping[str, Tensor], num_prefix_positions: int) -> dict[str, Tensor]:
    """Add the position embeddings of CLS and registers to those tokens, which is where they always end up.

    Args:
        state_dict: weights with a position table (1, prefix + h * w, D) or (h * w, D).
        num_prefix_positions: rows of the table that stand before those of the patches: none, the CLS token's, or that
            and the registers'.

    Returns:
        The weights with a position table (h * w, D) of the patches alone, and the position embedding (1, D) that was
        added to the CLS token, as `CLS_POSITION`.

    Raises:
        ValueError: there is no position table.
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
    """Zeros for biases of queries, values and patches that the source lacks, and tables of no tokens.

    A zero bias is no bias, so the function is the same, and DINOv3's authors publish such zeros themselves. Keys are
    left without: the model has a field for that.
    """
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
    """Permute the channels of queries and keys within each head to the order in which `rotary_embeddings` turns them.

    Scores do not change, since queries and keys are permuted alike.

    Args:
        state_dict: weights with separate query and key projections.
        num_heads: heads of every block.
        interleaved: whether the source rotates channel 2i with 2i + 1; else channel i with i + E/2, as we do.
        columns_first: whether the first half of the source's frequencies turns with the column; else with the row.

    Returns:
        The weights, permuted.
    """
    permuted = dict(state_dict)
    for name, tensor in state_dict.items():
        if not re.fullmatch(r"layers\.\d+\.attention\.[qk]_proj\.(weight|bias)", name):
            continue
        heads = tensor.unflatten(0, (num_heads, -1))
        channels = torch.arange(heads.shape[1], device=tensor.device)
        pairs = channels.view(-1, 2).T if interleaved else channels.view(2, -1)  # (2, E/2): who turns with whom
        if columns_first:
            pairs = pairs.roll(pairs.shape[1] // 2, dims=1)
        permuted[name] = heads[:, pairs.flatten()].flatten(0, 1)
    return permuted


def resample_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Resize the kernel of a patch embedding so that resized patches give the tokens of the original ones.

    FlexiViT (Beyer et al., arXiv 2212.08013, section 3.4): with R the matrix that resizes a patch (bicubic with
    antialiasing), the new kernel is pinv(R)^T times the old one; upwards, tokens are unchanged for resized images.
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
    # Row i of the transposed R is what basis image i becomes.
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
