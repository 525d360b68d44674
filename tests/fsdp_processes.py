"""Training steps for test_fsdp.py, on one process or sharded over several; also what each of several processes runs.

`python -m tests.fsdp_processes FOLDER` writes, from the first process, the records of all cases and a checkpoint. Rank,
world size and address come from the environment. A case has four images: with two processes, two for each.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_segvit.models.configuration_vit_p import ViTPConfig
from hf_segvit.models.modeling_vit_p import ViTPForPointClassification
from hf_segvit.training.derivation import derive
from hf_segvit.training.optimizers import build_optimizer
from hf_segvit.training.recipe import Recipe
from hf_segvit.training.start import checkpoint_blocks
from tests.sharding import load_whole_state, shard_model, whole_state

from .tiny_models import DINOV3, randomize, tiny_eomt
from .trainer_processes import same_points

NUM_IMAGES = 4
# Objects, or labelled prompts, of each image.
COUNTS = {"few and many": [1, 1, 12, 8], "none on one process": [3, 2, 0, 0]}
# Masked attention in each step: on, on for one layer, off.
PROBABILITIES = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
MAX_GRAD_NORM = 0.5  # below the norms that occur, so that gradients are scaled
MASKED = {"masked_attention_probabilities": [1.0, 1.0]}
# What must leave no parameter without gradient: fields of the configuration.
DDP_CASES: dict[str, dict[str, Any]] = {
    "masked": MASKED,
    "annealing": {"masked_attention_probabilities": [0.5, 0.5]},
    "annealed": {"masked_attention_probabilities": [0.0, 0.0]},
    "never masked": {"masked_attention": False},
    "dinov3": {**DINOV3, **MASKED, "num_register_tokens": 2},
    "giant": {**MASKED, "mlp_type": "swiglu", "num_register_tokens": 0},
}
Loss = Callable[[nn.Module, int, int], Tensor]


def eomt(**fields: Any) -> nn.Module:
    model = tiny_eomt(num_queries=22, **fields).train()
    model.criterion.point_sampler = same_points
    return model


def vit_p() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTPConfig(
        **sizes, image_size=32, patch_size=16, num_labels=5, embedding_norm=True, prompt_attention="isolated"
    )
    return randomize(ViTPForPointClassification(config)).train()


def eomt_loss(counts: list[int]) -> Loss:
    """Loss of the images of a process, for any number of them."""

    def loss(model: nn.Module, rank: int, world_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(NUM_IMAGES, 3, 64, 64, generator=generator)
        masks = [torch.rand(count, 64, 64, generator=generator) > 0.7 for count in counts]
        labels = [torch.randint(5, (count,), generator=generator) for count in counts]
        mine = share(rank, world_size)
        return model(pixels[mine], mask_labels=masks[mine], class_labels=labels[mine]).loss

    return loss


def vit_p_loss(counts: list[int]) -> Loss:
    """The same for labelled prompts, of which there are 12 for each image."""

    def loss(model: nn.Module, rank: int, world_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(NUM_IMAGES, 3, 32, 32, generator=generator)
        prompts = torch.rand(NUM_IMAGES, 12, 4, generator=generator)
        labels = torch.randint(5, (NUM_IMAGES, 12), generator=generator)
        for image, count in enumerate(counts):
            labels[image, count:] = -100
        mine = share(rank, world_size)
        normalizer = sum(counts) / world_size
        return model(pixels[mine], prompts[mine], labels=labels[mine], loss_normalizer=normalizer).loss

    return loss


def share(rank: int, world_size: int) -> slice:
    size = NUM_IMAGES // world_size
    return slice(rank * size, (rank + 1) * size)


def optimizer_of(model: nn.Module) -> Optimizer:
    kind = "eomt" if hasattr(model, "eomt") else "vit_p"
    recipe = Recipe(
        model=kind, task="panoptic" if kind == "eomt" else "points", steps=100, weight_decay_mode="matrices"
    )
    return build_optimizer(model, derive(recipe, NUM_IMAGES, config=model.config))


def steps(model: nn.Module, optimizer: Optimizer, loss_of: Loss, settings: list[list[float]]) -> dict[str, Tensor]:
    """Losses over all processes, gradients of the first step, and their norms before clipping."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    record: dict[str, Tensor] = {}
    losses, norms = [], []
    for probabilities in settings:
        if hasattr(model, "set_masked_attention_probabilities"):
            model.set_masked_attention_probabilities(probabilities)
        loss = loss_of(model, rank, world_size)
        loss.backward()
        if not losses:
            record |= {f"gradient/{name}": whole(gradient) for name, gradient in gradients(model).items()}
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world_size
        if world_size > 1:
            dist.all_reduce(mean)
        losses.append(mean)
    return {**record, "losses": torch.stack(losses), "norms": torch.stack(norms)}


def final_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and moments after the steps; empty on all processes but the first."""
    weights, state = whole_state(model, optimizer)
    record = {f"weight/{name}": tensor for name, tensor in weights.items()}
    for name, moments in state.get("state", {}).items():
        if moments["exp_avg"].numel():
            record[f"moment/{name}"] = moments["exp_avg"]
    return record


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters but empty ones, such as the registers of a model without."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def sharded_record(model: nn.Module, loss_of: Loss) -> tuple[dict[str, Tensor], nn.Module, Optimizer]:
    model = shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    largest = model.get_input_embeddings().projection.weight
    assert largest.to_local().numel() == largest.numel() // dist.get_world_size()
    optimizer = optimizer_of(model)
    record = steps(model, optimizer, loss_of, PROBABILITIES)
    return {**record, **final_state(model, optimizer)}, model, optimizer


def check_that_it_goes_on(model: nn.Module, optimizer: Optimizer, loss_of: Loss, folder: Path) -> None:
    """Save, put the states into a new sharded model, and compare the next steps with those of the old one."""
    weights, state = whole_state(model, optimizer)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "checkpoint", state_dict=dict(weights))  # which it empties
    resumed = shard_model(randomize(eomt(), seed=9))
    resumed_optimizer = optimizer_of(resumed)
    load_whole_state(resumed, resumed_optimizer, weights, state)
    for one, other in ((model, optimizer), (resumed, resumed_optimizer)):
        steps(one, other, loss_of, PROBABILITIES[1:])
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local()), name


def ddp_gradients(model: nn.Module, loss_of: Loss) -> dict[str, Tensor]:
    """Gradients of the second of two passes: it raises where the first left a parameter out."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):
        model.zero_grad()
        loss_of(wrapped, dist.get_rank(), dist.get_world_size()).backward()
    return gradients(model)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    records: dict[str, dict[str, Tensor]] = {}
    for case, counts in COUNTS.items():
        records[f"eomt, {case}"], model, optimizer = sharded_record(eomt(), eomt_loss(counts))
        records[f"vit_p, {case}"], _, _ = sharded_record(vit_p(), vit_p_loss(counts))
        records[f"ddp vit_p, {case}"] = ddp_gradients(vit_p(), vit_p_loss(counts))
    check_that_it_goes_on(model, optimizer, eomt_loss(counts), folder)
    for case, fields in DDP_CASES.items():
        records[f"ddp eomt, {case}"] = ddp_gradients(eomt(**fields), eomt_loss(COUNTS["none on one process"]))
    checkpointed = eomt(**MASKED)
    checkpoint_blocks(checkpointed)
    records["ddp eomt, checkpointed"] = ddp_gradients(checkpointed, eomt_loss(COUNTS["few and many"]))
    if dist.get_rank() == 0:
        tensors = {f"{case}|{name}": value for case, record in records.items() for name, value in record.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "records.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
