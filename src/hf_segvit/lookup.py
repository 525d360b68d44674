"""Look up what users name: suggestions, import paths, settings.

- `suggestion` ends the error about an unknown name;
- `import_object` imports the class or function at "package.module:Name", which recipes and commands accept wherever
  users can plug in their own code;
- `entry_points` lists the plug-ins of installed packages in a group such as `hf_segvit.readers`;
- `printable` escapes what a name from a file could do to a terminal;
- `parse_yaml` reads YAML, and `parse_key_values` reads `key=value` arguments whose values are YAML.

Nothing heavy is imported here, as the command line uses this module before it loads PyTorch.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def suggestion(name: object, choices: Iterable[str], count: int = 1, otherwise: str | None = None) -> str:
    """The end of an error about an unknown name: "did you mean X?", or all choices if none is similar.

    Args:
        count: largest number of names to suggest.
        otherwise: text if none is similar, for choices that are too many to list.
    """
    known = list(choices)
    text = str(name)[:_LONGEST_COMPARED]
    if len(known) > _MOST_COMPARED:  # names of classes, from a file: comparing takes 10 microseconds each
        folded = text.casefold()
        known_alike = [choice for choice in known if choice[:_LONGEST_COMPARED].casefold() == folded][:count]
        few = f"choose one of {', '.join(choice[:100] for choice in known[:20])}, ... ({len(known):,} in all)"
        return f"did you mean {' or '.join(known_alike)}?" if known_alike else otherwise or few
    # 0.6 still finds "panoptc" and swapped letters; below that, short names resemble everything.
    similar = get_close_matches(text, known, n=count, cutoff=0.6)
    # A beginning, such as "Focal" of "FocalCriterion", is less similar than that by letters.
    similar = similar or [choice for choice in known if len(str(name)) > 2 and choice.startswith(str(name))][:count]
    return f"did you mean {' or '.join(similar)}?" if similar else otherwise or f"choose one of {', '.join(known)}"


_MOST_COMPARED = 2000
_LONGEST_COMPARED = 100  # characters


def printable(text: object, allowed: str = "") -> str:
    """A name or message for a terminal: control characters, which could move its cursor, are escaped.

    So are those that turn the direction of writing, with which a name could hide or fake a part of a line, and halves
    of characters. `allowed` are characters to keep.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in allowed else match[0].encode("unicode_escape").decode("ascii")

    return _CONTROL.sub(escaped, str(text))


def is_import_path(text: object) -> bool:
    """Whether `text` has the form "package.module:Name"."""
    return isinstance(text, str) and _IMPORT_PATH.fullmatch(text) is not None


def import_object(path: str, argument: str, methods: Sequence[str] = (), *, is_class: bool = True) -> Any:
    """Import the class or function at "package.module:Name".

    Args:
        argument: the option that the path was given for, such as "criterion", for errors.
        methods: methods that the object must have.

    Raises:
        ValueError: the path has another form, cannot be imported, is not a class, or lacks a method.
    """
    if not is_import_path(path):
        raise ValueError(
            f"{argument}={path!r} is no import path; give package.module:Name, such as my_package.loss:Loss"
        )
    module_name, _, name = path.partition(":")
    try:
        imported: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        # Whether the module or a package that contains it is missing, rather than something that it imports.
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        remedy = "install its package or add its folder to PYTHONPATH" if is_missing else "fix it"
        raise ValueError(
            f"{argument}={path}: {module_name} cannot be imported ({type(error).__name__}: {error}); {remedy}"
        ) from error
    for part in name.split("."):
        if not hasattr(imported, part):
            known = [known for known in vars(imported) if not known.startswith("_")]
            raise ValueError(f"{argument}={path}: {module_name} has no {name}; {suggestion(name, known)}")
        imported = getattr(imported, part)
    if is_class and not isinstance(imported, type):
        raise ValueError(f"{argument}={path} is {type(imported).__name__} and no class; name a class")
    missing = [method for method in methods if not callable(getattr(imported, method, None))]
    if missing:
        raise ValueError(f"{argument}={path} has no method {', '.join(missing)}; add it, see docs/extending.md")
    return imported


def entry_points(group: str) -> dict[str, EntryPoint]:
    """Entry points of installed packages in a group, by name; two different ones of a name raise `ValueError`."""
    import importlib.metadata  # takes longer to import than everything else here

    points: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"two packages offer {point.name!r} in {group}: {other.value} and {point.value}; uninstall one"
            )
    return points


class _Refused(yaml.constructor.ConstructorError):
    """YAML that is valid, but that no setting needs; its problem is in our words."""


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Refuses duplicate keys, of which PyYAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            counts = Counter(str(key.value) for key, _ in node.value)
            duplicates = ", ".join(sorted(key[:100] for key, count in counts.items() if count > 1)[:5])
            raise _Refused(None, None, f"the key {duplicates} occurs twice", node.start_mark)
        return mapping


# The parser in C, which the wheels of PyYAML have, takes a tenth of the time of that in Python.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseLoader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class _Loader(_UniqueKeys, _SafeLoader):
    """Loads plain data only."""


class _TextLoader(_UniqueKeys, _BaseLoader):
    """Keeps every scalar as it is written: in YAML 1.1 a class called `no` would be False, and `1e3` a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # PyYAML's own loader of text ignores tags instead of refusing them.
        if str(node.tag).removeprefix("tag:yaml.org,2002:") not in ("str", "seq", "map"):
            raise _Refused(None, None, f"the tag {node.tag!r} is unknown; values are text here", node.start_mark)
        return super().construct_object(node, deep=deep)


# As in YAML 1.2; in YAML 1.1, which PyYAML reads, 1e-4 is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def parse_yaml(text: str, source: str, *, as_text: bool = False) -> Any:
    """Read YAML without executing anything in it; errors are `ValueError` with `source` and line.

    Args:
        as_text: keep keys and values as they are written, such as `no`, `1e3` and `2024-01-01`.
    """
    loader = _TextLoader if as_text else _Loader
    try:
        _check_structure(text)
        return yaml.load(text, Loader=loader)
    except RecursionError as error:
        raise ValueError(f"{source}: no valid YAML (nested too deep); give a flatter file") from error
    except _Refused as error:
        raise ValueError(
            f"{source}: no valid YAML ({error.problem}, {_place(error.problem_mark)}); correct it"
        ) from error
    except yaml.MarkedYAMLError as error:
        # Of PyYAML's problems, those whose place does not show them.
        known = {"nesting depth": "nested too deep, ", "unhashable": "a key that is a list or table, "}
        problem = next((words for text, words in known.items() if text in str(error)), "")
        place = _place(error.problem_mark or error.context_mark)
        raise ValueError(f"{source}: no valid YAML ({problem}{place}); correct the lines there") from error
    except yaml.YAMLError as error:  # of characters, which have no line
        raise ValueError(f"{source}: no valid YAML, nor even text; give a text file") from error
    except _SCALAR_ERRORS as error:
        # A scalar that does not fit its tag: a month of 13, `!!bool foo`, `!!int ''`, `!!timestamp x`.
        where = _wrong_scalar(text, loader)
        raise ValueError(
            f"{source}: no valid YAML ({where or 'a value that does not fit its type'}); correct it"
        ) from error


_SCALAR_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
_MOST_DEPTH = 50
_MOST_ALIASES = 100  # a short file can make billions of values from aliases of aliases
_MOST_VALUES = 1_000_000  # with aliases unrolled


def _check_structure(text: str) -> None:
    """Refuse YAML that is nested too deep, or whose aliases multiply, before anything is made of it."""
    depth, aliases = 0, 0
    # Values within each open collection and within each anchor, with aliases counted as what they stand for.
    open_counts, open_anchors, values = [0], list[str | None](), dict[str, int]()
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_counts.append(1)
            open_anchors.append(event.anchor)
            if depth > _MOST_DEPTH:
                raise _refusal(f"nested too deep, more than {_MOST_DEPTH} levels", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            count, anchor = open_counts.pop(), open_anchors.pop()
            open_counts[-1] += count
            if anchor is not None:
                values[anchor] = count
        elif isinstance(event, yaml.ScalarEvent):
            open_counts[-1] += 1
            if event.anchor is not None:
                values[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            anchor = str(event.anchor)
            if anchor in open_anchors:
                raise _refusal(f"the alias *{anchor[:50]} is inside of what it stands for", event)
            open_counts[-1] += values.get(anchor, 1)
            if aliases > _MOST_ALIASES or open_counts[-1] > _MOST_VALUES:
                raise _refusal(
                    f"aliases that stand for too many values (at most {_MOST_ALIASES} aliases and {_MOST_VALUES:,} "
                    "values); write them out",
                    event,
                )


def _refusal(message: str, event: Any) -> yaml.YAMLError:
    return _Refused(None, None, message, event.start_mark)


def _place(mark: Any) -> str:
    return "at an unknown place" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"


def _wrong_scalar(text: str, loader: Any) -> str:
    """The first scalar that cannot be read as its tag says, with its key and line; "" if there is none."""
    constructor = loader("")
    pending: list[tuple[str, Any]] = [("", yaml.compose(text, Loader=loader))]
    while pending:
        key, node = pending.pop()
        if isinstance(node, yaml.MappingNode):
            children = [
                (f"{key}.{name.value}".strip(".") if isinstance(name, yaml.ScalarNode) else key, value)
                for name, value in node.value
            ]
            pending += [*children[::-1], *((key, name) for name, _ in node.value)]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(key, value) for value in node.value[::-1]]
        elif isinstance(node, yaml.ScalarNode):
            try:
                constructor.construct_object(node, deep=True)
            except (yaml.YAMLError, *_SCALAR_ERRORS):
                kind = str(node.tag).rpartition(":")[2]
                shown = f"{key}: " if key else ""
                return f"line {node.start_mark.line + 1}: {shown}{node.value[:60]!r} is no value of type {kind}"
    return ""


def parse_key_values(texts: Iterable[str], text_keys: Container[str] = ()) -> dict[str, Any]:
    """Settings from "key=value" arguments, by dotted key, in order; the last value of a repeated key counts.

    Args:
        texts: arguments whose values are YAML, such as `4`, `1e-5`, `true`, `null`, `text` or `[64, 96]`; commas make a
            list without brackets too, as in `64,96`.
        text_keys: keys whose values are used literally, apart from `null`, `~` and an empty value, which are None.

    Raises:
        ValueError: an argument has no key or no `=`, or its value is not YAML.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not all(key.split(".")):
            raise ValueError(f"{text!r} is no setting; give key=value, such as batch_size=8")
        values.pop(key, None)  # its new position counts: `a={}` between two `a.b=` takes back only the first
        if key in text_keys:  # a folder may be called 2024, and a path contain YAML's special characters
            values[key] = None if value in ("null", "~", "") else value
        else:
            is_bare_list = "," in value and value[0] not in "[{\"'"
            values[key] = parse_yaml(f"[{value}]" if is_bare_list else value, f"the value of {key}")
    return values
