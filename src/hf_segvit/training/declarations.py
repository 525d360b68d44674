"""Declare the fields of a recipe, and what each kind of model adds to them.

`option` declares a field of a dataclass once; `checked` checks values and converts them to the declared types. The
table of `hf-segvit train --fields` and the rules for resuming follow from the same declarations. `TaskDeclaration` is
what a recipe may set for one kind of model. Every `TrainingTask` is one; those of EoMT and ViT-P are separate classes,
which their tasks inherit, so that a recipe can be read and checked without PyTorch.
"""

# ruff: noqa: RUF009 - `option` makes a field, which belongs into the class

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import reprlib
import types
import typing
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..lookup import import_object, is_import_path, suggestion

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
# Names of types for people who write YAML, not Python.
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
WORDS |= {list: "a list", dict: "key: value pairs"}
# Steps of a run; the longest published one has a hundredth of it.
MOST_STEPS = 10_000_000
_DEEPEST, _MOST_VALUES = 12, 10_000  # of the lists and mappings of a field, each alias in YAML counted anew
_LONGEST_SHOWN = 300
_LONGEST_TEXT = 4096  # characters, as of a path


def option(
    default: Any,
    meaning: str,
    *,
    limits: str = "",
    choices: Sequence[str] = (),
    length: Sequence[int] = (),
    keys: type | None = None,
    imported: Sequence[str] | None = None,
    resume: str = "no",
) -> Any:
    """Declare a field of a dataclass.

    Args:
        limits: of a number, or of each number in a list, such as "> 0" or ">= 0, < 1".
        length: the lengths that a list may have.
        keys: dataclass that declares the keys of a dict, or of each dict in a list.
        imported: the field takes "package.module:Class" (besides `choices`); the class must have these methods.
        resume: whether the value may change when a run is resumed: "yes" if the result does not depend on it, "no", or
            "told" if it does, but changing it can rescue a diverging run; the change is then logged.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, list | dict):  # a copy for each record, as the default itself would be shared
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Shortened(reprlib.Repr):
    """Values in messages: short, whatever a file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxother = 3, 8, 4, 120, 120

    def repr_int(self, value: int, level: int) -> str:
        """A number, or how long it is: Python refuses to write those of thousands of digits."""
        bits = value.bit_length()
        return repr(value) if bits < 200 else f"a number of {int(bits * math.log10(2)) + 1} digits"


def shown(value: Any) -> str:
    """A value in a message."""
    text = _Shortened().repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not set."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def checked(record: type, values: Mapping[str, Any], where: str = "", without: Container[str] = ()) -> dict[str, Any]:
    """Convert values to the types that a dataclass declares, and check limits and choices.

    Args:
        where: prefix of the names in errors, such as "points.".
        without: fields of the dataclass that must not be set here.

    Raises:
        ValueError: a name is unknown or a value does not fit; the message names both and what would fit.
    """
    for name, value in values.items():
        refuse_deep(f"{where}{name}", value)
    hints = typing.get_type_hints(record)
    declared = {field.name: field.metadata for field in dataclasses.fields(record) if field.name not in without}
    refuse_unknown(values, declared, where)
    return {name: _checked(f"{where}{name}", value, hints[name], declared[name]) for name, value in values.items()}


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raise a `ValueError` for the first name that is no field, with the fields it resembles."""
    known = list(known)
    for name in names:
        if name not in known:
            near = suggestion(str(name)[:_LONGEST_TEXT], known, 2)
            raise ValueError(f"{where.rstrip('.') or 'a recipe'} has no key {shown(name)}; {near}")


def refuse_deep(name: str, value: Any) -> None:
    """Refuse nesting and numbers of values that no setting needs: the work on them grows without bound."""
    count, level = 0, [value]
    for _ in range(_DEEPEST):
        count += len(level)
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
        if count + len(level) > _MOST_VALUES:
            raise ValueError(f"{name} holds more than {_MOST_VALUES:,} values; no setting needs as many, remove them")
    raise ValueError(f"{name} is nested more than {_DEEPEST} deep; no setting is, remove the brackets")


def types_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, `list` and `dict` without the types of their items."""
    return tuple(typing.get_origin(choice) or choice for choice in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _checked(name: str, value: Any, hint: Any, declared: Mapping[str, Any]) -> Any:
    # A float field takes 3 from YAML and an int field takes 3.0; the first type that fits wins.
    matches = [converted for kind in _alternatives(hint) for converted in _converted(value, kind)]
    if not matches:
        expected = " or ".join(WORDS.get(kind, str(kind)) for kind in types_of(hint))
        raise ValueError(f"{name}={shown(value)} does not fit; expected {expected}")
    result, keys, length = matches[0], declared.get("keys"), declared.get("length")
    if length and isinstance(result, list) and len(result) not in length:
        raise ValueError(
            f"{name}={shown(result)} must have {' or '.join(map(str, length))} numbers: {declared['meaning']}"
        )
    items = result if isinstance(result, list) else [result]
    if keys is not None:
        items = [checked(keys, item, f"{name}.") if isinstance(item, dict) else item for item in items]
    limits = [limit.split() for limit in declared.get("limits", "").split(", ") if limit]
    for item in items:
        # "not all within" rather than "any beyond": every comparison with NaN is false, so NaN is refused, too.
        if isinstance(item, int | float) and not all(_COMPARISONS[sign](item, float(bound)) for sign, bound in limits):
            raise ValueError(f"{name}={shown(value)} must be {' and '.join(map(' '.join, limits))}")
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{name}={shown(value)} must be finite: {declared.get('meaning', '')}")
        if isinstance(item, str):
            _check_text(name, item, declared.get("choices"), declared.get("imported"))
    return items if isinstance(result, list) else items[0]


def _check_text(name: str, text: str, choices: Sequence[str] | None, methods: Sequence[str] | None) -> None:
    # Control and format characters and halves of letters are in no name or path that anybody means.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text) or len(text) > _LONGEST_TEXT:
        raise ValueError(
            f"{name}={shown(text)} holds a character that is not printed, or more than {_LONGEST_TEXT:,} of them; "
            "correct it"
        )
    if methods is not None and (not choices or is_import_path(text)):
        import_object(text, name, methods)
    elif choices and text not in choices:
        also = "" if methods is None else "; or give package.module:Class"
        raise ValueError(f"{name}={shown(text)} is unknown; {suggestion(text, choices)}{also}")


def _converted(value: Any, kind: Any) -> list[Any]:
    """The value in a type, as a list of one; an empty list if it does not fit."""
    origin = typing.get_origin(kind) or kind
    if origin is list and isinstance(value, list | tuple):
        (item_kind,) = typing.get_args(kind) or (Any,)
        items = [fitted for item in value for fitted in _converted(item, item_kind)]
        return [items] if len(items) == len(value) else []
    if origin is dict and isinstance(value, Mapping):
        return [dict(value)] if all(isinstance(key, str) for key in value) else []
    if kind is Any:
        return [value]
    if isinstance(value, bool):  # before the numbers, since bool is a subclass of int
        return [value] if kind is bool else []
    if kind is float and isinstance(value, int):
        # A number of 400 digits is beyond all limits, and beyond floating point.
        return [float(value) if value.bit_length() < 1000 else math.inf if value > 0 else -math.inf]
    if kind is int and isinstance(value, float) and value.is_integer():  # YAML has 9.0e+4 as a float
        return [int(value)]
    return [value] if isinstance(value, origin) else []


@dataclass(frozen=True)
class SegmentationOptions:
    """Fields of models that learn from masks."""

    # In the official code void is background to every mask, which teaches nonsense where much of an image is void.
    loss_mask: bool = option(
        False, "leave void, crowds and padding out of the loss; false as in the papers, true advised for own data"
    )


@dataclass(frozen=True)
class OutlierOptions:
    """The keys of `outliers`, see data/outliers.py; the loss is that of RbA (Nayal et al., ICCV 2023)."""

    data: str = option(None, "folder of cut-outs with transparency, or FORMAT:PATH of data with objects")
    split: str | None = option(None, "split of the data; null: the first")
    probability: float = option(0.2, "share of the training images that get objects", limits="> 0, <= 1")
    max_objects: int = option(1, "an image gets 1 to as many objects", limits="> 0, <= 100")
    scale_range: list[float] = option(
        [0.1, 0.5], "longer side of objects, relative to the shorter one of the image", limits="> 0, <= 1", length=(2,)
    )
    weight: float = option(1.0, "weight of the outlier loss", limits="> 0, <= 1e6")


@dataclass(frozen=True)
class AnnealingOptions(SegmentationOptions):
    """Fields of models whose queries attend by masks."""

    annealing: list[Any] | bool | None = option(
        None,
        "when masked attention fades: [start, end] for each query layer (decoder layer of mask2former_vit), as "
        "fractions of training; null: by rule; false: never",
    )


@dataclass(frozen=True)
class EoMTOptions(AnnealingOptions):
    """Fields of EoMT only."""

    decay_query_layers: bool = option(True, "apply layer_decay to the query layers, too")
    # LogitNorm of Wei et al., ICML 2022.
    logit_norm: float | None = option(
        None,
        "temperature of class logits that the loss scales to length 1, such as 0.04 (LogitNorm)",
        limits="> 0, <= 100",
    )
    outliers: dict[str, Any] | None = option(
        None, "paste objects into training images, which the model learns to reject", keys=OutlierOptions
    )


@dataclass(frozen=True)
class PromptOptions:
    """How training points are drawn, see data/prompts.py, which also has the defaults in force."""

    num_points: int = option(200, "prompts per image", limits="> 0, <= 100000")
    source: str = option("mask", "kind of labels that prompts are drawn from", choices=("mask", "coarse", "box"))
    instance_aware: bool = option(False, "draw a segment of the class first, then a pixel of it")
    box_share: float = option(
        0.5, "source=box: share of prompts that are boxes; the others are points in boxes", limits=">= 0, <= 1"
    )
    coarse_margin: float = option(0.03, "source=coarse: how far labels stay away from borders", limits=">= 0, <= 1")


@dataclass(frozen=True)
class MixtureOptions(PromptOptions):
    """Another data set of a mixture; options of prompts that are not set are those of the recipe's own data."""

    data: str = option(None, "FORMAT:PATH")
    share: float = option(1.0, "share of the training images, relative to the other data sets", limits="> 0, <= 1e6")
    split: str | None = option(None, "null: the first split")


@dataclass(frozen=True)
class PointOptions(PromptOptions):
    """The keys of `points`."""

    share: float = option(1.0, "share of the recipe's own data in a mixture", limits="> 0, <= 1e6")
    mixture: list[dict[str, Any]] = option(
        [], "more data sets, each with data, split, share, source, ...", keys=MixtureOptions
    )
    reset_head: bool = option(False, "with init: learn all classes anew")
    evaluate: str | list[str] = option(
        ["random"], "kinds of points to score at", choices=("random", "interior", "maximum")
    )
    generator: str | None = option(None, "segmentation model that proposes the masks for evaluate=maximum")


@dataclass(frozen=True)
class ViTPOptions:
    """Fields of ViT-P only."""

    prompt_learning_rate: float | None = option(
        None, "learning rate of the prompt encoder; null: learning_rate", limits="> 0, <= 1000", resume="told"
    )
    points: dict[str, Any] = option({}, "how training points are drawn", keys=PointOptions)


@dataclass(frozen=True)
class NoOptions:
    """A model without fields of its own."""


class TaskDeclaration:
    """What a recipe may set for one kind of model.

    Attributes:
        tasks: values of `task`; the first is the default.
        default_image_size: pixels per side, for all tasks or by task.
        default_augmentation: name or import path, for all tasks or by task.
        options: dataclass of additional fields, see `option`. Those that `Recipe` has, too, are set there; all others
            under `options`.
    """

    tasks: ClassVar[Sequence[str]] = ()
    default_image_size: ClassVar[int | Mapping[str, int]] = 512
    default_augmentation: ClassVar[str | Mapping[str, str]] = "eomt_semantic"
    options: ClassVar[type] = NoOptions


class SegmentationDeclaration(TaskDeclaration):
    """Segmentation by masks."""

    tasks = ("panoptic", "instance", "semantic")
    # Sizes and augmentations of EoMT's official configurations for COCO and ADE20K.
    default_image_size: ClassVar = {"panoptic": 640, "instance": 640, "semantic": 512}
    default_augmentation: ClassVar = {
        **{"panoptic": "eomt_coco_panoptic", "instance": "eomt_coco_instance", "semantic": "eomt_semantic"}
    }
    options: ClassVar[type] = SegmentationOptions


class QueryDeclaration(SegmentationDeclaration):
    """Segmentation by queries that attend by masks."""

    options: ClassVar[type] = AnnealingOptions


class EoMTDeclaration(QueryDeclaration):
    """EoMT."""

    options = EoMTOptions


class Mask2FormerViTDeclaration(QueryDeclaration):
    """Mask2Former on a plain ViT."""


class ViTPDeclaration(TaskDeclaration):
    """ViT-P."""

    tasks = ("points",)
    default_image_size = 518  # the official size: 37 patches of 14 pixels
    default_augmentation = "vit_p"
    options = ViTPOptions


DECLARATIONS: dict[str, type[TaskDeclaration]] = {
    "eomt": EoMTDeclaration,
    "mask2former_vit": Mask2FormerViTDeclaration,
    "vit_p": ViTPDeclaration,
}


def task_declaration(model: str) -> type[TaskDeclaration]:
    """The declaration for a recipe's `model`: by name, or a `TrainingTask` by import path.

    Raises:
        ValueError: there is no such class, or it is not a complete training task.
    """
    if model in DECLARATIONS:
        return DECLARATIONS[model]
    task_class = import_object(model, "model")
    if not issubclass(task_class, TaskDeclaration):
        raise ValueError(f"model={model} is no training task; derive it from hf_segvit.training.tasks.TrainingTask")
    # Abstract methods would fail only once the task is created, after the recipe has been accepted.
    missing = [*sorted(getattr(task_class, "__abstractmethods__", ())), *([] if task_class.tasks else ["tasks"])]
    if missing:
        raise ValueError(f"model={model} lacks {', '.join(missing)}; add it, see TrainingTask")
    return task_class
