"""This package's own `PlainViTModel`: nothing to rename, perhaps another size."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...models.configuration_plain_vit import PlainViTConfig
from .source import SourceBackbone, last_hidden_state

FAMILY = "plain ViT"
MODELS = (PlainViTConfig.model_type,)
features = last_hidden_state
SETTINGS = ("num_attention_heads", "layer_norm_eps", "hidden_act", "gate_act", "rope_reference_grid", "rope_offset")


def convert(model: Any, state_dict: Mapping[str, Tensor]) -> SourceBackbone:
    """A `PlainViTModel` as it is."""
    config = model.config
    settings = {name: getattr(config, name) for name in SETTINGS}
    # `SourceBackbone` takes a `rope_theta` for the sign that positions are rotary.
    if config.has_rotary_positions:
        settings["rope_theta"] = config.rope_theta
    return SourceBackbone(dict(state_dict), config.grid_size, settings)
