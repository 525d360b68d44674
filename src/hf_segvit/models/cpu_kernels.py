"""Kernels for CPUs: which of them is fastest on this processor.

In order: what the processor has, the rule that chooses, linear layers through oneDNN, attention as matrix products.
Where a gradient is wanted, only linear layers in fp32 are used, and not in a compiled graph. No kernel here is used on
other devices, under autocast, or in an exported graph; the MLP that keeps less for its backward pass is, but for the
last.

The rule rests on PyTorch 2.14 and one thread; two threads give the same order. Milliseconds for 1605 tokens of a ViT-S
(linear: 384 to 1536 channels with GELU; attention: 6 heads of 64 channels):

                                          linear            attention
                                          PyTorch  oneDNN   fused  products
    AMD EPYC, Zen 5, fp32                 19.0     9.0      43.7   28.1
    the same with the backward pass       55.8     32.4
    the same kept to AVX2, fp32           19.5     21.1     45.0   46.9
    AMD EPYC, Zen 5, bf16                 5.2      4.7      45.9   19.7
    the same kept to AVX-512, bf16                          46     88
    the same kept to AVX2, bf16                             42     1021
    AMD EPYC, Zen 5, fp16                                   65     776
    Intel Xeon with AMX, bf16, all of a ViT-S               206    279

Shapes: B batch, T tokens, D in and O out features, E channels of one head.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

# Rows of scores computed at a time, so that they stay in the cache: 256 x 1605 x 6 heads in bf16 are 5 MB.
ROWS_IN_CACHE = 256


@dataclass(frozen=True)
class ProcessorFeatures:
    """What a processor and this build of PyTorch have for matrix products."""

    amd: bool = False
    avx512: bool = False
    avx512_bf16: bool = False
    amx_bf16: bool = False
    onednn: bool = False  # and the operator behind `linear`

    def __str__(self) -> str:
        names = {"avx512": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
        return ", ".join(text for name, text in names.items() if getattr(self, name)) or "no AVX-512"


@dataclass(frozen=True)
class CPUKernels:
    """The types in which a kernel of this file is faster than PyTorch's own."""

    linear: frozenset[torch.dtype] = frozenset()
    attention: frozenset[torch.dtype] = frozenset()
    fast_bfloat16: bool = False  # whether a model in bf16 is faster than in fp32


def processor_features() -> ProcessorFeatures:
    """The features of this processor; those that this release of PyTorch does not tell count as missing."""
    # `get_capabilities` is newer than the private functions, and neither is promised to stay.
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() or {}
    if not told:
        functions = {
            "avx512_f": "_is_avx512_supported",
            "avx512_bf16": "_is_avx512_bf16_supported",
            "amx_bf16": "_is_amx_tile_supported",
        }
        told = {name: getattr(torch.cpu, function, lambda: False)() for name, function in functions.items()}
    name = str(told.get("cpu_name") or platform.processor())
    return ProcessorFeatures(
        amd="AMD" in name,
        avx512=bool(told.get("avx512_f")),
        avx512_bf16=bool(told.get("avx512_bf16")),
        amx_bf16=bool(told.get("amx_bf16")),
        onednn=torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    )


def kernels_for(features: ProcessorFeatures) -> CPUKernels:
    """The kernels that are fastest on a processor; the figures are at the top of this file."""
    if not features.onednn:
        return CPUKernels()
    linear, attention = set(), set()
    if features.avx512_bf16 or features.amx_bf16:
        linear.add(torch.bfloat16)  # PyTorch's own ends in oneDNN, too, but does not fuse the GELU
    if features.avx512_bf16 and not features.amx_bf16:
        # PyTorch's fused kernel converts bf16 to fp32 unless there are tiles; without instructions oneDNN emulates.
        attention.add(torch.bfloat16)
    if features.amd and features.avx512:
        # PyTorch's products in fp32 are MKL's, which on AMD keeps to AVX2: half of what the processor can do.
        linear.add(torch.float32)
        attention.add(torch.float32)
    return CPUKernels(frozenset(linear), frozenset(attention), features.avx512_bf16 or features.amx_bf16)


# Asked once, so that `torch.compile` sees a constant.
KERNELS = kernels_for(processor_features())


class Linear(nn.Linear):
    """A linear layer through the fastest kernel."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Transform (..., D) to (..., O)."""
        return linear(inputs, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """A linear layer (..., D) -> (..., O) through the fastest kernel, followed by a GELU if `gelu`."""
    if not takes_onednn(inputs, weight):
        trained = trains_through_onednn(inputs, weight)
        outputs = _TrainedLinear.apply(inputs, weight, bias) if trained else F.linear(inputs, weight, bias)
        return F.gelu(outputs) if gelu else outputs
    if torch.compiler.is_compiling():
        return onednn_linear(inputs, weight, bias, gelu)
    return _onednn_linear(inputs, weight, bias, gelu)


def linear_and_activation(layer: nn.Module, activation: nn.Module, inputs: Tensor) -> Tensor:
    """`activation(layer(inputs))`, in one kernel where both allow it."""
    if not (is_bare(layer) and _is_gelu(activation)):
        return activation(layer(inputs))
    return linear(inputs, layer.weight, layer.bias, gelu=True)  # type: ignore[arg-type]


def two_layers(first: nn.Module, activation: nn.Module, second: nn.Module, inputs: Tensor) -> Tensor:
    """`second(activation(first(inputs)))`; in training a GELU's output is computed twice, instead of kept."""
    tensors: list[Any] = [inputs, first.weight, first.bias, second.weight, second.bias]
    if is_bare(first) and is_bare(second) and _is_gelu(activation) and _is_trained(inputs, *tensors[1::2]):
        return _TrainedMLP.apply(*(None if each is None else in_autocast_type(each) for each in tensors))
    return second(linear_and_activation(first, activation, inputs))


def _is_trained(inputs: Tensor, *weights: Tensor) -> bool:
    # `torch.compile` chooses itself what to keep, and `torch.func` needs rules that a function written by hand lacks.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    tensors = (inputs, *weights)
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(is_plain(weight) for weight in weights)
        and len({in_autocast_type(tensor[:0]).dtype for tensor in tensors}) == 1
    )


# Asked once, since `torch.compile` cannot ask.
_HAVE_AUTOCAST = {name for name in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(name)}


def in_autocast_type(values: Tensor) -> Tensor:
    """Values as autocast would convert them for products, once for all of them; without autocast as they are."""
    dtype = autocast_type(values.device)
    return values if dtype is None or values.dtype == torch.float64 else values.to(dtype)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast converts to on a device; `None` without autocast."""
    if device.type not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one that does what its weight and bias say."""
    # Adapters and offloading replace the layer, its forward or its weight, or hang hooks on it.
    return type(layer) is Linear and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in vars(layer)
    )


def _is_gelu(activation: nn.Module) -> bool:
    return type(activation) is GELUActivation and activation.act is F.gelu


def takes_onednn(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a product of these goes to oneDNN."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in KERNELS.linear
        and inputs.dtype == weight.dtype
        and is_plain(weight)
        and _is_inference(inputs, weight)
    )


def trains_through_onednn(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a product of these goes to oneDNN with its backward pass."""
    # `torch.compile` has its own products, and `torch.func` needs rules that a function written by hand lacks.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and torch.float32 in KERNELS.linear
        and is_plain(weight)
        and torch.is_grad_enabled()
        and (inputs.requires_grad or weight.requires_grad)
        and not (torch.is_autocast_enabled("cpu") or torch.jit.is_tracing())
    )


class _TrainedLinear(torch.autograd.Function):
    """A linear layer whose three products all go to oneDNN."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _onednn_linear(inputs, weight, bias, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = _product(rows, weight.t()).view(inputs.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _product(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_inputs, of_weight, of_bias


class _TrainedMLP(torch.autograd.Function):
    """Two linear layers with a GELU between them, whose widest activation is kept once: before the GELU, not after.

    All tensors have one type, on any device.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, weight_2: Tensor, bias_2: Tensor | None
    ) -> Tensor:
        hidden = _trained_linear(inputs, weight, bias)
        ctx.save_for_backward(inputs, weight, bias, weight_2, hidden)
        return _trained_linear(F.gelu(hidden), weight_2, bias_2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, weight_2, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # `hidden` has no graph of its own for the gradient of this gradient
            hidden = F.linear(inputs, weight, bias)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[3]:
            of[3] = _product(rows.t(), F.gelu(hidden).t())
        if ctx.needs_input_grad[4]:
            of[4] = rows.sum(0)
        if any(ctx.needs_input_grad[:3]):
            rows = torch.ops.aten.gelu_backward(_product(rows, weight_2.t()), hidden)
        if ctx.needs_input_grad[0]:
            of[0] = _product(rows, weight.t()).view(inputs.shape)
        if ctx.needs_input_grad[1]:
            of[1] = _product(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of[2] = rows.sum(0)
        return tuple(of)


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    # With `create_graph` the backward pass is differentiated too, which PyTorch's own products allow.
    return F.linear(inputs, weight) if torch.is_grad_enabled() else _trained_linear(inputs, weight, None)


def _trained_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on_cpu = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and torch.float32 in KERNELS.linear
    return _onednn_linear(inputs, weight, bias, False) if on_cpu else F.linear(inputs, weight, bias)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor: not quantised and not sharded."""
    return type(weight) in (Tensor, nn.Parameter)


def _is_inference(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or torch.jit.is_tracing())


def _onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if not inputs.numel():
        return inputs.new_zeros(*inputs.shape[:-1], weight.shape[0])
    kind, variant = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, kind, [], variant)


def products_are_faster(query: Tensor) -> bool:
    """Whether `attention_products` is the faster kernel for this query."""
    return query.device.type == "cpu" and query.dtype in KERNELS.attention and _is_inference(query)


def attention_products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention (B, T, heads, E) of query, key, value (B, heads, T, E) as matrix products, without a mask."""
    if query.dtype != torch.float32 or torch.float32 not in KERNELS.linear:
        keys = key.transpose(-1, -2).contiguous()
        value = value.contiguous()
        groups = (query * scaling).split(ROWS_IN_CACHE, dim=2)
        return torch.cat([(rows @ keys).softmax(dim=-1) @ value for rows in groups], dim=2).transpose(1, 2)
    if torch.compiler.is_compiling():
        return onednn_attention(query, key, value, scaling)
    return _onednn_attention(query, key, value, scaling)


def _onednn_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    # A product of two activations is a linear layer whose weight is one of them.
    batch_size, num_heads, num_rows, channels = query.shape
    query, key, value = query * scaling, key.contiguous(), value.transpose(-1, -2).contiguous()
    context = query.new_empty(batch_size, num_rows, num_heads, channels)
    for image in range(batch_size):
        for head in range(num_heads):
            for start in range(0, num_rows, ROWS_IN_CACHE):
                rows = slice(start, start + ROWS_IN_CACHE)
                weights = _onednn_linear(query[image, head, rows], key[image, head], None, False).softmax(-1)
                context[image, rows, head] = _onednn_linear(weights, value[image, head], None, False)
    return context


# `torch.compile` wants the weight of oneDNN's own operator to be a constant, so it sees these as one call each.
def _registered(name: str, function: Callable, fake: Callable) -> Any:
    # A checkpoint that carries this file as remote code has a copy of it, which finds the name taken.
    existing = getattr(torch.ops.hf_segvit, name, None)
    if existing is not None:
        return existing
    operator = torch.library.custom_op(f"hf_segvit::{name}", function, mutates_args=())
    operator.register_fake(fake)
    return operator


def _linear_operator(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return _onednn_linear(inputs, weight, bias, gelu)


def _attention_operator(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return _onednn_attention(query, key, value, scaling)


onednn_linear = _registered(
    "onednn_linear", _linear_operator, lambda inputs, weight, *_: inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
)
onednn_attention = _registered(
    "onednn_attention",
    _attention_operator,
    lambda query, *_: query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]),
)
