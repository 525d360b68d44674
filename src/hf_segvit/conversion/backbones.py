"""Backbones of timm and Transformers as plain ViTs: the way in for every fine-tuning run.

`convert_backbone` gives the configuration and the weights of a `PlainViTModel` that computes what the source does;
`model_from_backbone` is what stands behind every model's `from_backbone`. Nothing is guessed: a part that the plain ViT
does not have, a weight that is left over, and a parameter that nothing fills are errors. Only what stands outside the
backbone (classifier, pooling, MAE's decoder, SigLIP's text tower) is dropped.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.configuration_plain_vit import PlainViTConfig
from ..models.configuration_vit_p import ViTPConfig
from ..models.modeling_plain_vit import PlainViTModel
from ..weight_checks import check_complete, check_weights
from .backbone_loading import converter_for, load_backbone, quiet
from .families.source import pair
from .key_maps import CLS_POSITION, CLS_TOKEN, PATCH_KERNEL
from .resampling import fit_to_size


def convert_backbone(
    source: Any,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A backbone as the configuration and the weights of a `PlainViTModel`.

    Args:
        source: `"timm/<name>"` (downloaded by timm), the Hub id or folder of a Transformers, timm or `PlainViTModel`
            checkpoint, or a model of one of these in memory.
        image_size: pixels, an int or `[height, width]`; position embeddings are resampled to its grid. `None` keeps the
            source's grid.
        patch_size: the patch kernel is resampled to it. `None` keeps the source's.
        state_dict: weights to take instead of the source's, under the source's names; with `"timm/<name>"` nothing is
            downloaded then.

    Returns:
        Keyword arguments for `PlainViTConfig`, and the weights, which share no memory with the source.

    Raises:
        ValueError: the name is unknown (the message has the nearest), the source is of another family, has a part or
            a weight that cannot be expressed, a weight is NaN or infinite, or sizes do not fit.
    """
    fields, weights, _ = _converted(source, image_size, patch_size, state_dict)
    return fields, weights


def _converted(
    source: Any,
    image_size: int | Sequence[int] | None,
    patch_size: int | None,
    state_dict: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """What `convert_backbone` returns, and the position embedding (1, D) of the CLS token where the source has one."""
    named = isinstance(source, str | os.PathLike)
    place = os.fspath(source) if named else type(source).__name__
    model, weights = load_backbone(place, with_weights=state_dict is None) if named else (source, None)
    convert, backbone, prefix = converter_for(model)
    complete = _under(prefix, model.state_dict())
    given = complete if state_dict is None and weights is None else _under(prefix, state_dict or weights or {})
    check_weights(given, place)
    converted = convert(backbone, given)
    if given is not complete:
        check_complete(
            converted.state_dict, convert(backbone, complete).state_dict, f"{place} needs exactly its own weights"
        )
    size = None if image_size is None else pair(image_size)
    fitted, size = fit_to_size(converted.state_dict, converted.grid_size, size, patch_size)
    fields = {
        **converted.config_fields(),
        "patch_size": fitted[PATCH_KERNEL].shape[-1],
        "image_size": size[0] if size[0] == size[1] else list(size),
    }
    check_complete(fitted, _expected(PlainViTModel, PlainViTConfig(**fields)), f"{place} is not converted")
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in fitted.items()}
    return fields, own, None if converted.cls_position is None else converted.cls_position.clone()


def model_from_backbone(
    cls: Any, source: Any, image_size: int | Sequence[int] | None, patch_size: int | None, **kwargs: Any
) -> Any:
    """A model on the plain ViT with the weights of a backbone; see `PlainViTPreTrainedModel.from_backbone`.

    Args:
        cls: the model's class.
        source: as for `convert_backbone`, with `image_size`, `patch_size` and, among `kwargs`, `state_dict`.
        image_size: see there.
        patch_size: see there.
        kwargs: fields of the model's configuration, and arguments of `from_pretrained`.

    Raises:
        ValueError: as `convert_backbone`, or a field contradicts the backbone's weights.
    """
    fields, weights, cls_position = _converted(source, image_size, patch_size, kwargs.pop("state_dict", None))
    takes_prompts = issubclass(cls.config_class, ViTPConfig)
    if takes_prompts:
        fields["use_cls_token"] = False
        weights[CLS_TOKEN] = weights[CLS_TOKEN][:, :0]
    names = {field.name for field in dataclasses.fields(cls.config_class)} - {"dtype"} | {"num_labels"}
    asked = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    config = cls.config_class(**{**fields, **asked})

    expected = _expected(PlainViTModel, config)
    if not fields["final_norm"]:  # where the config asks for one nevertheless, it is as new as the heads
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("layernorm.")}
    check_complete(weights, expected, f"the fields {sorted(asked)} do not go with this backbone")

    if takes_prompts:
        zeros = torch.zeros(1, config.hidden_size)  # no position, as none was learned
        weights[CLS_POSITION] = zeros if cls_position is None else cls_position
    prefix = next(name.removesuffix(PATCH_KERNEL) for name in _expected(cls, config) if name.endswith(PATCH_KERNEL))
    kwargs.setdefault("dtype", torch.float32)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    with quiet():  # that the heads are new is the point here
        return cls.from_pretrained(None, config=config, state_dict=weights, **kwargs)


def _expected(cls: Any, config: PlainViTConfig) -> dict[str, Tensor]:
    """Names and shapes of a model's parameters, without its memory."""
    with torch.device("meta"):
        return cls(config).state_dict()


def _under(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a part of a model, under the part's own names."""
    return {
        name.removeprefix(prefix): tensor.detach() for name, tensor in state_dict.items() if name.startswith(prefix)
    }
