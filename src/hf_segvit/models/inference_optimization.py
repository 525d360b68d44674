"""Optimise a model for inference: fused projections, pruned masks, compilation.

The methods `optimize_for_inference` of the models take their switches from here. None of them changes a checkpoint:
`save_pretrained` writes the same file afterwards, and none but bf16's rounding changes an answer.

Shapes: B batch, Q queries, K kept queries, C classes without no-object (which is index C).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .cpu_kernels import KERNELS
from .plain_vit_layers import PlainViTAttention
from .published_labels import TASKS

logger = logging.get_logger(__name__)

_ROUNDING = 1e-5  # exceeds the error of a float32 probability


def refuse_masked_attention(config: Any) -> None:
    """Refuse a model whose inference still confines queries to their masks."""
    masked = [value for value in config.masked_attention_probabilities or [] if value >= 0.5]
    if config.masked_attention and masked:
        raise ValueError(
            f"the model still masks attention in {len(masked)} of its {config.num_query_layers} query layers "
            f"(masked_attention_probabilities={config.masked_attention_probabilities}), which takes a prediction "
            "before each of them; anneal the masks by training to the end, or, if its answers without masks will do, "
            "call model.set_masked_attention_probabilities(0) first"
        )


def fuse_projections(model: nn.Module, fuse: bool | None) -> bool:
    """Fuse or separate queries, keys and values of all blocks; `None` fuses where that is faster. Says if it fused."""
    if fuse is None:
        weight = next(model.parameters())
        # On a CPU three products in fp32 are as fast as one, and each of them is the better use of the cache.
        fuse = weight.device.type != "cpu" or weight.dtype in KERNELS.linear - {torch.float32}
    for module in model.modules():
        if isinstance(module, PlainViTAttention):
            module.set_fused(fuse)
    return fuse


def set_channels_last(model: nn.Module, channels_last: bool | None) -> bool:
    """Lay out the kernels of convolutions channels-last; `None` does so on accelerators. Says if it did."""
    if channels_last is None:
        channels_last = next(model.parameters()).device.type != "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return channels_last


def compile_module(module: nn.Module, compile: bool | None, cuda_graphs: bool | None) -> bool:
    """Compile the forward pass of a module in place; `None` compiles on CUDA, with CUDA graphs. Says if it did.

    Raises:
        ValueError: this machine has no compiler, or CUDA graphs were asked for without CUDA or without `compile`.
    """
    device = next(module.parameters()).device
    on_cuda = device.type == "cuda"
    wanted = on_cuda if compile is None else compile
    if cuda_graphs and not (on_cuda and wanted):
        raise ValueError(
            f"cuda_graphs=True needs a model on a CUDA device and compile=True, but the model is on {device} and "
            f"compile={compile}; leave it out"
        )
    module._compiled_call_impl = None
    if not wanted:
        return False
    problem = compiler_problem(device)
    if problem is not None:
        if compile:
            raise ValueError(f"compile=True: {problem}, or leave compile out")
        logger.warning(f"the model runs uncompiled, which is slower: {problem}")
        return False
    module.compile(fullgraph=True, mode="reduce-overhead" if on_cuda and cuda_graphs is not False else None)
    return True


def compiler_problem(device: torch.device) -> str | None:
    """What `torch.compile` lacks on this machine, with the remedy; `None` if nothing."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed; run `pip install triton`"
    named = os.environ.get("CXX")
    # Without CXX, PyTorch tries this one only; Triton, which compiles for CUDA, has more of them.
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    others = [name for name in ("g++", "clang++", "c++", "cl") if name != usual and shutil.which(name)]
    compiler = named or (others[0] if others and device.type == "cuda" and not shutil.which(usual) else usual)
    needed = "torch.compile needs a C++ compiler, and"
    if not shutil.which(compiler):
        if named:
            return f"{needed} CXX={named}, which is not there; install one, such as g++, or name its path alone"
        if others:
            return f"{needed} {usual} is not on PATH; install it, or set the environment variable CXX={others[0]}"
        return f"{needed} none is on PATH; install one, such as g++"
    # The compiler of Windows has no such option.
    if sys.platform != "win32" and subprocess.run([compiler, "--version"], capture_output=True).returncode:
        return f"{needed} `{compiler} --version` fails; repair it, or name another in the environment variable CXX"
    headers = sysconfig.get_path("include")
    if device.type == "cpu" and sys.platform == "linux" and not os.path.exists(os.path.join(headers, "Python.h")):
        return f"torch.compile needs Python's headers, and {headers} has no Python.h; install them, such as python3-dev"
    return None


def queries_to_decode(class_logits: Tensor, task: str, threshold: float) -> Tensor:
    """The (B, K) indices, rising, of queries whose class score may pass; where images differ in number, also others.

    Args:
        class_logits: (B, Q, C + 1), no-object last.
        task: of the post-processing that follows, `"panoptic"` or `"instance"`; for `"semantic"` all queries count.
        threshold: its score threshold, or a lower one.

    Raises:
        ValueError: there is no such task, or the threshold is not a number, so nobody knows what may pass.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}; it is one of {', '.join(map(repr, TASKS))}")
    if threshold != threshold:
        raise ValueError(f"pruning_threshold={threshold} is not a number; give the threshold of the post-processing")
    if task == "semantic":
        return torch.arange(class_logits.shape[1], device=class_logits.device).expand(class_logits.shape[:2])
    # The rules of post-processing, which are applied again there: rounding may only let more pass here.
    probabilities = class_logits.detach().float().softmax(-1)
    best, no_object = probabilities[..., :-1].amax(-1), probabilities[..., -1]
    passing = best >= threshold - _ROUNDING
    if task == "panoptic":
        passing &= best >= no_object - _ROUNDING
    # The one synchronisation. At least one query, so that no tensor is empty.
    count = max(1, int(passing.sum(1).max()))
    return (~passing).to(torch.uint8).argsort(dim=1, stable=True)[:, :count].sort(1).values


def take_queries(values: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, K) of values (B, Q, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], indices]
