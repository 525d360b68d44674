"""What configuration Transformers' `eomt` or `eomt_dinov3` has for one of our models, and what neither can express."""

import dataclasses
from itertools import pairwise

import transformers
from transformers import EomtConfig, EomtDinov3Config

from ..models.configuration_eomt import EoMTConfig
from ..models.transformers_eomt import SHARED_FIELDS

# Fields that mean the same there under the same name.
_SHARED_FIELDS = (*SHARED_FIELDS, "patch_size", "id2label", "label2id")
# Fields that the functions below translate, or that have no bearing on what the model computes.
_OTHER_FIELDS = {
    "image_size",
    "intermediate_size",
    "position_embedding_type",
    "rope_theta",
    "mlp_type",
    "gate_act",
    "key_bias",
    "layer_scale_init_value",
    "num_query_layers",
    "masked_attention",
    "masked_attention_probabilities",
    "loss_normalization",
}


def transformers_config(config: EoMTConfig) -> tuple[EomtConfig | EomtDinov3Config, list[str]]:
    """The configuration of the same model in Transformers.

    Args:
        config: of our model.

    Returns:
        Theirs, and notes on what behaves otherwise there.

    Raises:
        ValueError: Transformers cannot express the model; the message says why.
    """
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
    rope = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    dinov3 = EomtDinov3Config(
        **fields,
        intermediate_size=config.intermediate_size,
        use_gated_mlp=gated,
        key_bias=config.key_bias,
        rope_parameters=rope,
    )
    return dinov3, notes


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
    for field in dataclasses.fields(EoMTConfig):
        known = field.name in _SHARED_FIELDS or field.name in _OTHER_FIELDS
        general = field.name in {other.name for other in dataclasses.fields(transformers.PreTrainedConfig)}
        if known or general or field.default is dataclasses.MISSING:
            continue
        value = getattr(config, field.name)
        if value != field.default:
            raise inexpressible(f"{field.name}={value!r}; it knows only what {field.default!r} means here")


def inexpressible(reason: str) -> ValueError:
    """The error for what Transformers' EoMT cannot express."""
    return ValueError(f"Transformers' EoMT cannot express {reason}")


def _mlp_ratio(config: EoMTConfig) -> int:
    """The integer from which `eomt` derives the width of its MLP."""
    width, hidden_size = config.intermediate_size, config.hidden_size
    if config.mlp_type == "swiglu":
        if config.gate_act != "silu":
            raise inexpressible(f"gate_act={config.gate_act!r}; the gate of eomt is silu")
        # Two thirds of a plain MLP's width, rounded up to a multiple of 8.
        ratios = [ratio for ratio in range(1, 33) if (int(hidden_size * ratio * 2 / 3) + 7) // 8 * 8 == width]
    else:
        ratios = [width // hidden_size] if width % hidden_size == 0 else []
    if not ratios:
        raise inexpressible(f"intermediate_size={width} with hidden_size={hidden_size}; it has whole ratios only")
    return ratios[0]


def masked_attention_probabilities(config: EoMTConfig) -> list[float]:
    """The probabilities that Transformers keeps beside the weights: 0 where a model is never masked."""
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
