"""Match the classes of two label spaces by name.

`match_names` compares names without case, hyphens and underscores; then by their first synonym, up to a comma or
semicolon ("person, individual"); then by `ALIASES`, words in which publishers of one label set differ. It is used by
`match_label_spaces` for a generator and a classifier, whose classes may differ if that is allowed, and by
`match_labels` for a model and a data set with as many classes, where classes left over are matched in order, with a
warning. C classes of the model.
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

_GENERIC = re.compile(r"label_?\d+")  # Transformers' default names
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class LabelSpaceMatch:
    """The classes of a classifier that correspond to those of a generator."""

    class_matches: tuple[int, ...]  # for each class of the generator the classifier's label id, or -1
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
    """Match the classes of a generator and a classifier by name; both map label ids, numbered from 0, to names.

    Args:
        label_mismatch: `"error"`: both must have the same classes, in any order; `"keep"`: some may exist in only one.

    Raises:
        ValueError: the classes differ (`"error"`), or none is shared; the message lists some of them.
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
            f"{_names(classifier_labels)[0]!r}), so it is unknown which are the same; set id2label in the "
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
    """For each of our label ids the other label id whose class has the same name, where names decide.

    Names that several classes share decide nothing, unless all names are the same in the same order; nor do default
    names (`LABEL_0`, ...).
    """
    ours, theirs = _names(labels), _names(others)
    if [whole_name(name) for name in ours] == [whole_name(name) for name in theirs]:
        return {label: label for label in range(len(ours))}
    matches: dict[int, int] = {}
    if are_unnamed(labels) or are_unnamed(others):
        return matches
    # From strict to loose, each for what is left, so that a loose form never overrides a better match.
    for form in (whole_name, first_synonym, _published_alias):
        left, right = _unique_names(ours, matches.keys(), form), _unique_names(theirs, matches.values(), form)
        matches |= {left[name]: right[name] for name in left if name in right}
    return matches


def whole_name(name: str) -> str:
    """A class name without case, hyphens and underscores."""
    return " ".join(re.split(r"[\s_-]+", str(name).casefold().strip()))


def first_synonym(name: str) -> str:
    """The first of the synonyms in a class name, in the form of `whole_name`."""
    return whole_name(re.split("[,;]", str(name))[0])


def _published_alias(name: str) -> str:
    synonym = first_synonym(name)
    return ALIASES.get(synonym, synonym)


def are_unnamed(labels: Mapping[Any, str]) -> bool:
    """Whether all class names are Transformers' defaults."""
    return all(_GENERIC.fullmatch(str(name).casefold()) is not None for name in labels.values())


def _names(labels: Mapping[Any, str]) -> list[str]:
    """Names in the order of their label ids."""
    # In a config.json the ids are strings, which would sort "10" before "2".
    return [str(name) for _, name in sorted((int(label), name) for label, name in labels.items())]


def _unique_names(names: list[str], matched: Iterable[int], form: Callable[[str], str]) -> dict[str, int]:
    """Label id by name, in a given form, of unmatched classes whose name is unique among them."""
    done = set(matched)
    forms = {label: form(name) for label, name in enumerate(names) if label not in done}
    counts = Counter(forms.values())
    return {name: label for label, name in forms.items() if counts[name] == 1}


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + _rest(len(names))


def _rest(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


@dataclass(frozen=True)
class LabelMatch:
    """The classes of a data set that correspond to those of a model."""

    table: np.ndarray | None  # (C,) int64 label id of the data set for each of the model's; None: the same ids
    # (model's name, data set's name) of the classes that were matched in order, although their names differ.
    by_order: list[tuple[str, str]] = field(default_factory=list)

    def model_ids(self, data_ids: Iterable[int]) -> list[int]:
        """The model's label ids, ascending, of classes of the data set."""
        wanted = set(data_ids)
        return sorted(wanted if self.table is None else np.flatnonzero(np.isin(self.table, list(wanted))).tolist())

    @property
    def warning(self) -> str:
        """What a user should know about `by_order`, or "" if names decided everything."""
        if not self.by_order:
            return ""
        pairs = ", ".join(f"{ours!r} as {theirs!r}" for ours, theirs in self.by_order[:_SHOWN])
        return (
            f"{len(self.by_order)} of the model's classes have names that the data set lacks; they are scored in "
            f"order: {pairs}{_rest(len(self.by_order))}. If these are not the same classes, the scores mean nothing"
        )


def match_labels(model_labels: Mapping[int, str], data_labels: Mapping[int, str]) -> LabelMatch:
    """Match the classes of a model and a data set of as many, both label id to name: by name, the rest in order."""
    if len(model_labels) != len(data_labels):
        only_model, only_data = _unmatched(model_labels, data_labels), _unmatched(data_labels, model_labels)
        raise ValueError(
            f"the model has {len(model_labels)} classes and the data set {len(data_labels)}; the model alone has "
            f"{only_model}, the data set alone {only_data}: evaluate on the data that the model was trained for, or "
            "fine-tune it"
        )
    # A model trained without names has the ids of its data: no reason for a warning.
    if are_unnamed(model_labels):
        return LabelMatch(None)
    matches = match_names(model_labels, data_labels)
    leftover = sorted(set(model_labels) - set(matches)), sorted(set(data_labels) - set(matches.values()))
    pairs = list(zip(*leftover, strict=True))
    matches |= dict(pairs)
    table = np.array([matches[index] for index in sorted(matches)], dtype=np.int64)
    return LabelMatch(
        None if (table == np.arange(len(table))).all() else table,
        [(str(model_labels[index]), str(data_labels[other])) for index, other in pairs],
    )


def _unmatched(labels: Mapping[int, str], others: Mapping[int, str]) -> list[str]:
    known = {first_synonym(name) for name in others.values()}
    return [str(name) for name in labels.values() if first_synonym(name) not in known][:_SHOWN]
