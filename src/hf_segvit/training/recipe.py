"""The recipe: everything that decides how a model is trained, as one flat record.

`Recipe` has the fields of the sections `General`, `Data`, `Optimisation` and `Run`, and those of each kind of model
(declarations.py). A field that is `None` is derived from the others (derivation.py); a value that is set is taken as it
is. `load_recipe` reads a short YAML file, or a packaged recipe by its bare name, and applies `key=value` overrides.

Nothing here imports PyTorch, so that the command line lists and checks recipes at once. The packaged values are those
of the official configurations of EoMT (Kerssies et al., CVPR 2025) and ViT-P.
"""

# ruff: noqa: RUF009 - `option` makes a field, which belongs into the class

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..lookup import parse_key_values, parse_yaml, suggestion
from .declarations import (
    DECLARATIONS,
    MOST_STEPS,
    WORDS,
    EoMTOptions,
    TaskDeclaration,
    ViTPOptions,
    checked,
    default_of,
    option,
    refuse_deep,
    refuse_unknown,
    shown,
    task_declaration,
    types_of,
)

_LARGEST_SEED = 2**32 - 1
_MOST_BYTES = 1_000_000  # of a recipe
RECIPE_FOLDER = Path(__file__).parent / "recipes"
# Old name of a field to its present name: recipes and checkpoints with the old one can still be read.
RENAMED: dict[str, str] = {}
# Methods of MaskCriterion and Metric that the loop calls, repeated because their modules import PyTorch.
CRITERION_METHODS = ("forward", "from_config", "count_normalizers", "curve_name")
METRIC_METHODS = ("reset", "add_batch", "compute", "state_dict", "merge")


_STEPS = f"> 0, <= {MOST_STEPS}"


@dataclass(frozen=True)
class LoraOptions:
    """The keys of `lora`, see start.py."""

    rank: int = option(16, "rank of the adapters", limits="> 0, <= 4096")
    alpha: float = option(32.0, "adapters are scaled by alpha / rank", limits="> 0, <= 1e6")
    dropout: float = option(0.0, "dropout on the inputs of the adapters", limits=">= 0, < 1")
    targets: list[str] | None = option(None, "linear layers of the blocks to adapt; null: all")


@dataclass(frozen=True)
class General:
    """What is trained, and from what."""

    model: str = option(
        "eomt", "kind of model, or a TrainingTask class", choices=("eomt", "mask2former_vit", "vit_p"), imported=()
    )
    task: str = option(None, "what the model learns; null: its first task")
    init: str | None = option(
        None, "segmentation model to start from; classes that it does not know are new; scratch: random weights"
    )
    backbone: str | None = option(None, "backbone to start from; null, and init null: from scratch")
    model_config: dict[str, Any] = option({}, "fields of the model's configuration")
    options: dict[str, Any] = option({}, "fields that an imported task declares")
    criterion: str | None = option(None, "class of the loss; null: the model's own", imported=CRITERION_METHODS)
    freeze: str | None = option(None, "backbone, or until_layer:N for the embeddings and the first N blocks")
    lora: dict[str, Any] | None = option(
        None, "train low-rank adapters instead of the backbone's weights", keys=LoraOptions
    )
    seed: int = option(0, "seed of all random numbers", limits=">= 0")
    name: str = option("recipe", "name of the recipe; by default that of its file", resume="yes")


@dataclass(frozen=True)
class Data:
    """What the model learns from and is scored on."""

    data: str | None = option(None, "training data as FORMAT:PATH, see check-data --help")
    train_split: str | None = option(None, "split to train on; null: the first")
    val_data: str | None = option(None, "data to score on, as FORMAT:PATH; null: data", resume="yes")
    val_split: str | None = option(None, "split to score on; null: val, validation or test", resume="yes")
    val_fraction: float | None = option(
        None, "share of the training images to score on instead, whole groups if names tell", limits="> 0, < 1"
    )
    image_size: int | list[int] | None = option(
        None, "size of training images in pixels: a number or [height, width]", limits=">= 1, <= 16384", length=(1, 2)
    )
    augmentation: str | None = option(
        None,
        "augmentation; null: by task",
        choices=(
            *("eomt_coco_panoptic", "eomt_coco_instance", "eomt_ade20k_panoptic", "eomt_semantic"),
            *("vit_p", "vit_p_coco"),
        ),
        imported=(),
    )
    augmentation_options: dict[str, Any] = option({}, "settings of the augmentation to change")
    num_workers: int | None = option(
        None, "processes that load images; null: by number of CPU cores", limits=">= 0, <= 512", resume="yes"
    )
    cache: bool | str = option(
        False, "keep id maps in a format that loads faster: true (in output) or a folder", resume="yes"
    )


@dataclass(frozen=True)
class Optimisation:
    """How the weights are trained."""

    epochs: float | None = option(None, "passes over the data", limits="> 0, <= 1e6")
    steps: int | None = option(None, "optimiser steps, instead of epochs", limits=_STEPS)
    batch_size: int = option(16, "images per step, over all devices and accumulation", limits="> 0, <= 65536")
    device_batch_size: int | None = option(
        None, "images on a device at once; the rest of the batch is accumulated", limits="> 0, <= 65536", resume="yes"
    )
    optimizer: str = option("adamw", "optimiser", choices=("adamw", "sgd"))
    learning_rate: float | None = option(
        None,
        "peak learning rate, before layer_decay; null: from base_learning_rate",
        limits="> 0, <= 1000",
        resume="told",
    )
    base_learning_rate: float | None = option(
        None,
        "peak learning rate for a batch of 16 (80 with SGD), scaled to batch_size",
        limits="> 0, <= 1000",
        resume="told",
    )
    betas: list[float] = option([0.9, 0.999], "betas of AdamW", limits=">= 0, < 1", length=(2,))
    momentum: float = option(0.9, "momentum of SGD", limits=">= 0, < 1")
    weight_decay: float = option(0.05, "weight decay", limits=">= 0, <= 100", resume="told")
    weight_decay_mode: str = option(
        "all", "all (official), or matrices: not biases, norms and tokens", choices=("all", "matrices")
    )
    # 0.01 is the value of the official EoMT configurations.
    max_grad_norm: float | None = option(
        0.01, "gradients are clipped to this norm; null: never", limits="> 0, <= 1e9", resume="told"
    )
    schedule: str = option("polynomial", "decay of the learning rate", choices=("polynomial", "cosine"))
    warmup_steps: list[int] | None = option(
        None,
        "[all parameters] or [new parameters, then the backbone]",
        limits=f">= 0, <= {MOST_STEPS}",
        length=(1, 2),
        resume="told",
    )
    power: float = option(0.9, "exponent of polynomial decay and annealing", limits="> 0, <= 100")
    layer_decay: float = option(0.8, "learning rate of a block relative to the next block", limits="> 0, <= 1")
    precision: str = option("no", "mixed precision; no: float32", choices=("no", "bf16", "fp16"), resume="told")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory", resume="yes")
    compile: bool = option(False, "use torch.compile", resume="yes")
    ema_decay: float | None = option(
        None, "score and save a moving average of the weights with this decay, such as 0.999", limits="> 0, < 1"
    )


@dataclass(frozen=True)
class Run:
    """What is scored, recorded, saved and published."""

    evaluate_every: float | str | None = option(
        None,
        'between evaluations: "5 epochs" (or 5), "100 steps", or end; null: 1 epoch, but at most 50 evaluations',
        limits="> 0, <= 1e6",
        resume="yes",
    )
    evaluate_limit: int | None = option(
        None, "score only the first images, this many", limits="> 0, <= 1e9", resume="yes"
    )
    metrics: list[str] = option([], "classes of additional metrics", imported=METRIC_METHODS, resume="yes")
    keep_best: str | None = option(None, "score that selects the best model; null: by task", resume="yes")
    patience: int | None = option(
        None, "evaluations without a better score before training stops", limits="> 0, <= 1e6", resume="yes"
    )
    save_every: float | str | None = option(
        None,
        "between checkpoints, as evaluate_every; each evaluation saves one, too",
        limits="> 0, <= 1e6",
        resume="yes",
    )
    save_every_steps: int | None = option(
        None, "steps between checkpoints, instead of save_every", limits=_STEPS, resume="yes"
    )
    keep_last: int = option(2, "checkpoints to keep besides the best", limits="> 0, <= 1e6", resume="yes")
    callbacks: list[str] = option([], "classes of callbacks", imported=(), resume="yes")
    trackers: list[str] = option(["tensorboard"], "trackers of Accelerate, such as wandb", resume="yes")
    log_every: int = option(50, "steps between log records; fewer in short runs", limits=_STEPS, resume="yes")
    draw: int = option(4, "images to draw predictions on at each evaluation", limits=">= 0, <= 1000", resume="yes")
    output: str | None = option(None, "output folder; null: runs/NAME", resume="yes")
    push_to_hub: str | None = option(None, "Hub repository for the trained model", resume="yes")
    resume: bool = option(True, "resume from the newest valid checkpoint in output", resume="yes")


SECTIONS: dict[str, type] = {
    **{"general": General, "data": Data, "optimisation": Optimisation, "run": Run},
    # Those of mask2former_vit are among EoMT's.
    **{model: DECLARATIONS[model].options for model in ("eomt", "vit_p")},
}


# Bases from last to first: dataclasses collect fields in that order, and the table starts with General.
@dataclass(frozen=True)
class Recipe(ViTPOptions, EoMTOptions, Run, Optimisation, Data, General):
    """How to train a model; `hf-segvit train --fields` lists the fields.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names the field and the remedy.
    """

    def __post_init__(self) -> None:
        # `task` has no null in its type: whoever reads a recipe finds the task, never None.
        values = checked(Recipe, {name: value for name, value in vars(self).items() if (name, value) != ("task", None)})
        declaration = task_declaration(values["model"])
        _start_from_scratch(values)
        values.setdefault("task", declaration.tasks[0])
        if values["options"] and not own_fields(self.model):
            raise ValueError(f"options={shown(values['options'])}: model={self.model} declares none; leave them out")
        values["options"] = checked(declaration.options, values["options"], "options.", without=FIELDS)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen
        _check_recipe(self, declaration)

    @property
    def declaration(self) -> type[TaskDeclaration]:
        """The declaration of its model."""
        return task_declaration(self.model)

    def task_options(self) -> Any:
        """The task's options as its own record, whether they are set as fields or under `options`."""
        record = self.declaration.options
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(record) if field.name in FIELDS}
        return record(**shared, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with defaults; `Recipe(**recipe.to_dict())` is the same recipe."""
        return dataclasses.asdict(self)

    def changed(self, **fields: Any) -> Recipe:
        """A copy with other values in these fields."""
        return Recipe(**{**self.to_dict(), **fields})


# Values of `init` and `backbone` that ask for random weights.
_SCRATCH = ("scratch", "none")
# A ViT-Ti, which learns something from a few dozen images; with pretrained weights larger ones are better.
_SCRATCH_MODEL = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
# Random weights take, and need, larger steps than trained ones, and the first blocks as large as the last.
_SCRATCH_RATES = {"adamw": 5e-4, "sgd": 1e-2}


def _start_from_scratch(values: dict[str, Any]) -> None:
    """Replace init=scratch and backbone=scratch by null, with sizes and rates that random weights need."""
    texts = {name: values[name] for name in ("init", "backbone") if isinstance(values[name], str)}
    asked = [name for name, text in texts.items() if text.strip().lower() in _SCRATCH]
    if not asked:
        return
    for name in asked:
        values[name] = None
    if values["init"] is not None or values["backbone"] is not None:
        return  # one of them is a model all the same
    for name in ("freeze", "lora"):
        if values.get(name) is not None:
            raise ValueError(f"{asked[0]}=scratch and {name}: random weights have to be trained; set {name} to null")
    if values.get("learning_rate") is None and values.get("base_learning_rate") is None:
        values["base_learning_rate"] = _SCRATCH_RATES[values["optimizer"]]
    if values["layer_decay"] == default_of(FIELDS["layer_decay"]):
        values["layer_decay"] = 1.0
    if values["model"] in DECLARATIONS and not {"hidden_size", "num_hidden_layers"} & values["model_config"].keys():
        values["model_config"] = {**_SCRATCH_MODEL, **values["model_config"]}


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def own_fields(model: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields that are set under `options`: an imported task declares them, and `Recipe` lacks them."""
    declared = dataclasses.fields(task_declaration(model).options)
    return {field.name: field for field in declared if field.name not in FIELDS}


def all_fields(model: str) -> dict[str, dataclasses.Field[Any]]:
    """All fields of a recipe; fields under `options` are called "options.NAME"."""
    own = {f"options.{name}": field for name, field in own_fields(model).items()}
    return {name: field for name, field in FIELDS.items() if name != "options"} | own


def resume_rules(model: str) -> dict[str, str]:
    """Whether each field may change when a run is resumed: "yes", "no" or "told", see `option`."""
    return {name: field.metadata.get("resume", "no") for name, field in all_fields(model).items()}


def flat(recipe: Recipe) -> dict[str, Any]:
    """The value of each field, by the names of `all_fields`."""
    values = recipe.to_dict()
    values |= {f"options.{name}": value for name, value in values["options"].items()}
    return {name: values.get(name, default_of(field)) for name, field in all_fields(recipe.model).items()}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or a packaged one by name.

    Args:
        overrides: "key=value", where a dot reaches into a dict, as in "model_config.num_queries=100". An override of
            `steps` replaces the file's `epochs`, and vice versa; likewise `init` and `backbone`.

    Raises:
        ValueError: no such recipe or key (the message suggests the nearest), invalid YAML, or a value does not fit.
    """
    path = find_recipe(path_or_name)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path}: has more than {_MOST_BYTES:,} bytes, which no recipe needs; give a recipe")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no text; give a YAML file in UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a YAML file that can") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"not {WORDS.get(type(values), 'a ' + type(values).__name__)}"
        raise ValueError(f"{path}: a recipe is a list of `key: value` lines, and this is {kind}; give a recipe")
    try:
        for name, value in values.items():
            refuse_deep(str(name), value)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    # A recipe without a name is called after its file.
    try:
        return Recipe(**{"name": path.stem, **_with_overrides(values, overrides)})
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def find_recipe(path_or_name: str | Path) -> Path:
    """The path of a recipe; a packaged one may be given by name.

    Raises:
        ValueError: there is neither; the message suggests the nearest names.
    """
    try:
        path = Path(path_or_name).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown user, an unreadable folder
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{shown(str(path_or_name))}: cannot be opened ({reason}); check the path") from error
    if path.exists():
        raise ValueError(f"{path}: is a folder or a device; give a YAML file")
    # A file of the working directory goes before a packaged recipe of the same name.
    packaged = RECIPE_FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    near = suggestion(path.stem, packaged_recipes(), 3)
    raise ValueError(f"{shown(str(path_or_name))[1:-1]}: there is no such file, and no recipe of this name; {near}")


def packaged_recipes() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def _with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a file, updated by those of the command line."""
    kinds = {name: types_of(hint) for name, hint in typing.get_type_hints(Recipe).items()}
    # Values of text fields are not parsed as YAML, so that a folder called 2024 stays text.
    stated = renamed(parse_key_values(overrides, [name for name in kinds if set(kinds[name]) <= {str, types.NoneType}]))
    result = renamed(copy.deepcopy(dict(values)))
    for name, alternative in (("steps", "epochs"), ("epochs", "steps"), ("init", "backbone"), ("backbone", "init")):
        if name in stated and alternative not in stated:
            result.pop(alternative, None)
    if any(name in stated and str(stated[name]).lower() in (*_SCRATCH, "") for name in ("init", "backbone")):
        _drop_fine_tuning(stated, values, result)
    for key, value in stated.items():
        *path, last = key.split(".")
        refuse_unknown([key.partition(".")[0]], FIELDS)
        if path and dict not in kinds[path[0]]:
            raise ValueError(f"{key}: {path[0]} holds no keys of its own; give {path[0]}=value")
        target = result
        for part in path:
            target[part] = target.get(part) or {}
            target = target[part]
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {part} holds {shown(target)}, which has no keys of its own")
        target[last] = value
    refuse_unknown(result, FIELDS)
    return result


def _drop_fine_tuning(stated: dict[str, Any], values: Mapping[str, Any], result: dict[str, Any]) -> None:
    """Drop what a file has for trained weights from `result`, if the command line asks for random ones."""
    # An empty value leaves nothing to start from either, as every other start is dropped.
    for name in ("init", "backbone"):
        if name in stated and str(stated[name]).lower() in ("", *_SCRATCH):
            stated[name] = "scratch"
    starts = [str(values.get(name) or "scratch").lower() for name in ("init", "backbone")]
    if set(starts) <= set(_SCRATCH):
        return  # the file's rates are for random weights already
    for name in ("learning_rate", "base_learning_rate", "layer_decay", "freeze", "lora"):
        result.pop(name, None)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the present names of their fields; old names raise a warning, both at once a `ValueError`."""
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise ValueError(f"{old} is called {new} now, and both are set; leave out {old}")
        if old in values:
            warnings.warn(f"the recipe's {old} is called {new} now; please rename it", FutureWarning, stacklevel=2)
    return {RENAMED.get(name, name): value for name, value in values.items()}


def _check_recipe(recipe: Recipe, declaration: type[TaskDeclaration]) -> None:
    """Refuse values that contradict each other; data, weights and devices are not needed for that."""
    if recipe.task not in declaration.tasks:
        raise ValueError(
            f"task={recipe.task!r} is none of model={recipe.model}; {suggestion(recipe.task, declaration.tasks)}"
        )
    # The flat record has the fields of all models, so one for another model would be ignored silently.
    own = {field.name for field in dataclasses.fields(declaration.options)}
    for model, other in DECLARATIONS.items():
        for field in dataclasses.fields(other.options):  # all are fields of Recipe
            value = getattr(recipe, field.name)
            if field.name not in own and value != default_of(field):
                raise ValueError(
                    f"{field.name}={shown(value)} is for model={model}, not for {recipe.model}; leave it out"
                )
    if recipe.epochs is not None and recipe.steps is not None:
        raise ValueError(f"epochs={recipe.epochs} and steps={recipe.steps} both say how long; set one of them to null")
    if recipe.init is not None and recipe.backbone is not None:
        raise ValueError(f"init={recipe.init} and backbone={recipe.backbone}: start from one of them; set one to null")
    if recipe.device_batch_size is not None and recipe.batch_size % recipe.device_batch_size:
        raise ValueError(
            f"device_batch_size={recipe.device_batch_size} does not divide batch_size={recipe.batch_size}, which "
            "counts all devices and accumulation"
        )
    if recipe.seed > _LARGEST_SEED:
        raise ValueError(f"seed={shown(recipe.seed)} must be at most {_LARGEST_SEED}, the largest that NumPy takes")
    if recipe.name in ("", ".", "..") or re.search(r"[/\\]", recipe.name) or len(recipe.name.encode()) > 200:
        raise ValueError(f"name={shown(recipe.name)} names a folder in runs/; give a short name without slashes")
    parse_freeze(recipe.freeze)
    for name in ("evaluate_every", "save_every"):
        parse_interval(name, getattr(recipe, name))
    if recipe.val_fraction is not None and (recipe.val_split is not None or recipe.val_data is not None):
        raise ValueError(
            f"val_fraction={recipe.val_fraction} scores on a part of the training images, val_split and val_data on "
            "others; set val_fraction to null, or the others"
        )
    if recipe.lora is not None and recipe.freeze is not None:
        raise ValueError(f"lora and freeze={recipe.freeze}: adapters freeze what they adapt; set one of them to null")
    if recipe.outliers is not None and not recipe.outliers.get("data"):
        raise ValueError(
            "outliers has no data; give outliers.data=FOLDER of cut-outs, or FORMAT:PATH, or set it to null"
        )
    if recipe.annealing is True:
        raise ValueError("annealing=true is ambiguous; give null to anneal by rule, false for none, or fractions")
    for pair in recipe.annealing or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"annealing={shown(recipe.annealing)} must hold [start, end] for each query layer")
        start, end = (parse_fraction(value) for value in pair)
        if start > end:
            raise ValueError(f"annealing has [{pair[0]}, {pair[1]}], which ends before it starts; swap them")


def parse_freeze(freeze: str | None) -> int | None:
    """Number of blocks that `freeze` asks for, besides the embeddings; -1: the whole backbone, `None`: nothing."""
    if freeze is None:
        return None
    if freeze == "backbone":
        return -1
    match = re.fullmatch(r"until_layer:([0-9]{1,6})", freeze)
    if match is None:
        raise ValueError(
            f"freeze={shown(freeze)} is unknown; give backbone, until_layer:N (such as until_layer:6) or null"
        )
    return int(match.group(1))


def parse_interval(name: str, value: float | str | None) -> tuple[float, str] | None:
    """(number, "epochs" or "steps") of a value such as 2, "5 epochs" or "100 steps"; (1, "end") for "end".

    Raises:
        ValueError: naming the field and the forms that it takes.
    """
    if value is None or isinstance(value, int | float):
        return None if value is None else (float(value), "epochs")
    match = re.fullmatch(r"\s*([0-9_.]{1,20}(?:e[0-9]{1,2})?)\s*(epoch|step)s?\s*", value, re.IGNORECASE)
    if value.strip().lower() == "end":
        return 1.0, "end"
    number = 0.0
    if match is not None:
        with contextlib.suppress(ValueError):
            number = float(match[1])
    if match is None or not 0 < number <= MOST_STEPS or (match[2].lower() == "step" and number != int(number)):
        raise ValueError(
            f'{name}={shown(value)} is no interval; give "100 steps", "5 epochs", a number of epochs, or end'
        )
    return number, f"{match[2].lower()}s"


def parse_fraction(value: Any) -> float:
    """A number in [0, 1] from a number or a text such as "1/6"; a `ValueError` for anything else."""
    try:
        # An exponent such as that of 1e999999999 would take hours to work out, and True would stand for 1.
        if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(r"[0-9./ ]{1,40}", value)):
            raise ValueError("no fraction")
        number = Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"annealing has {shown(value)}; give fractions of training, such as 0.25 or 1/4") from error
    if not 0 <= number <= 1:
        raise ValueError(f"annealing has {shown(value)}, not a fraction of training; give 0 to 1, such as 0.25 or 1/4")
    return float(number)


def output_folder(recipe: Recipe) -> Path:
    """The folder that a run of the recipe writes to."""
    return Path(recipe.output or Path("runs") / recipe.name)


def cache_folder(recipe: Recipe) -> Path | None:
    """The folder in which id maps are cached, if at all."""
    if not recipe.cache:
        return None
    return output_folder(recipe) / "cache" if recipe.cache is True else Path(recipe.cache)
