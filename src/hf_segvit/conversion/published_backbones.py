"""Names of published backbones that convert, and what is meant by one that does not.

timm's are found in timm's own list, by family; those of Transformers are listed here. Other weights of the same
families convert too: the lists serve suggestions, documentation and tests.
"""

import difflib

import timm

# Family to patterns of timm's names, tags included.
TIMM_FAMILIES = {
    "DINOv2": ("vit_*_patch14_dinov2.*", "vit_*_patch14_reg4_dinov2.*"),
    "DINOv3": ("vit_*_patch16_dinov3*",),
    "EVA-02": ("eva02_*",),
    "DeiT-III": ("deit3_*",),
    "ViT augreg": ("vit_*_patch*.augreg*",),
    "MAE": ("vit_*.mae",),
    "SigLIP": ("vit_*_siglip_*",),
    "Perception Encoder": ("vit_pe_*",),
}
# Its blocks are normalised behind the branches.
NOT_EXPRESSED = "eva02_enormous_*"

TRANSFORMERS_BACKBONES = (
    *(f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov3-vit{size}16-pretrain-lvd1689m" for size in ("s", "splus", "b", "l", "hplus", "7b")),
    *(f"facebook/dinov3-vit{size}16-pretrain-sat493m" for size in ("l", "7b")),
    *(f"facebook/vit-mae-{size}" for size in ("base", "large", "huge")),
    *(f"google/vit-{size}-patch16-224-in21k" for size in ("base", "large")),
    *(f"google/siglip-{size}" for size in ("base-patch16-224", "large-patch16-256", "so400m-patch14-384")),
    *(f"google/siglip2-{size}" for size in ("base-patch16-512", "large-patch16-512", "so400m-patch16-512")),
    *(f"google/siglip2-{size}-naflex" for size in ("base-patch16", "so400m-patch16")),
)


def supported_backbones() -> list[str]:
    """Names that `from_backbone` takes, of timm (`timm/...`) and of Transformers, sorted."""
    patterns = [pattern for patterns in TIMM_FAMILIES.values() for pattern in patterns]
    names = timm.list_pretrained(patterns, exclude_filters=[NOT_EXPRESSED])
    return sorted((*(f"timm/{name}" for name in names), *TRANSFORMERS_BACKBONES))


def unknown_backbone(name: str) -> ValueError:
    """The error for a name that means nothing, with the names that it resembles."""
    known = supported_backbones()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close = close or difflib.get_close_matches(f"timm/{name}", known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "hf_segvit.conversion.published_backbones lists names"
    return ValueError(f"{name!r} is no backbone that is known, no folder, and nothing that the Hub would give; {hint}")
