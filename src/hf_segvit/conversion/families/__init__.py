"""Families of backbones that convert to a plain ViT.

| source | families |
|---|---|
| `timm_vit` | DINOv2, DeiT-III, ViT augreg, MAE, SigLIP and SigLIP 2 of timm |
| `timm_eva` | DINOv3, EVA-02, Perception Encoder of timm |
| `transformers_dinov2` | DINOv2 of Transformers, with and without registers |
| `transformers_dinov3` | DINOv3 of Transformers |
| `transformers_vit` | ViT and MAE of Transformers |
| `transformers_siglip` | SigLIP and SigLIP 2 of Transformers |
| `plain_vit` | this package's own |

Each module has a key map and reads the settings of its source. Other packages can register a `BackboneFamily` in the
entry point group `hf_segvit.backbones`.
"""

from ...lookup import entry_points
from . import (
    plain_vit,
    timm_eva,
    timm_vit,
    transformers_dinov2,
    transformers_dinov3,
    transformers_siglip,
    transformers_vit,
)
from .source import BackboneFamily, checked_family

ENTRY_POINT_GROUP = "hf_segvit.backbones"
# BEiT is missing: it adds a learned bias per head and pair of patches to all attention scores. That takes a float
# mask over all tokens, which rules out the fast attention kernels and masks on single rows.
FAMILIES: tuple[BackboneFamily, ...] = (
    timm_vit,
    timm_eva,
    transformers_dinov2,
    transformers_dinov3,
    transformers_vit,
    transformers_siglip,
    plain_vit,
)


def family_of(model: str) -> BackboneFamily | None:
    """The family that converts a model, or `None`.

    Args:
        model: its `model_type` in Transformers, or its class as "module.Class".
    """
    built_in = next((family for family in FAMILIES if model in family.MODELS), None)
    if built_in is not None:
        return built_in
    # Other packages are imported only for models that no built-in family knows, so they cannot replace one by accident.
    matches = {name: family for name, family in offered_families().items() if model in family.MODELS}
    if len(matches) > 1:
        raise ValueError(f"the backbone families {' and '.join(matches)} both convert {model}; say which with family=")
    return next(iter(matches.values()), None)


def offered_families() -> dict[str, BackboneFamily]:
    """The families of other installed packages, by the names of their entry points."""
    families = {}
    for name, point in entry_points(ENTRY_POINT_GROUP).items():
        origin = f"the backbone family {name!r} ({point.value}) of an installed package"
        try:
            family = point.load()
        except Exception as error:  # foreign code may raise anything; name its package
            raise ValueError(
                f"{origin} cannot be imported ({type(error).__name__}: {error}); fix or uninstall the package"
            ) from error
        families[name] = checked_family(family, origin)
    return families


def known_models() -> str:
    """All models that can be converted, for error messages."""
    return ", ".join(model for family in (*FAMILIES, *offered_families().values()) for model in family.MODELS)
