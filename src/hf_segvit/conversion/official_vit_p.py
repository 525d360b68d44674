"""Official ViT-P checkpoints (github.com/sajjad-sh33/ViT-P) under our names.

The files hold a flat table of tensors: a DINOv2 whose CLS position embedding the points share, a linear encoder of
points `cls_embeddings`, and a linear `head`. The encoder takes (row, column) in [-1, 1]. No published file has an
encoder of four columns, so the user must give their order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..weight_checks import check_weights, format_hint
from .checkpoint_files import PICKLE_NAMES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint, strip_prefixes
from .families import timm_vit
from .families.source import SourceBackbone
from .key_maps import CLS_POSITION, POSITION_TABLE, fill_absent, rename, unpack
from .official_catalogue import ReleasedModel
from .options import ConversionOptions

# Columns of the prompt encoder, ours and the official code's.
COLUMNS = ("x", "y", "w", "h")
OFFICIAL_COLUMNS = ("y", "x")
# What the official code does without a setting; the weights depend on it.
_CONVENTIONS = {
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "prompt_attention": "joint",
    "head_type": "linear",
    "position_interpolation": "official",
    "point_origin": "corner",
}
# As timm names a DINOv2, except for the registers.
_KEY_MAP = (*timm_vit.KEY_MAP, *timm_vit.MLP_KEY_MAPS["Mlp"], (r"register_tokens", r"embeddings.register_tokens"))
_FREE_FIELDS = ("num_attention_heads", "image_size", "prompt_columns", "num_labels")
_HEAD_CHANNELS = 64  # in all DINOv2
_NEEDED = ("cls_embeddings.weight", "head.weight", "head.bias", "pos_embed")
_UNUSED = {
    "mask_token": "used in pre-training only",
    "cls_token": "the official model has no CLS token and ignores it",
}


@dataclass
class OfficialViTP:
    """An official checkpoint in our terms.

    Attributes:
        fields: arguments of `ViTPConfig`, without labels.
        state_dict: weights of `ViTPForPointClassification`.
        image_size: height and width that images are squashed to; the position table may be of another, square size.
        notes: what was done besides renaming, and what was left out, a line each.
    """

    fields: dict[str, Any]
    state_dict: dict[str, Tensor]
    image_size: tuple[int, int]
    notes: list[str]

    @property
    def num_labels(self) -> int:
        """Classes C of the head."""
        return self.state_dict["classifier.weight"].shape[0]


def read_official_vit_p(source: str, options: ConversionOptions, released: ReleasedModel | None = None) -> OfficialViTP:
    """Read an official checkpoint, refusing one that contradicts the options or does not contain what they leave open.

    Args:
        source: file, folder or Hub id.
        options: may give `num_attention_heads` of unusual widths, the `image_size` that images are squashed to, and the
            `prompt_columns` of an encoder with four columns.
        released: the released model in the file, if it is one.
    """
    unknown = sorted(options.fields.keys() - set(_FREE_FIELDS))
    if unknown:
        raise ValueError(f"--set {unknown[0]}: for official ViT-P weights only {', '.join(_FREE_FIELDS)} can be set")
    # The authors' repository holds a file for each model, so the usual names do not help.
    names = PICKLE_NAMES + SAFETENSORS_NAMES if released is None else (f"{released.id}.pth",)
    path = str(find_checkpoint(source, names, options.revision))
    state_dict = strip_prefixes(read_checkpoint(path, options.max_bytes), ("teacher.", "module.", "backbone."))
    missing = [name for name in _NEEDED if name not in state_dict]
    if missing:
        hint = format_hint(state_dict, but="the official ViT-P code")
        raise ValueError(
            f"{path} is not of the official ViT-P code: it lacks {missing[0]}{hint}; check the file and the kind of "
            "conversion"
        )
    check_weights(state_dict, path)
    notes = [f"left out {name}: {reason}" for name, reason in _UNUSED.items() if state_dict.pop(name, None) is not None]
    head = {f"classifier.{part}": state_dict.pop(f"head.{part}") for part in ("weight", "bias")}
    encoder = _encoder_columns(state_dict.pop("cls_embeddings.weight"), options.fields.get("prompt_columns"), path)
    if encoder.shape[1] == 4 and "prompt_columns" in options.fields:
        notes.append("widths and heights of boxes are taken as shares of the image, from 0 to 1")

    weights = unpack(rename(state_dict, _KEY_MAP, (), "official ViT-P"))
    # Row 0 belongs to the CLS token, which the official model replaces by the points.
    positions = weights[POSITION_TABLE].flatten(0, -2)
    weights[POSITION_TABLE] = positions[1:]
    weights = fill_absent(weights)
    # The grid is set below, from the number of positions.
    fields = SourceBackbone(weights, (0, 0), dict(_CONVENTIONS)).config_fields()
    patch_size, side = fields["patch_size"], math.isqrt(len(positions) - 1)
    if side * side != len(positions) - 1:
        raise ValueError(f"{path}: {len(positions) - 1} positions are not a square grid, as the official code has")
    fields["image_size"] = side * patch_size
    fields["num_attention_heads"] = _num_heads(fields["hidden_size"], options.fields.get("num_attention_heads"), path)
    own = {**weights, CLS_POSITION: positions[:1], "prompt_encoder.weight": encoder}
    size = options.fields.get("image_size", released.image_size if released else fields["image_size"])
    notes.append(
        "answers depend on how many points are asked at once, as in the official code"
        + (f", which asks {released.num_prompts}" if released else "")
    )
    state_dict = {f"vit_p.{name}": tensor for name, tensor in own.items()} | head
    return OfficialViTP(fields, state_dict, _input_size(size, patch_size), notes)


def _encoder_columns(weight: Tensor, order: Any, path: str) -> Tensor:
    """The prompt encoder (D, 2 or 4) with our four columns; missing ones are 0, so points give the official token."""
    columns: Sequence[Any] = OFFICIAL_COLUMNS
    if order is not None:
        columns = order if isinstance(order, list) else [order]
    elif weight.shape[1] == 4:
        raise ValueError(
            f"{path}: its point encoder has four columns, whose order is not in the file; pass --set "
            "prompt_columns=x,y,w,h in the right order"
        )
    if len(columns) != weight.shape[1] or sorted(columns) != sorted(COLUMNS[: weight.shape[1]]):
        raise ValueError(
            f"--set prompt_columns={','.join(map(str, columns))}: the encoder of {path} has {weight.shape[1]} "
            f"columns; name each of {', '.join(COLUMNS[: weight.shape[1]])} once"
        )
    ours = weight.new_zeros(weight.shape[0], len(COLUMNS))
    for index, column in enumerate(columns):
        ours[:, COLUMNS.index(column)] = weight[:, index]
    return ours


def _num_heads(hidden_size: int, given: Any, path: str) -> int:
    if given is None and hidden_size % _HEAD_CHANNELS:
        raise ValueError(
            f"{path}: its width {hidden_size} is not a multiple of {_HEAD_CHANNELS}, so the head count is unknown; "
            "pass --set num_attention_heads=..."
        )
    return given if given is not None else hidden_size // _HEAD_CHANNELS


def _input_size(size: Any, patch_size: int) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or any(type(side) is not int or side < patch_size or side % patch_size for side in sides):
        raise ValueError(
            f"--set image_size={size}: expected pixels, or height,width, in multiples of the patch size {patch_size}"
        )
    return sides[0], sides[1]
