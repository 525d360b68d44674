"""Read the classes of a data set or a model from a file or a value.

`read_classes` takes a text file with one name per line, a JSON file, or the same as Python values:
- `["road", "car"]`: names in the order of their values from 0;
- `{"0": "road", "11": "void"}`: names by value;
- `{"classes": [{"value": 1, "name": "road", "is_thing": false}, ...], "void": [0, 255]}`: the full form;
- `{"id2label": {"0": "road", "1": "car"}, "stuff_classes": [0]}`: as in a model's config.json.
In data sets a class called "void", "ignore" or "unlabeled" is void, and so is 255 unless it is a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .archives import MAX_TEXT_BYTES, Location, location_name, read_json, read_location

VOID = -1  # label of pixels that neither train nor count
CLASS_FILES = ("classes.json", "classes.txt", "labels.txt")

_VOID_NAMES = ("void", "ignore", "unlabeled", "unlabelled", "__ignore__")


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


def read_classes(source: Any, *, of_model: bool = False) -> ClassList:
    """Read a list of classes.

    Args:
        source: path or location of a file, or a value; see the module.
        of_model: the classes are a model's: none is void, and values run from 0 to n - 1 without a gap.

    Raises:
        ValueError: the file is missing, or the list has an unknown form, duplicate names or values, or gaps.
    """
    name = "classes"
    if isinstance(source, str | Path):
        source = Location(archive=None, member=str(source))
    if isinstance(source, dict) and set(source) == {"archive", "member"}:
        location = Location(archive=source["archive"], member=source["member"])
        name, source = location_name(location), _read_file(location)
    entries, void = _entries(source, name)
    names, labels, things = list[str](), dict[int, int](), set[int]()
    for value, text, is_thing in sorted(entries, key=lambda entry: entry[0]):
        # In a data set the exact text matters: annotations refer to classes by it.
        text = text.strip() if of_model else text
        if value in labels or value in void:
            raise ValueError(f"{name}: the value {value} is listed twice; give each class a value of its own")
        if not text.strip():
            raise ValueError(f"{name}: the class of value {value} has no name; give each class one")
        if not of_model and text.strip().lower() in _VOID_NAMES:
            labels[value] = VOID
            continue
        if text in names:
            raise ValueError(f"{name}: two classes are called {text!r}; name them differently")
        labels[value] = len(names)
        if is_thing:
            things.add(len(names))
        names.append(text)
    if not names:
        raise ValueError(f"{name}: lists no class; give at least one name")
    if of_model and list(labels) != list(range(len(names))):
        raise ValueError(f"{name}: classes are numbered {list(labels)[:5]}, not 0 to {len(names) - 1} without a gap")
    # `labels` last, so that a class listed with value 255 is not void.
    void_labels = {} if of_model else {255: VOID} | dict.fromkeys(void, VOID)
    states_things = any(is_thing is not None for _, _, is_thing in entries)
    return ClassList(tuple(names), void_labels | labels, frozenset(things), states_things)


def _read_file(location: Location) -> Any:
    if location["member"].lower().endswith(".json"):
        return read_json(location)
    try:
        # Editors on Windows write a byte order mark, which would become part of the first name.
        text = read_location(location, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location_name(location)}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _entries(source: Any, name: str) -> tuple[list[tuple[int, str, bool | None]], list[int]]:
    """(value, name, whether it is a thing if stated) of each class, and void values."""
    try:
        if isinstance(source, Mapping) and "classes" in source:
            rows = [(int(row["value"]), str(row["name"]), row.get("is_thing")) for row in source["classes"]]
            return rows, [int(value) for value in source.get("void", [])]
        if isinstance(source, Mapping) and "id2label" in source:
            stuff = source.get("stuff_classes")
            names = {int(value): str(text) for value, text in source["id2label"].items()}
            # `True` is an int to isinstance, and would stand for class 1.
            if unknown := [value for value in stuff or () if type(value) is not int or value not in names]:
                raise ValueError(f"stuff_classes holds {unknown[0]!r}, which is no number of a class")
            return [(value, text, None if stuff is None else value not in stuff) for value, text in names.items()], []
        if isinstance(source, Mapping):
            return [(int(value), str(text), None) for value, text in source.items()], []
        if isinstance(source, list | tuple) and all(isinstance(text, str) for text in source):
            return [(value, text, None) for value, text in enumerate(source)], []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name}: cannot be read as classes ({error!r}); give {CLASS_FORMS}") from error
    raise ValueError(f"{name}: cannot be read as classes; give {CLASS_FORMS}")


CLASS_FORMS = (
    'a list of names, {"value": "name", ...}, or {"classes": [{"value": 1, "name": "road", "is_thing": false}], '
    '"void": [255]}'
)
