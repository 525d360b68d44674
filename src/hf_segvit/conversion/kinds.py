"""Kinds of source that `hf-segvit convert` knows, without heavy imports."""

from dataclasses import dataclass

from ..lookup import suggestion


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        description: what the source is.
        options: fields of `ConversionOptions` that it uses, besides `max_bytes` and `check`.
    """

    description: str
    options: tuple[str, ...]


KINDS = {
    "timm": Kind("a backbone of timm: timm/NAME, or a weights file with --model NAME", ("fields", "model")),
    "official-eomt": Kind(
        "a checkpoint of the official EoMT code: file, folder or Hub id",
        ("fields", "base", "model", "labels", "task", "reset_class_head", "revision"),
    ),
    "transformers-eomt": Kind(
        "an eomt or eomt_dinov3 checkpoint of Transformers: folder or Hub id", ("labels", "task", "revision")
    ),
    "to-transformers": Kind(
        "a checkpoint of this package, written as Transformers' own eomt or eomt_dinov3", ("revision",)
    ),
    "official-vit-p": Kind(
        "a checkpoint of the official ViT-P code: file, folder or Hub id", ("fields", "model", "labels", "revision")
    ),
    "mask2former-head": Kind(
        "decoders and class head of a Mask2Former of Transformers, onto the ViT that --base names: folder or Hub id",
        ("fields", "base", "labels", "task", "revision"),
    ),
    "vit-adapter": Kind(
        "a ViT and its adapter of the public ViT-Adapter code, with timm's --model of the ViT: file, folder or Hub id",
        ("fields", "model", "labels", "task", "revision"),
    ),
    "backbone": Kind(
        "any backbone that from_backbone takes, such as of a family that another package offers: folder or Hub id",
        ("fields",),
    ),
}


def check_kind(kind: str) -> None:
    """Refuse an unknown kind, naming the nearest."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; {suggestion(kind, KINDS)}")
