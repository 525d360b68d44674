"""A recipe: everything that decides how a model is trained, in one flat record, from one short YAML file.

`load_recipe` reads a file, or a recipe that comes with the package by its bare name (`packaged_recipes` lists them),
and applies `key=value` overrides; `Recipe` is the record. A field that is `None` is derived from the others, see
derivation.py, which also has the rules; whatever is stated is taken as it is.

Source of the packaged values: the official configurations of EoMT (Kerssies et al., CVPR 2025) and ViT-P.

What a recipe may hold: the choices of its fields, their ranges, and values that contradict each other.

`check_recipe` refuses everything that can be told without data, weights or devices, so that a mistake shows before
anything is loaded.

Values of a recipe as they come from a file or the command line: reading, overriding, and fitting them to the fields.

In here, in this order: YAML (with numbers like 1e-4, which YAML 1.1 takes for text, and no key twice), `key=value`
overrides, and the types of the fields.

Where a training writes to: `output_folder` for results and checkpoints, `cache_folder` for id maps.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

RECIPE_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """How to train a model.

    Attributes:
        model: "eomt" or "vit_p".
        task: "panoptic", "instance" or "semantic" for EoMT, "points" for ViT-P.
        data: "FORMAT:PATH", as `load_segmentation_dataset` takes it.
        train_split: of the data; `None` is the first there is.
        val_split: of the data, to score on; `None` is the first of val, validation and test that there is.
        val_data: "FORMAT:PATH" of the images to score on where they are another data set.
        init: checkpoint of a segmentation model to start from; in its class head, classes of other names are new.
        backbone: backbone to start from, as `from_backbone` takes it. Without both, training starts from scratch; with
            either, pixels are normalised as those weights know them.
        model_config: fields of the model's configuration.
        image_size: pixels of the training images, one number or [height, width].
        augmentation: one of `data.augmentation.AUGMENTATIONS`.
        augmentation_options: other settings than those of this augmentation.
        loss_mask: keep void, crowds and padding out of the loss. The official recipes do not; one's own data should.
        epochs: passes over the data.
        steps: of the optimiser, instead of `epochs`.
        batch_size: images per step of the optimiser: processes x accumulation x images on a device.
        device_batch_size: images on a device at once; the rest of the batch is accumulated.
        optimizer: "adamw" or "sgd".
        learning_rate: the highest, of everything that `layer_decay` does not lower.
        base_learning_rate: the same for a batch of 16 (80 with SGD), from which `learning_rate` follows by rule.
        betas: of AdamW.
        momentum: of SGD.
        weight_decay: of AdamW and SGD.
        weight_decay_mode: "all" (official) decays every parameter, "matrices" spares biases, norms and tokens.
        max_grad_norm: gradients are scaled down to this norm; `None` leaves them.
        schedule: "polynomial" or "cosine".
        warmup_steps: [all parameters] or [new parameters, then the backbone, which stands still before].
        power: of the polynomial schedules of learning rate and annealing.
        layer_decay: the learning rate of a block is this much lower than that of the next.
        decay_query_layers: whether `layer_decay` counts for the blocks that see the queries.
        prompt_learning_rate: of ViT-P's prompt encoder.
        annealing: [start, end] per query layer, as fractions of training (a number or text such as "3000/88692") over
            which its masked attention is annealed; `False` leaves masked attention as the configuration has it.
        freeze: "backbone", or "until_layer:N" for the embeddings and the first N blocks.
        lora: settings of low-rank adapters: `rank`, `alpha`, `dropout`, `targets`; see adapters.py.
        precision: "no", "bf16" or "fp16".
        gradient_checkpointing: compute activations of the blocks again in the backward pass, to save memory.
        compile: use `torch.compile`.
        ema_decay: of the moving average of the weights that is evaluated and saved; `None` keeps none.
        seed: of all randomness.
        num_workers: processes that read images; `None` takes what the machine has.
        cache: keep id maps in a form that is quicker to read, in this folder, or with `True` in `output`'s `cache`.
        evaluate_every: epochs between evaluations; `None` is one, or more where that were over 50 evaluations.
        evaluate_limit: score the first so many images alone.
        keep_best: score that decides which checkpoint is best; `None` is the headline of the task.
        patience: evaluations without a better score after which training stops.
        save_every: epochs between checkpoints, besides one at each evaluation; `None` saves no others.
        save_every_steps: instead of `save_every`.
        keep_last: checkpoints that are kept besides the best.
        trackers: of Accelerate, such as "tensorboard", "wandb" or "trackio".
        log_every: steps between records, or fewer where that were below 20 records.
        draw: images whose predictions are drawn at each evaluation.
        points: of ViT-P: how training points are drawn.
        output: folder for everything that training writes; `None` is "runs/" and the recipe's name.
        push_to_hub: Hub repository for the result.
        resume: go on from the newest valid checkpoint in `output`.
        name: of the recipe, from its file.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names the field and the remedy.
    """

    model: str = "eomt"
    task: str = "panoptic"
    data: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    val_data: str | None = None
    init: str | None = None
    backbone: str | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    image_size: int | list[int] | None = None
    augmentation: str | None = None
    augmentation_options: dict[str, Any] = field(default_factory=dict)
    loss_mask: bool = False
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 16
    device_batch_size: int | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.9
    weight_decay: float = 0.05
    weight_decay_mode: str = "all"
    max_grad_norm: float | None = 0.01
    schedule: str = "polynomial"
    warmup_steps: list[int] | None = None
    power: float = 0.9
    layer_decay: float = 0.8
    decay_query_layers: bool = True
    prompt_learning_rate: float | None = None
    annealing: list[Any] | bool | None = None
    freeze: str | None = None
    lora: dict[str, Any] | None = None
    precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    ema_decay: float | None = None
    seed: int = 0
    num_workers: int | None = None
    cache: bool | str = False
    evaluate_every: float | None = None
    evaluate_limit: int | None = None
    keep_best: str | None = None
    patience: int | None = None
    save_every: float | None = None
    save_every_steps: int | None = None
    keep_last: int = 2
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 50
    draw: int = 4
    points: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    push_to_hub: str | None = None
    resume: bool = True
    name: str = "recipe"

    def __post_init__(self) -> None:
        for name, value in convert_fields(vars(self), type(self)).items():
            object.__setattr__(self, name, value)
        check_recipe(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields, also the defaults; `Recipe(**recipe.to_dict())` is the same recipe."""
        return dataclasses.asdict(self)

    def changed(self, **fields: Any) -> Recipe:
        """The same recipe with other values of these fields."""
        return Recipe(**{**self.to_dict(), **fields})


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a recipe that comes with the package.
        overrides: "key=value" in YAML; a dot goes into a dict, as in "model_config.num_queries=100". `steps` takes the
            place of the file's `epochs`, and the other way round; so do `init` and `backbone`.

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
    values = {"name": path.stem, **apply_overrides(_without_rivals(values, overrides), overrides, Recipe)}
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _without_rivals(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a file without those that an override stands in for."""
    stated = {text.partition("=")[0].strip() for text in overrides}
    rivals = {"steps": "epochs", "epochs": "steps", "init": "backbone", "backbone": "init"}
    replaced = {rival for key, rival in rivals.items() if key in stated and rival not in stated}
    return {key: value for key, value in values.items() if key not in replaced}


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
    names = packaged_recipes()
    near = get_close_matches(path.stem, names, n=3, cutoff=0.4) or names
    raise ValueError(f"{path_or_name}: there is no such file, and no recipe of this name; near: {', '.join(near)}")


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


CHOICES = {
    "model": ("eomt", "vit_p"),
    "task": ("panoptic", "instance", "semantic", "points"),
    "optimizer": ("adamw", "sgd"),
    "weight_decay_mode": ("all", "matrices"),
    "schedule": ("polynomial", "cosine"),
    "precision": ("no", "bf16", "fp16"),
}
POSITIVE = (
    "epochs",
    "steps",
    "batch_size",
    "device_batch_size",
    "learning_rate",
    "base_learning_rate",
    "prompt_learning_rate",
    "max_grad_norm",
    "power",
    "layer_decay",
    "evaluate_every",
    "evaluate_limit",
    "patience",
    "save_every",
    "save_every_steps",
    "keep_last",
    "log_every",
)
NOT_NEGATIVE = ("weight_decay", "momentum", "seed", "num_workers", "draw")
LORA_KEYS = ("rank", "alpha", "dropout", "targets")


def check_recipe(recipe: Any) -> None:
    """Refuse a `Recipe` that cannot be meant.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    for name, choices in CHOICES.items():
        value = getattr(recipe, name)
        if value not in choices:
            near = get_close_matches(value, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
            raise ValueError(f"{name}={value!r} is unknown; {hint}")
    for name in POSITIVE:
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be greater than 0")
    for name in NOT_NEGATIVE:
        value = getattr(recipe, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name}={value} must not be negative")
    if (recipe.task == "points") != (recipe.model == "vit_p"):
        raise ValueError(
            f"model={recipe.model} and task={recipe.task} do not go together; ViT-P's task is points, EoMT's are "
            "panoptic, instance and semantic"
        )
    if recipe.epochs is not None and recipe.steps is not None:
        raise ValueError(f"epochs={recipe.epochs} and steps={recipe.steps} both say how long; set one of them to null")
    if recipe.init is not None and recipe.backbone is not None:
        raise ValueError(f"init={recipe.init} and backbone={recipe.backbone}: start from one of them; set one to null")
    _check_optimization(recipe)
    _check_image_size(recipe.image_size)
    _check_annealing(recipe)
    parse_freeze(recipe.freeze)
    _check_lora(recipe)


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


def _check_optimization(recipe: Any) -> None:
    if recipe.layer_decay > 1:
        raise ValueError(f"layer_decay={recipe.layer_decay} must be at most 1, which is the same rate for all layers")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        raise ValueError(f"betas={recipe.betas} must be two numbers in [0, 1)")
    if recipe.momentum >= 1:
        raise ValueError(f"momentum={recipe.momentum} must be below 1")
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        raise ValueError(f"ema_decay={recipe.ema_decay} must lie between 0 and 1, such as 0.999; null keeps no average")
    if recipe.device_batch_size is not None and recipe.batch_size % recipe.device_batch_size:
        raise ValueError(
            f"device_batch_size={recipe.device_batch_size} does not divide batch_size={recipe.batch_size}, which "
            "counts all devices and accumulation"
        )
    warmup = recipe.warmup_steps
    if warmup is not None and (len(warmup) not in (1, 2) or min(warmup) < 0):
        raise ValueError(f"warmup_steps={warmup} must be one or two whole numbers, such as [500] or [500, 1000]")


def _check_image_size(image_size: int | list[int] | None) -> None:
    sides = [image_size] if isinstance(image_size, int) else image_size
    if sides is not None and (len(sides) > 2 or not sides or min(sides) < 1):
        raise ValueError(f"image_size={image_size} must be a number of pixels, or [height, width]")


def _check_annealing(recipe: Any) -> None:
    annealing = recipe.annealing
    if annealing is True:
        raise ValueError("annealing=true says nothing; null anneals by the rule, false not at all, or give fractions")
    for pair in annealing or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"annealing={annealing} must hold [start, end] for each query layer")
        start, end = (parse_fraction(value) for value in pair)
        if start > end:
            raise ValueError(f"annealing has [{pair[0]}, {pair[1]}], which ends before it starts; swap them")
    if annealing and recipe.model != "eomt":
        raise ValueError(f"annealing is for EoMT's masked attention, not for model={recipe.model}; leave it out")


def _check_lora(recipe: Any) -> None:
    if recipe.lora is None:
        return
    for key in recipe.lora:
        if key not in LORA_KEYS:
            near = get_close_matches(str(key), LORA_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(LORA_KEYS)}"
            raise ValueError(f"lora has no key {key!r}; {hint}")
    if recipe.freeze is not None:
        raise ValueError(f"lora and freeze={recipe.freeze}: adapters freeze what they adapt; set one of them to null")


class _RecipeLoader(yaml.SafeLoader):
    """Plain data only; and a key that stands twice is an error, not silently the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(twice)} stands there twice", node.start_mark
            )
        return mapping


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, place: str) -> Any:
    """The data in a YAML text; nothing in it is executed.

    Args:
        text: YAML.
        place: where it comes from, for the error.

    Raises:
        ValueError: it is no YAML, or has a key twice; the message has the line.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{place}: no valid YAML ({' '.join(str(error).split())})") from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str], record: type) -> dict[str, Any]:
    """Values with "key=value" texts applied in order.

    Args:
        values: field to value.
        overrides: a key may have dots where it goes into a dict; the value is YAML, so `key=null` is no value.
        record: the dataclass whose fields are meant.

    Raises:
        ValueError: a text is not of this form, or there is no such field; the message has the nearest.
    """
    result = copy.deepcopy(dict(values))
    refuse_unknown(result, record)
    hints = typing.get_type_hints(record)
    for text in overrides:
        key, separator, value = text.partition("=")
        name, *inner = key.strip().split(".")
        if not separator or not all((name, *inner)):
            raise ValueError(f"{text!r} is no override; give key=value, such as batch_size=8")
        refuse_unknown([name], record)
        if not inner and set(_options(hints[name])) <= {str, types.NoneType}:
            result[name] = _text(value)
            continue
        parsed = parse_yaml(value, f"the value of {key}")
        if not inner:
            result[name] = parsed
            continue
        if not _allows_dict(hints[name]):
            raise ValueError(f"{key}: {name} holds no keys of its own; give {name}=value")
        target = result[name] = result.get(name) or {}
        for part in inner[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {part} holds {target!r}, which has no keys of its own")
        target[inner[-1]] = parsed
    return result


def _text(value: str) -> str | None:
    """A text field: a folder may be called 2024, and a path may hold what means something in YAML."""
    value = value.strip()
    return None if value in ("null", "~", "") else value


def refuse_unknown(names: Any, record: type) -> None:
    """Refuse names that are no fields.

    Raises:
        ValueError: naming the first and the fields that it resembles.
    """
    known = [field.name for field in dataclasses.fields(record)]
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(known)}"
            raise ValueError(f"a recipe has no key {name!r}; {hint}")


def convert_fields(values: Mapping[str, Any], record: type) -> dict[str, Any]:
    """Values in the types of their fields: whole numbers where decimals are meant and the like are converted.

    Raises:
        ValueError: a value is of another type; the message names the field, the value and what is expected.
    """
    hints = typing.get_type_hints(record)
    return {name: _convert(name, value, hints[name]) for name, value in values.items()}


def _convert(name: str, value: Any, hint: Any) -> Any:
    options = _options(hint)
    for option in options:
        matched, converted = _match(value, option)
        if matched:
            return converted
    expected = " or ".join(_words(option) for option in options)
    raise ValueError(f"{name}={value!r} does not fit; expected {expected}")


def _match(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value in it."""
    origin = typing.get_origin(option)
    if origin is list:
        if not isinstance(value, list | tuple):
            return False, value
        matches = [_match(item, typing.get_args(option)[0]) for item in value]
        return all(matched for matched, _ in matches), [converted for _, converted in matches]
    if origin is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    if option is Any:
        return True, value
    if option is float and isinstance(value, int | float) and not isinstance(value, bool):
        return True, float(value)
    if option is int and isinstance(value, float) and value.is_integer():
        return True, int(value)
    return isinstance(value, option) and (option is not int or not isinstance(value, bool)), value


def _allows_dict(hint: Any) -> bool:
    return any(typing.get_origin(option) is dict for option in _options(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _words(option: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        types.NoneType: "null",
    }
    origin = typing.get_origin(option)
    if origin is list:
        return "a list"
    return "key: value pairs" if origin is dict else words.get(option, str(option))


def output_folder(recipe: Recipe) -> Path:
    """Where a recipe writes to."""
    return Path(recipe.output or Path("runs") / recipe.name)


def cache_folder(recipe: Recipe) -> Path | None:
    """Where id maps are kept for quicker reading; `None` where they are not."""
    if not recipe.cache:
        return None
    return output_folder(recipe) / "cache" if recipe.cache is True else Path(recipe.cache)
