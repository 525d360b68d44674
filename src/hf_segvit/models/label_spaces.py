"""Which of a classifier's classes is which of a generator's, by their names.

Names are compared without case, hyphens and underscores; then by their first synonym, up to a comma or semicolon
("person, individual"); then by `ALIASES`, words that publishers of one label set differ in. Order never decides, except
for models whose classes nobody named (`LABEL_0`, ...) on both sides.

`match_label_spaces` is the function for it, `LabelSpaceMatch` what it answers.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    ours, theirs = (
        [str(name) for _, name in sorted((int(label), name) for label, name in labels.items())]
        for labels in (generator_labels, classifier_labels)
    )
    unnamed = [
        owner for owner, names in (("generator", ours), ("classifier", theirs)) if names and all(map(is_generic, names))
    ]
    if [whole_name(name) for name in ours] == [whole_name(name) for name in theirs]:
        return LabelSpaceMatch(tuple(range(len(ours))))
    if unnamed:
        raise ValueError(
            f"the classes of the {' and the '.join(unnamed)} have no names ({ours[0]!r}, {theirs[0]!r}), so there is "
            "no telling which are the same; set id2label in the model's config to the names of its classes"
        )
    matches: dict[int, int] = {}
    for form in (whole_name, first_synonym, _published_alias):
        left = _unique_names(ours, matches.keys(), form)
        right = _unique_names(theirs, matches.values(), form)
        matches |= {left[name]: right[name] for name in left if name in right}
    taken = set(matches.values())
    result = LabelSpaceMatch(
        tuple(matches.get(label, NO_MATCH) for label in range(len(ours))),
        tuple(name for label, name in enumerate(ours) if label not in matches),
        tuple(name for label, name in enumerate(theirs) if label not in taken),
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


def whole_name(name: str) -> str:
    """A class name without case, hyphens and underscores."""
    return " ".join(re.split(r"[\s_-]+", str(name).casefold().strip()))


def first_synonym(name: str) -> str:
    """The first of the synonyms that a class name lists, in the form of `whole_name`."""
    return whole_name(re.split("[,;]", str(name))[0])


def _published_alias(name: str) -> str:
    synonym = first_synonym(name)
    return ALIASES.get(synonym, synonym)


def is_generic(name: str) -> bool:
    """Whether a class name is what Transformers calls a class that nobody named."""
    return _GENERIC.fullmatch(name.casefold()) is not None


def _unique_names(names: list[str], matched: Any, form: Callable[[str], str]) -> dict[str, int]:
    """Label id by name in a form, of classes not matched yet whose name no other of them has."""
    taken = set(matched)
    forms = {label: form(name) for label, name in enumerate(names) if label not in taken}
    counts = Counter(forms.values())
    return {name: label for label, name in forms.items() if counts[name] == 1}


def _shown(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
