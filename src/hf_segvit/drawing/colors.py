"""Colours of classes, far apart for every kind of colour vision, and fixed.

`class_color(label_id)` is the colour of a class in every image; `segment_colors` gives shades of it to the segments of
one image. The palette is chosen greedily: each next colour is the one that is furthest from all before it, in the kind
of colour vision where they are closest. Distances are Euclidean in OKLab, where equal steps look equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Color = tuple[int, int, int]

NUM_COLORS = 256  # classes beyond repeat the palette
# OKLab to cube roots of cone responses, and cone responses to linear sRGB; from Ottosson, "A perceptual color space for
# image processing", 2020.
_OKLAB_TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
# What people see who lack one kind of cones, in linear sRGB; from Machado, Oliveira and Fernandes, "A physiologically-
# based model for simulation of color vision deficiency", 2009, at full severity. Tritanopia, one in ten thousand, would
# cost the others too much.
COLOR_VISIONS: dict[str, np.ndarray] = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
_LIGHTNESS = (0.42, 0.92)  # darker colours are lost on dark images, and lighter ones on bright ones
_LEAST_CHROMA = 0.115  # greyer colours look like the image itself
# The first colours, as an image shows best: red, azure, green, yellow.
_FIRST = ((0.63, 0.2, 25.0), (0.7, 0.13, 245.0), (0.72, 0.2, 142.0), (0.88, 0.17, 98.0))
# Added to lightness and hue (degrees) for the second, third ... segment of a class; six times five combinations.
_SHADES = (0.0, -0.12, 0.08, -0.2, 0.13, -0.06)
_TURNS = (0.0, 12.0, -12.0, 6.0, -6.0)


def class_color(label_id: int) -> Color:
    """(red, green, blue) in [0, 255] of a class; the same in every image, and for `label_id` + 256."""
    return _color(*palette()[label_id % NUM_COLORS])


def segment_colors(segments_info: Sequence[Mapping[str, Any]]) -> dict[int, Color]:
    """Colours by segment id: the class's for its first segment, shades of it for the others."""
    colors: dict[int, Color] = {}
    num_segments: dict[int, int] = {}
    for row in segments_info:
        label, number = row["label_id"], num_segments.get(row["label_id"], 0)
        num_segments[label] = number + 1
        lightness, chroma, hue = palette()[label % NUM_COLORS]
        shade = _SHADES[number % len(_SHADES)]
        # Away from the ends of the range, where a shade would be cut off.
        lightness += shade if _LIGHTNESS[0] <= lightness + shade <= 0.95 else -shade
        colors[row["id"]] = _color(lightness, chroma, hue + _TURNS[number % len(_TURNS)])
    return colors


@lru_cache(maxsize=1)
def palette() -> tuple[tuple[float, float, float], ...]:
    """256 colours as (lightness, chroma, hue in degrees) of OKLCH."""
    grid = np.array(
        [
            (lightness, chroma, hue)
            for lightness in np.arange(_LIGHTNESS[0], _LIGHTNESS[1] + 1e-9, 0.05)
            for chroma in np.arange(_LEAST_CHROMA, 0.3, 0.03)
            for hue in np.arange(0, 360, 6)
        ]
    )
    linear = _linear_rgb(grid)
    grid = np.concatenate([np.array(_FIRST), grid[((linear >= -1e-6) & (linear <= 1 + 1e-6)).all(axis=1)]])
    rgb = np.clip(_linear_rgb(grid), 0, 1)
    seen = np.stack([_oklab(np.clip(rgb @ matrix.T, 0, 1)) for matrix in COLOR_VISIONS.values()])  # (3, N, 3)
    chosen: list[int] = []
    nearest = np.full(len(grid), np.inf)  # of each candidate to the colours chosen so far
    while len(chosen) < NUM_COLORS:
        best = len(chosen) if len(chosen) < len(_FIRST) else int(nearest.argmax())
        chosen.append(best)
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[:, best : best + 1], axis=2).min(axis=0))
    return tuple((float(row[0]), float(row[1]), float(row[2])) for row in grid[chosen])


def ink_on(color: Color) -> str:
    """The colour of letters on a ground of `color`: black or white, whichever contrasts more (WCAG 2's ratio)."""
    luminance = float(np.dot(_decoded(np.array(color) / 255), (0.2126, 0.7152, 0.0722)))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _color(lightness: float, chroma: float, hue: float) -> Color:
    linear = np.clip(_linear_rgb(np.array([[lightness, chroma, hue]]))[0], 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # gamma of sRGB
    red, green, blue = (int(value) for value in np.rint(255 * encoded))
    return red, green, blue


def _linear_rgb(lch: np.ndarray) -> np.ndarray:
    """(N, 3) linear sRGB of OKLCH colours; outside of [0, 1] where a screen cannot show them."""
    hue = lch[:, 2] * (math.pi / 180)
    lab = np.stack([lch[:, 0], lch[:, 1] * np.cos(hue), lch[:, 1] * np.sin(hue)], axis=1)
    return (lab @ _OKLAB_TO_CONES.T) ** 3 @ _CONES_TO_RGB.T


def _oklab(linear: np.ndarray) -> np.ndarray:
    """(N, 3) OKLab of linear sRGB."""
    cones = np.cbrt(linear @ np.linalg.inv(_CONES_TO_RGB).T)
    return cones @ np.linalg.inv(_OKLAB_TO_CONES).T


def _decoded(rgb: np.ndarray) -> np.ndarray:
    """Linear sRGB of encoded values in [0, 1]."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
