"""The formats of data sets as text for people: `format_list` says of each what it is, its layout and its options."""

from __future__ import annotations

import importlib
import inspect
import textwrap

from .class_lists import CLASS_FILES, CLASS_FORMS
from .reading import FORMATS

_ALWAYS = ("path", "split", "task", "problems")


def format_list(width: int = 100) -> str:
    """What FORMAT:PATH may be.

    Args:
        width: of the text, in characters.
    """
    lines = ["FORMAT:PATH, with the files at PATH:"]
    for name, about in FORMATS.items():
        module = importlib.import_module(f".readers.{name}", __package__)
        lines += _wrapped(f"{name}: {about}", 2, width)
        lines += _wrapped(module.LAYOUT, 6, width)
        if options := [option for option in inspect.signature(module.read).parameters if option not in _ALWAYS]:
            lines += _wrapped(f"options: {', '.join(options)}", 6, width)
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
