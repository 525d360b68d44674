"""Prepare the model for training: starting weights, class head, adapters.

- `pixel_settings`, `backbone_pixel_settings`: normalisation that the new image processor takes over.
- `load_changed`, `carry_over_classes`: a checkpoint with other settings or other classes.
- `build_trained_model`, `compile_blocks`, `checkpoint_blocks`, `WholeModel`: the model as the loop runs it.
- `add_adapters`, `merge_adapters`, `merged_weights`: LoRA (Hu et al., arXiv 2106.09685) by PEFT.

C classes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..conversion.backbones import image_normalization
from ..conversion.key_maps import PATCH_KERNEL, POSITION_TABLE, fit_to_size, for_channels
from ..inference.loading import out_of_file, quiet_transformers
from ..models.class_fusion import NO_MATCH
from ..models.label_spaces import are_unnamed, match_names
from ..models.modeling_plain_vit import PlainViTLayer
from .optimizers import BACKBONE, freeze, layer_of, parameter_role
from .recipe import LoraOptions
from .tasks import TrainingTask
from .training_state import is_sharded, whole

# Weights know pixels in this scaling, so training continues with it.
# Not the bands of files: these are the data's.
_PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "value_range")


def pixel_settings(processor: Any) -> dict[str, Any]:
    """Rescaling and normalisation of an image processor, by name of the setting."""
    return {name: getattr(processor, name) for name in _PIXEL_SETTINGS}


def channel_statistics(settings: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """`image_mean` and `image_std` for a model of so many channels; nothing where the settings have as many."""
    known = {}
    for name, default in (("image_mean", IMAGENET_DEFAULT_MEAN), ("image_std", IMAGENET_DEFAULT_STD)):
        value = settings.get(name) or default
        known[name] = [value] * channels if isinstance(value, int | float) else list(value)
    if len(known["image_mean"]) == channels:
        return {}
    # What further bands hold is unknown; the mean over the colours is as good for them as for grey images.
    return {name: (values + [sum(values) / len(values)] * channels)[:channels] for name, values in known.items()}


def backbone_pixel_settings(backbone: str) -> tuple[dict[str, Any], list[str]]:
    """`image_mean` and `image_std` of a backbone's pre-training; if unknown, no settings but a remark for the log."""
    try:
        mean, std = image_normalization(backbone)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return {}, [
            f"normalisation: that of {backbone} is unknown, so pixels are normalised by ImageNet's mean and "
            f"standard deviation; if it was pre-trained with others, put its preprocessor_config.json beside its "
            f"config.json ({reason})"
        ]
    return {"image_mean": mean, "image_std": std}, []


def load_changed(
    cls: Any, source: str, before: Any, class_head: str, fields: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """Load a checkpoint in float32 with other fields in its configuration, and remarks on weights that are new.

    Position embeddings and the patch kernel are resampled to another input or patch size.

    Args:
        source: folder or Hub id of the checkpoint.
        before: the checkpoint, loaded unchanged.
        class_head: prefix of the parameters that the caller fills.

    Raises:
        ValueError: the input size is not a multiple of the patch size.
    """
    with quiet_transformers():
        model, report = cls.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
        )
    # from_pretrained leaves tensors of another size at random values; these two can be resampled instead.
    weights = before.base_model.state_dict()
    size, patch_size = model.config.image_size, model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    old = {name: weights[name] for name in (PATCH_KERNEL, POSITION_TABLE) if name in weights}
    if PATCH_KERNEL in old:
        old[PATCH_KERNEL] = for_channels(old[PATCH_KERNEL], model.config.num_channels)
    fitted, _ = fit_to_size(old, before.config.grid_size, (height, width), patch_size)
    with torch.no_grad():
        for name, tensor in fitted.items():
            model.base_model.get_parameter(name).copy_(tensor)
    remarks = []
    if before.config.grid_size != model.config.grid_size and POSITION_TABLE in fitted:
        grids = ("{}x{}".format(*config.grid_size) for config in (before.config, model.config))
        remarks.append(f"position embeddings: resampled from {' to '.join(grids)} patches")
    if before.config.num_channels != model.config.num_channels:
        channels = f"{before.config.num_channels} to {model.config.num_channels}"
        remarks.append(f"patch kernel: from {channels} channels; new ones start as the mean of the others")
    resampled = [f"{model.base_model_prefix}.{name}" for name in fitted]
    for name, *shapes in sorted(map(tuple, report["mismatched_keys"])):
        if name not in resampled and not name.startswith(class_head):
            theirs, ours = ("x".join(map(str, shape)) for shape in shapes)
            remarks.append(f"{name}: new, as its size is {ours}, but {theirs} in the checkpoint")
    return model, remarks


def build_trained_model(task: TrainingTask) -> tuple[Any, Any]:
    """The model of a task, with frozen parts and adapters, and its image processor."""
    model, processor = task.build_model()
    out_of_file(model)
    freeze(model, task.recipe.freeze)
    if task.recipe.lora is not None:
        model = add_adapters(model, task.recipe.lora)
    return model, processor


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks in place: much quicker to compile than the whole model, and about as fast to run."""
    # Annealing stays outside of the blocks, so that its changes from step to step do not compile anything again.
    repeated = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in repeated:
            # Modules of a class share their graphs, and at a second size PyTorch compiles one graph for any size. Only
            # the blocks of the ViT want that, since queries and prompts change their length. The others depend on the
            # size of the image, and PyTorch 2.14 fails where that is dynamic: in the backward pass of resampled
            # positions and in the channels-last convolution of the scale layers, each of which has a size of its own.
            # Sizes beyond PyTorch's limit of eight graphs run uncompiled.
            module.compile(dynamic=None if isinstance(module, PlainViTLayer) else False)


def checkpoint_blocks(model: Any) -> None:
    """Recompute the activations of every block in the backward pass instead of storing them."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # Transformers' new name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class WholeModel:
    """Unsharded copy of a model for evaluation, in which processes do not run in step."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self._copy: Any = None  # built once, as evaluations recur

    def of(self, model: Any) -> Any:
        """The model itself, or a copy if it is sharded; gathering its weights needs a call by every process."""
        if not is_sharded(model):
            return model
        if self._copy is None:
            self._copy, _ = build_trained_model(self.task)
        self._copy.load_state_dict(whole(model.state_dict()))
        return self._copy


_SHOWN = 5  # class names in a message


def carry_over_classes(
    head: nn.Linear, before: nn.Linear, labels: Mapping[int, str], labels_before: Mapping[int, str]
) -> str | None:
    """Fill a class head in place: rows of classes that the checkpoint has are copied by name, the others are new.

    Args:
        head: (C, D), or (C + 1, D) with a last row for no object, which is always copied.
        before: the checkpoint's head, with a row for no object if `head` has one.
        labels: class name by label id of `head`, from 0.
        labels_before: the same of `before`.

    Returns:
        A remark on what is new or in doubt; `None` if the classes are the same, in any order.
    """
    rows = _rows_before(labels, labels_before)
    copied = [(row, source) for row, source in enumerate(rows) if source != NO_MATCH]
    extra = head.out_features - len(labels)
    copied += [(len(labels) + number, len(labels_before) + number) for number in range(extra)]
    # A new layer, for PyTorch's initial values: `head` may hold the checkpoint's rows of unrelated classes.
    fresh = nn.Linear(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        for ours, theirs in ((fresh.weight, before.weight), (fresh.bias, before.bias)):
            ours[[row for row, _ in copied]] = theirs[[source for _, source in copied]].to(ours)
        head.weight.copy_(fresh.weight)
        head.bias.copy_(fresh.bias)
    new = [labels[row] for row, source in enumerate(rows) if source == NO_MATCH]
    if new:
        shown = ", ".join(map(repr, new[:_SHOWN])) + (f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else "")
        return (
            f"class head: {len(labels) - len(new)} of {len(labels)} classes are carried over from the checkpoint by "
            f"name, {len(new)} are new ({shown})"
        )
    if are_unnamed(labels_before) and not are_unnamed(labels):
        return (
            f"class head: the checkpoint's {len(labels)} classes have no names and are taken in order, as those of "
            "the data; if they are others, set id2label in its config.json to their names"
        )
    return None


def _rows_before(labels: Mapping[int, str], labels_before: Mapping[int, str]) -> list[int]:
    """For each class its row in the checkpoint, or `NO_MATCH`."""
    # LABEL_0, ... match nothing by name; with as many classes, order is the best guess, and a remark says so.
    if are_unnamed(labels_before) and len(labels_before) == len(labels):
        return list(range(len(labels)))
    matches = match_names(labels, labels_before)
    return [matches.get(row, NO_MATCH) for row in range(len(labels))]


# Linear layers of a block, with either kind of MLP.
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


def add_adapters(model: nn.Module, settings: Mapping[str, Any]) -> Any:
    """Wrap a model in PEFT's, which adapts the ViT and freezes what it adapts; all other parts are trained in full.

    Args:
        settings: fields of `LoraOptions`.

    Raises:
        ValueError: PEFT is not installed, or the blocks have no layer of one of the `targets`.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError('lora needs PEFT, which is not installed; run pip install "hf-segvit[lora]"') from error
    values = asdict(LoraOptions(**settings))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if layer_of(name) not in (None, -1)]
    known = sorted({name.rpartition(".")[2] for name in layers})
    targets = list(values["targets"] or (name for name in TARGETS if name in known))
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise ValueError(
            f"lora.targets has {', '.join(unknown)}, which the blocks do not have; choose from {', '.join(known)}"
        )
    config = LoraConfig(
        r=values["rank"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        # By full name, as the heads have layers of the same names, which are trained in full.
        target_modules=[name for name in layers if name.rpartition(".")[2] in targets],
        modules_to_save=_trained_in_full(model),
    )
    return get_peft_model(model, config)


def merge_adapters(model: Any) -> Any:
    """An ordinary model, with the adapters added to its weights; a model without adapters is returned as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def merged_weights(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole state `weights` of a model with adapters as that of an ordinary model, for checkpoints in training."""
    config = model.peft_config["default"]
    scale = config.lora_alpha / config.r
    merged = {}
    for name, tensor in weights.items():
        layer, adapted, _ = name.partition(".base_layer.weight")
        if adapted:
            down, up = (weights[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            tensor = tensor + up @ down * scale  # W + (alpha / r) B A, section 4.1 of the paper
        # PEFT keeps an untrained copy of every module that is trained in full.
        if ".lora_" not in name and ".original_module." not in name:
            merged[_own_name(name)] = tensor
    return merged


def _trained_in_full(model: nn.Module) -> list[str]:
    """Full names of the outermost modules without a backbone parameter: PEFT takes modules, not parameters."""
    ours = [name.split(".") for name, _ in model.named_parameters() if parameter_role(name) != BACKBONE]
    backbone = [name.split(".") for name, _ in model.named_parameters() if parameter_role(name) == BACKBONE]
    around = {tuple(parts[:end]) for parts in backbone for end in range(len(parts))}  # modules around the backbone
    outermost = []
    for parts in ours:
        outside = [parts[:end] for end in range(1, len(parts)) if tuple(parts[:end]) not in around]
        if outside:
            outermost.append(".".join(outside[0]))
    return list(dict.fromkeys(outermost))


def _own_name(name: str) -> str:
    """The model's own name of a parameter, from PEFT's name."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
