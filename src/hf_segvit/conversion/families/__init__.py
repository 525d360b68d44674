"""Families of backbones that become a plain ViT: for each source format one key map and one reading of its settings.

| source | families |
|---|---|
| `timm_vit` | DINOv2, DeiT-III, ViT augreg, MAE, SigLIP and SigLIP 2 of timm |
| `timm_eva` | DINOv3, EVA-02, Perception Encoder of timm |
| `transformers_dinov2` | DINOv2 with and without registers of Transformers |
| `transformers_dinov3` | DINOv3 of Transformers |
| `transformers_vit` | ViT and MAE of Transformers |
| `transformers_siglip` | SigLIP and SigLIP 2 of Transformers |
| `plain_vit` | this package's own |

BEiT is not among them: it adds a learned bias per head and pair of patches to the attention scores of every block,
which would need a float mask over all tokens, and so give up the fast attention kernels and masks on single rows.

Other packages can offer families of their own, in the entry point group `hf_segvit.backbones`: see `BackboneFamily` for
what one is. They are imported only where none of these knows a model, so these cannot be replaced by accident.
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

    Raises:
        ValueError: an installed package offers a family that is none, or two claim the model.
    """
    own = next((family for family in FAMILIES if model in family.MODELS), None)
    if own is not None:
        return own
    found = {name: family for name, family in offered_families().items() if model in family.MODELS}
    if len(found) > 1:
        raise ValueError(f"the backbone families {' and '.join(found)} both convert {model}; say which with family=")
    return next(iter(found.values()), None)


def offered_families() -> dict[str, BackboneFamily]:
    """The families of other installed packages, by the names of their entry points.

    Raises:
        ValueError: one cannot be imported, or lacks a part of `BackboneFamily`; the message names it.
    """
    families = {}
    for name, point in entry_points(ENTRY_POINT_GROUP).items():
        origin = f"the backbone family {name!r} ({point.value}) of an installed package"
        try:
            family = point.load()
        except Exception as error:  # whatever a stranger's module raises is said with its name
            raise ValueError(
                f"{origin} cannot be imported ({type(error).__name__}: {error}); mend or uninstall the package"
            ) from error
        families[name] = checked_family(family, origin)
    return families


def known_models() -> str:
    """The models that are converted, for messages."""
    return ", ".join(model for family in (*FAMILIES, *offered_families().values()) for model in family.MODELS)
