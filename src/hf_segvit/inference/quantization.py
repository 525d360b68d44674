"""Quantise a model for inference through torchao: int8, int8 weights only, fp8.

Only the linear layers of the transformer blocks are quantised, which hold nearly all weights and products; embeddings,
norms and heads keep their type. It happens after loading, in memory: there are no quantised checkpoints.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..lookup import suggestion
from ..models.modeling_plain_vit import PlainViTLayer
from ..models.plain_vit_layers import PlainViTAttention
from .devices import describe_device

logger = logging.get_logger(__name__)

METHODS = {
    "int8": "Int8DynamicActivationInt8WeightConfig",  # weights for each output channel, activations for each token
    "int8-weight-only": "Int8WeightOnlyConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
}
_FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later
_INT8_CAPABILITY = (8, 0)
_MULTIPLE = 16  # of rows and columns, which the products of int8 and fp8 need


def check_quantization(method: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a method that is unknown or that the device or the type of the weights does not allow.

    Raises:
        ValueError: with what to use instead, or what to install.
    """
    if method not in METHODS:
        raise ValueError(f"there is no quantization {method!r}; {suggestion(method, METHODS)}")
    if find_spec("torchao") is None:
        raise ValueError(
            f'quantization {method} needs torchao, which is not installed; run pip install "hf-segvit[quantization]"'
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if method == "fp8":
        if capability is None or capability < _FP8_CAPABILITY:
            raise ValueError(
                f"{describe_device(device)} has no fp8, which NVIDIA GPUs have from compute capability 8.9 on; use "
                + ("dtype bfloat16 or float16" if device.type == "mps" else "quantization int8 or int8-weight-only")
            )
        if dtype != torch.bfloat16:
            raise ValueError(
                f"quantization fp8 computes the rest in bfloat16, not in {str(dtype).removeprefix('torch.')}; "
                "use dtype bfloat16"
            )
    elif device.type not in ("cpu", "cuda") or (capability is not None and capability < _INT8_CAPABILITY):
        raise ValueError(
            f"{describe_device(device)} has no fast int8 products; quantization {method} is for CPUs and NVIDIA GPUs "
            "from compute capability 8.0 on; use dtype float16 or auto"
        )
    if device.type == "cpu":
        # Measured in benchmarks/results: no silent slow path.
        logger.warning_once(
            f"quantization {method} on a CPU quarters the memory of the weights, but is seldom faster than dtype "
            "bfloat16; `hf-segvit benchmark` tells"
        )


def quantize_model(model: Any, method: str) -> int:
    """Quantise the linear layers of the transformer blocks in place; how many there were.

    The model must be on its device, and can then be optimised and compiled; it can no longer be trained or saved.

    Raises:
        ValueError: as `check_quantization`, or the model has no layers that can be quantised.
    """
    parameter = next(model.parameters())
    check_quantization(method, parameter.device, parameter.dtype)
    blocks = [module for module in model.modules() if isinstance(module, PlainViTLayer)]
    chosen = {id(module) for block in blocks for module in block.modules() if _can_be_quantised(module, method)}
    if not chosen:
        raise ValueError(
            f"a {type(model).__name__} cannot be quantised: it has no plain ViT whose linear layers have multiples of "
            f"{_MULTIPLE} channels; leave quantization out"
        )
    import torchao.quantization

    for block in blocks:
        for module in block.modules():
            if isinstance(module, PlainViTAttention):
                module.set_fused(False)  # else the product would still be of the weights before
    config = getattr(torchao.quantization, METHODS[method])
    torchao.quantization.quantize_(model, config(), filter_fn=lambda module, name: id(module) in chosen)
    model.save_pretrained = _refuse_saving
    return len(chosen)


def plain_tensors(weights: Tensor) -> list[Tensor]:
    """The tensors that quantised weights consist of, whose bytes can be read; other weights are their own."""
    if not hasattr(weights, "__tensor_flatten__"):
        return [weights]
    return [getattr(weights, name) for name in weights.__tensor_flatten__()[0]]


def _can_be_quantised(module: nn.Module, method: str) -> bool:
    # Adapters replace the layers by other modules, whose weights must be merged first.
    if not isinstance(module, nn.Linear) or module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
        return False
    # torchao 0.18 takes the one scale of such a weight for that of a block of 128 x 128, and then fails.
    return method != "fp8" or (module.in_features, module.out_features) != (128, 128)


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "the model is quantised in memory, and would not load elsewhere; save it before it is quantised, and name the "
        "quantization again where it is loaded"
    )
