"""The weights of the official EoMT code (github.com/tue-mps/eomt) in our names.

Its files hold a flat table of tensors with the backbone as timm (DINOv2, DeiT-III) or Transformers (DINOv3) names it.
`read_official_eomt` reads dimensions off the tensors, adds a DINOv3 delta to its base, swaps the class head and
resamples position embeddings where asked to, and returns a config and the weights that fit it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..weight_checks import check_complete, check_weights, format_hint
from .checkpoint_files import PICKLE_NAMES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint, strip_prefixes
from .conversion_options import ConversionOptions
from .families import timm_vit
from .families.source import SourceBackbone
from .key_maps import POSITION_TABLE, fill_absent, rename, unpack
from .official_catalogue import ReleasedModel
from .official_delta import backbone_of_base, dinov3_names, is_delta, rename_dinov3
from .official_positions import fit_positions

_BACKBONE = "encoder.backbone."
_HEAD_KEY_MAP = (
    (r"q\.weight", r"eomt.query.weight"),
    (r"class_head\.(weight|bias)", r"class_predictor.\1"),
    (r"mask_head\.0\.(weight|bias)", r"eomt.mask_head.fc1.\1"),
    (r"mask_head\.2\.(weight|bias)", r"eomt.mask_head.fc2.\1"),
    (r"mask_head\.4\.(weight|bias)", r"eomt.mask_head.fc3.\1"),
    (r"upscale\.(\d+)\.(conv1\.weight|conv1\.bias|conv2\.weight)", r"eomt.upscale_block.block.\1.\2"),
    (r"upscale\.(\d+)\.norm\.(weight|bias)", r"eomt.upscale_block.block.\1.layernorm2d.\2"),
)
# What the released ViTs are, where their weights do not tell. The official code has no other families.
_TIMM_SETTINGS = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
_DINOV3_SETTINGS = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "rope_theta": 100.0}
_HEAD_CHANNELS = 64
# Fields that are a convention or a choice and not read off the weights: `--set` may change them.
_FREE_FIELDS = {"num_attention_heads", "layer_norm_eps", "rope_theta", "hidden_act", "masked_attention_probabilities"}


@dataclass
class OfficialEoMT:
    """An official checkpoint in our words.

    Attributes:
        fields: arguments of `EoMTConfig`, without labels.
        state_dict: weights of `EoMTForUniversalSegmentation`.
        pixel_mean: per channel, in [0, 1].
        pixel_std: per channel, in [0, 1].
        notes: what was done besides renaming, and what was left out, a line each.
    """

    fields: dict[str, Any]
    state_dict: dict[str, Tensor]
    pixel_mean: list[float]
    pixel_std: list[float]
    notes: list[str]

    @property
    def num_labels(self) -> int:
        """Classes C that the class head knows, without no-object."""
        return self.state_dict["class_predictor.weight"].shape[0] - 1


def read_official_eomt(
    source: str, options: ConversionOptions, num_labels: int | None = None, released: ReleasedModel | None = None
) -> OfficialEoMT:
    """Read an official checkpoint.

    Args:
        source: file, folder or Hub id. Of a folder the pickle comes first: repositories of the authors also hold a
            `model.safetensors` in the format of Transformers.
        options: what to change and what the tensors do not tell.
        num_labels: classes C that the model is to have; with another number in the file, `reset_class_head` is needed.
        released: the released model that it is, if it is one: tells the picture size where positions are rotary.

    Returns:
        Config fields and weights that fit.

    Raises:
        ValueError: the file is of another format, contradicts the options, is a delta without its base or the other way
            round, or does not tell something that the options must give; the message says which.
    """
    path = str(find_checkpoint(source, PICKLE_NAMES + SAFETENSORS_NAMES, options.revision))
    state_dict = strip_prefixes(read_checkpoint(path, options.max_bytes))
    if "q.weight" not in state_dict or not any(name.startswith(_BACKBONE) for name in state_dict):
        hint = format_hint(state_dict, but="the official EoMT code")
        raise ValueError(f"{path} is not of the official EoMT code: it lacks q.weight or {_BACKBONE}*{hint}")
    notes = []
    if state_dict.pop("criterion.empty_weight", None) is not None:
        notes.append("left out criterion.empty_weight: class weights of the loss, which follow from the config")
    check_weights(state_dict, path)
    delta = is_delta(state_dict, path, options.base, released.base if released else None)
    mean, std = _pixel_statistics(state_dict, delta)
    probabilities = _masked_attention_probabilities(state_dict, delta, path, notes)

    backbone_names = [name for name in state_dict if name.startswith(_BACKBONE)]
    notes += [f"left out {name}: used in pre-training only" for name in backbone_names if name.endswith("mask_token")]
    backbone = {name.removeprefix(_BACKBONE): state_dict.pop(name) for name in backbone_names}
    weights = _rename_backbone(backbone, path)
    settings = dict(_DINOV3_SETTINGS if POSITION_TABLE not in weights else _TIMM_SETTINGS)
    if delta:
        assert options.base is not None  # is_delta has seen to it
        weights, base_settings = _add_base(weights, options.base, options.max_bytes)
        settings |= base_settings
        notes.append(f"added the differences of the file to the {len(weights)} weights of {options.base}")
    weights = fill_absent(weights)
    head = _rename_head(state_dict, path)
    fields = _fields_of(weights, head, settings)
    if probabilities is not None:
        fields |= {"num_query_layers": len(probabilities), "masked_attention_probabilities": probabilities}
    if released is not None and POSITION_TABLE not in weights:
        fields["image_size"] = released.image_size
    _apply_fields(fields, options.fields, path)
    fit_positions(weights, fields, options.fields, notes)
    _fit_class_head(head, fields["hidden_size"], num_labels, options.reset_class_head, notes)
    state_dict = {f"eomt.{name}": tensor for name, tensor in weights.items()} | head
    return OfficialEoMT(fields, state_dict, mean, std, notes)


def _rename_head(state_dict: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Queries, heads and upscaling as `EoMTForUniversalSegmentation` names them."""
    head: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        matches = ((re.fullmatch(pattern, name), target) for pattern, target in _HEAD_KEY_MAP)
        ours = next((match.expand(target) for match, target in matches if match), None)
        if ours is None:
            raise ValueError(f"{place}: {name!r} is no weight of the official EoMT code, and is not dropped in silence")
        head[ours] = tensor
    return head


def _rename_backbone(backbone: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The backbone's weights as `PlainViTModel` names them."""
    if any(re.search(r"attn\.[qkv]_(proj|bias)|mlp\.fc1_[gx]|(^|\.)rope", name) for name in backbone):
        raise ValueError(
            f"{place} has a backbone of the EVA family, of which the official EoMT code publishes no format; convert "
            "the backbone alone with `hf-segvit convert timm`"
        )
    if "patch_embed.patch_embeddings.weight" in backbone:
        return rename_dinov3(dinov3_names(backbone))
    inner, outer = (backbone.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    # timm packs gate and value into fc1: twice as many outputs as fc2 has inputs.
    packed = inner is not None and outer is not None and inner.shape[0] == 2 * outer.shape[1]
    key_map = timm_vit.KEY_MAP + timm_vit.MLP_KEY_MAPS["GluMlp" if packed else "Mlp"]
    weights = unpack(rename(backbone, key_map, (), "backbone of an official EoMT"))
    if POSITION_TABLE not in weights:
        raise ValueError(f"{place}: its backbone has neither position embeddings nor the names of DINOv3")
    weights[POSITION_TABLE] = weights[POSITION_TABLE].flatten(0, -2)
    return weights


def _add_base(differences: dict[str, Tensor], base: str, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, settings = backbone_of_base(base, max_bytes)
    check_complete(differences, weights, f"the delta is for another backbone than --base {base}")
    return {name: weights[name].float() + differences[name].float() for name in differences}, settings


def _fields_of(weights: dict[str, Tensor], head: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """The config fields that follow from the weights."""
    queries = head["eomt.query.weight"]
    blocks = [re.match(r"eomt\.upscale_block\.block\.(\d+)\.", name) for name in head]
    fields = SourceBackbone(weights, (0, 0), settings).config_fields()
    fields["num_queries"] = queries.shape[0]
    fields["num_upscale_blocks"] = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    if "num_attention_heads" not in fields and fields["hidden_size"] % _HEAD_CHANNELS == 0:
        fields["num_attention_heads"] = fields["hidden_size"] // _HEAD_CHANNELS
    return fields


def _pixel_statistics(state_dict: dict[str, Tensor], delta: bool) -> tuple[list[float], list[float]]:
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    found = [state_dict.pop(f"encoder.pixel_{name}", None) for name in ("mean", "std")]
    # fp32 buffers hold 0.4850000143...: six digits are what was written down.
    mean, std = (
        default if tensor is None or delta else [round(float(value), 6) for value in tensor.flatten()]
        for tensor, default in zip(found, imagenet, strict=True)
    )
    return mean, std


def _masked_attention_probabilities(
    state_dict: dict[str, Tensor], delta: bool, place: str, notes: list[str]
) -> list[float] | None:
    tensor = state_dict.pop("attn_mask_probs", None)
    if tensor is None:
        return None
    if delta:
        # The difference to an untrained model, whose probabilities are 1; the released runs are annealed to 0.
        return [0.0] * tensor.numel()
    values = [float(value) for value in tensor.flatten()]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"{place}: attn_mask_probs {values} are not probabilities")
    if any(values):
        notes.append(
            f"masked attention stays on, the file's probabilities are {values}; for a run whose annealing was finished "
            "pass --set masked_attention_probabilities=0"
        )
    return values


def _apply_fields(fields: dict[str, Any], given: Mapping[str, Any], place: str) -> None:
    """Put what `--set` gives into the fields, refusing what contradicts the weights."""
    for name, value in given.items():
        if name == "masked_attention_probabilities" and isinstance(value, int | float):
            value = [value] * fields.get("num_query_layers", given.get("num_query_layers", 0))
        if name in ("image_size", "native_image_size", "num_labels"):
            continue  # have their own rules
        if name in fields and name not in _FREE_FIELDS and fields[name] != value:
            raise ValueError(f"--set {name}={value}: the weights of {place} say {fields[name]}")
        fields[name] = value
    if "num_attention_heads" not in fields:
        raise ValueError(
            f"{place}: its width {fields['hidden_size']} is no multiple of {_HEAD_CHANNELS}, so the number of heads is "
            "open; pass --set num_attention_heads=..."
        )
    if "num_query_layers" not in fields:
        raise ValueError(
            f"{place} has no attn_mask_probs, so it does not tell how many blocks see the queries; pass "
            "--set num_query_layers=..."
        )
    # A file without probabilities is of a finished run: masks are only for training.
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
        raise ValueError("--reset-class-head: say for which classes, with --labels or --set num_labels=...")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # one file and one command give one folder
        layer = nn.Linear(hidden_size, num_labels + 1, dtype=head["eomt.query.weight"].dtype)
    head |= {"class_predictor.weight": layer.weight.data, "class_predictor.bias": layer.bias.data}
    notes.append(f"replaced the class head by an untrained one for {num_labels} classes")
