"""A recipe: everything that decides how a model is trained, in one flat record, from one short YAML file.

`load_recipe` reads a file, or a recipe that comes with the package by its bare name (`packaged_recipes` lists them),
and applies `key=value` overrides; `Recipe` is the record. A field that is `None` is derived from the others, see
derivation.py, which also has the rules; whatever is stated is taken as it is.

Source of the packaged values: the official configurations of EoMT (Kerssies et al., CVPR 2025) and ViT-P.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .recipe_checks import check_recipe
from .recipe_values import apply_overrides, convert_fields, parse_yaml

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
        val_data: "FORMAT:PATH" of the pictures to score on where they are another data set.
        init: checkpoint of a segmentation model to start from; in its class head, classes of other names are new.
        backbone: backbone to start from, as `from_backbone` takes it. Without both, training starts from scratch; with
            either, pixels are normalised as those weights know them.
        model_config: fields of the model's configuration.
        image_size: pixels of the training pictures, one number or [height, width].
        augmentation: one of `data.augmentation.AUGMENTATIONS`.
        augmentation_options: other settings than those of this augmentation.
        loss_mask: keep void, crowds and padding out of the loss. The official recipes do not; one's own data should.
        epochs: passes over the data.
        steps: of the optimiser, instead of `epochs`.
        batch_size: pictures per step of the optimiser: processes x accumulation x pictures on a device.
        device_batch_size: pictures on a device at once; the rest of the batch is accumulated.
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
        num_workers: processes that read pictures; `None` takes what the machine has.
        cache: keep id maps in a form that is quicker to read, in this folder, or with `True` in `output`'s `cache`.
        evaluate_every: epochs between evaluations; `None` is one, or more where that were over 50 evaluations.
        evaluate_limit: score the first so many pictures alone.
        keep_best: score that decides which checkpoint is best; `None` is the headline of the task.
        patience: evaluations without a better score after which training stops.
        save_every: epochs between checkpoints, besides one at each evaluation; `None` saves no others.
        save_every_steps: instead of `save_every`.
        keep_last: checkpoints that are kept besides the best.
        trackers: of Accelerate, such as "tensorboard", "wandb" or "trackio".
        log_every: steps between records, or fewer where that were below 20 records.
        draw: pictures whose predictions are drawn at each evaluation.
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
