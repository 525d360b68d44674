"""Which class of the data set each of a model's classes is.

`match_labels` compares names; only where a model has as many classes as the data set may the order decide, and then it
says for which classes it did. Label ids are turned by `LabelMatch.table`, and back by `LabelMatch.model_ids`.

C classes of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..models.label_spaces import first_synonym, is_generic, whole_name

_SHOWN = 5  # names in a message


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
    """Match classes by name, and those that are left by order.

    Names are compared without case, hyphens and underscores; then by their first synonym, up to a comma or semicolon.
    A model without names (`LABEL_0`, ...) is matched by order silently.

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
    if all(is_generic(str(name)) for name in model_labels.values()):
        return LabelMatch(None)
    place: dict[int, int] = {}
    for form in (whole_name, first_synonym):
        ours = _unique_names(model_labels, place.keys(), form)
        theirs = _unique_names(data_labels, place.values(), form)
        place |= {ours[name]: theirs[name] for name in ours if name in theirs}
    left = sorted(set(model_labels) - set(place)), sorted(set(data_labels) - set(place.values()))
    pairs = list(zip(*left, strict=True))
    place |= dict(pairs)
    table = np.array([place[index] for index in sorted(place)], dtype=np.int64)
    return LabelMatch(
        None if (table == np.arange(len(table))).all() else table,
        [(str(model_labels[index]), str(data_labels[other])) for index, other in pairs],
    )


def _unique_names(labels: Mapping[int, str], matched: Iterable[int], form: Callable[[str], str]) -> dict[str, int]:
    """Label id by name in a form, of classes not matched yet whose name no other of them has."""
    taken = set(matched)
    forms = {index: form(str(name)) for index, name in labels.items() if index not in taken}
    counts = Counter(forms.values())
    return {name: index for index, name in forms.items() if counts[name] == 1}


def _strangers(labels: Mapping[int, str], others: Mapping[int, str]) -> list[str]:
    known = {first_synonym(name) for name in others.values()}
    return [str(name) for name in labels.values() if first_synonym(name) not in known][:_SHOWN]
