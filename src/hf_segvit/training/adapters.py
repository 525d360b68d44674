"""LoRA: training low-rank adapters in the backbone in place of its weights, by PEFT.

`add_adapters` puts them onto the attention and MLP projections of the ViT; whatever is not the backbone (queries, mask
head, upscaling, class head) is trained in full. `merge_adapters` computes them into the weights afterwards: what is
saved or pushed then is an ordinary model, which loads without PEFT and runs as fast as before. `merged_weights` does
the same to a copy of the weights, for checkpoints in the middle of training. PEFT's own
`save_pretrained` writes the adapters alone, which `load_adapters` puts back onto their base model.

Source: Hu et al., arXiv 2106.09685. Needs PEFT: `pip install "hf-segvit[lora]"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .parameter_groups import BACKBONE, layer_of, parameter_role

DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": None}
# Linear layers of a block, of both kinds of MLP.
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


def add_adapters(model: nn.Module, settings: Mapping[str, Any]) -> Any:
    """Put adapters onto a model, and freeze what they adapt.

    Args:
        model: one of ours, changed in place.
        settings: `rank`, `alpha` (the adapters' share is alpha / rank), `dropout` before the adapters, and `targets`,
            names of linear layers in the blocks; by default all of them.

    Returns:
        PEFT's model around it: `forward`, `config` and the methods of the model work through it.

    Raises:
        ValueError: PEFT is not installed, or the blocks have no layer of one of these names.
    """
    LoraConfig, get_peft_model, _ = _peft()
    values = {**DEFAULTS, **settings}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_of(name) not in (None, -1)
    ]
    found = sorted({name.rpartition(".")[2] for name in layers})
    targets = list(values["targets"] or (name for name in TARGETS if name in found))
    strangers = [name for name in targets if name not in found]
    if strangers:
        raise ValueError(
            f"lora.targets has {', '.join(strangers)}, which the blocks do not have; choose from {', '.join(found)}"
        )
    config = LoraConfig(
        r=values["rank"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        # By full name: the heads have layers of the same names, and they are trained in full.
        target_modules=[name for name in layers if name.rpartition(".")[2] in targets],
        modules_to_save=_trained_in_full(model),
    )
    return get_peft_model(model, config)


def merge_adapters(model: Any) -> Any:
    """The model itself, with adapters computed into its weights; a model without adapters comes back as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def merged_weights(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with adapters as those of the model itself, by its own names; the model stays as it is.

    Args:
        model: what `add_adapters` returned.
        weights: its whole state, on any device.
    """
    config = model.peft_config["default"]
    scale = config.lora_alpha / config.r
    merged = {}
    for name, tensor in weights.items():
        layer, adapted, _ = name.partition(".base_layer.weight")
        if adapted:
            down, up = (weights[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            tensor = tensor + up @ down * scale
        if ".lora_" not in name and ".original_module." not in name:
            merged[_own_name(name)] = tensor
    return merged


def load_adapters(model: nn.Module, folder: str | Path) -> Any:
    """Adapters that PEFT saved, on their base model.

    Args:
        model: as `add_adapters` got it.
        folder: what `save_pretrained` of its result wrote.

    Raises:
        ValueError: PEFT is not installed.
    """
    _, _, PeftModel = _peft()
    return PeftModel.from_pretrained(model, str(folder))


def _trained_in_full(model: nn.Module) -> list[str]:
    """The outermost modules that hold no parameter of the backbone, by full name; PEFT takes modules only."""
    ours = [name.split(".") for name, _ in model.named_parameters() if parameter_role(name) != BACKBONE]
    backbone = [name.split(".") for name, _ in model.named_parameters() if parameter_role(name) == BACKBONE]
    shared = {tuple(parts[:end]) for parts in backbone for end in range(len(parts))}  # modules around the backbone
    whole = []
    for parts in ours:
        outside = [parts[:end] for end in range(1, len(parts)) if tuple(parts[:end]) not in shared]
        if outside:
            whole.append(".".join(outside[0]))
    return list(dict.fromkeys(whole))


def _own_name(name: str) -> str:
    """Name of a parameter in the model itself, from that in PEFT's model around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _peft() -> tuple[Any, Any, Any]:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ValueError('lora needs PEFT, which is not installed; run pip install "hf-segvit[lora]"') from error
    return LoraConfig, get_peft_model, PeftModel
