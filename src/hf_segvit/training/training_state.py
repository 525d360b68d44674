"""The states of all generators of random numbers that training may use: Python's, NumPy's and PyTorch's.

`random_states` takes them, `restore_random_states` puts them back, `unchanged_random_states` keeps what happens in
between from mattering, and `seed_everything` starts them.

States of model and optimiser however they are spread: whole on one process, sharded by FSDP2, or DeepSpeed's.

`collect_weights` and `collect_optimizer` gather them, `put_weights` and `put_optimizer` hand them out again, also to
another number of processes. Weights are always those of one process. An optimiser's state is PyTorch's own, by the
numbers of parameters, where nothing is sharded, and by their names where something is; either goes into either.
DeepSpeed's optimiser belongs to its engine and to this number of processes, so that it is not collected.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def random_states() -> dict[str, Any]:
    """The states of this process, as tensors and plain numbers that `torch.load(weights_only=True)` can read."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = _numpy_state()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` took. A GPU's state is left out where there is no GPU."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _numpy_state() -> Any:
    return np.random.get_state(legacy=True)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Whatever the block draws, the numbers after it are those that would have come without it."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


def seed_everything(*seeds: int) -> None:
    """Start all generators from numbers of which each makes a difference, such as seed, step and process."""
    words = np.random.SeedSequence(seeds).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) % 2**63)


_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process alone
_HANDED_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only its part of the weights, as under FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def collect_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a prepared model; every process calls it, and where they are sharded the first alone gets them."""
    if is_sharded(model):
        weights: Any = get_model_state_dict(model, options=_GATHERED)
        return weights
    return accelerator.get_state_dict(model)


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights, the same on all processes, into a model.

    Raises:
        RuntimeError: names or shapes differ.
    """
    if is_sharded(model):
        set_model_state_dict(model, dict(weights), options=_HANDED_OUT)
    else:
        model.load_state_dict(weights)


def collect_optimizer(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any] | None:
    """The state of a prepared optimiser, as `collect_weights`; `None` where it cannot be had, as under DeepSpeed."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return None
    if is_sharded(model):
        return get_optimizer_state_dict(model, _innermost(optimizer), options=_GATHERED)
    return optimizer.state_dict()


def put_optimizer(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Put a state that `collect_optimizer` returned, on any number of processes, into an optimiser.

    The optimiser keeps the settings of its groups, such as rates and decay: these are the recipe's, not the state's.

    Args:
        model: unwrapped; sharded or not.
        optimizer: of its parameters, each group with their `names`.
        state: the same on all processes.
    """
    by_name = all(isinstance(key, str) for group in state["param_groups"] for key in group["params"])
    named = state if by_name else _by_name(state)
    if not is_sharded(model):
        optimizer.load_state_dict(_by_number(named, optimizer))
        return
    inner = _innermost(optimizer)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in inner.param_groups]
    # A copy, as PyTorch would make these tensors the optimiser's own.
    set_optimizer_state_dict(model, inner, copy.deepcopy(dict(named)), options=_HANDED_OUT)
    for group, own in zip(inner.param_groups, settings, strict=True):
        group.update(own)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, those that are sharded put together on every process; all have to call."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded as the example is."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def _innermost(optimizer: Any) -> Any:
    """PyTorch's optimiser within Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by numbers of parameters as one by their names, which the groups list in the same order."""
    names = {
        number: name
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["names"], strict=True)
    }
    groups = [{**group, "params": list(group["names"])} for group in state["param_groups"]]
    return {"state": {names[number]: moments for number, moments in state["state"].items()}, "param_groups": groups}


def _by_number(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The moments of a state by names in one by the optimiser's own numbers, with its own groups."""
    own = optimizer.state_dict()["param_groups"]
    numbers = {name: number for group in own for number, name in zip(group["params"], group["names"], strict=True)}
    # Parameters without elements are in no group of a sharded model, see sharding.py.
    moments = {numbers[name]: values for name, values in state["state"].items() if name in numbers}
    return {"state": moments, "param_groups": own}
