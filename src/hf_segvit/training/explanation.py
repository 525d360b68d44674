"""Explain a recipe and its training plan in text.

`field_table` is printed by `hf-segvit train RECIPE --fields` and needs no PyTorch. `explain` is printed by `--explain`:
one screen, or with `full` every parameter. `memory_advice` lists what to change if a batch does not fit on the device.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .declarations import DECLARATIONS, WORDS, default_of, types_of
from .derivation import TrainingPlan, augmentation_name, epochs_text, has_queries, image_size, is_eomt
from .recipe import SECTIONS, Recipe, own_fields

if TYPE_CHECKING:
    from torch import nn

# Of field, value, choices or limits, resume rule and meaning: with two blanks in between, 120 columns.
_WIDTHS = (23, 24, 21, 6, 38)
_SHOWN_CLASSES = 8
_RESUME = textwrap.wrap(
    "resume: whether the value may change when a run is resumed. yes: the result does not depend on it; told: the "
    "result does, so the change is logged; no: start a new run.",
    120,
)


def field_table(recipe: Recipe) -> str:
    """A table of all fields of a recipe by section, with values, limits and meaning; 120 columns."""
    rows: list[str] = [_row(("field", "value (default)", "choices or limits", "resume", "meaning"))]
    options = recipe.declaration.options
    for section, record in SECTIONS.items():
        title = record.__doc__
        # By fields, not by name: a task derived from EoMT's has its fields, too.
        if section in DECLARATIONS and not _field_names(record) <= _field_names(options):
            shared = [field.name for field in dataclasses.fields(record) if field.name in _field_names(options)]
            title = f"only {', '.join(shared)} for model={recipe.model}" if shared else f"not for model={recipe.model}"
        rows += ["", f"{section}: {title}", *_field_rows(record, recipe.to_dict())]
    if own_fields(recipe.model):
        own = _field_rows(options, recipe.options, "options.", own_fields(recipe.model))
        rows += ["", f"options: {options.__doc__}", *own]
    return "\n".join([*rows, "", *_RESUME])


def _field_names(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def _field_rows(
    record: type, values: Mapping[str, Any], prefix: str = "", only: Iterable[str] | None = None
) -> Iterator[str]:
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        if only is None or field.name in only:
            default = default_of(field)
            value = values.get(field.name, default)
            shown = _in_yaml(value) + ("" if value == default else f" ({_in_yaml(default)})")
            declared, keys = field.metadata, field.metadata.get("keys")
            allowed = _allowed(hints[field.name], declared)
            meaning = declared.get("meaning", "")
            yield _row((prefix + field.name, shown, allowed, declared.get("resume", "no"), meaning))
            # Keys of a dict are fields of their own; those of each dict in a list would repeat.
            if keys is not None and dict in types_of(hints[field.name]):
                yield from _field_rows(keys, value or {}, f"{prefix}{field.name}.")


def _row(cells: Sequence[str]) -> str:
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, _WIDTHS, strict=True)]
    lines = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(map(str.ljust, line, _WIDTHS)).rstrip() for line in lines)


def _in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(hint: Any, declared: Mapping[str, Any]) -> str:
    """Choices, limits or types of a field."""
    named = [*declared.get("choices", ()), *([] if declared.get("imported") is None else ["module:Class"])]
    kinds = [WORDS.get(kind, str(kind)).removeprefix("a ") for kind in types_of(hint) if kind is not types.NoneType]
    return ", ".join(named) or f"{' or '.join(kinds)} {declared.get('limits', '')}".strip()


def explain(plan: TrainingPlan, model: nn.Module, processor: Any, full: bool = False, validation: str = "") -> str:
    """All decisions of a plan, and a table of the parameters by learning rate.

    Args:
        validation: what the model is scored on, if known.
        model: as it is trained, with frozen parts and adapters.
        full: one row for each module with the shapes of its parameters, instead of one for each role.
    """
    from .optimizers import parameter_groups  # here, as it imports PyTorch, which --fields does without

    recipe = plan.recipe
    groups = parameter_groups(model, plan)
    lines = [f"{name:<16}{text}" for name, text in _decisions(plan, model, processor, full, validation).items()]
    if not full:  # one screen; the full text is for searching
        lines = [row for line in lines for row in textwrap.wrap(line, 120, subsequent_indent=" " * 16)]
    lines += ["", *(_full_table(groups) if full else _brief_table(groups, str(model.base_model_prefix)))]
    trained = sum(_count(group["params"]) for group in groups)
    frozen = _count(parameter for parameter in model.parameters() if not parameter.requires_grad)
    lines += ["", f"{trained:,} parameters in {len(groups)} groups are trained, {frozen:,} are frozen"]
    advice = memory_advice(recipe, plan)
    if advice:
        lines += ["", "If memory runs out:", *(f"  {line}" for line in advice)]
    return "\n".join(lines)


def starting_block(plan: TrainingPlan, task: Any, model: nn.Module, device: Any, output: Any, step: int) -> str:
    """What a run prints first: where it computes, on what, for how long, and where its results and curves are."""
    from ..inference.devices import describe_device  # here, as it imports PyTorch, which --fields does without

    recipe = plan.recipe
    labels = [str(name) for name in (getattr(model.config, "id2label", None) or {}).values()]
    shown = ", ".join(labels[:_SHOWN_CLASSES]) + (", ..." if len(labels) > _SHOWN_CLASSES else "")
    trained = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    validation = getattr(task, "validation_size", None)
    scored = "" if validation is None else f", {validation:,} to score on"
    rows = {
        "device": f"{plan.world_size} x {describe_device(device)}" if plan.world_size > 1 else describe_device(device),
        "images": f"{plan.num_images:,} to train on{scored}",
        "classes": f"{len(labels)}: {shown}" if labels else "",
        "parameters": f"{_count(model.parameters()):,}, of which {trained:,} are trained",
        "steps": f"{plan.total_steps:,} of {recipe.batch_size} images = {epochs_text(plan.epochs)}, scored every "
        f"{plan.evaluate_every_steps:,}" + (f"; resumed after step {step:,}" if step else ""),
        "folder": str(output),
        "curves": f"tensorboard --logdir {output / 'logs'}" if "tensorboard" in recipe.trackers else "",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items() if text)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _full_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'role':<10}{'learning rate':>14}{'decay':>8}{'parameters':>13}  names"]
    for group in groups:
        count = f"{_count(group['params']):,}"
        start = f"{group['role']:<10}{group['lr']:>14.4g}{group['weight_decay']:>8.3g}{count:>13}"
        shapes = [tuple(parameter.shape) for parameter in group["params"]]
        for row in _rows(group["names"], shapes):
            lines.append(f"{start}  {row}")
            start = " " * len(start)
    return lines


def _brief_table(groups: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    """One row per role and weight decay, with the range of learning rates."""
    lines = [f"{'role':<10}{'learning rate':<24}{'decay':>6}{'parameters':>15}  names"]
    for role, decay in dict.fromkeys((group["role"], group["weight_decay"]) for group in groups):
        same = [group for group in groups if (group["role"], group["weight_decay"]) == (role, decay)]
        low, high = (f"{extreme(group['lr'] for group in same):.4g}" for extreme in (min, max))
        count = sum(_count(group["params"]) for group in same)
        parts = _parts([name for group in same for name in group["names"]], prefix)
        start = f"{role:<10}{low if low == high else f'{low} to {high}':<24}{decay:>6.3g}{count:>15,}  "
        lines += textwrap.wrap(parts, 120, initial_indent=start, subsequent_indent=" " * len(start))
    return lines


def _parts(names: Sequence[str], prefix: str) -> str:
    """Modules in text, all blocks as one: "embeddings, blocks 0 to 11, layernorm"."""
    from .optimizers import layer_of

    layers = {name: layer_of(name) for name in names}
    blocks = [layer for layer in layers.values() if layer not in (None, -1)]
    parts: dict[str, None] = {}  # an ordered set
    for name in names:
        if layers[name] not in (None, -1):
            parts[f"blocks {min(blocks)} to {max(blocks)}"] = None
        else:
            # PEFT wraps a model with adapters, which puts "base_model.model." in front of all names.
            parts[re.sub(rf"^(base_model\.model\.)?({prefix}\.)?", "", name).partition(".")[0]] = None
    return ", ".join(parts)


def memory_advice(recipe: Recipe, plan: TrainingPlan) -> list[str]:
    """Settings to try if a batch does not fit on a device, one a line, with the cheapest first."""
    advice = []
    if plan.device_batch_size > 1:
        # The result stays the same, as losses are normalised over the whole batch, however it is split.
        smaller = _largest_divisor(plan.device_batch_size)
        steps = plan.accumulation_steps * plan.device_batch_size // smaller
        advice.append(f"device_batch_size={smaller}: the same result, in {steps} parts a step")
    if not recipe.gradient_checkpointing:
        advice.append("gradient_checkpointing=true: the same result, about a third slower")
    if recipe.precision == "no":
        advice.append("precision=bf16: half the activations, and faster on a GPU")
    height, width = image_size(recipe)
    if min(height, width) >= 256:
        smaller_size = [side * 3 // 4 // 16 * 16 for side in (height, width)]  # 16: patch size of the EoMT recipes
        value = smaller_size[0] if height == width else smaller_size
        advice.append(f"image_size={str(value).replace(' ', '')}: half the memory, but small objects get lost")
    if recipe.lora is None and recipe.freeze is None:
        # What starts from random weights has to be trained.
        if recipe.init is not None or recipe.backbone is not None:
            advice.append("freeze=until_layer:N: no gradient and no optimiser state for the first N blocks")
        if is_eomt(recipe) and recipe.init is not None:
            advice.append("the recipe own_lora: adapters instead of the backbone's weights")
    return advice


def _decisions(plan: TrainingPlan, model: Any, processor: Any, full: bool, validation: str = "") -> dict[str, str]:
    from ..models.image_processing_plain_vit import unit_normalization

    recipe, annealing = plan.recipe, plan.annealing
    height, width = image_size(recipe, model.config)
    parts = f"{plan.world_size} x {plan.accumulation_steps} x {plan.device_batch_size}"
    warmup = [f"{steps:,}" for steps in plan.warmup_steps]
    stages = f"{warmup[0]} steps" if len(warmup) == 1 else f"{warmup[0]} steps, then {warmup[1]} for the backbone"
    limit = "gradients as they are" if recipe.max_grad_norm is None else f"gradients at most {recipe.max_grad_norm}"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in unit_normalization(vars(processor)))
    decisions = {
        "recipe": f"{recipe.name}: {recipe.model}, {recipe.task}",
        "data": f"{recipe.data}, {plan.num_images:,} images",
        "validation": validation,
        "start": recipe.init or recipe.backbone or "from scratch",
        "model": "" if full else _size(model),
        "images": f"{height} x {width}, augmentation {augmentation_name(recipe)}",
        "normalisation": f"mean {mean}, standard deviation {std}, of pixels in [0, 1]",
        "length": f"{plan.total_steps:,} steps = {epochs_text(plan.epochs)} of {plan.steps_per_epoch:,} steps",
        "batch": f"{recipe.batch_size} = {parts} (processes x accumulation x images on a device)",
        "optimiser": f"{recipe.optimizer}, learning rate {plan.learning_rate:.4g}, {limit}",
        "warm-up": f"{stages}; then {recipe.schedule} decay",
        "evaluation": f"every {plan.evaluate_every_steps:,} steps; a checkpoint every {plan.save_every_steps:,}",
    }
    if recipe.patience is not None:
        decisions["patience"] = _patience(recipe.patience, plan)
    if not full:
        decisions["annealing"] = _masks(plan, model.config)
    elif annealing is not None:
        phases = zip(annealing.starts, annealing.ends, strict=True)
        steps = ", ".join(f"{start:,} to {end:,}" for start, end in phases)
        decisions["annealing"] = f"{steps} (a {_kind_of_layers(recipe)} layer each)"
    else:
        decisions["annealing"] = _masks(plan, model.config)
    return {name: text for name, text in decisions.items() if text}


def _size(model: Any) -> str:
    """Depth, width, heads and parameters; an imported model may lack some of them."""
    words = {
        "num_hidden_layers": "{} blocks",
        "num_query_layers": "the last {} with queries",
        "num_decoder_layers": "{} decoder layers",
        "hidden_size": "width {}",
        "num_attention_heads": "{} heads",
    }
    sizes = [text.format(getattr(model.config, name)) for name, text in words.items() if hasattr(model.config, name)]
    return ", ".join([*sizes, f"{_count(model.parameters()):,} parameters"])


def _masks(plan: TrainingPlan, config: Any) -> str:
    annealing = plan.annealing
    if annealing is not None:
        return (
            f"the masks of the {len(annealing.starts)} {_kind_of_layers(plan.recipe)} layers fade one after the other, "
            f"from step {min(annealing.starts):,} to {max(annealing.ends):,}; afterwards, and at inference, nothing is "
            "masked"
        )
    if not has_queries(plan.recipe):
        return ""
    if config.masked_attention and any(config.masked_attention_probabilities):
        layers = _kind_of_layers(plan.recipe)
        return f"false: attention stays masked, also at inference, where every {layers} layer has to predict masks"
    return "none: nothing is masked, in training and at inference"


def _kind_of_layers(recipe: Recipe) -> str:
    return "query" if is_eomt(recipe) else "decoder"


def _patience(patience: int, plan: TrainingPlan) -> str:
    """When training may stop early, or a warning that it never will."""
    count, total = plan.comparable_evaluations, len(plan.evaluation_steps)
    of_all = f"{count} of the {total} evaluations count" + (", those after annealing" if count < total else "")
    # The first evaluation only sets the score to beat, and after the last one the run is over anyway.
    if patience < count - 1:
        return f"{patience}: training stops after this many evaluations without a better score; {of_all}"
    most = f"at most {count - 2}, or " if count > 2 else ""
    return f"WARNING: {patience} cannot stop this run early, as {of_all}; give {most}a lower evaluate_every"


def _rows(names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """One row per module: its block or part, and the shapes of its parameters."""
    rows: dict[str, list[str]] = {}
    for name, shape in zip(names, shapes, strict=True):
        # Up to a block or another large part, and otherwise all of the name.
        part = re.match(r"(.*?layers\.\d+|.*?embeddings|.*?upscale_block|.*?mask_head|.*)(?:\.|$)", name)
        prefix = part.group(1) if part is not None else name
        rest = name.removeprefix(prefix).removeprefix(".")
        rows.setdefault(prefix, []).append(f"{rest} {'x'.join(map(str, shape))}".strip())
    return [f"{prefix}: {', '.join(parameters)}" for prefix, parameters in rows.items()]


def _largest_divisor(number: int) -> int:
    """The largest proper divisor."""
    return next(divisor for divisor in range(number // 2, 0, -1) if number % divisor == 0)
