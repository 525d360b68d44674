"""The kernels for CPUs: the rule that chooses them, and their agreement with PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from hf_segvit.models import cpu_kernels
from hf_segvit.models.configuration_plain_vit import PlainViTConfig
from hf_segvit.models.cpu_kernels import (
    CPUKernels,
    Linear,
    ProcessorFeatures,
    attention_products,
    kernels_for,
    linear,
    two_layers,
)
from hf_segvit.models.mask_head import mask_logits
from hf_segvit.models.modeling_plain_vit import PlainViTModel

from .tiny_models import randomize

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = CPUKernels(frozenset({FP32, BF16}), frozenset({FP32, BF16}), True)
NOTHING = CPUKernels()
needs_onednn = pytest.mark.skipif(not cpu_kernels.processor_features().onednn, reason="PyTorch without oneDNN")


def tiny_vit() -> PlainViTModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return randomize(PlainViTModel(PlainViTConfig(**size, image_size=64, patch_size=16))).eval()


@pytest.mark.parametrize(
    ("features", "linear_types", "attention_types", "fast"),
    [
        ({"amd": True, "avx512": True, "avx512_bf16": True}, {FP32, BF16}, {FP32, BF16}, True),  # Zen 4 and 5
        ({"avx512": True, "avx512_bf16": True, "amx_bf16": True}, {BF16}, set(), True),  # Sapphire Rapids
        ({"avx512": True, "avx512_bf16": True}, {BF16}, {BF16}, True),  # Cooper Lake
        ({"avx512": True}, set(), set(), False),  # Skylake
        ({"amd": True}, set(), set(), False),  # Zen 3
    ],
)
def test_the_rule_follows_what_the_processor_has(features, linear_types, attention_types, fast) -> None:
    kernels = kernels_for(ProcessorFeatures(onednn=True, **features))
    assert (kernels.linear, kernels.attention, kernels.fast_bfloat16) == (linear_types, attention_types, fast)
    assert kernels_for(ProcessorFeatures(onednn=False, **features)) == NOTHING


def test_features_are_read_from_either_form_that_pytorch_has(monkeypatch) -> None:
    told = {"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    expected = ProcessorFeatures(amd=True, avx512=True, avx512_bf16=True, amx_bf16=False, onednn=True)
    assert cpu_kernels.processor_features() == expected
    assert str(expected) == "AVX-512, AVX512-BF16"
    # Releases before `get_capabilities`, and one that tells nothing at all.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(cpu_kernels.platform, "processor", lambda: "Intel")
    for name, value in (("_is_avx512_supported", True), ("_is_avx512_bf16_supported", True)):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert cpu_kernels.processor_features() == ProcessorFeatures(False, True, True, True, True)
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_kernels.processor_features() == ProcessorFeatures()
    assert str(ProcessorFeatures()) == "no AVX-512"


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-6), (BF16, 1e-2)])
def test_linear_layers_agree_with_the_formula(dtype, tolerance, gelu, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    inputs, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 5, 32), (24, 32), (24,)))
    for given in (bias, None):
        # In strides that are not contiguous, and of no rows at all.
        for rows in (inputs, inputs[:, ::2], inputs[:, :0]):
            expected = F.linear(rows.double(), weight.double(), None if given is None else given.double())
            expected = F.gelu(expected) if gelu else expected
            answer = linear(rows, weight, given, gelu)
            assert answer.dtype == dtype
            assert answer.shape == expected.shape
            torch.testing.assert_close(answer.double(), expected, rtol=tolerance, atol=tolerance * 5)


@needs_onednn
@pytest.mark.parametrize("wanted", ["all", "inputs", "weights"])
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 2), slice(0, 0)])
def test_gradients_of_linear_layers_agree_with_the_formula(rows, wanted, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    torch.manual_seed(0)
    for shape, with_bias, expanded in (((2, 5, 32), True, False), ((2, 5, 32), False, True), ((5, 32), True, True)):
        inputs = torch.randn(shape)[..., rows, :].requires_grad_(wanted != "weights")
        weight, bias = torch.randn(24, 32), torch.randn(24) if with_bias else None
        given = [value.requires_grad_(wanted != "inputs") for value in (weight, bias) if value is not None]
        gradient = torch.randn(24).expand(*inputs.shape[:-1], 24) if expanded else torch.randn(*inputs.shape[:-1], 24)
        outputs = linear(inputs, weight, bias)
        assert type(outputs.grad_fn).__name__ == "_TrainedLinearBackward"
        leaves = [value for value in (inputs, *given) if value.requires_grad]
        found = torch.autograd.grad(outputs, leaves, gradient)
        doubles = [value.detach().double().requires_grad_(value.requires_grad) for value in (inputs, weight)]
        double_bias = None if bias is None else bias.detach().double().requires_grad_(bias.requires_grad)
        expected = torch.autograd.grad(
            F.linear(*doubles, double_bias),
            [value for value in (*doubles, double_bias) if value is not None and value.requires_grad],
            gradient.double(),
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-5)


def plain_mlp(inputs, weight, bias, weight_2, bias_2):
    return F.linear(F.gelu(F.linear(inputs, weight, bias)), weight_2, bias_2)


def our_mlp(inputs, *values):
    layers = [Linear(8, 12, bias=values[1] is not None), Linear(12, 4, bias=values[3] is not None)]
    for layer, weight, bias in zip(layers, values[::2], values[1::2], strict=True):
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
    return two_layers(layers[0], ACT2FN["gelu"], layers[1], inputs)


@needs_onednn
@pytest.mark.parametrize("wanted", ["11111", "10000", "01111", "00011", "11100", "10100"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_two_layers_agree_with_the_formula(wanted, with_bias, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    torch.manual_seed(0)
    shapes = ((2, 5, 8), (12, 8), (12,), (4, 12), (4,))
    values = [torch.randn(shape).requires_grad_(flag == "1") for shape, flag in zip(shapes, wanted, strict=True)]
    if not with_bias:
        values[2] = values[4] = None
    doubles = [None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in values]
    gradient = torch.randn(2, 5, 4)
    outputs, expected = our_mlp(*values), plain_mlp(*doubles)
    assert type(outputs.grad_fn).__name__ == "_TrainedMLPBackward"
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)
    for found, other in zip(
        torch.autograd.grad(outputs, [v for v in values if v is not None and v.requires_grad], gradient),
        torch.autograd.grad(expected, [v for v in doubles if v is not None and v.requires_grad], gradient.double()),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("way", ["checkpoint", "autocast"])
def test_two_layers_under_checkpointing_and_autocast(way, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    torch.manual_seed(0)
    values = [torch.randn(shape).requires_grad_() for shape in ((2, 5, 8), (12, 8), (12,), (4, 12), (4,))]

    def gradients(layers):
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                outputs = layers(*values)
        else:
            outputs = torch.utils.checkpoint.checkpoint(layers, *values, use_reentrant=False)
        return type(outputs.grad_fn).__name__, torch.autograd.grad(outputs.float().square().sum(), values)

    tolerance = {"rtol": 0, "atol": 0} if way == "autocast" else {"rtol": 1e-5, "atol": 1e-4}
    (name, found), (_, expected) = gradients(our_mlp), gradients(plain_mlp)
    assert name == "_TrainedMLPBackward"
    for one, other in zip(found, expected, strict=True):  # under autocast the same operators of PyTorch run
        torch.testing.assert_close(one, other, **tolerance)


@needs_onednn
def test_two_layers_keep_their_widest_activation_once(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    first, second, gelu = Linear(8, 32), Linear(32, 8), ACT2FN["gelu"]
    inputs, kept = torch.randn(7, 8, requires_grad=True), {}

    def keep(value):
        kept[value.data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        two_layers(first, gelu, second, inputs)
    parameters = sum(value.numel() for value in (first.weight, first.bias, second.weight))
    assert sum(kept.values()) == inputs.numel() + 7 * 32 + parameters
    # Whatever hangs on a layer is called.
    calls = []
    second.register_full_backward_hook(lambda *_: calls.append("backward"))
    two_layers(first, gelu, second, inputs).sum().backward()
    first.register_forward_hook(lambda *_: calls.append("forward"))
    two_layers(first, gelu, second, inputs)
    assert calls == ["backward", "forward"]


@needs_onednn
def test_gradients_of_gradients_and_function_transforms_work_as_before(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4)

    def penalty(layer):
        leaves = [value.clone().requires_grad_() for value in (inputs, weight, bias)]
        (slope,) = torch.autograd.grad(layer(*leaves).tanh().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaves)

    for found, expected in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(found, expected)
    more = [torch.randn(3, 8), torch.randn(12, 8), torch.randn(12), torch.randn(4, 12), torch.randn(4)]

    def penalty_of_two(layers):
        leaves = [value.clone().requires_grad_() for value in more]
        (slope,) = torch.autograd.grad(layers(*leaves).tanh().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaves)

    for found, expected in zip(penalty_of_two(our_mlp), penalty_of_two(plain_mlp), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(
        *(torch.func.jacrev(layer, (0, 1, 2))(inputs, weight, bias) for layer in (linear, F.linear)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@needs_onednn
def test_layers_take_onednn_only_where_it_may_replace_pytorch(monkeypatch) -> None:
    calls = []
    real = cpu_kernels._onednn_linear
    monkeypatch.setattr(cpu_kernels, "_onednn_linear", lambda *args: calls.append(args[3]) or real(*args))
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    layer, gelu, inputs = Linear(8, 8), ACT2FN["gelu"], torch.randn(3, 8)
    layer(inputs).sum().backward()  # two of them for the output and for the gradient of the weight
    assert calls == [False, False]
    calls.clear()
    layer.to(BF16)(inputs.to(BF16))  # a gradient in half precision is left to PyTorch
    layer.float()
    assert not calls
    with torch.no_grad():
        layer(inputs)
        cpu_kernels.linear_and_activation(layer, gelu, inputs)
        assert calls == [False, True]
        cpu_kernels.linear_and_activation(layer, ACT2FN["gelu_new"], inputs)
        cpu_kernels.linear_and_activation(nn.Linear(8, 8), gelu, inputs)
        assert calls == [False, True, False]
        hook = layer.register_forward_hook(lambda module, arguments, output: output + 1)
        torch.testing.assert_close(cpu_kernels.linear_and_activation(layer, gelu, inputs), gelu(layer(inputs)))
        hook.remove()
        calls.clear()
        with torch.autocast("cpu", BF16):
            assert layer(inputs).dtype == BF16
        layer.half()(inputs.half())
        monkeypatch.setattr(cpu_kernels, "KERNELS", NOTHING)
        layer.float()(inputs)
        assert not calls


@needs_onednn
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-6), (BF16, 0.05), (FP16, 0.01)])
def test_both_kernels_of_attention_are_as_near_to_the_formula_as_their_rounding(
    dtype, tolerance, products, monkeypatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "ROWS_IN_CACHE", 7)
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    query, key, value = torch.randn(3, 2, 4, 20, 16).to(dtype)
    weights = (query.double() @ key.double().transpose(-1, -2) * 0.25).softmax(-1)
    expected = (weights @ value.double()).transpose(1, 2)
    if products:
        answer = attention_products(query, key, value, 0.25)
    else:
        answer = F.scaled_dot_product_attention(query, key, value, scale=0.25).transpose(1, 2)
    assert answer.dtype == dtype
    # Scores of a few units and weights are rounded to 8 (bf16), 11 (fp16) or 24 (fp32) bits on the way.
    torch.testing.assert_close(answer.double(), expected, rtol=0, atol=tolerance)


@needs_onednn
@pytest.mark.parametrize("kernels", [EVERYTHING, NOTHING])
def test_attention_takes_the_faster_kernel_where_it_may(kernels, monkeypatch) -> None:
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return attention_products(*arguments)

    monkeypatch.setattr("hf_segvit.models.plain_vit_layers.attention_products", counted)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        monkeypatch.setattr(cpu_kernels, "KERNELS", NOTHING)
        expected = tiny_vit()(pixels).last_hidden_state
        monkeypatch.setattr(cpu_kernels, "KERNELS", kernels)
        answer = tiny_vit()(pixels).last_hidden_state
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
        answer = tiny_vit().bfloat16()(pixels.bfloat16()).last_hidden_state
        assert (answer.float() - expected).abs().max() < 0.1 * expected.abs().max()
        assert len(calls) == (6 if kernels is EVERYTHING else 0)  # one for each layer and type
        calls.clear()
        tiny_vit().half()(pixels.half())
        tiny_vit().bfloat16().train()(pixels.bfloat16())
    tiny_vit().bfloat16()(pixels.bfloat16()).last_hidden_state.sum().backward()  # needs gradients
    assert not calls


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kernels", [EVERYTHING, NOTHING])
def test_the_choice_of_a_kernel_breaks_no_graph(kernels, dtype, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", kernels)
    torch._dynamo.reset()
    model, pixels = tiny_vit().to(dtype), torch.randn(1, 3, 32, 32).to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # In half precision PyTorch 2.11 rounds some values elsewhere; those of a normed state are around 1.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.0, "atol": 0.05}
    torch.testing.assert_close(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state, **tolerance)


@needs_onednn
def test_an_exported_graph_holds_only_pytorchs_own_operators(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", EVERYTHING)
    with torch.no_grad():
        exported = torch.export.export(tiny_vit(), (torch.randn(1, 3, 32, 32),), strict=False)
    names = {str(node.target).partition(".")[0] for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten" in names
    assert not names & {"mkldnn", "hf_segvit"}


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("kernels", [EVERYTHING, NOTHING])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-6), (BF16, 1e-2)])
def test_mask_products_agree_with_the_formula_without_a_copy_of_the_features(
    dtype, tolerance, kernels, monkeypatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", kernels)
    queries, features = torch.randn(2, 7, 16).to(dtype), torch.randn(2, 8, 12, 16).to(dtype)
    expected = torch.einsum("bqd,bhwd->bqhw", queries.double(), features.double())
    answer = mask_logits(queries, features)
    assert answer.shape == (2, 7, 8, 12)
    torch.testing.assert_close(answer.double(), expected, rtol=tolerance, atol=tolerance * 5)
    # Handed on as a view where the features come first in the product.
    assert answer.is_contiguous() == (dtype == FP32)
