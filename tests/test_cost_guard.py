"""What inference costs, counted instead of timed: multiply-adds, large tensors, waits for the device, graph breaks.

The numbers are exact and the same on every machine, so a regression shows without a clock. Whoever makes the model
cheaper lowers them here; a number that has to rise needs a reason. A ViT-S at 640 pixels runs on fake tensors, which
have shapes but no memory.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_segvit.models import cpu_kernels, plain_vit_layers
from hf_segvit.models.configuration_eomt import EoMTConfig
from hf_segvit.models.cpu_kernels import CPUKernels
from hf_segvit.models.image_processing_eomt import EoMTImageProcessor
from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel

from .tiny_models import tiny_eomt

FP32, BF16 = torch.float32, torch.bfloat16
LARGE = 2**20  # bytes of a tensor that counts
PLAIN = CPUKernels()
PRODUCTS = CPUKernels(attention=frozenset({BF16}))
ONEDNN = CPUKernels(linear=frozenset({FP32, BF16}))
VIT_S = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 640,
    "patch_size": 16,
    "num_queries": 200,
    "num_query_layers": 3,
    "num_labels": 133,
}
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select")


class Allocations(TorchDispatchMode):
    """Counts new tensors above a size, and operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        result = func(*args, **kwargs)
        self.operators[func.overloadpacket.__name__] += 1
        for each in tree_leaves(result):
            if torch.is_tensor(each) and each.untyped_storage()._cdata not in given:
                size = each.untyped_storage().nbytes()
                self.count += size > LARGE
                self.bytes += size if size > LARGE else 0
        return result


# PyTorch's own counter leaves these operators out, and hands over shapes.
def linear_flops(inputs: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(inputs) * weight[0]


def attention_flops(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(query) * key[2]


@torch.no_grad()
def cost(dtype: torch.dtype, kernels: CPUKernels, switches: dict[str, Any] | None, monkeypatch: Any) -> tuple:
    """Multiply-adds in millions, large tensors and their MiB, of an annealed ViT-S at 640 pixels."""
    monkeypatch.setattr(cpu_kernels, "KERNELS", kernels)
    monkeypatch.setattr(EoMTForUniversalSegmentation, "init_weights", lambda self: None)  # needs memory
    monkeypatch.setattr(EoMTModel, "init_weights", lambda self: None)
    for module in (cpu_kernels, plain_vit_layers):  # fake tensors are a class of their own
        monkeypatch.setattr(module, "is_plain", lambda weight: True)
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    if kernels is ONEDNN:
        formulas[torch.ops.mkldnn._linear_pointwise] = linear_flops
    with FakeTensorMode():
        torch.set_default_dtype(dtype)  # fake parameters cannot change theirs
        try:
            model = EoMTForUniversalSegmentation(EoMTConfig(**VIT_S, masked_attention=False)).eval()
        finally:
            torch.set_default_dtype(FP32)
        prune = switches is not None and switches.pop("prune_masks", False)
        if switches is not None:
            model.optimize_for_inference(**switches)
        pixels = torch.zeros(1, 3, 640, 640, dtype=dtype)
        with FlopCounterMode(display=False, custom_mapping=formulas) as flops, Allocations() as allocations:
            if prune:  # the choice of queries needs data; what is left out before it does not
                model.eomt(pixels, decode_masks=False)
            else:
                model(pixels)
    assert not any(allocations.operators[name] for name in WAITS)
    return round(flops.get_total_flops() / 2e6), allocations.count, round(allocations.bytes / 2**20)


@pytest.mark.parametrize(
    ("dtype", "kernels", "switches", "expected"),
    [
        pytest.param(FP32, PLAIN, None, (67820, 158, 743), id="fp32"),
        pytest.param(BF16, PLAIN, None, (67820, 158, 372), id="bf16"),
        pytest.param(BF16, PRODUCTS, None, (67820, 374, 1182), id="bf16-products"),
        pytest.param(FP32, PLAIN, {"fuse_qkv": True}, (67820, 134, 743), id="fp32-fused"),
        pytest.param(FP32, PLAIN, {"prune_masks": True}, (65843, 157, 723), id="fp32-before-masks"),
        pytest.param(FP32, ONEDNN, None, (67820, 147, 646), id="fp32-onednn"),
    ],
)
def test_a_forward_pass_costs_what_it_did(dtype, kernels, switches, expected, monkeypatch) -> None:
    if kernels is ONEDNN and not cpu_kernels.processor_features().onednn:
        pytest.skip("PyTorch without oneDNN")
    assert cost(dtype, kernels, switches and dict(switches), monkeypatch) == expected


@torch.no_grad()
def test_pruned_masks_cost_one_wait_and_their_own_multiply_adds(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KERNELS", PLAIN)
    model, pixels = tiny_eomt(num_queries=20, masked_attention=False), torch.zeros(2, 3, 64, 64)
    costs = {}
    for threshold in (None, 0.0, 1.0):
        with FlopCounterMode(display=False) as flops, Allocations() as operators:
            model(pixels, task="instance", pruning_threshold=threshold)
        waits = sum(operators.operators[name] for name in WAITS)
        costs[threshold] = (flops.get_total_flops(), waits)
    # Masks of 16 x 16 cells, 32 channels: 20 of each image, or 1.
    assert costs[0.0][0] == costs[None][0]
    assert costs[None][0] - costs[1.0][0] == 2 * 2 * 19 * 16 * 16 * 32
    assert [costs[threshold][1] for threshold in (None, 0.0, 1.0)] == [0, 1, 1]


def test_an_image_is_prepared_with_one_large_tensor() -> None:
    processor = EoMTImageProcessor(size={"height": 640, "width": 640})
    with Allocations() as allocations:
        pixels = processor(Image.new("RGB", (1200, 900)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 640, 640)
    # The batch in fp32 alone: the image is resized in 8 bits, below the size that counts, and normalised in place.
    assert (allocations.count, allocations.bytes) == (1, 3 * 640 * 640 * 4)


@pytest.mark.parametrize("pruned", [False, True])
@torch.no_grad()
def test_the_model_is_one_graph(pruned) -> None:
    torch._dynamo.reset()
    model = tiny_eomt(num_hidden_layers=2, num_query_layers=1, masked_attention=False)
    forward = (lambda pixels: model.eomt(pixels, decode_masks=False).mask_features) if pruned else model
    explained = torch._dynamo.explain(forward)(torch.zeros(1, 3, 64, 64))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def kept_in_training(model: torch.nn.Module, pixels: torch.Tensor) -> int:
    """Bytes that the backward pass of the model up to its masks needs, besides its parameters."""
    own, storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, or its place would be taken by another
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(pixels)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kernels", [PLAIN, ONEDNN], ids=["plain", "oneDNN"])
def test_training_keeps_the_widest_activation_of_each_block_once(kernels, monkeypatch) -> None:
    if kernels is ONEDNN and not cpu_kernels.processor_features().onednn:
        pytest.skip("needs oneDNN's linear layers")
    monkeypatch.setattr(cpu_kernels, "KERNELS", kernels)
    settings = {"num_hidden_layers": 3, "num_query_layers": 1, "num_queries": 5, "intermediate_size": 160}
    model, pixels = tiny_eomt(**settings).train(), torch.ones(2, 3, 64, 64)
    config, once = model.config, kept_in_training(model.eomt, pixels)
    monkeypatch.setattr(cpu_kernels, "_is_trained", lambda *_: False)
    patches = (64 // config.patch_size) ** 2 + 1 + config.num_register_tokens
    tokens = config.num_hidden_layers * patches + config.num_query_layers * config.num_queries
    assert kept_in_training(model.eomt, pixels) - once == 2 * tokens * config.intermediate_size * 4


def test_what_a_training_step_keeps_under_autocast(monkeypatch) -> None:
    # Of a block, with T tokens of D channels: the residual stream before each norm in single precision; in half the
    # output of each norm, query, key, value and what attention makes of them, both branches before their scale, and
    # four times as much before the GELU. Whatever else is kept does not grow with the number of blocks.
    torch.manual_seed(0)
    bytes_of = []
    for depth in (2, 3):
        model = tiny_eomt(num_hidden_layers=depth, num_query_layers=1, num_queries=5, masked_attention=False).train()
        monkeypatch.setattr(plain_vit_layers, "joins_projections", lambda _: True)  # as on an accelerator
        with torch.autocast("cpu", BF16):
            bytes_of.append(kept_in_training(model.eomt, torch.ones(2, 3, 64, 64)))
    config = model.config
    tokens = 2 * (16 + 1 + config.num_register_tokens)
    weights = (4 * config.hidden_size + 2 * config.intermediate_size) * config.hidden_size + config.intermediate_size
    statistics = 2 * 2 + config.num_attention_heads  # of the norms and the softmax
    single, half = 2 * config.hidden_size + statistics, 8 * config.hidden_size + config.intermediate_size
    assert bytes_of[1] - bytes_of[0] == tokens * (4 * single + 2 * half) + 2 * weights
