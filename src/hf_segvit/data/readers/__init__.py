"""Data set formats, one reader module each, listed without importing any.

A reader is a module with four names: `TASKS`, the tasks it supports, default first; `LAYOUT`, the files it expects, in
words; `splits(path, wanted=(), **options)`, the splits it finds, where `wanted` adds names to look for; and `read(path,
split, task, problems, **options)`, which returns a `Reading` (../reading.py). `read` adds faulty entries to `problems`
and leaves them out, and raises `ValueError` if nothing can be read at all. Readers in this folder also have a one-line
`DESCRIPTION`, and `VARIANTS` if some options deserve a format name of their own. A reader in another package is named
by its import path, or by an entry point in the group `READER_GROUP`.
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
NOT_OPTIONS = ("path", "split", "task", "problems")  # parameters of `splits` and `read` that every format has
_CONSTANTS = ("DESCRIPTION", "LAYOUT", "VARIANTS")


@dataclass(frozen=True)
class Format:
    """A format that has its reader in this folder."""

    module: str  # import path of the reader
    description: str
    layout: str
    options: tuple[str, ...]  # names that may follow a `?`
    preset: dict[str, Any] = field(default_factory=dict)  # options that the name of a variant stands for


def _formats() -> dict[str, Format]:
    formats: dict[str, Format] = {}
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
        formats[name] = Format(module, constants["DESCRIPTION"], layout, options)
        for variant, (description, preset) in constants.get("VARIANTS", {}).items():
            free = tuple(option for option in options if option not in preset)
            formats[variant] = Format(module, description, layout, free, preset)
    return formats


# From the readers' source text: importing them takes seconds, as they load image libraries, and the command line lists
# the formats long before it needs a reader.
FORMATS = _formats()


def format_list(width: int = 100) -> str:
    """Help text on FORMAT:PATH, `width` characters wide."""
    lines = ["FORMAT:PATH, with the files at PATH:"]
    for name, known in FORMATS.items():
        lines += _wrapped(f"{name}: {known.description}", 2, width)
        lines += _wrapped(known.layout, 6, width)
        if known.options:
            lines += _wrapped(f"options: {', '.join(known.options)}", 6, width)
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
    # Paths and option names must stay whole, so that they can be copied.
    return textwrap.wrap(
        text, width, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
