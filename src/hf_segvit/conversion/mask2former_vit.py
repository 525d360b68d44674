"""Weights for a Mask2Former on a plain ViT: heads and adapters of other code.

`from_mask2former_head` takes both decoders and the class head of a Mask2Former of Transformers, on any backbone;
`from_vit_adapter` a ViT and its adapter under the names of the public ViT-Adapter code. What the source lacks is
newly initialised and reported, for training to start from.
"""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor
from transformers import AutoConfig, Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerTransformerModule

from ..models.checkpoint_json import check_foreign_fields, errors_name, path_of, stored_config
from ..models.configuration_mask2former_vit import NUM_INTERACTIONS, Mask2FormerViTConfig
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.modeling_mask2former_vit import STRIDES, Mask2FormerViTForUniversalSegmentation
from ..models.vit_adapter import NUM_LAST_EXTRACTORS, NUM_POINTS, NUM_SCALES
from ..weight_checks import check_complete, check_weights, format_hint, mapping_lines
from .backbones import image_normalization
from .checkpoint_files import PICKLE_NAMES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint, strip_prefixes
from .options import ConversionOptions, read_labels
from .sources import Converted, check_timm_name
from .to_transformers import compare_outputs

# Our fields, and Transformers' of the same meaning.
_HEAD_FIELDS = {
    "num_queries": "num_queries",
    "decoder_hidden_size": "hidden_dim",
    "num_decoder_attention_heads": "num_attention_heads",
    "decoder_intermediate_size": "dim_feedforward",
    "num_pixel_decoder_layers": "encoder_layers",
    "pixel_decoder_intermediate_size": "encoder_feedforward_dim",
    "no_object_weight": "no_object_weight",
    "class_weight": "class_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "train_num_points": "train_num_points",
    "oversample_ratio": "oversample_ratio",
    "importance_sample_ratio": "importance_sample_ratio",
}
# What our decoders have, as all published checkpoints do.
_HEAD_DEMANDS = {
    "pre_norm": False,
    "activation_function": "relu",
    "common_stride": STRIDES[0],
    "feature_strides": STRIDES,
    "enforce_input_projection": False,
    "dropout": 0.0,
}
_HEAD_PREFIXES = {
    "model.pixel_level_module.decoder.": "mask2former.pixel_decoder.",
    "model.transformer_module.": "mask2former.transformer_module.",
    "class_predictor.": "class_predictor.",
}
# The convolutions that read the backbone, with the norms behind them.
_INPUT_CONVOLUTION = re.compile(r"mask2former\.pixel_decoder\.(input_projections\.\d+|adapter_\d+)\.")

# The public ViT-Adapter's names of modules, and ours.
_ADAPTER_NAMES = (
    (r"spm\.(stem|conv[234])\.", r"spatial_prior.\1."),
    (r"interactions\.(\d+)\.extractor\.", r"interactions.\1.extractors.0."),
    (r"\.feat_norm\.", ".feature_norm."),
    (r"\.attn\.", ".attention."),
    (r"\.ffn_norm\.", ".mlp_norm."),
    (r"\.ffn\.dwconv\.dwconv\.", ".mlp.convolution."),
    (r"\.ffn\.", ".mlp."),
    (r"^up\.", "upscaling."),
)
_ADAPTER_KEYS = re.compile(r"(spm|interactions|up|norm[1-4])\.|level_embed$")


def from_mask2former_head(source: str, options: ConversionOptions) -> Converted:
    """A Mask2Former of Transformers whose backbone is replaced by `options.base` with an adapter."""
    if options.base is None:
        raise ValueError("mask2former-head needs --base: timm/NAME, folder or Hub id of the ViT that replaces its own")
    at_revision: dict[str, Any] = {"revision": options.revision or "main"}
    stored = stored_config(source, **at_revision)
    where = path_of(stored)
    if stored.get("model_type") != Mask2FormerConfig.model_type:
        raise ValueError(
            f"{where}: the model is of type {stored.get('model_type')!r}, not Transformers' mask2former; give one"
        )
    check_foreign_fields(stored, where, local=False)
    with errors_name(where):
        theirs: Any = AutoConfig.from_pretrained(source, trust_remote_code=False, **at_revision)
    fields = head_fields(theirs, where)
    if options.labels:
        labels = read_labels(options.labels)
        counts = len(labels.id2label), theirs.num_labels
        if counts[0] != counts[1]:
            raise ValueError(f"{options.labels} names {counts[0]} classes, but the model of {where} has {counts[1]}")
        fields["id2label"] = labels.id2label
    path = find_checkpoint(source, SAFETENSORS_NAMES + PICKLE_NAMES, options.revision)
    state_dict = read_checkpoint(path, options.max_bytes)
    check_weights(_without_counts(state_dict), str(path))
    head = rename_head(state_dict)
    own = {name: value for name, value in options.fields.items() if name not in fields}
    model = Mask2FormerViTForUniversalSegmentation.from_backbone(options.base, **{**fields, **own})
    fitting, lines = _fit_head(head, model, str(path))
    model.load_state_dict(fitting, strict=False)
    lines = [*mapping_lines(fitting), *lines]
    if model.config.has("adapter"):
        lines.append("new: the adapter, which at first does not change the ViT")
    if options.check:
        lines.append(_compared_decoder(model, theirs, state_dict))
    else:
        lines.append("not compared, as asked")
    stuff_classes = labels.stuff_classes if options.labels else None
    return Converted(model, _processor(model, options, options.base, stuff_classes), lines)


def head_fields(theirs: Any, where: str) -> dict[str, Any]:
    """Fields of a `Mask2FormerViTConfig` for the head that a `Mask2FormerConfig` describes; refuses what differs."""
    for name, wanted in _HEAD_DEMANDS.items():
        value = getattr(theirs, name)
        value = tuple(value) if isinstance(value, list) else value
        if value != wanted:
            raise ValueError(f"{where}: {name} is {value!r}, but these models have {wanted!r}; take another checkpoint")
    if not theirs.hidden_dim == theirs.feature_size == theirs.mask_feature_size:
        raise ValueError(
            f"{where}: hidden_dim={theirs.hidden_dim}, feature_size={theirs.feature_size} and mask_feature_size="
            f"{theirs.mask_feature_size} must be equal; take another checkpoint"
        )
    fields = {ours: getattr(theirs, name) for ours, name in _HEAD_FIELDS.items()}
    return {**fields, "num_decoder_layers": theirs.decoder_layers - 1, "id2label": dict(theirs.id2label)}


def rename_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head of a `Mask2FormerForUniversalSegmentation` under our names, without backbone and loss."""
    return {
        ours + name.removeprefix(theirs): tensor
        for name, tensor in state_dict.items()
        for theirs, ours in _HEAD_PREFIXES.items()
        if name.startswith(theirs)
    }


def _fit_head(head: dict[str, Tensor], model: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a head that fit the model; convolutions that read a backbone of other widths stay new."""
    expected = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(_HEAD_PREFIXES.values()))
    }
    new = sorted(
        {
            found[0]
            for name, tensor in head.items()
            if (found := _INPUT_CONVOLUTION.match(name)) and name in expected and tensor.shape != expected[name].shape
        }
    )
    fitting = {name: tensor for name, tensor in head.items() if not name.startswith(tuple(new))}
    wanted = {name: tensor for name, tensor in expected.items() if not name.startswith(tuple(new))}
    check_complete(fitting, wanted, f"{source} does not fit the config.json beside it; copy both again")
    width = model.config.hidden_size
    return fitting, [f"new: {name.rstrip('.')}, which reads features of {width} channels" for name in new]


@torch.no_grad()
def _compared_decoder(model: Any, theirs: Any, state_dict: Mapping[str, Tensor]) -> str:
    """Compare with Transformers' transformer decoder of the source, on noise as features."""
    prefix = "model.transformer_module."
    decoder = Mask2FormerTransformerModule(theirs.feature_size, theirs)
    decoder.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    )
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, theirs.feature_size, side, side, generator=generator) for side in (2, 4, 8, 16)]
    expected = decoder.eval()(maps[:3], maps[3])
    ours = model.eval().mask2former.decode_queries(maps[:3], maps[3])
    queries, weight = expected.intermediate_hidden_states[-1], state_dict["class_predictor.weight"].float()
    classes = queries @ weight.T + state_dict["class_predictor.bias"].float()
    pairs = {
        "masks_queries_logits": (ours.masks_queries_logits[-1], expected.masks_queries_logits[-1]),
        "class_queries_logits": (model.class_predictor(ours.intermediate_hidden_states[-1]), classes),
    }
    return compare_outputs(pairs, tolerance=1e-4, reference="Transformers' transformer decoder")


def from_vit_adapter(source: str, options: ConversionOptions) -> Converted:
    """A ViT with its adapter from the public ViT-Adapter code; `options.model` is timm's name of the ViT."""
    if options.model is None:
        raise ValueError("vit-adapter needs --model: timm's name of the ViT in the file, such as vit_large_patch16_224")
    name = options.model.removeprefix("timm/")
    check_timm_name(name)
    path = find_checkpoint(source, SAFETENSORS_NAMES + PICKLE_NAMES, options.revision)
    state_dict = strip_prefixes(read_checkpoint(path, options.max_bytes), ("backbone.",))
    check_weights(_without_counts(state_dict), str(path))
    vit, adapter, rest = split_adapter(state_dict)
    if not adapter:
        hint = format_hint(state_dict, "")
        raise ValueError(f"{path} has no weights of a ViT-Adapter, such as spm.stem.0.weight{hint}")
    fields = adapter_fields(adapter, str(path))
    if options.labels:
        fields["id2label"] = read_labels(options.labels).id2label
    # The final norm of the ViT is no part of an adapter's ViT.
    reference = timm.create_model(name, num_classes=0, **_grid_of(vit, name))
    vit = {**{key: value for key, value in reference.state_dict().items() if key.startswith("norm.")}, **vit}
    model = Mask2FormerViTForUniversalSegmentation.from_backbone(
        reference, state_dict=vit, **{**dict(options.fields), **fields}
    )
    renamed = rename_adapter(adapter)
    remedy = f"{path} is damaged, or of another version of ViT-Adapter"
    check_complete(renamed, model.mask2former.adapter.state_dict(), remedy, "the weights do not fit the adapter")
    model.mask2former.adapter.load_state_dict(renamed)
    lines = mapping_lines(renamed)
    lines += [f"left out {count} tensors of {part}" for part, count in rest.items()]
    lines += ["new: pixel decoder, transformer decoder and class head", "not compared: the code is no library"]
    return Converted(model, _processor(model, options, reference), lines)


def split_adapter(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """The weights of the ViT and of its adapter, and how many others there are by the first part of their names."""
    vit: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    rest: dict[str, int] = {}
    for name, tensor in state_dict.items():
        if _ADAPTER_KEYS.match(name):
            adapter[name] = tensor
        elif re.match(r"(blocks|patch_embed|norm|norm_pre)\.|(cls_token|pos_embed|reg_token)$", name):
            vit[name] = tensor
        else:
            part = name.split(".")[0]
            rest[part] = rest.get(part, 0) + 1
    return vit, adapter, rest


def adapter_fields(adapter: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Fields of a `Mask2FormerViTConfig` that the shapes of an adapter's weights show."""
    names = {
        "stem": "spm.stem.0.weight",
        "offsets": "interactions.0.injector.attn.sampling_offsets.weight",
        "values": "interactions.0.injector.attn.value_proj.weight",
        "mlp": "interactions.0.extractor.ffn.fc1.weight",
    }
    missing = [name for name in names.values() if name not in adapter]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]}; it is damaged, or of another version of ViT-Adapter")
    width = adapter[names["values"]].shape[1]
    return {
        "adapter_stem_channels": adapter[names["stem"]].shape[0],
        "num_adapter_attention_heads": adapter[names["offsets"]].shape[0] // (NUM_SCALES * NUM_POINTS * 2),
        "adapter_value_ratio": adapter[names["values"]].shape[0] / width,
        "adapter_mlp_ratio": adapter[names["mlp"]].shape[0] / width,
    }


def rename_adapter(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapter under the names of `ViTAdapter`."""
    numbered = {f"spm.fc{index + 1}.": f"spatial_prior.projections.{index}." for index in range(len(STRIDES))}
    numbered |= {f"norm{index + 1}.": f"norms.{index}." for index in range(len(STRIDES))}
    last = f"interactions.{NUM_INTERACTIONS - 1}."
    for index in range(NUM_LAST_EXTRACTORS - 1):
        numbered[f"{last}extra_extractors.{index}."] = f"{last}extractors.{index + 1}."
    renamed = {}
    for name, tensor in adapter.items():
        for theirs, ours in numbered.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        for pattern, replacement in _ADAPTER_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _grid_of(vit: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The input size and patch size of the file's ViT, which may not be those of timm's model, as its arguments."""
    if "patch_embed.proj.weight" not in vit or "pos_embed" not in vit:
        raise ValueError(f"the file lacks patch_embed.proj.weight or pos_embed, which {name} has; check --model")
    patch_size = vit["patch_embed.proj.weight"].shape[-1]
    side = int((vit["pos_embed"].shape[1]) ** 0.5)  # rounded down, as there are positions of a few prefix tokens
    return {"img_size": side * patch_size, "patch_size": patch_size}


def _without_counts(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the numbers of batches that BatchNorms have seen, which are whole."""
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}


def _processor(
    model: Any, options: ConversionOptions, backbone: Any, stuff_classes: list[int] | None = None
) -> EoMTImageProcessor:
    mean, std = image_normalization(backbone)
    config: Mask2FormerViTConfig = model.config
    height, width = config.image_height_width
    task = options.task or "panoptic"
    return EoMTImageProcessor(
        task=task,
        size={"height": height, "width": width},
        image_mean=mean,
        image_std=std,
        num_labels=config.num_labels,
        stuff_classes=(stuff_classes or []) if task == "panoptic" else [],
    )
