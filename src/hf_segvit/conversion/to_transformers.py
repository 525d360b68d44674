"""Export an EoMT to a folder that stock Transformers loads: its `eomt` or `eomt_dinov3`.

Learned positions become `eomt`, rotary ones `eomt_dinov3`. Weights, image processor and configuration are translated,
and what neither model type can express is refused with the reason. A forward pass of both models on one random image
checks that they agree; `compare_outputs` serves the conversions in the other direction too.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
)

from ..atomic_files import check_destination, complete_folder
from ..models.checkpoint_json import path_of, stored_config
from ..models.configuration_eomt import EoMTConfig
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.transformers_eomt import SHARED_FIELDS, SHARED_SETTINGS, is_transformers_eomt
from ..weight_checks import check_complete, check_weights, common_dtype
from .checkpoint_files import DEFAULT_MAX_BYTES, SAFETENSORS_NAMES, find_checkpoint, read_checkpoint


def export_to_transformers(
    model_or_folder: EoMTForUniversalSegmentation | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    processor: EoMTImageProcessor | None = None,
    overwrite: bool = False,
    check: bool = True,
    revision: str | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> list[str]:
    """Write a model as a folder of Transformers' own `eomt` or `eomt_dinov3`.

    Args:
        model_or_folder: a model, or where `from_pretrained` finds one.
        destination: the folder, which appears complete or not at all.
        processor: image processor of the model; by default the folder's, and for a model in memory one of the config's
            image size.
        overwrite: replace an existing model folder.
        check: compare both models' outputs on a random image before the folder appears.
        revision: branch, tag or commit, if the source is a Hub id.
        max_bytes: largest size of the weights.

    Returns:
        Lines that report what was done and what behaves differently there.

    Raises:
        ValueError: Transformers cannot express the model, or the destination is taken; nothing was written.
    """
    check_destination(destination, overwrite)  # before the weights are read
    model: EoMTForUniversalSegmentation
    if isinstance(model_or_folder, EoMTForUniversalSegmentation):
        model = model_or_folder
    else:
        stored = stored_config(model_or_folder, revision=revision)
        if stored.get("model_type", EoMTConfig.model_type) != EoMTConfig.model_type and not is_transformers_eomt(
            stored
        ):
            raise ValueError(
                f"{path_of(stored)}: the model is of type {stored['model_type']!r}, which Transformers' eomt and "
                f"eomt_dinov3 cannot express; give an EoMT ({EoMTConfig.model_type})"
            )
        path = find_checkpoint(model_or_folder, SAFETENSORS_NAMES, revision)
        check_weights(read_checkpoint(path, max_bytes), str(path))
        model = EoMTForUniversalSegmentation.from_pretrained(model_or_folder, revision=revision)
        processor = processor or EoMTImageProcessor.from_pretrained(model_or_folder, revision=revision or "main")
    if processor is None:
        height, width = model.config.image_height_width
        processor = EoMTImageProcessor(size={"height": height, "width": width})
    config, notes = transformers_config(model.config)
    state_dict = transformers_state_dict(model, config, notes)
    their_processor = transformers_image_processor(processor, notes)
    their_model = transformers_class(config).from_pretrained(
        None, config=config, state_dict=state_dict, dtype=common_dtype(model.state_dict())
    )
    if check:
        notes.append(compare_with_transformers(model, their_model, tolerance=1e-5))
    with complete_folder(destination, overwrite) as folder:
        their_model.save_pretrained(folder)
        their_processor.save_pretrained(folder)
    return [f"wrote {config.model_type} to {Path(destination)}, {len(state_dict)} tensors", *notes]


def transformers_state_dict(
    model: EoMTForUniversalSegmentation, config: EomtConfig | EomtDinov3Config, notes: list[str]
) -> dict[str, Tensor]:
    """The weights of the same model in Transformers; differences are added to `notes`."""
    check_weights(model.state_dict(), "the model")
    renamed = {_their_name(name, config): tensor for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        expected = transformers_class(config)(config).state_dict()
    # Which names a gated MLP has depends on the installed version, so look at its model.
    if any(".mlp.weights_in." in name for name in expected):
        renamed = _pack_gates(renamed)
    if isinstance(config, EomtConfig) and config.use_swiglu_ffn:
        notes.append(f"the gated MLPs are named as in Transformers {transformers.__version__}; other versions differ")
    probabilities = torch.tensor(masked_attention_probabilities(model.config))
    # Transformers stores the weight of no-object in the loss as a buffer.
    class_weights = torch.ones(len(model.class_predictor.bias))
    class_weights[-1] = model.config.no_object_weight
    renamed |= {"attn_mask_probs": probabilities, "criterion.empty_weight": class_weights}
    like = model.class_predictor.weight  # for dtype and device
    for name in expected.keys() - renamed.keys():
        if name.endswith(".k_proj.bias"):
            renamed[name] = like.new_zeros(expected[name].shape)  # the same function as without a bias
        elif name.endswith(".lambda1"):
            renamed[name] = like.new_ones(expected[name].shape)  # the same function as without LayerScale
    check_complete(renamed, expected, f"Transformers {transformers.__version__} does not have the same EoMT")
    return renamed


def transformers_class(config: EomtConfig | EomtDinov3Config) -> Any:
    """Transformers' model class for one of its configurations."""
    return EomtForUniversalSegmentation if isinstance(config, EomtConfig) else EomtDinov3ForUniversalSegmentation


def _their_name(name: str, config: EomtConfig | EomtDinov3Config) -> str:
    name = name.removeprefix("eomt.")
    if isinstance(config, EomtConfig):
        return name
    # `eomt` has our names; `eomt_dinov3` has those of DINOv3.
    name = name.replace("patch_embeddings.projection.", "patch_embeddings.")
    name = name.replace(".attention.out_proj.", ".attention.o_proj.")
    return name.replace(".mlp.fc1.", ".mlp.up_proj.").replace(".mlp.fc2.", ".mlp.down_proj.")


def _pack_gates(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gate and value in one matrix, as `eomt` has them in Transformers up to 5.17."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        gate = re.fullmatch(r"(.+\.mlp\.)gate_proj\.(.+)", name)
        if gate:
            packed[f"{gate[1]}weights_in.{gate[2]}"] = torch.cat((tensor, state_dict[f"{gate[1]}up_proj.{gate[2]}"]))
        elif ".mlp.up_proj." not in name:
            packed[name.replace(".mlp.down_proj.", ".mlp.weights_out.")] = tensor
    return packed


def transformers_image_processor(processor: EoMTImageProcessor, notes: list[str]) -> EomtImageProcessor:
    """Transformers' processor with the same preprocessing; what it cannot store is added to `notes`."""
    height, width = processor.size["height"], processor.size["width"]
    if height != width:
        raise inexpressible(f"an image processor for {height} x {width} pixels; its inputs are square")
    # `do_pad` is exported but not read from checkpoints of theirs, for which our default holds.
    settings = {name: getattr(processor, name) for name in (*SHARED_SETTINGS, "do_pad")}
    if processor.stuff_classes:
        notes.append(
            f"pass stuff_classes={processor.stuff_classes} to its post_process_panoptic_segmentation, since its "
            "processor does not store them"
        )
    if processor.do_reduce_labels:
        settings["ignore_index"] = processor.ignore_index  # there it also makes labels count from 1
    # A split image is scaled by its shorter side, any other to fit inside the square.
    size: dict[str, Any] = {"shortest_edge": height, "longest_edge": None if processor.do_split_image else height}
    return EomtImageProcessor(size=size, **settings)


# Fields with the same name and meaning there.
_SHARED_FIELDS = (*SHARED_FIELDS, "patch_size", "id2label", "label2id")
# Fields that the functions below translate, or that do not change what the model computes. Any other field must have
# its default: a field added later is then refused instead of lost.
_OTHER_FIELDS = (
    *("image_size", "intermediate_size", "position_embedding_type", "rope_theta", "mlp_type"),
    *("gate_act", "key_bias", "layer_scale_init_value", "num_query_layers"),
    *("masked_attention", "masked_attention_probabilities", "loss_normalization"),
)


def transformers_config(config: EoMTConfig) -> tuple[EomtConfig | EomtDinov3Config, list[str]]:
    """The configuration of the same model in Transformers, and notes on what behaves differently there."""
    _refuse_foreign_fields(config)
    notes = _probability_notes(config)
    height, _ = config.image_height_width
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS}
    fields |= {
        "image_size": height,
        "num_blocks": config.num_query_layers,
        "layerscale_value": 1.0 if config.layer_scale_init_value is None else float(config.layer_scale_init_value),
    }
    if config.position_embedding_type == "learned":
        return EomtConfig(**fields, mlp_ratio=_mlp_ratio(config), use_swiglu_ffn=config.mlp_type == "swiglu"), notes
    gated = config.mlp_type == "swiglu"
    if gated and config.gate_act != config.hidden_act:
        raise inexpressible(
            f"gate_act={config.gate_act!r} beside hidden_act={config.hidden_act!r}; eomt_dinov3 has one field for both"
        )
    fields |= {name: getattr(config, name) for name in ("intermediate_size", "key_bias")}
    rope = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    return EomtDinov3Config(**fields, use_gated_mlp=gated, rope_parameters=rope), notes


def _refuse_foreign_fields(config: EoMTConfig) -> None:
    height, width = config.image_height_width
    if config.position_embedding_type not in ("learned", "rope"):
        raise inexpressible(
            f"position_embedding_type={config.position_embedding_type!r}; it has learned or rotary ones"
        )
    if height != width:
        raise inexpressible(
            f"image_size={height} x {width}; its position table and mask grid are square. Give the "
            "model a square image_size first"
        )
    general = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    for field in dataclasses.fields(EoMTConfig):
        if field.name in general.union(_SHARED_FIELDS, _OTHER_FIELDS) or field.default is dataclasses.MISSING:
            continue
        value = getattr(config, field.name)
        if value != field.default:
            raise inexpressible(f"{field.name}={value!r}; it supports only the equivalent of {field.default!r}")


def inexpressible(reason: str) -> ValueError:
    """The error for what Transformers' EoMT cannot express."""
    return ValueError(f"Transformers' EoMT cannot express {reason}")


def _mlp_ratio(config: EoMTConfig) -> int:
    """The integer from which `eomt` derives the width of its MLP."""
    width, hidden_size = config.intermediate_size, config.hidden_size
    if config.mlp_type == "swiglu":
        if config.gate_act != "silu":
            raise inexpressible(f"gate_act={config.gate_act!r}; the gate of eomt is silu")
        # Its width is two thirds of a plain MLP's, rounded up to a multiple of 8, which has no inverse: try them.
        ratios = [ratio for ratio in range(1, 33) if (int(hidden_size * ratio * 2 / 3) + 7) // 8 * 8 == width]
    else:
        ratios = [width // hidden_size] if width % hidden_size == 0 else []
    if not ratios:
        raise inexpressible(f"intermediate_size={width} with hidden_size={hidden_size}; it has whole ratios only")
    return ratios[0]


def masked_attention_probabilities(config: EoMTConfig) -> list[float]:
    """The probabilities that Transformers stores beside the weights, 0 for a model that is never masked."""
    if not config.masked_attention:
        return [0.0] * config.num_query_layers
    return [float(p) for p in config.masked_attention_probabilities or ()]


def _probability_notes(config: EoMTConfig) -> list[str]:
    probabilities = masked_attention_probabilities(config)
    masked = [p > 0 for p in probabilities]
    if any(earlier and not later for earlier, later in pairwise(masked)):
        raise inexpressible(
            f"masked_attention_probabilities={probabilities}: where a masked layer comes before a mask-free one, it "
            "applies the old mask to both. Set them with model.set_masked_attention_probabilities, to 0 after training"
        )
    notes = []
    if any(0 < p < 1 for p in probabilities):
        notes.append(
            f"warning: masked_attention_probabilities={probabilities}: Transformers draws masks in evaluation too, so "
            "its outputs are random where this package's are not"
        )
    if not config.masked_attention:
        notes.append("masked_attention=False: in training, Transformers predicts masks between the blocks all the same")
    return notes


@torch.no_grad()
def compare_with_transformers(ours: EoMTForUniversalSegmentation, theirs: Any, tolerance: float) -> str:
    """Compare with Transformers' `eomt` or `eomt_dinov3`, both without attention masks, as `compare_outputs` does.

    Both models are as before afterwards, except that theirs is in evaluation mode.
    """
    config, size = ours.config, ours.config.image_height_width
    weight = next(ours.parameters())
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, config.num_channels, *size, generator=generator).to(weight.device, weight.dtype)
    # Masks are a step function of logits, so a logit near 0 may differ although all weights are equal. The outputs
    # without masks pass through all weights too.
    kept = ours.training, config.masked_attention_probabilities, theirs.attn_mask_probs.clone()
    try:
        config.masked_attention_probabilities = [0.0] * config.num_query_layers
        theirs.attn_mask_probs.zero_()  # a buffer: it takes the place of the config's field there
        our_outputs, their_outputs = ours.eval()(pixel_values), theirs.eval()(pixel_values)
    finally:
        ours.train(kept[0])
        config.masked_attention_probabilities = kept[1]
        theirs.attn_mask_probs.copy_(kept[2])
    return compare_outputs(
        {name: (our_outputs[name], their_outputs[name]) for name in ("class_queries_logits", "masks_queries_logits")},
        tolerance,
        "Transformers' model",
    )


def compare_outputs(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float, reference: str) -> str:
    """Compare tensors that should be equal; returns a line that reports how close they are.

    Args:
        pairs: name to our output and the reference's.
        tolerance: largest difference allowed in fp32, as a share of the reference's largest value (1 at least).
        reference: name of the other model, for the message.

    Raises:
        ValueError: shapes differ, or values by more than allowed.
    """
    worst = 0.0
    for name, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} has shape {tuple(ours.shape)} here and {tuple(theirs.shape)} in {reference}")
        # Half precision: eight rounding steps.
        allowed = tolerance if ours.dtype == torch.float32 else 8 * torch.finfo(ours.dtype).eps
        scale = max(1.0, float(theirs.float().abs().max()))
        difference = float((ours.float() - theirs.float()).abs().max()) / scale
        if not difference <= allowed:  # NaN too
            raise ValueError(
                f"the converted model does not compute what {reference} does: {name} differs by {difference:.1e} of "
                "its largest value; nothing was written"
            )
        worst = max(worst, difference)
    return f"checked: outputs equal those of {reference} to {worst:.0e} of their largest value"
