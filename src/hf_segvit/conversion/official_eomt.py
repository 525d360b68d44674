"""Official EoMT checkpoints (github.com/tue-mps/eomt) under our names.

The files hold a flat table of tensors, with the backbone as timm (DINOv2, DeiT-III) or Transformers (DINOv3) names it.
`read_official_eomt` reads dimensions off the tensors, adds a DINOv3 delta to its base, replaces the class head and
resamples position embeddings on request, and returns a config and weights that fit.

DINOv3's licence forbids passing its weights on, so those files hold, for the backbone, only the differences that
training made; queries and heads are complete. `is_delta` tells the two kinds of file apart.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint_json import check_foreign_fields, stored_config
from ..models.modeling_plain_vit import resample_position_embeddings
from ..weight_checks import check_complete, check_weights, format_hint
from .checkpoint_files import PICKLE_NAMES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint, strip_prefixes
from .families import timm_vit, transformers_dinov3
from .families.source import SourceBackbone
from .key_maps import POSITION_TABLE, fill_absent, rename, renamed, unpack
from .official_catalogue import ReleasedModel
from .options import ConversionOptions

_BACKBONE = "encoder.backbone."
_HEAD_KEY_MAP = (
    (r"q\.weight", r"eomt.query.weight"),  # the learnable queries (Q, D)
    (r"class_head\.(weight|bias)", r"class_predictor.\1"),
    (r"mask_head\.0\.(weight|bias)", r"eomt.mask_head.fc1.\1"),
    (r"mask_head\.2\.(weight|bias)", r"eomt.mask_head.fc2.\1"),
    (r"mask_head\.4\.(weight|bias)", r"eomt.mask_head.fc3.\1"),
    (r"upscale\.(\d+)\.(conv1\.weight|conv1\.bias|conv2\.weight)", r"eomt.upscale_block.block.\1.\2"),
    (r"upscale\.(\d+)\.norm\.(weight|bias)", r"eomt.upscale_block.block.\1.layernorm2d.\2"),
)
# Settings of the two families that the official code has, which weights do not show.
_TIMM_SETTINGS = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
_DINOV3_SETTINGS = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "rope_theta": 100.0}
_PATCH_KERNELS = ("patch_embed.proj.weight", "patch_embed.patch_embeddings.weight")
_HEAD_CHANNELS = 64  # in all released ViTs
# `--set` may change these: they are conventions or choices, not read off the weights.
_FREE_FIELDS = {"num_attention_heads", "layer_norm_eps", "rope_theta", "hidden_act", "masked_attention_probabilities"}


@dataclass
class OfficialEoMT:
    """An official checkpoint in our terms.

    Attributes:
        fields: arguments of `EoMTConfig`, without labels.
        state_dict: weights of `EoMTForUniversalSegmentation`.
        pixel_mean, pixel_std: per channel, in [0, 1].
        notes: what was done besides renaming, and what was left out, a line each.
    """

    fields: dict[str, Any]
    state_dict: dict[str, Tensor]
    pixel_mean: list[float]
    pixel_std: list[float]
    notes: list[str]

    @property
    def num_labels(self) -> int:
        """Classes C of the class head, without no-object."""
        return self.state_dict["class_predictor.weight"].shape[0] - 1


def read_official_eomt(
    source: str, options: ConversionOptions, num_labels: int | None = None, released: ReleasedModel | None = None
) -> OfficialEoMT:
    """Read an official checkpoint, refusing one that contradicts the options or does not contain what they leave open.

    Args:
        source: file, folder or Hub id.
        options: what to change, and what the tensors do not show.
        num_labels: classes C wanted; another number than the file's needs `reset_class_head`.
        released: the released model in the file, if it is one; gives the image size if positions are rotary.
    """
    # The pickle first: the authors' repositories also hold a model.safetensors in the format of Transformers.
    path = str(find_checkpoint(source, PICKLE_NAMES + SAFETENSORS_NAMES, options.revision))
    state_dict = strip_prefixes(read_checkpoint(path, options.max_bytes))
    if "q.weight" not in state_dict or not any(name.startswith(_BACKBONE) for name in state_dict):
        hint = format_hint(state_dict, but="the official EoMT code")
        raise ValueError(
            f"{path} is not of the official EoMT code: it lacks q.weight or {_BACKBONE}*{hint}; check the file and "
            "the kind of conversion"
        )
    notes = []
    if state_dict.pop("criterion.empty_weight", None) is not None:
        notes.append("left out criterion.empty_weight: class weights of the loss, which follow from the config")
    check_weights(state_dict, path)
    holds_delta = is_delta(state_dict, path, options.base, released.base if released else None)
    mean, std = _pixel_statistics(state_dict, holds_delta, path)
    probabilities = _masked_attention_probabilities(state_dict, holds_delta, path, notes)

    backbone_names = [name for name in state_dict if name.startswith(_BACKBONE)]
    notes += [f"left out {name}: used in pre-training only" for name in backbone_names if name.endswith("mask_token")]
    backbone = {name.removeprefix(_BACKBONE): state_dict.pop(name) for name in backbone_names}
    weights = _rename_backbone(backbone, path)
    settings = dict(_DINOV3_SETTINGS if POSITION_TABLE not in weights else _TIMM_SETTINGS)
    if holds_delta:
        assert options.base is not None  # checked by is_delta
        differences = weights
        base_weights, base_settings = backbone_of_base(options.base, options.max_bytes)
        check_complete(differences, base_weights, f"the delta is for another backbone than --base {options.base}")
        # In fp32: half precision would round small differences away.
        weights = {name: base_weights[name].float() + delta.float() for name, delta in differences.items()}
        settings |= base_settings
        notes.append(f"added the differences of the file to the {len(weights)} weights of {options.base}")
    weights = fill_absent(weights)
    head = _rename_head(state_dict, path)
    fields = _fields_of(weights, head, settings)
    if probabilities is not None:
        fields |= {"num_query_layers": len(probabilities), "masked_attention_probabilities": probabilities}
    if released is not None and POSITION_TABLE not in weights:
        # Rotary positions leave no table to read it off.
        fields["image_size"] = released.image_size
    _apply_fields(fields, options.fields, path)
    fit_positions(weights, fields, options.fields, notes)
    _fit_class_head(head, fields["hidden_size"], num_labels, options.reset_class_head, notes)
    state_dict = {f"eomt.{name}": tensor for name, tensor in weights.items()} | head
    return OfficialEoMT(fields, state_dict, mean, std, notes)


def _rename_head(state_dict: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Queries, heads and upscaling as `EoMTForUniversalSegmentation` names them."""
    head: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        ours = renamed(name, _HEAD_KEY_MAP)
        if ours is None:
            raise ValueError(
                f"{path}: {name!r} is not a weight of the official EoMT code, and nothing is dropped silently"
            )
        head[ours] = tensor
    return head


def _rename_backbone(backbone: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The backbone's weights as `PlainViTModel` names them."""
    # Names that only timm's `Eva` has.
    if any(re.search(r"attn\.[qkv]_(proj|bias)|mlp\.fc1_[gx]|(^|\.)rope", name) for name in backbone):
        raise ValueError(
            f"{path} has a backbone of the EVA family, which the official EoMT code does not have; convert "
            "the backbone alone with `hf-segvit convert timm`"
        )
    if "patch_embed.patch_embeddings.weight" in backbone:
        # The names are Transformers' except for these two prefixes.
        renamed = {re.sub(r"^patch_embed\.", "embeddings.", name): tensor for name, tensor in backbone.items()}
        return rename_dinov3({re.sub(r"^blocks\.", "layer.", name): tensor for name, tensor in renamed.items()})
    inner, outer = (backbone.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    # timm packs gate and value into fc1: twice as many outputs as fc2 has inputs.
    packed = inner is not None and outer is not None and inner.shape[0] == 2 * outer.shape[1]
    key_map = timm_vit.KEY_MAP + timm_vit.MLP_KEY_MAPS["GluMlp" if packed else "Mlp"]
    weights = unpack(rename(backbone, key_map, (), "backbone of an official EoMT"))
    if POSITION_TABLE not in weights:
        raise ValueError(f"{path}: its backbone has neither position embeddings nor the names of DINOv3")
    weights[POSITION_TABLE] = weights[POSITION_TABLE].flatten(0, -2)  # timm has a batch axis in front
    return weights


def _fields_of(weights: dict[str, Tensor], head: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """The config fields that follow from the weights."""
    queries = head["eomt.query.weight"]
    blocks = [re.match(r"eomt\.upscale_block\.block\.(\d+)\.", name) for name in head]
    fields = SourceBackbone(weights, (0, 0), settings).config_fields()  # fit_positions settles the grid
    fields["num_queries"] = queries.shape[0]
    fields["num_upscale_blocks"] = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    if "num_attention_heads" not in fields and fields["hidden_size"] % _HEAD_CHANNELS == 0:
        fields["num_attention_heads"] = fields["hidden_size"] // _HEAD_CHANNELS
    return fields


def _pixel_statistics(state_dict: dict[str, Tensor], delta: bool, path: str) -> tuple[list[float], list[float]]:
    # A delta holds the difference to these, which is 0.
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    statistics = [state_dict.pop(f"encoder.pixel_{name}", None) for name in ("mean", "std")]
    kernels = (state_dict.get(f"{_BACKBONE}{name}") for name in _PATCH_KERNELS)
    channels = next((kernel.shape[1] for kernel in kernels if kernel is not None and kernel.ndim == 4), 3)
    for name, tensor in zip(("mean", "std"), statistics, strict=True):
        if tensor is not None and tensor.shape not in ((channels,), (channels, 1, 1), (1, channels, 1, 1)):
            raise ValueError(
                f"{path}: encoder.pixel_{name} has the shape {list(tensor.shape)}, not one number for each of the "
                f"{channels} channels"
            )
    if not delta and statistics[1] is not None and bool((statistics[1] <= 0).any()):
        raise ValueError(f"{path}: encoder.pixel_std {statistics[1].flatten().tolist()} must be positive")
    # Six digits: fp32 buffers hold 0.4850000143... for 0.485.
    mean, std = (
        default if tensor is None or delta else [round(float(value), 6) for value in tensor.flatten()]
        for tensor, default in zip(statistics, imagenet, strict=True)
    )
    return mean, std


def _masked_attention_probabilities(
    state_dict: dict[str, Tensor], delta: bool, path: str, notes: list[str]
) -> list[float] | None:
    tensor = state_dict.pop("attn_mask_probs", None)
    if tensor is None:
        return None
    blocks = {match[1] for name in state_dict if (match := re.match(rf"{_BACKBONE}blocks\.(\d+)\.", name))}
    if tensor.ndim != 1 or not 1 <= len(tensor) <= max(1, len(blocks)):
        raise ValueError(
            f"{path}: attn_mask_probs has the shape {list(tensor.shape)}, not one number for each of at most "
            f"{len(blocks)} blocks"
        )
    if delta:
        # It holds the difference to an untrained model, whose probabilities are 1; the released runs are annealed to 0.
        return [0.0] * tensor.numel()
    values = [float(value) for value in tensor.flatten()]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"{path}: attn_mask_probs {values} are not probabilities")
    if any(values):
        notes.append(
            f"masked attention stays on, the file's probabilities are {values}; for a run whose annealing was finished "
            "pass --set masked_attention_probabilities=0"
        )
    return values


def _apply_fields(fields: dict[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Add what `--set` gives, refusing what contradicts the weights."""
    for name, value in given.items():
        if name == "masked_attention_probabilities" and isinstance(value, int | float):
            value = [value] * fields.get("num_query_layers", given.get("num_query_layers", 0))
        if name in ("image_size", "native_image_size", "num_labels"):
            continue  # handled by fit_positions and _fit_class_head
        if name in fields and name not in _FREE_FIELDS and fields[name] != value:
            raise ValueError(f"--set {name}={value}: the weights of {path} say {fields[name]}")
        fields[name] = value
    if "num_attention_heads" not in fields:
        raise ValueError(
            f"{path}: its width {fields['hidden_size']} is not a multiple of {_HEAD_CHANNELS}, so the head count is "
            "unknown; pass --set num_attention_heads=..."
        )
    if "num_query_layers" not in fields:
        raise ValueError(
            f"{path} has no attn_mask_probs, so the number of blocks that see the queries is unknown; pass "
            "--set num_query_layers=..."
        )
    # Masks are for training only, and a file without probabilities is from a finished run.
    fields.setdefault("masked_attention_probabilities", [0.0] * fields["num_query_layers"])


def _fit_class_head(
    head: dict[str, Tensor], hidden_size: int, num_labels: int | None, reset: bool, notes: list[str]
) -> None:
    """Check the class head against the labels, or replace it by a new one."""
    weight = head.get("class_predictor.weight")
    if not reset:
        if weight is None:
            raise ValueError("the file has no class head; pass --reset-class-head and --labels to give it a new one")
        if num_labels is not None and weight.shape[0] != num_labels + 1:
            raise ValueError(
                f"the file's class head knows {weight.shape[0] - 1} classes, not {num_labels}; for other labels pass "
                "--reset-class-head, which replaces it by an untrained one"
            )
        return
    if not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError("--reset-class-head: name the classes, with --labels or --set num_labels=...")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same command must write the same folder
        layer = nn.Linear(hidden_size, num_labels + 1, dtype=head["eomt.query.weight"].dtype)  # + 1: no-object
    head |= {"class_predictor.weight": layer.weight.data, "class_predictor.bias": layer.bias.data}
    notes.append(f"replaced the class head by an untrained one for {num_labels} classes")


# pixel_std is about 0.22 in a complete file and 0 in a delta; the final norm's weights are about 1 and nearly 0.
_ZERO = 1e-3
_SMALL_NORM = 0.1


def is_delta(state_dict: Mapping[str, Tensor], path: str, base: str | None, usual_base: str | None = None) -> bool:
    """Whether a checkpoint is a delta; `base` must be given for a delta, and only then."""
    delta = _holds_differences(state_dict)
    if delta is None:
        delta = base is not None  # only the user can know
    if delta and base is None:
        raise ValueError(
            f"{path} holds the difference to a backbone, not its weights, and is noise by itself; give it "
            f"with --base {usual_base or 'facebook/dinov3-vitl16-pretrain-lvd1689m or the like'}"
        )
    if base is not None and not delta:
        raise ValueError(f"{path} holds whole weights, not the difference to a backbone; convert it without --base")
    return delta


def _holds_differences(state_dict: Mapping[str, Tensor]) -> bool | None:
    """True for a delta, False for a complete file, `None` if the tensors do not show it."""
    std = state_dict.get("encoder.pixel_std")
    if std is not None:
        return bool(std.float().abs().max() < _ZERO)
    probabilities = state_dict.get("attn_mask_probs")
    if probabilities is not None and bool((probabilities < 0).any()):
        return True
    norm = state_dict.get("encoder.backbone.norm.weight")
    if norm is not None and bool(norm.float().abs().median() < _SMALL_NORM):
        return True
    return None


def rename_dinov3(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Transformers' DINOv3 ViT as `PlainViTModel` names them."""
    dinov3 = transformers_dinov3
    gated = any(".mlp.gate_proj." in name for name in backbone)
    mlp_key_map = dinov3.GATED_MLP_KEY_MAP if gated else dinov3.PLAIN_MLP_KEY_MAP
    return rename(backbone, dinov3.KEY_MAP + mlp_key_map, dinov3.DROPPED, dinov3.FAMILY)


def backbone_of_base(base: str, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a delta's base as `PlainViTModel` names them, and the config fields in its config.json."""
    config = stored_config(base)
    check_foreign_fields(config, f"{base}: config.json", local=os.path.isdir(base))
    if config.get("model_type") != "dinov3_vit":
        raise ValueError(
            f"--base {base} is of type {config.get('model_type')!r}, but deltas are made for Transformers' dinov3_vit"
        )
    path = find_checkpoint(base, SAFETENSORS_NAMES)
    state_dict = read_checkpoint(path, max_bytes)
    check_weights(state_dict, str(path))
    settings: dict[str, Any] = {
        name: config[name] for name in ("num_attention_heads", "layer_norm_eps") if name in config
    }
    # Transformers 5 nests it, earlier versions do not.
    nested = config.get("rope_parameters")
    theta = (nested if isinstance(nested, dict) else {}).get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        settings["rope_theta"] = theta
    return rename_dinov3(state_dict), settings


def fit_positions(
    weights: dict[str, Tensor], fields: dict[str, Any], given: Mapping[str, Any], notes: list[str]
) -> None:
    """Settle `fields["image_size"]`, and resample learned position embeddings to it; in place.

    `given` holds the fields of `--set`, among them `native_image_size` if the file's position table is not square.
    """
    patch_size, wanted = fields["patch_size"], given.get("image_size")
    if POSITION_TABLE not in weights:
        if wanted is None and "image_size" not in fields:
            raise ValueError("rotary positions do not show the image size; pass --set image_size=640 or the right one")
        fields["image_size"] = wanted or fields["image_size"]
        return
    table = weights[POSITION_TABLE]
    native = _native_grid(len(table), patch_size, wanted, given.get("native_image_size"))
    new = native if wanted is None else _grid(wanted, patch_size)
    height, width = (cells * patch_size for cells in new)
    fields["image_size"] = height if height == width else [height, width]
    if new != native:
        weights[POSITION_TABLE] = resample_position_embeddings(table, native, new)
        notes.append(f"resampled position embeddings from {native[0]} x {native[1]} to {new[0]} x {new[1]} patches")


def _native_grid(length: int, patch_size: int, wanted: Any, native: Any) -> tuple[int, int]:
    """Rows and columns of a table of position embeddings, which its length alone may not determine."""
    if native is not None:
        grid = _grid(native, patch_size)
        if math.prod(grid) != length:
            raise ValueError(
                f"--set native_image_size={native}: its {grid[0]} x {grid[1]} patches are not the {length} positions "
                "of the file"
            )
        return grid
    # The table is a list without its rows and columns. All released models are square, but 64 positions may also be
    # 4 x 16; only `--set` can decide.
    side = math.isqrt(length)
    fits = wanted is not None and math.prod(_grid(wanted, patch_size)) == length
    if side * side == length:
        if fits and _grid(wanted, patch_size) != (side, side):
            raise ValueError(
                f"--set image_size={wanted}: the file's {length} positions may be those of this image or of a square "
                "one; say which with --set native_image_size=..."
            )
        return side, side
    if fits:
        return _grid(wanted, patch_size)
    raise ValueError(
        f"the file has {length} positions, which is not a square number; name the size of their image with "
        "--set native_image_size=HEIGHT,WIDTH"
    )


def _grid(image_size: Any, patch_size: int) -> tuple[int, int]:
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"image size {image_size}: expected pixels, or height,width")
    if any(side < patch_size or side % patch_size for side in sides):
        raise ValueError(f"image size {image_size}: both sides must be multiples of the patch size {patch_size}")
    return sides[0] // patch_size, sides[1] // patch_size
