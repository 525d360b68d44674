"""The formats of data sets: one module per format, and what is known of each without importing it.

A reader is a module with four names: `TASKS`, the tasks that it reads for, its default first; `LAYOUT`, which files it
expects, in words; `splits(path, wanted=(), **options)`, the splits that are there; and `read(path, split, task,
problems, **options)`, which returns a `Reading` (reading.py). Readers of this folder also have a `DESCRIPTION` of one
line, and `VARIANTS` if options of theirs deserve a format name of their own. A module from elsewhere is a reader too:
by its import path in place of the format, or by name as an entry point in the group `READER_GROUP`.

Modules of readers import the libraries that decode images, which takes seconds. The command line lists the formats
long before it needs them, so `FORMATS` is read from the readers' source text.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ...lookup import entry_points
from ..class_lists import CLASS_FILES, CLASS_FORMS

READER_GROUP = "hf_segvit.readers"
NOT_OPTIONS = ("path", "split", "task", "problems")  # parameters of `splits` and `read` that each format has
_CONSTANTS = ("DESCRIPTION", "LAYOUT", "VARIANTS")


@dataclass(frozen=True)
class Format:
    """A format of this folder.

    Attributes:
        module: import path of its reader.
        description: what it is, in one line.
        layout: which files it expects.
        options: names of what may be said after a `?`.
        preset: options that its name stands for.
    """

    module: str
    description: str
    layout: str
    options: tuple[str, ...]
    preset: dict[str, Any] = field(default_factory=dict)


def _formats() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda file: file.name):
        name = file.name.removesuffix(".py")
        if not file.name.endswith(".py") or name.startswith("_"):
            continue
        constants: dict[str, Any] = {}
        options: tuple[str, ...] = ()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if node.targets[0].id in _CONSTANTS:
                    constants[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.FunctionDef) and node.name == "read":
                options = tuple(argument.arg for argument in node.args.args if argument.arg not in NOT_OPTIONS)
        module, layout = f"{__package__}.{name}", constants["LAYOUT"]
        found[name] = Format(module, constants["DESCRIPTION"], layout, options)
        for variant, (description, preset) in constants.get("VARIANTS", {}).items():
            left = tuple(option for option in options if option not in preset)
            found[variant] = Format(module, description, layout, left, preset)
    return found


FORMATS = _formats()


def format_list(width: int = 100) -> str:
    """What FORMAT:PATH may be, as text for people.

    Args:
        width: of the text, in characters.
    """
    lines = ["FORMAT:PATH, with the files at PATH:"]
    for name, about in FORMATS.items():
        lines += _wrapped(f"{name}: {about.description}", 2, width)
        lines += _wrapped(about.layout, 6, width)
        if about.options:
            lines += _wrapped(f"options: {', '.join(about.options)}", 6, width)
    for name, point in entry_points(READER_GROUP).items():
        origin = f" of {point.dist.name}" if point.dist else ""
        lines += _wrapped(f"{name}: the reader {point.value}{origin}", 2, width)
    lines += _wrapped("package.module: a reader of your own, see hf_segvit.data.readers", 2, width)
    lines += _wrapped(f"{' or '.join(CLASS_FILES)}, or classes=FILE: {CLASS_FORMS}", 0, width)
    lines += [
        "Options follow a `?`: 'mask_folder:streets?classes=streets.json', 'generated:hard?num_scenes=50&size=64'"
    ]
    return "\n".join(lines)


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
