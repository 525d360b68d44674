"""What users write: names with the nearest known one, import paths, entry points, YAML and key=value settings.

- `suggestion` ends the error about a name that is not known;
- `import_object` gives the class or function of "package.module:Name", which recipes and commands accept wherever
  code of one's own can stand;
- `entry_points` lists what installed packages offer in a group such as `hf_segvit.readers`;
- `parse_yaml` reads YAML, and `parse_key_values` the `key=value` words of a command line, whose values are YAML.

It imports nothing heavy, so that the command line can use it before PyTorch is there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Container, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import yaml

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def suggestion(name: object, choices: Iterable[str], count: int = 1, otherwise: str | None = None) -> str:
    """The end of an error about an unknown name: "did you mean X?", or all choices where none is near.

    Args:
        name: what was given.
        choices: the names that are known.
        count: at most so many near names are listed.
        otherwise: to say where none is near, instead of all choices, where those are too many.
    """
    known = list(choices)
    # 0.5 still finds "panoptc" and swapped letters; below it, short names resemble everything.
    near = get_close_matches(str(name), known, n=count, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise or f"choose one of {', '.join(known)}"


def is_import_path(text: object) -> bool:
    """Whether a text has the form "package.module:Name"."""
    return isinstance(text, str) and _IMPORT_PATH.fullmatch(text) is not None


def import_object(path: str, argument: str, methods: Sequence[str] = (), *, is_class: bool = True) -> Any:
    """The class or function that "package.module:Name" names.

    Args:
        path: module and name, with a colon between them.
        argument: what the path was given for, such as "criterion"; the error names it.
        methods: names that the object must have.
        is_class: whether it must be a class.

    Raises:
        ValueError: the text is no import path, the module or name does not exist or cannot be imported, it is no
            class, or a method is missing; the message names argument, path and remedy.
    """
    if not is_import_path(path):
        raise ValueError(
            f"{argument}={path!r} is no import path; give package.module:Name, such as my_package.loss:Loss"
        )
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises is said with its path
        remedy = "install its package or add its folder to PYTHONPATH" if _is_absent(error, module_name) else "mend it"
        raise ValueError(
            f"{argument}={path}: {module_name} cannot be imported ({type(error).__name__}: {error}); {remedy}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(found) if not known.startswith("_")]
            raise ValueError(f"{argument}={path}: {module_name} has no {name}; {suggestion(name, known)}")
        found = getattr(found, part)
    if is_class and not isinstance(found, type):
        raise ValueError(f"{argument}={path} is {type(found).__name__} and no class; name a class")
    missing = [method for method in methods if not callable(getattr(found, method, None))]
    if missing:
        raise ValueError(f"{argument}={path} has no method {', '.join(missing)}; add it, see docs/extending.md")
    return found


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """What installed packages offer in an entry point group, by name.

    Raises:
        ValueError: two packages offer different objects under one name; the message names both.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"two packages offer {point.name!r} in {group}: {other.value} and {point.value}; uninstall one"
            )
    return found


def _is_absent(error: BaseException, module_name: str) -> bool:
    """Whether the module itself or a package that holds it is not there, rather than something it imports."""
    return isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")


class _Loader(yaml.SafeLoader):
    """Plain data only; and a key that is written twice is an error, not silently the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(twice)} stands there twice", node.start_mark
            )
        return mapping


# As in YAML 1.2: YAML 1.1, which PyYAML reads, takes 1e-4 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def parse_yaml(text: str, source: str) -> Any:
    """The data in a YAML text; nothing in it is executed.

    Args:
        text: YAML.
        source: where it comes from, for the error.

    Raises:
        ValueError: it is no YAML, or has a key twice; the message has the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: no valid YAML ({' '.join(str(error).split())})") from error


def parse_key_values(texts: Iterable[str], text_keys: Container[str] = ()) -> dict[str, Any]:
    """The settings in "key=value" words, in order; of a key that is given twice the last counts.

    Args:
        texts: the value is YAML, such as `4`, `1e-5`, `true`, `null`, `text` or `[64, 96]`; without a bracket or quote
            in front, commas make a list too, as in `64,96`.
        text_keys: keys whose value is text as it is: a folder may be called 2024, and a path have what means something
            in YAML. Only an empty value, `null` and `~` are `None` there, too.

    Returns:
        Key, dots included, to value.

    Raises:
        ValueError: a word has no key or no `=`, or its value is no YAML.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not all(key.split(".")):
            raise ValueError(f"{text!r} is no setting; give key=value, such as batch_size=8")
        values.pop(key, None)  # its new position counts: `a={}` between two `a.b=` takes back only the first
        if key in text_keys:
            values[key] = None if value in ("null", "~", "") else value
        else:
            is_row = "," in value and value[0] not in "[{\"'"
            values[key] = parse_yaml(f"[{value}]" if is_row else value, f"the value of {key}")
    return values
