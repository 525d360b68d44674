"""Look up what users name: suggestions, import paths, settings.

- `suggestion` ends the error about an unknown name;
- `import_object` imports the class or function at "package.module:Name", which recipes and commands accept wherever
  users can plug in their own code;
- `entry_points` lists the plug-ins of installed packages in a group such as `hf_segvit.readers`;
- `parse_yaml` reads YAML, and `parse_key_values` reads `key=value` arguments whose values are YAML.

Nothing heavy is imported here, as the command line uses this module before it loads PyTorch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Container, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def suggestion(name: object, choices: Iterable[str], count: int = 1, otherwise: str | None = None) -> str:
    """The end of an error about an unknown name: "did you mean X?", or all choices if none is similar.

    Args:
        count: largest number of names to suggest.
        otherwise: text if none is similar, for choices that are too many to list.
    """
    known = list(choices)
    # 0.6 still finds "panoptc" and swapped letters; below that, short names resemble everything.
    similar = get_close_matches(str(name), known, n=count, cutoff=0.6)
    # A beginning, such as "Focal" of "FocalCriterion", is less similar than that by letters.
    similar = similar or [choice for choice in known if len(str(name)) > 2 and choice.startswith(str(name))][:count]
    return f"did you mean {' or '.join(similar)}?" if similar else otherwise or f"choose one of {', '.join(known)}"


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


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Refuses duplicate keys, of which PyYAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            duplicates = ", ".join(sorted({str(key) for key in keys if keys.count(key) > 1}))
            raise yaml.constructor.ConstructorError(None, None, f"the key {duplicates} occurs twice", node.start_mark)
        return mapping


class _Loader(_UniqueKeys, yaml.SafeLoader):
    """Loads plain data only."""


class _TextLoader(_UniqueKeys, yaml.BaseLoader):
    """Keeps every scalar as it is written: in YAML 1.1 a class called `no` would be False, and `1e3` a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # PyYAML's own loader of text ignores tags instead of refusing them.
        if not str(node.tag).startswith("tag:yaml.org,2002:") or "python/" in str(node.tag):
            raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is unknown", node.start_mark)
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
    try:
        return yaml.load(text, Loader=_TextLoader if as_text else _Loader)
    except RecursionError as error:
        raise ValueError(f"{source}: no valid YAML (nested too deep)") from error
    except (yaml.YAMLError, ValueError) as error:  # a month of 13 is a `ValueError`
        raise ValueError(f"{source}: no valid YAML ({' '.join(str(error).split())})") from error


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
