"""Values in annotation files: ids, numbers, sizes and text, checked.

Files are written by many tools and by hand, so a value may be of any type. `is_id`, `is_size` and `is_text` tell
whether one can be used; `plain_number` and `whole_number` also read numbers that are stored as text. `name_fault` says
what is wrong with the name of a class, and `shown` puts any value into a message.
"""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

_PLAIN_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def is_id(value: Any) -> bool:
    """Whether a value can be an id: text, or a whole number of 64 bits."""
    # `type`, as True and False are instances of int. Arrow tables hold no larger numbers.
    return is_text(value) or (type(value) is int and -(2**63) <= value < 2**63)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be stored: JSON can hold halves of characters (surrogates)."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def is_size(height: Any, width: Any) -> bool:
    """Whether two values can be the height and width of an image."""
    from ..models.image_claims import max_image_pixels

    return (
        type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= max_image_pixels()
    )


def plain_number(value: Any) -> float | None:
    """A number, or the number that a text holds; `None` for anything else."""
    if type(value) in (int, float):
        return value
    # Not `float` alone, which also takes "nan", "1_000" and digits of other scripts.
    if not isinstance(value, str) or not _PLAIN_NUMBER.fullmatch(value):
        return None
    return int(value) if value.strip().lstrip("+-").isdigit() and len(value) < 20 else float(value)


def whole_number(value: Any) -> int | None:
    """A whole number, also as text or with a fraction of 0; `None` for anything else."""
    number = plain_number(value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


def plain_numbers(values: Any) -> Any:
    """A list in which texts that are numbers became numbers; unchanged if it is no list or holds anything else."""
    if not isinstance(values, list):
        return values
    numbers = [plain_number(value) for value in values]
    return values if None in numbers else numbers


LONGEST_NAME = 500  # characters in the name of a class; longer ones cannot be drawn or listed
MOST_CLASSES = 65_536


def name_fault(name: Any) -> str:
    """What is wrong with the name of a class; "" if nothing is."""
    if not isinstance(name, str) or not name.strip():
        return "a name must be text that is not blank"
    if not is_text(name):
        return "it holds half of a character (a lone surrogate), which cannot be stored; write the name again"
    if len(name) > LONGEST_NAME:
        return f"it has {len(name):,} characters, more than the {LONGEST_NAME} that a name of a class may have"
    return ""


def shown(value: Any) -> str:
    """A value from a file for a message: its `repr`, shortened."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
