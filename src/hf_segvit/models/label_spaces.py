"""Which classes of two label spaces are the same, by their names.

`match_names` compares names without case, hyphens and underscores; then by their first synonym, up to a comma or
semicolon ("person, individual"); then by `ALIASES`, words that publishers of one label set differ in. Order never
decides there. What follows from it depends on who asks:

- `match_label_spaces`: a generator and a classifier, whose classes may differ where that is allowed.
- `match_labels`: a model and a data set with as many classes, where order decides what names leave, and that is told.
  Label ids are turned by `LabelMatch.table`, and back by `LabelMatch.model_ids`.

C classes of the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .class_fusion import NO_MATCH

LABEL_MISMATCHES = ("error", "keep")

# Words for the same class in published lists of COCO, ADE20K and Cityscapes; the value stands for all of its keys.
ALIASES = {
    "aeroplane": "airplane",
    "plane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tv": "television",
    "tvmonitor": "television",
    "tv monitor": "television",
    "television receiver": "television",
    "television set": "television",
    "hair dryer": "hair drier",
    "doughnut": "donut",
    "cellphone": "cell phone",
    "mobile phone": "cell phone",
    "fridge": "refrigerator",
    "icebox": "refrigerator",
    "conveyor belt": "conveyer belt",
    "banister": "bannister",
    "crt": "crt screen",
    "trafficlight": "traffic light",
    "trafficsign": "traffic sign",
    "playing field": "playingfield",
    "window": "windowpane",
    "tub": "bathtub",
    "rail": "railing",
    "street lamp": "streetlight",
    "clothes": "apparel",
    "pool": "swimming pool",
    "falls": "waterfall",
    "trash can": "ashcan",
}

_GENERIC = re.compile(r"label_?\d+")  # Transformers' names where nobody gave any
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class LabelSpaceMatch:
    """How the classes of a classifier are those of a generator.

    Attributes:
        class_matches: for each class of the generator the classifier's number, or -1.
        generator_only: names that only the generator has.
        classifier_only: names that only the classifier has.
    """

    class_matches: tuple[int, ...]
    generator_only: tuple[str, ...] = ()
    classifier_only: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The classes that are not shared, for a message; "" where all are."""
        parts = [
            f"only the {owner} knows {_shown(names)}"
            for owner, names in (("generator", self.generator_only), ("classifier", self.classifier_only))
            if names
        ]
        return "; ".join(parts)


def match_label_spaces(
    generator_labels: Mapping[Any, str], classifier_labels: Mapping[Any, str], label_mismatch: str = "error"
) -> LabelSpaceMatch:
    """Match the classes of a generator and a classifier by name.

    Args:
        generator_labels: name by label id, numbered from 0.
        classifier_labels: the same of the classifier.
        label_mismatch: `"error"`: both must have the same classes, in any order; `"keep"`: some may be known to one of
            them only.

    Returns:
        The matches; with `"keep"` perhaps not of all classes.

    Raises:
        ValueError: the classes differ (`"error"`), or none is shared; the message names some of them.
    """
    if label_mismatch not in LABEL_MISMATCHES:
        raise ValueError(f"label_mismatch={label_mismatch!r} is not one of {', '.join(map(repr, LABEL_MISMATCHES))}")
    matches = match_names(generator_labels, classifier_labels)
    unnamed = [
        owner
        for owner, labels in (("generator", generator_labels), ("classifier", classifier_labels))
        if labels and are_unnamed(labels)
    ]
    if unnamed and not matches:
        raise ValueError(
            f"the classes of the {' and the '.join(unnamed)} have no names ({_names(generator_labels)[0]!r}, "
            f"{_names(classifier_labels)[0]!r}), so there is no telling which are the same; set id2label in the "
            "model's config to the names of its classes"
        )
    taken = set(matches.values())
    result = LabelSpaceMatch(
        tuple(matches.get(label, NO_MATCH) for label in range(len(generator_labels))),
        tuple(name for label, name in enumerate(_names(generator_labels)) if label not in matches),
        tuple(name for label, name in enumerate(_names(classifier_labels)) if label not in taken),
    )
    if not matches:
        raise ValueError(
            f"generator and classifier share no class: {result.description}; take a classifier of the same data set, "
            "or correct the names in id2label"
        )
    if result.description and label_mismatch == "error":
        raise ValueError(
            f"generator and classifier have different classes: {result.description}; pass label_mismatch='keep' to "
            f"fuse the {len(matches)} that they share, or correct the names in id2label"
        )
    return result


def match_names(labels: Mapping[Any, str], others: Mapping[Any, str]) -> dict[int, int]:
    """The label id among others of each class whose name tells it, by label id.

    Names that several classes share tell nothing, unless all names are the same in the same order; nor do those of
    classes that nobody named (`LABEL_0`, ...).
    """
    ours, theirs = _names(labels), _names(others)
    if [whole_name(name) for name in ours] == [whole_name(name) for name in theirs]:
        return {label: label for label in range(len(ours))}
    matches: dict[int, int] = {}
    if are_unnamed(labels) or are_unnamed(others):
        return matches
    for form in (whole_name, first_synonym, _published_alias):
        left, right = _unique_names(ours, matches.keys(), form), _unique_names(theirs, matches.values(), form)
        matches |= {left[name]: right[name] for name in left if name in right}
    return matches


def whole_name(name: str) -> str:
    """A class name without case, hyphens and underscores."""
    return " ".join(re.split(r"[\s_-]+", str(name).casefold().strip()))


def first_synonym(name: str) -> str:
    """The first of the synonyms that a class name lists, in the form of `whole_name`."""
    return whole_name(re.split("[,;]", str(name))[0])


def _published_alias(name: str) -> str:
    synonym = first_synonym(name)
    return ALIASES.get(synonym, synonym)


def are_unnamed(labels: Mapping[Any, str]) -> bool:
    """Whether all class names are what Transformers calls classes that nobody named."""
    return all(_GENERIC.fullmatch(str(name).casefold()) is not None for name in labels.values())


def _names(labels: Mapping[Any, str]) -> list[str]:
    """Names in the order of their label ids, which are numbers from 0, perhaps as text."""
    return [str(name) for _, name in sorted((int(label), name) for label, name in labels.items())]


def _unique_names(names: list[str], matched: Iterable[int], form: Callable[[str], str]) -> dict[str, int]:
    """Label id by name in a form, of classes not matched yet whose name no other of them has."""
    taken = set(matched)
    forms = {label: form(name) for label, name in enumerate(names) if label not in taken}
    counts = Counter(forms.values())
    return {name: label for label, name in forms.items() if counts[name] == 1}


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


@dataclass(frozen=True)
class LabelMatch:
    """How the classes of a model are those of a data set.

    Attributes:
        table: (C,) int64 label id of the data set for each of the model's; `None` where both number alike.
        by_order: (model's name, data set's name) of the classes that are taken for one another although their names
            differ.
    """

    table: np.ndarray | None
    by_order: list[tuple[str, str]] = field(default_factory=list)

    def model_ids(self, data_ids: Iterable[int]) -> list[int]:
        """The model's label ids of classes of the data set, rising."""
        wanted = set(data_ids)
        return sorted(wanted if self.table is None else np.flatnonzero(np.isin(self.table, list(wanted))).tolist())

    @property
    def warning(self) -> str:
        """What a user should know about `by_order`, or "" where names decided everything."""
        if not self.by_order:
            return ""
        pairs = ", ".join(f"{ours!r} as {theirs!r}" for ours, theirs in self.by_order[:_SHOWN])
        more = f" and {len(self.by_order) - _SHOWN} more" if len(self.by_order) > _SHOWN else ""
        return (
            f"{len(self.by_order)} of the model's classes have names that the data set lacks; they are scored in "
            f"order: {pairs}{more}. If these are not the same classes, the scores mean nothing"
        )


def match_labels(model_labels: Mapping[int, str], data_labels: Mapping[int, str]) -> LabelMatch:
    """Match classes by name, and those that are left by order; those of a model without names by order silently.

    Args:
        model_labels: name by label id.
        data_labels: the same of the data set.

    Raises:
        ValueError: the model has another number of classes; the message names some that differ.
    """
    if len(model_labels) != len(data_labels):
        only_model, only_data = _strangers(model_labels, data_labels), _strangers(data_labels, model_labels)
        raise ValueError(
            f"the model has {len(model_labels)} classes and the data set {len(data_labels)}; the model alone has "
            f"{only_model}, the data set alone {only_data}: evaluate on the data that the model was trained for, or "
            "fine-tune it"
        )
    if are_unnamed(model_labels):
        return LabelMatch(None)
    matches = match_names(model_labels, data_labels)
    left = sorted(set(model_labels) - set(matches)), sorted(set(data_labels) - set(matches.values()))
    pairs = list(zip(*left, strict=True))
    matches |= dict(pairs)
    table = np.array([matches[index] for index in sorted(matches)], dtype=np.int64)
    return LabelMatch(
        None if (table == np.arange(len(table))).all() else table,
        [(str(model_labels[index]), str(data_labels[other])) for index, other in pairs],
    )


def _strangers(labels: Mapping[int, str], others: Mapping[int, str]) -> list[str]:
    known = {first_synonym(name) for name in others.values()}
    return [str(name) for name in labels.values() if first_synonym(name) not in known][:_SHOWN]
