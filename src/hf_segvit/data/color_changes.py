"""Change the colours of training images as the official EoMT code does, which is as SSD did.

`jitter_colors` draws and applies the changes. They equal torchvision's bit by bit, but are computed in bands and for
the part that is wanted: a photograph of 12 million pixels takes a fifth of the time. H W pixels, h w of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

# The photometric distortion of SSD (arXiv:1512.02325), as in the official EoMT code.
BRIGHTNESS, CONTRAST, SATURATION = 32 / 255, 0.5, 0.5  # factors are 1 +- these
HUE = 18 / 360  # of the circle
PROBABILITY = 0.5  # of each change


_BAND = 65_536  # pixels changed at a time: what is computed in between then fits into a processor's cache

_WHOLE = (slice(None), slice(None))


def jitter_colors(pixels: Tensor, generator: np.random.Generator, window: tuple[slice, slice] = _WHOLE) -> Tensor:
    """Change the colours of an image (C, H, W) uint8: brightness first; contrast second or, just as often, last.

    Of more than three channels the first three count as colours, and the others, such as infrared or depth, are kept.

    Args:
        window: rows and columns to return; their values are those of the whole image, changed and then cut.
    """
    if pixels.shape[0] not in (1, 3):
        colors, others = (pixels[:3], pixels[3:]) if pixels.shape[0] > 3 else (pixels[:0], pixels)
        changed = jitter_colors(colors, generator, window) if len(colors) else colors[:, *window]
        # Concatenated with channels last in memory, as images are everywhere else.
        return torch.cat([changed.permute(1, 2, 0), others[:, *window].permute(1, 2, 0)], dim=2).permute(2, 0, 1)

    changes = _draw_changes(generator)
    names = [name for name, _ in changes]
    if "contrast" not in names:
        return _changed(pixels[:, *window], [_CHANGES[name](factor) for name, factor in changes])
    # Contrast is about the mean of the whole image, as the changes before it have left it.
    at = names.index("contrast")
    pixels = _changed(pixels, [_CHANGES[name](factor) for name, factor in changes[:at]])
    contrast = _contrast(changes[at][1], _mean_grey(pixels))
    return _changed(pixels[:, *window], [contrast, *(_CHANGES[name](factor) for name, factor in changes[at + 1 :])])


def _draw_changes(generator: np.random.Generator) -> list[tuple[str, float]]:
    """The changes of one image in order, each with its factor."""
    # torchvision's RandomPhotometricDistort draws from the global generator, so samples could not be reproduced.
    changes: list[tuple[str, float]] = []

    def chosen() -> bool:
        return bool(generator.random() < PROBABILITY)

    def factor(strength: float) -> float:
        return float(generator.uniform(1 - strength, 1 + strength))

    if chosen():
        changes.append(("brightness", factor(BRIGHTNESS)))
    contrast_first = chosen()
    if contrast_first and chosen():
        changes.append(("contrast", factor(CONTRAST)))
    if chosen():
        changes.append(("saturation", factor(SATURATION)))
    if chosen():
        changes.append(("hue", float(generator.uniform(-HUE, HUE))))
    if not contrast_first and chosen():
        changes.append(("contrast", factor(CONTRAST)))
    return changes


Change = Callable[[Tensor], Tensor]

_CHANGES: dict[str, Callable[[float], Change]] = {
    "brightness": lambda factor: lambda band: functional.adjust_brightness(band, factor),
    "saturation": lambda factor: lambda band: functional.adjust_saturation(band, factor),
    "hue": lambda factor: lambda band: turned_hue(band, factor) if len(band) == 3 else band,
}


def _contrast(factor: float, mean: Tensor) -> Change:
    """`functional.adjust_contrast`, for a part of an image whose mean is known."""
    return lambda band: band.mul(factor).add_(mean, alpha=1.0 - factor).clamp_(0, 255).to(torch.uint8)


def _mean_grey(pixels: Tensor) -> Tensor:
    """The mean that `functional.adjust_contrast` finds."""
    grey = torch.empty((1, *pixels.shape[1:]), dtype=torch.float32)
    for band in _bands(pixels):
        values = pixels[:, band].contiguous()
        if len(values) == 3:
            values = values[0].mul(0.2989).add_(values[1], alpha=0.587).add_(values[2], alpha=0.114).floor_()[None]
        grey[:, band] = values
    return grey.mean(dim=(-3, -2, -1), keepdim=True)


def _changed(pixels: Tensor, changes: Sequence[Change]) -> Tensor:
    """Apply changes of each pixel by itself to an image (C, h, w) uint8; the result is channels last in memory."""
    if not changes:
        return pixels
    changed = torch.empty((*pixels.shape[1:], pixels.shape[0]), dtype=torch.uint8).permute(2, 0, 1)
    for band in _bands(pixels):
        # Planes are read and written several times faster than channels beside each other.
        values = pixels[:, band].contiguous()
        for change in changes:
            values = change(values)
        changed[:, band] = values
    return changed


def _bands(pixels: Tensor) -> Iterator[slice]:
    height, width = pixels.shape[1:]
    rows = max(1, _BAND // max(1, width))
    return (slice(top, top + rows) for top in range(0, height, rows))


def turned_hue(pixels: Tensor, angle: float) -> Tensor:
    """`functional.adjust_hue` of an image (3, h, w) uint8, in two fifths of its time; `angle` in turns."""
    red, green, blue = functional.to_dtype(pixels, torch.float32, scale=True).unbind(0)
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    spread = high - low
    # Where these are 0 so is what they divide, and elsewhere they are at least 1 / 255.
    saturation = spread / high.clamp(min=1e-3)
    spread.clamp_(min=1e-3)
    # As factors: choosing by `where` takes several times as long as all the arithmetic.
    is_red = (high == red).to(torch.float32)
    is_green = (high == green).to(torch.float32).mul_(1 - is_red)
    from_red, from_green, from_blue = ((high - channel).div_(spread) for channel in (red, green, blue))
    hue = (from_red + 2.0).sub_(from_blue).mul_(is_green)
    hue.add_((from_blue - from_green).mul_(is_red))
    hue.add_(from_green.add_(4.0).sub_(from_red).mul_((1 - is_red).sub_(is_green)))
    hue.mul_(1.0 / 6.0).add_(1.0)
    # The fractional part twice, as torchvision rounds in between.
    hue.sub_(hue.floor()).add_(angle)
    within = hue.sub_(hue.floor()).mul_(6)
    sextant = within.floor()
    within.sub_(sextant)
    mixed, rest = saturation * within, 1.0 - saturation
    falling = (1.0 - mixed).mul_(high).clamp_(0.0, 1.0)
    rising = mixed.add_(rest).mul_(high).clamp_(0.0, 1.0)
    lowest = rest.mul_(high).clamp_(0.0, 1.0)
    levels = [functional.to_dtype(level, torch.uint8, scale=True).numpy() for level in (high, falling, rising, lowest)]
    numbers = sextant.to(torch.uint8).numpy()
    is_sextant = [(numbers == number).view(np.uint8) for number in range(6)]
    is_sextant[0] |= (numbers == 6).view(np.uint8)  # a fraction that was rounded up to 1
    turned = torch.zeros_like(pixels)
    for channel, sextants in zip(turned.numpy(), _LEVELS, strict=True):
        for level, chosen in zip(levels, sextants, strict=True):
            channel += sum((is_sextant[number] for number in chosen[1:]), start=is_sextant[chosen[0]]) * level
    return turned


# In which sextants of the hue red, green and blue are at the highest, falling, rising and lowest level.
_LEVELS = (
    ((0, 5), (1,), (4,), (2, 3)),
    ((1, 2), (3,), (0,), (4, 5)),
    ((3, 4), (5,), (2,), (0, 1)),
)
