"""Colour jitter with the parameters of the official EoMT code, which are those of SSD.

Each is changed with probability 0.5: brightness by a factor of 1 +- 32/255, contrast and saturation of 1 +- 0.5, hue by
+- 18/360 of the circle. Brightness comes first; contrast second or, just as often, last.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional

BRIGHTNESS, CONTRAST, SATURATION = 32 / 255, 0.5, 0.5
HUE = 18 / 360
PROBABILITY = 0.5


def jitter_colors(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Change the colours of a picture (3, H, W) uint8."""

    def chosen() -> bool:
        return bool(generator.random() < PROBABILITY)

    def factor(strength: float) -> float:
        return float(generator.uniform(1 - strength, 1 + strength))

    if chosen():
        pixels = functional.adjust_brightness(pixels, factor(BRIGHTNESS))
    contrast_first = chosen()
    if contrast_first and chosen():
        pixels = functional.adjust_contrast(pixels, factor(CONTRAST))
    if chosen():
        pixels = functional.adjust_saturation(pixels, factor(SATURATION))
    if chosen():
        pixels = functional.adjust_hue(pixels, float(generator.uniform(-HUE, HUE)))
    if not contrast_first and chosen():
        pixels = functional.adjust_contrast(pixels, factor(CONTRAST))
    return pixels
