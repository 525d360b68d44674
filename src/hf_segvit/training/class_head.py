"""The class head of a model that goes on from a checkpoint of other classes: what both know is carried over by name.

`carry_over_classes` fills the head's rows. Names are compared as in models/label_spaces.py; order decides only for a
checkpoint whose classes nobody named (`LABEL_0`, ...) and that has as many. C classes, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..models.class_fusion import NO_MATCH
from ..models.label_spaces import is_generic, match_label_spaces

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
    if _unnamed(labels_before) and not _unnamed(labels):
        return (
            f"class head: the checkpoint's {len(labels)} classes have no names and are taken in order for those of the "
            "data; if they are others, set id2label in its config.json to their names"
        )
    return None


def _rows_before(labels: Mapping[int, str], labels_before: Mapping[int, str]) -> tuple[int, ...]:
    """For each class its row in the checkpoint, or `NO_MATCH`."""
    if _unnamed(labels_before) and len(labels_before) == len(labels):
        return tuple(range(len(labels)))
    try:
        return match_label_spaces(labels, labels_before, "keep").class_matches
    except ValueError:  # they share no class, or cannot be told apart
        return (NO_MATCH,) * len(labels)


def _unnamed(labels: Mapping[int, str]) -> bool:
    return all(is_generic(str(name)) for name in labels.values())
