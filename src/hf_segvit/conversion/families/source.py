"""The interface of a backbone family, and the backbone it returns.

`BackboneFamily` is what a family implements, `SourceBackbone` its result: weights under our names, and the settings
that tensors do not show. The rest are small functions for families of Transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..key_maps import CLS_POSITION, CLS_TOKEN, PATCH_KERNEL, POSITION_TABLE, REGISTER_TOKENS


class BackboneFamily(Protocol):
    """A family of backbones, as a module or any other object.

    It may also have `features(model, pixel_values)`, which takes images (B, channels, H, W) and returns tokens in
    the order of `PlainViTModel`, (B, CLS + registers + patches, D) after the last norm, or `None` if they cannot be
    compared. `hf-segvit convert` checks the converted model against it.

    Attributes:
        FAMILY: name of the family, for messages.
        MODELS: what it converts: the `model_type` of Transformers' models, and the class of others, such as
            `"timm.models.eva.Eva"`.
    """

    @property
    def FAMILY(self) -> str: ...  # noqa: D102 - a read-only property, so that a module constant satisfies it
    @property
    def MODELS(self) -> tuple[str, ...]: ...  # noqa: D102

    def convert(self, model: Any, state_dict: Mapping[str, Tensor]) -> "SourceBackbone":
        """The backbone under our names.

        Args:
            model: the module, for the settings; it may be on the meta device.
            state_dict: its weights, or others of the same names.

        Raises:
            ValueError: the plain ViT has no counterpart of a part or a weight; the message names it.
        """


def checked_family(family: Any, origin: str) -> BackboneFamily:
    """A family from elsewhere, once it has everything that a family needs; errors name `origin`."""
    if isinstance(family, type):
        raise ValueError(f"{origin} is a class; give an object of it")
    missing = [name for name in ("FAMILY", "MODELS") if not hasattr(family, name)]
    missing += [] if callable(getattr(family, "convert", None)) else ["convert(model, state_dict)"]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}; see docs/extending.md")
    if isinstance(family.MODELS, str) or not all(isinstance(model, str) for model in family.MODELS):
        raise ValueError(f"{origin}: MODELS is {family.MODELS!r}; give a tuple of model types and class names")
    return family


def last_hidden_state(model: Any, pixel_values: Tensor) -> Tensor:
    """`features` of most Transformers models."""
    return model(pixel_values).last_hidden_state


@dataclass
class SourceBackbone:
    """A backbone under our names.

    Args:
        state_dict: weights of a `PlainViTModel`.
        grid_size: patch rows and columns of its positions.
        settings: fields of `PlainViTConfig` that shapes do not show: heads, activation, epsilon, rotary embeddings.
        cls_position: (1, D) position embedding that the CLS token of `state_dict` includes; `None` if there is none.
    """

    state_dict: dict[str, Tensor]
    grid_size: tuple[int, int]
    settings: dict[str, Any]
    cls_position: Tensor | None = None

    def __post_init__(self) -> None:
        # `fold_prefix_positions` passes it on among the weights, but it is not a parameter of the plain ViT.
        self.cls_position = self.state_dict.pop(CLS_POSITION, self.cls_position)

    def config_fields(self) -> dict[str, Any]:
        """Fields of `PlainViTConfig`: the settings, and what names and shapes show."""
        weights = self.state_dict
        layers = {int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}
        first = {name.removeprefix("layers.0."): tensor for name, tensor in weights.items()}
        gated = "mlp.gate_proj.weight" in first
        inner = first.get("mlp.gate_proj.weight" if gated else "mlp.fc1.weight")
        rotary, learned = "rope_theta" in self.settings, POSITION_TABLE in weights
        return {
            "hidden_size": weights[PATCH_KERNEL].shape[0],
            "num_channels": weights[PATCH_KERNEL].shape[1],
            "patch_size": weights[PATCH_KERNEL].shape[-1],
            "num_hidden_layers": max(layers) + 1,
            "intermediate_size": 0 if inner is None else inner.shape[0],
            "use_cls_token": weights[CLS_TOKEN].shape[1] > 0,
            "num_register_tokens": weights[REGISTER_TOKENS].shape[1],
            "position_embedding_type": "learned_rope" if rotary and learned else "rope" if rotary else "learned",
            "mlp_type": "swiglu" if gated else "mlp",
            "mlp_norm": "mlp.norm.weight" in first,
            "attention_norm": "attention.norm.weight" in first,
            "key_bias": "attention.k_proj.bias" in first,
            # Only whether it is `None` matters: the weights replace the initial value.
            "layer_scale_init_value": 1.0 if "layer_scale1.lambda1" in first else None,
            "embedding_norm": "embeddings.layernorm.weight" in weights,
            "final_norm": "layernorm.weight" in weights,
            **self.settings,
        }


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def patch_grid(config: Any) -> tuple[int, int]:
    """Patch rows and columns of an image, from a Transformers config."""
    height, width = pair(config.image_size)
    patch_size, _ = pair(config.patch_size)  # the convolution's weights show whether patches are square
    return height // patch_size, width // patch_size


def common_settings(config: Any) -> dict[str, Any]:
    """The settings that have the same names in Transformers' ViTs and here."""
    return {name: getattr(config, name) for name in ("num_attention_heads", "layer_norm_eps", "hidden_act")}
