"""Values of a recipe as they come from a file or the command line: reading, overriding, and fitting them to the fields.

In here, in this order: YAML (with numbers like 1e-4, which YAML 1.1 takes for text, and no key twice), `key=value`
overrides, and the types of the fields.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import yaml


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
