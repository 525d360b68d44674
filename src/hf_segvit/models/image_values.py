"""Values of images: their range, their bands, and how they become 8 bits.

`ImageSettings` says how the files of a data set or a model are read. C channels.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FEW_VALUES = 65536 // 16  # 16-bit images below it use a sixteenth of their range: most likely 12 bits or fewer
_unsaid = ContextVar("unsaid", default=False)


@dataclass(frozen=True)
class ImageSettings:
    """How files become pixels.

    Attributes:
        channels: number that a model takes; 3 makes RGB of grey. `None`: as many as the file has, grey as RGB.
        value_range: the values that become black and white, in images of more than 8 bits; others are clipped. `None`:
            0 to 65535, or 0 to 1 for floating point.
        bands: numbers of the bands to use, from 1, in this order; transparency counts as a band then.
    """

    channels: int | None = None
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None


RGB = ImageSettings(channels=3)
AS_STORED = ImageSettings()


def checked_range(value: Any, name: str = "value_range") -> tuple[float, float] | None:
    """A range of values from a pair or from text such as "0-4095" or "-1024-3071"; `None` stays."""
    if value is None:
        return None
    if isinstance(value, str):
        number = r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*"
        found = re.fullmatch(f"{number}[-,:]{number}", value, re.IGNORECASE)
        value = found.groups() if found else value
    try:
        low, high = (float(part) for part in value)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high < float("inf"):
        raise ValueError(f"{name}={value}: give the values of black and of white, the lower first, such as 0-4095")
    return low, high


def checked_bands(value: Any, name: str = "bands") -> tuple[int, ...] | None:
    """Numbers of bands from a sequence or from text such as "4,3,2"; `None` stays."""
    if value is None:
        return None
    parts = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    try:
        bands = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        bands = ()
    if not bands or min(bands) < 1:
        raise ValueError(f"{name}={value}: give the numbers of bands, from 1, such as 4,3,2")
    return bands


def eight_bits(
    values: np.ndarray, name: str, value_range: tuple[float, float] | None = None, nodata: float | None = None
) -> np.ndarray:
    """Samples of any type as uint8; NaN and the value for "no data" become black.

    Raises:
        ValueError: integers outside of 16 bits, or floating-point values outside of [0, 255], without a range.
    """
    if values.dtype == np.uint8:
        return values
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
    if nodata is not None:
        missing |= values == nodata
    if value_range is not None:
        low, high = value_range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.rint(np.clip(np.where(missing, 0, scaled), 0, 255)).astype(np.uint8)
    values = np.where(missing, values.dtype.type(0), values) if missing.any() else values
    lowest, highest = values.min(), values.max()
    remedy = f"say which values are black and white, for all images alike: {_range_hint(lowest, highest)}"
    if values.dtype.kind == "f":
        if not (lowest >= 0 and highest <= 255):
            raise ValueError(
                f"{name}: floating-point values from {lowest:g} to {highest:g}; scale them to [0, 1] or [0, 255], or "
                f"{remedy}"
            )
        return np.rint(values * (255.0 if highest <= 1 else 1.0)).astype(np.uint8)
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"{name}: integer values from {lowest} to {highest}, outside 16 bits; scale them to 0..65535, or {remedy}"
        )
    warn_of_few_values(int(highest))
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def few_values_note(highest: int) -> str:
    """What to say of 16-bit images whose highest value leaves most of their range unused; "" of others."""
    if not 0 < highest < _FEW_VALUES:
        return ""
    # The usual cause is a sensor of 10 or 12 bits, whose white is the last value of its own range.
    white = 2 ** highest.bit_length() - 1
    return (
        f"16-bit values that fill less than a sixteenth of their range come out nearly black; most likely {white} is "
        f"white: {_range_hint(0, white)}"
    )


def _range_hint(low: Any, high: Any) -> str:
    return f"?range={low:g}-{high:g} for readers, --value-range {low:g}-{high:g} or value_range=({low:g}, {high:g})"


@contextmanager
def few_values_unsaid() -> Iterator[None]:
    """Keep `warn_of_few_values` silent in this thread, where a report says so of each image."""
    token = _unsaid.set(True)
    try:
        yield
    finally:
        _unsaid.reset(token)


def warn_of_few_values(highest: int) -> None:
    """Say once if 16-bit values leave most of their range unused."""
    if not _unsaid.get() and (note := few_values_note(highest)):
        logger.warning_once(note)  # without the name of the image, or it would be said for each one
