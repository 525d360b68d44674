"""States of random number generators, models and optimisers, for saving and restoring.

Random numbers: `random_states` takes the states of Python's, NumPy's and PyTorch's generators, `restore_random_states`
puts them back, `unchanged_random_states` does both around a block, and `seed_everything` starts them.

Weights and optimiser: `collect_*` gather them, on one process or sharded by FSDP2, and `put_*` distribute them, also to
another number of processes. Weights are always collected as those of the whole model. An optimiser's state is keyed by
parameter index where nothing is sharded, else by parameter name; either can be put into either.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def save_plain(content: Any, path: Path) -> None:
    """`torch.save` of tensors and plain values."""
    # Through a file of Python's own, whose errors say why; PyTorch's only says that writing failed.
    with open(path, "wb") as file:
        torch.save(content, file)


def random_states() -> dict[str, Any]:
    """The generator states of this process, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)  # NumPy's annotation allows a dict, which legacy excludes
    name, keys, position, has_gauss, cached = numpy_state
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # do not start CUDA in a run on the CPU
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` returned; the state of a GPU is ignored where there is none."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Restore the states after the block, so that numbers drawn in it change nothing later."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


def seed_everything(*seeds: int) -> None:
    """Seed all generators from several numbers, such as seed, step and process."""
    # SeedSequence mixes them: sums or concatenations would give equal streams for different combinations.
    words = np.random.SeedSequence(seeds).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) % 2**63)


_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process alone
_HANDED_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a shard of the weights, as under FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def collect_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a prepared model; every process calls it, but if sharded only the first receives them."""
    if is_sharded(model):
        weights: Any = get_model_state_dict(model, options=_GATHERED)
        return weights
    return accelerator.get_state_dict(model)


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights, the same on all processes, into a model that may be sharded."""
    if is_sharded(model):
        set_model_state_dict(model, dict(weights), options=_HANDED_OUT)
    else:
        model.load_state_dict(weights)


def collect_optimizer(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any] | None:
    """The whole state of a prepared optimiser, as `collect_weights`; `None` under DeepSpeed."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return None  # it is tied to DeepSpeed's engine and the number of processes
    if is_sharded(model):
        return get_optimizer_state_dict(model, _innermost(optimizer), options=_GATHERED)
    return optimizer.state_dict()


def put_optimizer(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load a state from `collect_optimizer`, collected on any number of processes, for an unwrapped model."""
    by_name = all(isinstance(key, str) for group in state["param_groups"] for key in group["params"])
    named = state if by_name else _by_name(state)  # by the `names` in each of our groups
    if not is_sharded(model):
        optimizer.load_state_dict(_by_index(named, optimizer))
        return
    inner = _innermost(optimizer)
    # Rates and decay stay as in the recipe, which may have changed since the state was saved.
    settings = [{name: value for name, value in group.items() if name != "params"} for group in inner.param_groups]
    # A copy: PyTorch would make these very tensors the optimiser's own, and change them.
    set_optimizer_state_dict(model, inner, copy.deepcopy(dict(named)), options=_HANDED_OUT)
    for group, own in zip(inner.param_groups, settings, strict=True):
        group.update(own)


def optimizer_fault(state: Mapping[str, Any], optimizer: Any, weights: Mapping[str, Any], step: int) -> str | None:
    """Why a state from `collect_optimizer` cannot be that of this optimiser after `step` steps, if it cannot."""
    by_name = all(isinstance(key, str) for group in state["param_groups"] for key in group["params"])
    moments = (state if by_name else _by_name(state))["state"]
    names = {name for group in optimizer.param_groups for name in group["names"]}
    if unknown := moments.keys() - names:
        return f"is of other parameters, such as {min(unknown)!r}"
    if step and not moments:
        return "is empty"
    is_adam = isinstance(_innermost(optimizer), torch.optim.Adam | torch.optim.AdamW)
    needed = {"step", "exp_avg", "exp_avg_sq"} if is_adam else set()
    for name, values in moments.items():
        if not needed <= values.keys():
            return f"lacks {min(needed - values.keys())} of {name!r}"
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != weights[name].shape:
                return f"has {key} of shape {tuple(value.shape)} for {name!r}, which is {tuple(weights[name].shape)}"
            if key in needed and not isinstance(value, Tensor):
                return f"has no tensor for {key} of {name!r}"
    return None


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, with sharded ones gathered on every process; every process calls it."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Shard a tensor, the same on all processes, like `example`; unchanged if that is not sharded."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def _innermost(optimizer: Any) -> Any:
    """PyTorch's optimiser inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state keyed by parameter index to one keyed by name."""
    names = {
        index: name
        for group in state["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
    }
    groups = [{**group, "params": list(group["names"])} for group in state["param_groups"]]
    return {"state": {names[index]: moments for index, moments in state["state"].items()}, "param_groups": groups}


def _by_index(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Convert a state keyed by name to the parameter indices and groups of an optimiser."""
    own = optimizer.state_dict()["param_groups"]
    indices = {name: index for group in own for index, name in zip(group["params"], group["names"], strict=True)}
    # Parameters without elements are frozen in sharded models, as FSDP2 cannot exchange their gradients.
    moments = {indices[name]: values for name, values in state["state"].items() if name in indices}
    return {"state": moments, "param_groups": own}
