"""Fields that are declared once: `option` says what a field of a dataclass means and may be, `checked` sees to it.

Recipes, and what training tasks of one's own declare, are dataclasses of such fields; the table of `hf-segvit train
--fields` and the rules of resuming follow from the same declarations. Values come from YAML or the command line, so
their types are fitted: whole numbers become decimals where these are meant, and the other way round.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import types
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from ..lookup import import_object, is_import_path, suggestion

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
WORDS |= {list: "a list", dict: "key: value pairs"}


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
        default: a list or dict is copied for each record.
        meaning: in words, for the table of fields.
        limits: of a number, or of each number in a list, such as "> 0" or ">= 0, < 1".
        choices: the texts that there are.
        length: how many items a list may have.
        keys: dataclass that declares the keys of a dict, or of each dict in a list.
        imported: the field takes "package.module:Class" (besides `choices`), whose class needs these methods.
        resume: whether it may change when a training goes on: "no"; "yes", as the result does not depend on it; "told"
            where it does, but may have to change so that the training survives, which is then said.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not stated."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def checked(record: type, values: Mapping[str, Any], where: str = "", without: Container[str] = ()) -> dict[str, Any]:
    """Values in the types of the fields that a dataclass declares, within their limits and choices.

    Args:
        record: the dataclass; fields without `option` have types alone.
        values: to check; fields may be left out.
        where: the dict that they are in, such as "points.", for errors.
        without: names of fields that may not be there.

    Raises:
        ValueError: a name is unknown, or a value does not fit; the message names it, and what fits.
    """
    hints = typing.get_type_hints(record)
    declared = {field.name: field.metadata for field in dataclasses.fields(record) if field.name not in without}
    refuse_unknown(values, declared, where)
    return {name: _checked(f"{where}{name}", value, hints[name], declared[name]) for name, value in values.items()}


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Refuse names that are no fields.

    Raises:
        ValueError: naming the first and the fields that it resembles.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{where.rstrip('.') or 'a recipe'} has no key {name!r}; {suggestion(name, known, 2)}")


def types_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, `list` and `dict` without those of their items."""
    return tuple(typing.get_origin(choice) or choice for choice in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _checked(name: str, value: Any, hint: Any, declared: Mapping[str, Any]) -> Any:
    matches = [converted for kind in _alternatives(hint) for converted in _converted(value, kind)]
    if not matches:
        expected = " or ".join(WORDS.get(kind, str(kind)) for kind in types_of(hint))
        raise ValueError(f"{name}={value!r} does not fit; expected {expected}")
    result, keys, length = matches[0], declared.get("keys"), declared.get("length")
    if length and isinstance(result, list) and len(result) not in length:
        raise ValueError(f"{name}={result} must have {' or '.join(map(str, length))} numbers: {declared['meaning']}")
    items = result if isinstance(result, list) else [result]
    if keys is not None:
        items = [checked(keys, item, f"{name}.") if isinstance(item, dict) else item for item in items]
    limits = [limit.split() for limit in declared.get("limits", "").split(", ") if limit]
    for item in items:
        # Asked this way round, NaN is refused, too.
        if isinstance(item, int | float) and not all(_COMPARISONS[sign](item, float(bound)) for sign, bound in limits):
            raise ValueError(f"{name}={value} must be {' and '.join(map(' '.join, limits))}")
        if isinstance(item, str):
            _check_text(name, item, declared.get("choices"), declared.get("imported"))
    return items if isinstance(result, list) else items[0]


def _check_text(name: str, text: str, choices: Sequence[str] | None, methods: Sequence[str] | None) -> None:
    if methods is not None and (not choices or is_import_path(text)):
        import_object(text, name, methods)
    elif choices and text not in choices:
        also = "" if methods is None else "; or give package.module:Class"
        raise ValueError(f"{name}={text!r} is unknown; {suggestion(text, choices)}{also}")


def _converted(value: Any, kind: Any) -> list[Any]:
    """The value in a type, or nothing where it is of another."""
    origin = typing.get_origin(kind) or kind
    if origin is list and isinstance(value, list | tuple):
        (item_kind,) = typing.get_args(kind) or (Any,)
        found = [fitted for item in value for fitted in _converted(item, item_kind)]
        return [found] if len(found) == len(value) else []
    if origin is dict and isinstance(value, Mapping):
        return [dict(value)]
    if kind is Any:
        return [value]
    if isinstance(value, bool):  # which Python takes for a number
        return [value] if kind is bool else []
    if kind is float and isinstance(value, int):
        return [float(value)]
    if kind is int and isinstance(value, float) and value.is_integer():
        return [int(value)]
    return [value] if isinstance(value, origin) else []
