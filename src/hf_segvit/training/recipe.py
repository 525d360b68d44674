"""A recipe: everything that decides how a model is trained, in one flat record, from one short YAML file.

`Recipe` is the record. Its fields are those of the sections `General`, `Data`, `Optimisation` and `Run`, and of each
kind of model (declarations.py); each is declared once, by `option` (fields.py). A field that is `None` is derived from
the others (derivation.py); whatever is stated is taken as it is. `load_recipe` reads a file, or a recipe of the package
by its bare name, and applies `key=value` overrides.

Nothing here imports PyTorch, so that the command line lists and checks at once. Source of the packaged values: the
official configurations of EoMT (Kerssies et al., CVPR 2025) and ViT-P.
"""

# ruff: noqa: RUF009 - `option` makes a field, which belongs into the class

from __future__ import annotations

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
from .declarations import DECLARATIONS, EoMTOptions, TaskDeclaration, ViTPOptions, task_declaration
from .fields import checked, default_of, option, refuse_unknown, types_of

RECIPE_FOLDER = Path(__file__).parent / "recipes"
# Old name of a field to its name now: recipes and checkpoints with the old one are still read.
RENAMED: dict[str, str] = {}
# What the loop asks of classes that are not ours: see models/mask_criterion.py and metrics/accumulation.py.
CRITERION_METHODS = ("forward", "from_config", "count_normalizers", "curve_name")
METRIC_METHODS = ("reset", "add_batch", "compute", "state_dict", "merge")


@dataclass(frozen=True)
class LoraOptions:
    """The keys of `lora`, see start.py."""

    rank: int = option(16, "of the adapters", limits="> 0")
    alpha: float = option(32.0, "the adapters count alpha / rank", limits="> 0")
    dropout: float = option(0.0, "before the adapters", limits=">= 0, < 1")
    targets: list[str] | None = option(None, "linear layers in the blocks; null: all of them")


@dataclass(frozen=True)
class General:
    """What is trained, and from what."""

    model: str = option("eomt", "kind of model; or a TrainingTask of one's own", choices=("eomt", "vit_p"), imported=())
    task: str = option(None, "what it learns; null: the model's first task")
    init: str | None = option(None, "segmentation model to start from; classes that its head does not know are new")
    backbone: str | None = option(None, "backbone to start from; without it and init, training starts from scratch")
    model_config: dict[str, Any] = option({}, "fields of the model's configuration")
    options: dict[str, Any] = option({}, "what a task of one's own declares")
    criterion: str | None = option(None, "loss of one's own", imported=CRITERION_METHODS)
    freeze: str | None = option(None, "backbone, or until_layer:N for the embeddings and the first N blocks")
    lora: dict[str, Any] | None = option(None, "low-rank adapters in place of the backbone's weights", keys=LoraOptions)
    seed: int = option(0, "of all randomness", limits=">= 0")
    name: str = option("recipe", "of the recipe; from its file", resume="yes")


@dataclass(frozen=True)
class Data:
    """What the model learns from and is scored on."""

    data: str | None = option(None, "FORMAT:PATH, as load_segmentation_dataset takes it")
    train_split: str | None = option(None, "null: the first there is")
    val_data: str | None = option(None, "FORMAT:PATH to score on where that is another data set", resume="yes")
    val_split: str | None = option(None, "null: val, validation or test, the first there is", resume="yes")
    image_size: int | list[int] | None = option(
        None, "of training images, in pixels: one number or [height, width]", limits=">= 1", length=(1, 2)
    )
    augmentation: str | None = option(
        None,
        "null: that of the task",
        choices=(
            *("eomt_coco_panoptic", "eomt_coco_instance", "eomt_ade20k_panoptic", "eomt_semantic"),
            *("vit_p", "vit_p_coco"),
        ),
        imported=(),
    )
    augmentation_options: dict[str, Any] = option({}, "other settings than those of this augmentation")
    num_workers: int | None = option(
        None, "processes that read images; null: by the machine", limits=">= 0", resume="yes"
    )
    cache: bool | str = option(
        False,
        "keep id maps in a form that is quicker to read: in this folder, or true: in output's cache",
        resume="yes",
    )


@dataclass(frozen=True)
class Optimisation:
    """How the weights are found."""

    epochs: float | None = option(None, "passes over the data", limits="> 0")
    steps: int | None = option(None, "of the optimiser, in place of epochs", limits="> 0")
    batch_size: int = option(16, "images a step: processes x accumulation x images on a device", limits="> 0")
    device_batch_size: int | None = option(
        None, "images on a device at once; the rest of the batch is accumulated", limits="> 0", resume="yes"
    )
    optimizer: str = option("adamw", "of the weights", choices=("adamw", "sgd"))
    learning_rate: float | None = option(
        None, "the highest, of all that layer_decay does not lower", limits="> 0", resume="told"
    )
    base_learning_rate: float | None = option(
        None, "for a batch of 16 (80 with SGD); learning_rate follows by rule", limits="> 0", resume="told"
    )
    betas: list[float] = option([0.9, 0.999], "of AdamW", limits=">= 0, < 1", length=(2,))
    momentum: float = option(0.9, "of SGD", limits=">= 0, < 1")
    weight_decay: float = option(0.05, "of AdamW and SGD", limits=">= 0", resume="told")
    weight_decay_mode: str = option(
        "all", "all (official) or matrices, which spares biases, norms and tokens", choices=("all", "matrices")
    )
    max_grad_norm: float | None = option(
        0.01, "gradients are scaled down to this norm; null leaves them", limits="> 0", resume="told"
    )
    schedule: str = option("polynomial", "of the learning rate", choices=("polynomial", "cosine"))
    warmup_steps: list[int] | None = option(
        None, "[all] or [new parameters, then the backbone, which waits]", limits=">= 0", length=(1, 2), resume="told"
    )
    power: float = option(0.9, "of the polynomial schedules of learning rate and annealing", limits="> 0")
    layer_decay: float = option(0.8, "rate of a block over that of the next", limits="> 0, <= 1")
    precision: str = option("no", "no is float32", choices=("no", "bf16", "fp16"), resume="told")
    gradient_checkpointing: bool = option(False, "compute activations again backwards, to save memory", resume="yes")
    compile: bool = option(False, "use torch.compile", resume="yes")
    ema_decay: float | None = option(
        None, "of the average of the weights that is scored and saved, such as 0.999; null: none", limits="> 0, < 1"
    )


@dataclass(frozen=True)
class Run:
    """What is scored, recorded, saved and published."""

    evaluate_every: float | None = option(None, "epochs; null: one, or more for 50 in all", limits="> 0", resume="yes")
    evaluate_limit: int | None = option(None, "score the first so many images alone", limits="> 0", resume="yes")
    metrics: list[str] = option([], "further metrics of one's own", imported=METRIC_METHODS, resume="yes")
    keep_best: str | None = option(None, "score that decides; null: the task's headline", resume="yes")
    patience: int | None = option(
        None, "evaluations without a better score after which training stops", limits="> 0", resume="yes"
    )
    save_every: float | None = option(
        None, "epochs between checkpoints, besides one at each evaluation", limits="> 0", resume="yes"
    )
    save_every_steps: int | None = option(None, "in place of save_every", limits="> 0", resume="yes")
    keep_last: int = option(2, "checkpoints that are kept besides the best", limits="> 0", resume="yes")
    callbacks: list[str] = option([], "classes of one's own that the loop calls", imported=(), resume="yes")
    trackers: list[str] = option(["tensorboard"], "of Accelerate, such as wandb or trackio", resume="yes")
    log_every: int = option(50, "steps between records; fewer where that were below 20", limits="> 0", resume="yes")
    draw: int = option(4, "images whose predictions are drawn at each evaluation", limits=">= 0", resume="yes")
    output: str | None = option(None, "folder for everything; null: runs/ and the recipe's name", resume="yes")
    push_to_hub: str | None = option(None, "Hub repository for the result", resume="yes")
    resume: bool = option(True, "go on from the newest valid checkpoint in output", resume="yes")


SECTIONS: dict[str, type] = {
    **{"general": General, "data": Data, "optimisation": Optimisation, "run": Run},
    **{model: declaration.options for model, declaration in DECLARATIONS.items()},
}


@dataclass(frozen=True)
class Recipe(ViTPOptions, EoMTOptions, Run, Optimisation, Data, General):
    """How to train a model; `hf-segvit train --fields` lists what may be said.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names the field and the remedy.
    """

    def __post_init__(self) -> None:
        values = checked(Recipe, {name: value for name, value in vars(self).items() if (name, value) != ("task", None)})
        declaration = task_declaration(values["model"])
        values.setdefault("task", declaration.tasks[0])
        if values["options"] and not own_fields(self.model):
            raise ValueError(f"options={values['options']}: model={self.model} declares none; leave them out")
        values["options"] = checked(declaration.options, values["options"], "options.", without=FIELDS)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check_recipe(self, declaration)

    @property
    def declaration(self) -> type[TaskDeclaration]:
        """What may be said of its model."""
        return task_declaration(self.model)

    def task_options(self) -> Any:
        """The record of the task's `options`, with what is stated, as fields or under `options`, and the defaults."""
        record = self.declaration.options
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(record) if field.name in FIELDS}
        return record(**shared, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, also the defaults; `Recipe(**recipe.to_dict())` is the same recipe."""
        return dataclasses.asdict(self)

    def changed(self, **fields: Any) -> Recipe:
        """The same recipe with other values of these fields."""
        return Recipe(**{**self.to_dict(), **fields})


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def own_fields(model: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields that are stated under `options`: those that a task of one's own declares and no recipe has."""
    declared = dataclasses.fields(task_declaration(model).options)
    return {field.name: field for field in declared if field.name not in FIELDS}


def all_fields(model: str) -> dict[str, dataclasses.Field[Any]]:
    """All fields of a recipe, those under `options` as "options.NAME"."""
    own = {f"options.{name}": field for name, field in own_fields(model).items()}
    return {name: field for name, field in FIELDS.items() if name != "options"} | own


def resume_rules(model: str) -> dict[str, str]:
    """Whether a field may change when a training goes on: "yes", "no" or "told", see `option`."""
    return {name: field.metadata.get("resume", "no") for name, field in all_fields(model).items()}


def flat(recipe: Recipe) -> dict[str, Any]:
    """The value of every field, by the names of `all_fields`."""
    values = recipe.to_dict()
    values |= {f"options.{name}": value for name, value in values["options"].items()}
    return {name: values.get(name, default_of(field)) for name, field in all_fields(recipe.model).items()}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a recipe that comes with the package.
        overrides: "key=value" as `parse_key_values` reads them; a dot goes into a dict, as in
            "model_config.num_queries=100". `steps` takes the place of the file's `epochs`, and the other way round; so
            do `init` and `backbone`.

    Raises:
        ValueError: there is no such recipe or key (the message has the nearest), the file is no YAML, or a value does
            not fit its field.
    """
    path = find_recipe(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a recipe ({error}); give a YAML file in UTF-8") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a list of `key: value` lines, not {type(values).__name__}")
    values = {"name": path.stem, **_with_overrides(values, overrides)}
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe: the path itself, or that of a packaged recipe.

    Raises:
        ValueError: there is neither; the message has the nearest names.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    packaged = RECIPE_FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    near = suggestion(path.stem, packaged_recipes(), 3)
    raise ValueError(f"{path_or_name}: there is no such file, and no recipe of this name; {near}")


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def _with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a file with those of the command line."""
    kinds = {name: types_of(hint) for name, hint in typing.get_type_hints(Recipe).items()}
    stated = renamed(parse_key_values(overrides, [name for name in kinds if set(kinds[name]) <= {str, types.NoneType}]))
    result = renamed(copy.deepcopy(dict(values)))
    for name, rival in (("steps", "epochs"), ("epochs", "steps"), ("init", "backbone"), ("backbone", "init")):
        if name in stated and rival not in stated:
            result.pop(rival, None)
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
                raise ValueError(f"{key}: {part} holds {target!r}, which has no keys of its own")
        target[last] = value
    refuse_unknown(result, FIELDS)
    return result


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that fields have now, with a warning about old ones.

    Raises:
        ValueError: a field is there by its old and its new name.
    """
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise ValueError(f"{old} is called {new} now, and both are there; leave out {old}")
        if old in values:
            warnings.warn(f"the recipe's {old} is called {new} now; please rename it", FutureWarning, stacklevel=2)
    return {RENAMED.get(name, name): value for name, value in values.items()}


def _check_recipe(recipe: Recipe, declaration: type[TaskDeclaration]) -> None:
    """Refuse values that contradict each other, as far as can be told without data, weights or devices."""
    if recipe.task not in declaration.tasks:
        raise ValueError(
            f"task={recipe.task!r} is none of model={recipe.model}; {suggestion(recipe.task, declaration.tasks)}"
        )
    own = {field.name for field in dataclasses.fields(declaration.options)}
    for model, other in DECLARATIONS.items():
        for field in dataclasses.fields(other.options):
            value = getattr(recipe, field.name)
            if field.name not in own and value != default_of(field):
                raise ValueError(f"{field.name}={value!r} is for model={model}, not for {recipe.model}; leave it out")
    if recipe.epochs is not None and recipe.steps is not None:
        raise ValueError(f"epochs={recipe.epochs} and steps={recipe.steps} both say how long; set one of them to null")
    if recipe.init is not None and recipe.backbone is not None:
        raise ValueError(f"init={recipe.init} and backbone={recipe.backbone}: start from one of them; set one to null")
    if recipe.device_batch_size is not None and recipe.batch_size % recipe.device_batch_size:
        raise ValueError(
            f"device_batch_size={recipe.device_batch_size} does not divide batch_size={recipe.batch_size}, which "
            "counts all devices and accumulation"
        )
    parse_freeze(recipe.freeze)
    if recipe.lora is not None and recipe.freeze is not None:
        raise ValueError(f"lora and freeze={recipe.freeze}: adapters freeze what they adapt; set one of them to null")
    if recipe.annealing is True:
        raise ValueError("annealing=true says nothing; null anneals by the rule, false not at all, or give fractions")
    for pair in recipe.annealing or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"annealing={recipe.annealing} must hold [start, end] for each query layer")
        start, end = (parse_fraction(value) for value in pair)
        if start > end:
            raise ValueError(f"annealing has [{pair[0]}, {pair[1]}], which ends before it starts; swap them")


def parse_freeze(freeze: str | None) -> int | None:
    """What `freeze` asks for: `None` nothing, -1 the whole backbone, N the embeddings and the first N blocks.

    Raises:
        ValueError: it is neither.
    """
    if freeze is None:
        return None
    if freeze == "backbone":
        return -1
    match = re.fullmatch(r"until_layer:(\d+)", freeze)
    if match is None:
        raise ValueError(f"freeze={freeze!r} is unknown; give backbone, until_layer:N (such as until_layer:6) or null")
    return int(match.group(1))


def parse_fraction(value: Any) -> float:
    """A number in [0, 1], or a text such as "1/6".

    Raises:
        ValueError: it is neither.
    """
    try:
        number = Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"annealing has {value!r}; give fractions of training, such as 0.25 or 1/4") from error
    if not 0 <= number <= 1:
        raise ValueError(f"annealing has {value!r}, not a fraction of training; give 0 to 1, such as 0.25 or 1/4")
    return float(number)


def output_folder(recipe: Recipe) -> Path:
    """Where a recipe writes to."""
    return Path(recipe.output or Path("runs") / recipe.name)


def cache_folder(recipe: Recipe) -> Path | None:
    """Where id maps are kept for quicker reading; `None` where they are not."""
    if not recipe.cache:
        return None
    return output_folder(recipe) / "cache" if recipe.cache is True else Path(recipe.cache)
