"""A recipe that trains in a second: a tiny EoMT on a few generated scenes, without trackers and images."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_segvit.training.checkpoints import Checkpoints
from hf_segvit.training.recipe import Recipe

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "num_queries": 7,
    "num_query_layers": 2,
    "train_num_points": 32,
}


def tiny_recipe(output: Path, **changes: Any) -> Recipe:
    """Six steps of four 64 x 64 images, of which there are seven, so that epochs end within a step."""
    fields: dict[str, Any] = {
        "data": "generated:easy?num_scenes=7&size=64",
        "train_split": "train",
        "val_data": "generated:easy?num_scenes=2&size=64",
        "val_split": "val",
        "model_config": MODEL,
        "image_size": 64,
        "augmentation": "eomt_coco_panoptic",
        "augmentation_options": {"scale_range": [0.8, 1.5]},
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": [1],
        "num_workers": 0,
        "evaluate_every": "end",
        "save_every_steps": min(2, changes.get("steps") or 2),
        "trackers": [],
        "draw": 0,
        "log_every": 1,
        "output": str(output),
    }
    return Recipe(**{**fields, **changes})


def saved_tensors(output: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by default of the last one: model, average, optimiser, random states."""
    checkpoints = Checkpoints(output / "checkpoints")
    folder = checkpoints.path(checkpoints.steps()[-1] if step is None else step)
    tensors = {f"model/{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    for kind in ("ema", "adapted"):
        if (folder / f"{kind}.safetensors").is_file():
            content = load_file(folder / f"{kind}.safetensors")
            tensors |= {f"{kind}/{name}": tensor for name, tensor in content.items()}
    for file in ("optimizer.pt", "random_states.pt"):
        content = torch.load(folder / file, weights_only=True)
        tensors |= {f"{file}{path}": tensor for path, tensor in _tensors(content, "")}
    return tensors


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, such as {different[:3]}"


def _tensors(value: Any, path: str):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensors(entry, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{path}/{index}")
    elif isinstance(value, int | float):
        yield path, torch.tensor(value, dtype=torch.float64)
