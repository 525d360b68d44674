"""Read the classes of a data set or a model, and the one rule for its labels.

`read_classes` takes a text file with one name per line, a JSON file, or the same as Python values:
- `["road", "car"]`: names in the order of their values from 0;
- `{"0": "road", "11": "void"}`: names by value;
- `{"classes": [{"value": 1, "name": "road", "is_thing": false}, ...], "void": [0, 255]}`: the full form;
- `{"id2label": {"0": "road", "1": "car"}, "stuff_classes": [0]}`: as in a model's config.json.
In data sets a class called "void", "ignore" or "unlabeled" is void, and so is 255 unless it is a class.

`label_rule` decides for every reader which names are classes, which are void, and what uncovered pixels are; users read
about it in docs/labels.md. `union_of_splits` and `similar_names` compare lists of classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..lookup import suggestion
from .annotation_values import MOST_CLASSES, name_fault, shown, whole_number
from .archives import MAX_TEXT_BYTES, Location, encoding_fault, location_name, read_json, read_location

VOID = -1  # label of pixels that neither train nor count
CLASS_FILES = ("classes.json", "classes.txt", "labels.txt")
ANOMALY_CLASSES = ("known", "anomaly")  # of data sets of the readers anomaly and bravo, by label id
_LIST_SUFFIXES = (".txt", ".names")

_VOID_NAMES = ("void", "ignore", "unlabeled", "unlabelled", "__ignore__")
_LABELME_BACKGROUND = "_background_"
_BACKGROUND = "background"


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of their label ids."""

    names: tuple[str, ...]  # by label id
    labels: Mapping[int, int]  # label id by value in masks, -1 for void
    things: frozenset[int]  # label ids
    states_things: bool = False  # the list says which classes are things; otherwise `things` is empty

    @property
    def stuff_classes(self) -> list[int]:
        """Label ids of the classes that are not things."""
        return [label for label in range(len(self.names)) if label not in self.things]

    @property
    def remarks(self) -> list[str]:
        """What is void in masks, in a sentence for users."""
        values = ", ".join(str(value) for value, label in sorted(self.labels.items()) if label == VOID)
        if not values:
            return []
        return [f"void in masks, neither trained nor scored: {values}; void=NAME,VALUE makes others void, too"]


def read_classes(source: Any, *, of_model: bool = False, void: Any = ()) -> ClassList:
    """Read a list of classes.

    Args:
        source: path or location of a file, or a value; see the module.
        of_model: the classes are a model's: none is void, and values run from 0 to n - 1 without a gap.
        void: further void classes or values of masks, as the option `void=` gives them.

    Raises:
        ValueError: the file is missing, or the list has an unknown form, duplicate names or values, or gaps.
    """
    name, entries, values_void = _listed(source)
    if not of_model and entries and entries[0][:2] == (0, "__ignore__"):
        # labelme's own tools number the lines of such a list from -1, so that `_background_` is 0 in masks.
        entries = [(value - 1, text, is_thing) for value, text, is_thing in entries]
    void_names = set[str]()
    for chosen in filter(None, option_names(void)):
        if chosen in _texts(entries):
            void_names.add(chosen)
        elif _is_void(chosen):  # may be repeated: one spec serves several data sets
            continue
        elif chosen.removeprefix("-").isdecimal():
            void_names.update(text for value, text, _ in entries if value == int(chosen))
            values_void = [*values_void, int(chosen)]
        else:
            raise ValueError(f"{name}: void={chosen} is no class and no value; {suggestion(chosen, _texts(entries))}")
    names, labels, things = dict[str, None](), dict[int, int](), set[int]()
    listed_void = set(values_void)
    for value, text, is_thing in entries:
        if value in labels or (value in listed_void and text not in void_names):
            raise ValueError(f"{name}: the value {value} is listed twice; give each class a value of its own")
        if not of_model and (_is_void(text) or text in void_names):
            labels[value] = VOID
            continue
        if text in names:
            raise ValueError(f"{name}: two classes are called {text!r}; name them differently")
        labels[value] = len(names)
        if is_thing:
            things.add(len(names))
        names[text] = None
    if not names:
        raise ValueError(f"{name}: lists no class; give at least one name")
    if of_model and list(labels) != list(range(len(names))):
        raise ValueError(f"{name}: classes are numbered {list(labels)[:5]}, not 0 to {len(names) - 1} without a gap")
    # `labels` last, so that a class listed with value 255 is not void.
    void_labels = {} if of_model else {255: VOID} | dict.fromkeys(values_void, VOID)
    states_things = any(is_thing is not None for _, _, is_thing in entries)
    return ClassList(tuple(names), void_labels | labels, frozenset(things), states_things)


def _texts(entries: Sequence[tuple[int, str, bool | None]]) -> list[str]:
    return [text for _, text, _ in entries]


def listed_names(source: Any) -> tuple[str, ...]:
    """All names of a list for `read_classes`, also void ones, by ascending value: what `label_rule` takes."""
    return tuple(_texts(_listed(source)[1]))


def _listed(source: Any) -> tuple[str, list[tuple[int, str, bool | None]], list[int]]:
    """Name of the file, entries by ascending value as of `_entries`, and void values."""
    name = "classes"
    if isinstance(source, str | Path):
        source = Location(archive=None, member=str(source))
    if isinstance(source, dict) and set(source) == {"archive", "member"}:
        location = Location(archive=source["archive"], member=source["member"])
        name, source = location_name(location), _read_file(location)
    entries, void = _entries(source, name)
    entries = sorted(((value, text.strip(), is_thing) for value, text, is_thing in entries), key=lambda row: row[0])
    if len(entries) > MOST_CLASSES:
        raise ValueError(f"{name}: {len(entries):,} classes, more than the limit of {MOST_CLASSES:,}")
    for value, text, _ in entries:
        if not text:
            raise ValueError(f"{name}: the class of value {value} has no name; give each class one")
        if fault := name_fault(text):
            raise ValueError(f"{name}: the class of value {value}, {shown(text)}: {fault}")
    return name, entries, void


def _read_file(location: Location) -> Any:
    if location["member"].lower().endswith(".json"):
        return read_json(location)
    # Any file of lines could be read as a list of names, such as one that was named by mistake.
    if not location["member"].lower().endswith(_LIST_SUFFIXES):
        raise ValueError(
            f"{location_name(location)}: no list of classes; give a file that ends in .json or "
            f"{' or '.join(_LIST_SUFFIXES)}"
        )
    content = read_location(location, MAX_TEXT_BYTES)
    try:
        # Editors on Windows write a byte order mark, which would become part of the first name.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location_name(location)}: {encoding_fault(content, error)}") from error
    if control := re.search("[\x00-\x08\x0e-\x1b]", text):
        raise ValueError(
            f"{location_name(location)}: no list of names, as it holds the control character {control[0]!r}; give a "
            "text file with one name on each line"
        )
    return [line.strip() for line in text.splitlines() if line.strip()]


def _entries(source: Any, name: str) -> tuple[list[tuple[int, str, bool | None]], list[int]]:
    """(value, name, whether it is a thing if stated) of each class, and void values."""
    try:
        if isinstance(source, Mapping) and "classes" in source:
            rows = [(_value(row["value"]), _text(row["name"]), _flag(row.get("is_thing"))) for row in source["classes"]]
            return rows, [_value(value) for value in source.get("void", [])]
        if isinstance(source, Mapping) and "id2label" in source:
            stuff = source.get("stuff_classes")
            names = {_value(value): _text(text) for value, text in source["id2label"].items()}
            # `True` is an int to isinstance, and would stand for class 1.
            if unknown := [value for value in stuff or () if type(value) is not int or value not in names]:
                raise ValueError(f"stuff_classes holds {shown(unknown[0])}, which is no number of a class")
            listed = set(stuff or ())
            return [(value, text, None if stuff is None else value not in listed) for value, text in names.items()], []
        if isinstance(source, Mapping):
            return [(_value(value), _text(text), None) for value, text in source.items()], []
        if isinstance(source, list | tuple) and all(isinstance(text, str) for text in source):
            return [(value, text, None) for value, text in enumerate(source)], []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "a value is missing, or is of another type"
        raise ValueError(f"{name}: cannot be read as classes ({reason[:300]}); give {CLASS_FORMS}") from error
    raise ValueError(f"{name}: cannot be read as classes; give {CLASS_FORMS}")


def _value(value: Any) -> int:
    number = whole_number(value)
    # The values of masks have 32 bits at most.
    if number is None or not -(2**31) <= number < 2**32:
        raise ValueError(f"the value {shown(value)} is no whole number of a mask")
    return number


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the name {shown(name)} is no text")
    return name


def _flag(is_thing: Any) -> bool | None:
    if is_thing not in (None, 0, 1):
        raise ValueError(f"is_thing is {shown(is_thing)}; give true or false")
    return None if is_thing is None else bool(is_thing)


CLASS_FORMS = (
    'a list of names, {"value": "name", ...}, or {"classes": [{"value": 1, "name": "road", "is_thing": false}], '
    '"void": [255]}'
)


@dataclass(frozen=True)
class LabelRule:
    """Which names are classes, which are void, and what pixels are that no annotation covers."""

    names: tuple[str, ...]  # class names by label id
    # By listed name, and for `_background_`: label id, `VOID`, or `None` for no class in this task.
    labels: Mapping[str, int | None]
    background: int | None  # label id of pixels that no annotation covers; `None`: they are void
    crowds_are_objects: bool
    decisions: tuple[str, ...]  # sentences for users, with the option that changes each

    def label_of(self, name: str) -> int | None:
        """Label id of a name in an annotation, `VOID`, or `None` if annotations of this name are left out.

        Raises:
            ValueError: the name is not listed; the message suggests one.
        """
        name = name.strip()
        if name in self.labels:
            return self.labels[name]
        if _is_void(name):  # need not be listed
            return VOID
        if name.lower() == _LABELME_BACKGROUND:
            return self.labels[_LABELME_BACKGROUND]
        remedy = suggestion(name, list(self.labels))
        raise ValueError(f"the label {name!r} is not in the list of classes; add it there, or {remedy}")


def label_rule(
    names: Sequence[str],
    task: str,
    *,
    background: Any = None,
    void: Any = (),
    crowd: Any = "ignore",
    drop: Any = (),
    used: Collection[str] | None = None,
    source: str = "classes",
) -> LabelRule:
    """Decide what the names of a format with outlines mean; see docs/labels.md.

    Args:
        names: all listed names in the order of their label ids, with void and background ones.
        background: name of the class of uncovered pixels; True for "background"; "void" or False: they are void.
        void: names of classes whose pixels are void, as a list or as text with commas.
        crowd: "ignore", or "objects" to read crowds as single objects.
        drop: names of classes to leave out, or "unused".
        used: names that have at least one annotation in any split, for `drop="unused"`.
        source: file or folder that lists the names, for error messages.

    Raises:
        ValueError: names are empty or equal, an option names a class that is not listed, or nothing could be learnt.
    """
    listed = [str(name).strip() for name in names]
    if len(listed) > MOST_CLASSES:
        raise ValueError(f"{source}: {len(listed):,} classes, more than the limit of {MOST_CLASSES:,}")
    seen = set[str]()
    for index, name in enumerate(listed):
        if not name:
            raise ValueError(f"{source}: class {index} has no name; give each class one")
        if fault := name_fault(name):
            raise ValueError(f"{source}: class {index}, {shown(name)}: {fault}")
        if name in seen:
            raise ValueError(f"{source}: two classes are called {name!r}; name them differently")
        seen.add(name)
    decisions: list[str] = []
    if crowd not in ("ignore", "objects"):
        raise ValueError(f"crowd is {crowd!r}; give crowd=ignore or crowd=objects")
    voids = dict.fromkeys(_chosen(void, listed, "void", source))
    if drop != "unused":
        dropped = dict.fromkeys(_chosen(drop, listed, "drop", source))
    elif used is None:
        raise ValueError(f"{source}: this format cannot tell which classes are unused; give drop=NAME,NAME")
    else:
        # Void and background need no annotation to be of use.
        kept = {*used, *voids, *(name for name in listed if _is_void(name) or name.lower().strip("_") == _BACKGROUND)}
        dropped = dict.fromkeys(name for name in listed if name not in kept)
    labels: dict[str, int | None] = {}
    for name in listed:
        if name in dropped:
            labels[name] = None
        elif name in voids or _is_void(name):
            labels[name] = VOID
        else:
            labels[name] = 0  # numbered below
    own = _labelme_background(listed, labels)
    if task == "instance" and background is not None and not _is_no(background):
        raise ValueError(
            f"background={background} is for the tasks semantic and panoptic, in which pixels without an annotation "
            "can be a class; leave it out, or choose one of them (drop=NAME leaves a class out)"
        )
    if task == "instance" or (task == "panoptic" and (background is None or _is_no(background))):
        if own is not None:
            labels[own] = None
            decisions.append(f"{own!r} is no class in the {task} task; its annotations are left out")
        classes, ground = [name for name in listed if labels[name] == 0], None
    else:
        classes = [name for name in listed if labels[name] == 0]
        ground, sentence = _background_name(background, classes, own, source)
        if own is not None:
            if ground is None:
                labels[own] = VOID
                classes.remove(own)
            elif ground in classes and ground != own:
                classes.remove(own)
            else:
                classes[classes.index(own)] = ground
        elif ground is not None and ground not in classes:
            # First, as in the label maps of most tools, where 0 is the background.
            classes.insert(0, ground)
        decisions.append(sentence)
    if not classes or (task == "semantic" and classes == [ground]):
        raise ValueError(f"{source}: no class is left besides void and background; list or annotate at least one")
    position = {name: index for index, name in enumerate(classes)}
    for name in listed:
        if labels[name] == 0:
            labels[name] = position[ground if name == own and ground is not None else name]
    if named := [name for name in listed if labels[name] == VOID]:
        decisions.append(f"void, neither trained nor scored: {', '.join(named)}")
    if dropped:
        decisions.append(f"left out by drop=: {', '.join(dropped)}")
    if crowd == "objects":
        decisions.append("crowds are read as single objects (crowd=objects)")
    label = None if ground is None else classes.index(ground)
    if own is None:
        uncovered = VOID if label is None and task == "semantic" else label
        labels.setdefault(_LABELME_BACKGROUND, uncovered)
    return LabelRule(tuple(classes), labels, label, crowd == "objects", tuple(decisions))


def option_names(value: Any) -> list[str]:
    """Names in the value of an option: text with commas, a number, or a list."""
    if isinstance(value, str):
        value = value.split(",")
    return [str(name).strip() for name in (value if isinstance(value, list | tuple | set) else [value])]


def union_of_splits(names: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """All names of all splits in the order of the first split given, and remarks on classes that not all splits have.

    Args:
        names: stripped class names by split; give the split for training first.
    """
    union = list(dict.fromkeys(name for split in names.values() for name in split))
    remarks, sets = [], {split: set(listed) for split, listed in names.items()}
    for name in union:
        having = [split for split, listed in sets.items() if name in listed]
        if len(having) < len(names):
            others = [split for split in names if split not in having]
            remarks.append(f"the class {name!r} is listed in {', '.join(having)}, but not in {', '.join(others)}")
    return union, remarks


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in case and separators, or by one letter of at least five: likely misspelt."""
    plain = ["".join(c for c in name.casefold() if c.isalnum()) for name in names]
    # Names that are one slip apart share what is left of them without one letter, or are equal: with tens of thousands
    # of classes, comparing all pairs would take hours.
    alike: dict[str, list[int]] = {}
    pairs = []
    for index, one in enumerate(plain):
        # Long names would have too many variants, and are not misspelt unseen; digits differ on purpose.
        cuts = [cut for cut in range(len(one)) if not one[cut].isdigit()] if len(one) <= _LONGEST_COMPARED else []
        keys = {one, *(one[:cut] + one[cut + 1 :] for cut in cuts)}
        earlier = {other for key in keys for other in alike.get(key, ())}
        for other in sorted(earlier):
            two = plain[other]
            if one == two or (min(len(one), len(two)) >= 5 and _one_slip(one, two)):
                pairs.append((names[other], names[index]))
        for key in keys:
            # Hundreds of names with one beginning are numbered or generated, and none of them a slip.
            if len(sharing := alike.setdefault(key, [])) < _MOST_ALIKE:
                sharing.append(index)
    return pairs


_LONGEST_COMPARED = 60  # letters
_MOST_ALIKE = 50


def _one_slip(one: str, two: str) -> bool:
    """Whether one letter was changed, left out, added or swapped with its neighbour."""
    short, long = sorted((one, two), key=len)
    if len(long) - len(short) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    # `class1` and `class2`, or `lane` and `lane2`, are different on purpose.
    if any(character.isdigit() for character in short[start : start + 1] + long[start : start + 1]):
        return False
    if len(short) < len(long):
        # A plural may well be meant as a crowd or another class, but it is the most common slip of annotators.
        return short[start:] == long[start + 1 :]
    swapped = short[start : start + 2][::-1] == long[start : start + 2] and short[start + 2 :] == long[start + 2 :]
    return swapped or short[start + 1 :] == long[start + 1 :]


def _is_void(name: str) -> bool:
    return name.lower() in _VOID_NAMES


def _is_no(background: Any) -> bool:
    return background is False or str(background).strip().lower() in ("void", "false", "no", "none")


def _chosen(value: Any, listed: Sequence[str], option: str, source: str) -> list[str]:
    chosen = [name for name in option_names(value) if name]
    known = set(listed)
    for name in chosen:
        # Names that are void anyway may be repeated: one spec serves several data sets.
        if name not in known and not _is_void(name):
            raise ValueError(f"{source}: {option}={name} is no class; {suggestion(name, listed)}")
    return chosen


def _labelme_background(listed: Sequence[str], labels: Mapping[str, int | None]) -> str | None:
    return next((name for name in listed if name.lower() == _LABELME_BACKGROUND and labels[name] == 0), None)


def _background_name(background: Any, classes: Sequence[str], own: str | None, source: str) -> tuple[str | None, str]:
    """Name of the class of uncovered pixels or `None`, and the decision in words; `own` is `_background_` if listed."""
    plain = next((name for name in classes if name.lower() == _BACKGROUND), None)
    uncovered = "pixels that no annotation covers"
    if background is not None and _is_no(background):
        if len(classes) - (own is not None) < 2:
            raise ValueError(
                f"{source}: with background=void there is one class and void only, and nothing can be learnt; leave "
                "background=void out, or annotate a second class"
            )
        return None, f"{uncovered} are void, neither trained nor scored (background=void)"
    if background is None:
        if own or plain:
            return own or plain, f"{uncovered} are the class {own or plain!r}; background=void makes them void"
        if len(classes) == 1:
            return _BACKGROUND, (
                f"{uncovered} are the class {_BACKGROUND!r}, since with one class and void only nothing can be learnt; "
                "background=NAME names it otherwise"
            )
        return None, (
            f"{uncovered} are void, neither trained nor scored; background={_BACKGROUND} makes them a class of that "
            "name, which is right where everything that is to be found was annotated"
        )
    is_yes = background is True or str(background).strip().lower() in ("true", "yes", "1")
    name = (own or plain or _BACKGROUND) if is_yes and str(background) not in classes else str(background).strip()
    if not name:
        raise ValueError(f"background= needs a name; give background={_BACKGROUND} or background=void")
    return name, f"{uncovered} are the class {name!r} (background={background})"


def stuff_labels_of(rule: LabelRule, task: str, stuff: Any, classes: Any, source: str) -> tuple[list[int], list[str]]:
    """Label ids of stuff classes in the panoptic task, and remarks about them.

    Args:
        stuff: names from the option `stuff=`; without any, the classes that `classes` states to be no things.
        classes: file or value for `read_classes`, or `None`.
        source: of the data, for errors.
    """
    if task != "panoptic":
        return [], []
    chosen = [name for name in option_names(stuff) if name]
    if unknown := [name for name in chosen if name not in rule.names]:
        raise ValueError(f"{source}: stuff={unknown[0]} is no class; {suggestion(unknown[0], rule.names)}")
    if not chosen and classes is not None and (listed := read_classes(classes)).states_things:
        chosen = [listed.names[label] for label in listed.stuff_classes]
    labels = {rule.names.index(name) for name in chosen if name in rule.names}
    if rule.background is not None:
        labels.add(rule.background)
    if not labels:
        return [], ["no class is stuff: each shape is an object of its own; stuff=NAME,NAME merges those of a class"]
    return sorted(labels), [f"stuff, merged in each image: {', '.join(rule.names[label] for label in sorted(labels))}"]
