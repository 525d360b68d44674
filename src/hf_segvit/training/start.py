"""The model as training starts with it: built by its task, from another checkpoint perhaps, with adapters perhaps.

- `load_changed` reads a checkpoint with other settings: what has another size is resampled, or said to be new; and
  `carry_over_classes` fills its class head for other classes, by their names as in models/label_spaces.py. Order
  decides only for a checkpoint whose classes nobody named (`LABEL_0`, ...) and that has as many.
- `pixel_settings` and `backbone_pixel_settings` are what the new image processor takes over: pixels stay as the
  starting weights know them.
- `build_trained_model` has the model built by its task and adds frozen parts and adapters; `compile_blocks` and
  `checkpoint_blocks` change how its blocks run; `WholeModel` is the same model for one process where the trained one is
  sharded over several.
- `add_adapters` trains low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) in the attention and MLP projections of
  the ViT by PEFT; what is not the backbone is trained in full. `merge_adapters` computes them into the weights, so that
  what is saved or pushed is an ordinary model; `merged_weights` does so to a copy, for checkpoints in the middle of
  training.

h w patches along the sides of an image, C classes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.backbones import image_normalization
from ..conversion.key_maps import PATCH_KERNEL, POSITION_TABLE, fit_to_size
from ..inference.loading import quiet_transformers
from ..models.class_fusion import NO_MATCH
from ..models.label_spaces import are_unnamed, match_names
from ..models.modeling_plain_vit import PlainViTLayer
from .optimizers import BACKBONE, freeze, layer_of, parameter_role
from .recipe import LoraOptions
from .tasks import TrainingTask
from .training_state import is_sharded, whole

_PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def pixel_settings(processor: Any) -> dict[str, Any]:
    """The settings of an image processor that say what becomes of a pixel's values, by name."""
    return {name: getattr(processor, name) for name in _PIXEL_SETTINGS}


def backbone_pixel_settings(backbone: str) -> tuple[dict[str, Any], list[str]]:
    """`image_mean` and `image_std` for an image processor, as a backbone was pre-trained.

    Args:
        backbone: a name or folder, as `from_backbone` takes it.

    Returns:
        The settings, and lines for people; where the backbone does not say, no settings and a line about that.
    """
    try:
        mean, std = image_normalization(backbone)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return {}, [
            f"normalisation: that of {backbone} is not known, and pixels are normalised by ImageNet's mean and "
            f"standard deviation; if it was pre-trained with others, put its preprocessor_config.json beside its "
            f"config.json ({reason})"
        ]
    return {"image_mean": mean, "image_std": std}, []


def load_changed(
    cls: Any, source: str, before: Any, class_head: str, fields: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """A checkpoint with other fields in its configuration, in float32.

    Position embeddings are resampled to another grid of patches, and the patch kernel to another patch size, as where a
    backbone is taken over.

    Args:
        cls: of the model.
        source: folder or Hub id of the checkpoint.
        before: the checkpoint as it is.
        class_head: beginning of the names of the class head, which the caller fills.
        fields: of the configuration.

    Returns:
        The model, and lines for people about what else had another size and is new.

    Raises:
        ValueError: the input size is no multiple of the patch size.
    """
    with quiet_transformers():
        model, report = cls.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
        )
    weights = before.base_model.state_dict()
    size, patch_size = model.config.image_size, model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    fitted, _ = fit_to_size(
        {name: weights[name] for name in (PATCH_KERNEL, POSITION_TABLE) if name in weights},
        before.config.grid_size,
        (height, width),
        patch_size,
    )
    with torch.no_grad():
        for name, tensor in fitted.items():
            model.base_model.get_parameter(name).copy_(tensor)
    remarks = []
    if before.config.grid_size != model.config.grid_size and POSITION_TABLE in fitted:
        old, new = ("{}x{}".format(*config.grid_size) for config in (before.config, model.config))
        remarks.append(f"position embeddings: resampled from {old} to {new} patches")
    done = tuple(f"{model.base_model_prefix}.{name}" for name in fitted)
    for name, *shapes in sorted(map(tuple, report["mismatched_keys"])):
        if name not in done and not name.startswith(class_head):
            old, new = ("x".join(map(str, shape)) for shape in shapes)
            remarks.append(f"{name}: new, as its size is {new} and the checkpoint's {old}")
    return model, remarks


def build_trained_model(task: TrainingTask) -> tuple[Any, Any]:
    """The model of a task and its image processor, ready for an optimiser.

    Raises:
        ValueError: recipe, data, checkpoint or adapters do not go together.
    """
    model, processor = task.build_model()
    freeze(model, task.recipe.freeze)
    if task.recipe.lora is not None:
        model = add_adapters(model, task.recipe.lora)
    return model, processor


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks in place: a fraction of the time that the whole model takes, and about as fast.

    What changes from step to step, such as annealing, stays outside, so that nothing is compiled again for it.
    """
    repeated = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in repeated:
            # Modules of a class share their graphs, and after a second size PyTorch makes one graph for any size. Only
            # the blocks of the ViT want that, since queries and prompts change their length. The others depend on the
            # size of the image, and PyTorch 2.14 fails where that is open: in the backward pass of resampled positions
            # and in the channels-last convolution of the scale layers, each of which sees a size of its own. Sizes
            # beyond PyTorch's limit, eight graphs, run uncompiled.
            module.compile(dynamic=None if isinstance(module, PlainViTLayer) else False)


def checkpoint_blocks(model: Any) -> None:
    """Have the activations of every block computed again in the backward pass, instead of kept."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its new name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class WholeModel:
    """A model whose weights may be sharded, as each process can run it on its own: scoring is not done in step.

    Args:
        task: builds the copy, which is kept for the next time.
    """

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self._copy: Any = None

    def of(self, model: Any) -> Any:
        """The model itself where it is whole, else a copy with its weights; then all processes have to call."""
        if not is_sharded(model):
            return model
        if self._copy is None:
            self._copy, _ = build_trained_model(self.task)
        self._copy.load_state_dict(whole(model.state_dict()))
        return self._copy


_SHOWN = 5  # names in a message


def carry_over_classes(
    head: nn.Linear, before: nn.Linear, labels: Mapping[int, str], labels_before: Mapping[int, str]
) -> str | None:
    """Fill a class head: rows of classes that the checkpoint knows are its rows, the others are new.

    Args:
        head: (C, D), or (C + 1, D) with a last row for no object, which is always carried over; changed in place. New
            rows get PyTorch's initial values.
        before: of the checkpoint, with or without a row for no object as `head`.
        labels: class name by label id of `head`, from 0.
        labels_before: the same of `before`.

    Returns:
        A line for people about what is new or in doubt; `None` where the classes are the same, in any order.
    """
    rows = _rows_before(labels, labels_before)
    carried = [(row, found) for row, found in enumerate(rows) if found != NO_MATCH]
    extra = head.out_features - len(labels)
    carried += [(len(labels) + number, len(labels_before) + number) for number in range(extra)]
    fresh = nn.Linear(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        for ours, theirs in ((fresh.weight, before.weight), (fresh.bias, before.bias)):
            ours[[row for row, _ in carried]] = theirs[[found for _, found in carried]].to(ours)
        head.weight.copy_(fresh.weight)
        head.bias.copy_(fresh.bias)
    new = [labels[row] for row, found in enumerate(rows) if found == NO_MATCH]
    if new:
        shown = ", ".join(map(repr, new[:_SHOWN])) + (f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else "")
        return (
            f"class head: {len(labels) - len(new)} of {len(labels)} classes are carried over from the checkpoint by "
            f"name, {len(new)} are new ({shown})"
        )
    if are_unnamed(labels_before) and not are_unnamed(labels):
        return (
            f"class head: the checkpoint's {len(labels)} classes have no names and are taken in order for those of the "
            "data; if they are others, set id2label in its config.json to their names"
        )
    return None


def _rows_before(labels: Mapping[int, str], labels_before: Mapping[int, str]) -> list[int]:
    """For each class its row in the checkpoint, or `NO_MATCH`."""
    if are_unnamed(labels_before) and len(labels_before) == len(labels):
        return list(range(len(labels)))
    matches = match_names(labels, labels_before)
    return [matches.get(row, NO_MATCH) for row in range(len(labels))]


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
    values = asdict(LoraOptions(**settings))
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
