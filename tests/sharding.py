"""FSDP2 for our models: `shard_model` deals the weights out to the processes, `whole_state` collects them again.

`accelerate launch` with training/accelerate/fsdp2.yaml shards in the same way by itself, on GPUs; these functions are
for loops of one's own, and for processes on CPUs, where Accelerate leaves FSDP out. A sharded model is called as
before; its parameters are `DTensor`s, and an optimiser is made after sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed import is_initialized
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from hf_segvit.models.modeling_plain_vit import PlainViTLayer

# What is called beside `forward`, and needs whole weights as well.
_OTHER_METHODS = ("encode_image", "classify_prompts")


def shard_model(model: nn.Module, mesh: DeviceMesh | None = None, reshard_after_forward: bool = True) -> nn.Module:
    """Shard a model in place: each block on its own, then embeddings, queries, heads and upscaling with the model.

    The model is the unit for all that is no block, since EoMT reads its queries, and ViT-P the norm of its embeddings,
    from outside the modules that own them.

    Args:
        model: an EoMT or ViT-P, with the same weights on all processes; on the mesh's device.
        mesh: the processes; by default all of them.
        reshard_after_forward: gather a block's weights again for its backward pass instead of keeping them.

    Returns:
        The model.

    Raises:
        ValueError: there is no block to shard.
    """
    blocks = [module for module in model.modules() if isinstance(module, PlainViTLayer)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no block of a plain ViT to shard; give an EoMT or a ViT-P")
    for parameter in model.parameters():
        if parameter.numel() == 0:  # such as the registers of a ViT without; FSDP2 cannot exchange its gradient
            parameter.requires_grad_(False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for name in _OTHER_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def whole_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of a sharded model and its optimiser as one process would have them; all processes have to call.

    Returns:
        Plain tensors on the CPU by parameter name, for `model.save_pretrained(folder, state_dict=...)`, which empties
        the dict, and the optimiser's state, also by parameter name. Both are empty on all processes but the first; on
        one process alone they are not copies.
    """
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state(
    model: nn.Module, optimizer: Optimizer, model_state: Mapping[str, Any], optimizer_state: Mapping[str, Any]
) -> None:
    """Put what `whole_state` returned into a model and its optimiser, sharded over any number of processes.

    Args:
        model: sharded or not.
        optimizer: of its parameters, in the same groups.
        model_state: needed on the first process only, which sends it to the others.
        optimizer_state: the same.

    Raises:
        RuntimeError: names or shapes differ.
    """
    # One after the other: `set_state_dict` would leave the model out where its state is empty, on all but one process.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_initialized())
    set_model_state_dict(model, dict(model_state), options=options)
    # A copy, as PyTorch makes the tensors that are given the optimiser's own, and would share them with a second one.
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(dict(optimizer_state)), options=options)
