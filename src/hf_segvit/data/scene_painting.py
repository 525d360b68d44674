"""Paint the stuff and the things of generated scenes.

`STUFF_PAINTERS` fill an image with one kind of stuff; `place_thing` lays one of `SHAPES` on it, and `paint_thing`
paints it; `smooth_noise` is the basis of all textures. Lengths are in pixels or, for shapes, in radii of the thing;
colours are float32 in [0, 255]. H W pixels of the image, h w of a thing's window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Element-wise arithmetic only, no matrix products: their order of summation differs between machines, and so would
# scenes.

UNLABELLED = "blob"  # the shape that has no class
TEXTURES = ("plain", "speckle", "dots", "stripes", "checker")


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], rows: float, columns: float) -> np.ndarray:
    """(H, W) float32 in [-1, 1]: random values on a grid of about `rows` x `columns` cells, smoothly interpolated."""
    grid = rng.uniform(-1, 1, (int(rows) + 2, int(columns) + 2)).astype(np.float32)
    (y, fy), (x, fx) = _cells(size[0], rows), _cells(size[1], columns)
    lines = grid[y] + (grid[y + 1] - grid[y]) * fy[:, None]
    return lines[:, x] + (lines[:, x + 1] - lines[:, x]) * fx


def _cells(length: int, count: float) -> tuple[np.ndarray, np.ndarray]:
    """Cell of each of `length` pixels, over `count` cells, and its smoothed position in the cell."""
    positions = (np.arange(length, dtype=np.float32) + 0.5) * np.float32(count / length)
    cells = positions.astype(np.int64)
    fraction = positions - cells
    return cells, fraction * fraction * (3 - 2 * fraction)  # smoothstep: no creases between cells


def random_color(
    rng: np.random.Generator,
    hue: tuple[float, float] = (0, 1),
    saturation: tuple[float, float] = (0.45, 1),
    value: tuple[float, float] = (0.45, 1),
) -> np.ndarray:
    """(3,) float32 colour in [0, 255], from ranges of hue (1 is a full circle), saturation and value."""
    h, s, v = (rng.uniform(*bounds) for bounds in (hue, saturation, value))
    distance = np.abs((h + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return (255 * v * (1 - s + s * np.clip(distance, 0, 1))).astype(np.float32)


def _sky(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Smooth gradient, from the top colour to a paler horizon, with soft clouds."""
    top = random_color(
        rng, hue=(0.52, 0.66) if rng.random() < 0.7 else (0.9, 1.1), saturation=(0.25, 0.7), value=(0.7, 1)
    )
    fade = np.linspace(0, 0.8, size[0], dtype=np.float32)[:, None, None]
    clouds = np.clip(smooth_noise(rng, size, 6, 3) + 0.5 * smooth_noise(rng, size, 12, 7), 0, 1)[..., None]
    pale = top + (250 - top) * fade
    return pale + (255 - pale) * (0.6 * clouds)


def _grass(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Upright blades: fine noise, stretched vertically."""
    color = random_color(rng, hue=(0.17, 0.38), saturation=(0.4, 0.8), value=(0.4, 0.75))
    blades = smooth_noise(rng, size, 24, 64)
    return color * (1 + 0.28 * blades + 0.12 * smooth_noise(rng, size, 3, 3))[..., None]


def _water(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Horizontal waves, bent by slow noise, with light crests."""
    color = random_color(rng, hue=(0.48, 0.64), saturation=(0.5, 0.95), value=(0.35, 0.75))
    down = np.linspace(0, 2 * np.pi * rng.uniform(9, 13), size[0], dtype=np.float32)[:, None]
    waves = np.sin(down + 2.5 * smooth_noise(rng, size, 4, 5)) + 0.6 * smooth_noise(rng, size, 32, 5)
    return color * (1 + 0.14 * waves)[..., None] + 38 * np.clip(waves - 0.8, 0, 1)[..., None]


def _sand(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Grains over slow dunes."""
    color = random_color(rng, hue=(0.07, 0.16), saturation=(0.2, 0.55), value=(0.65, 0.95))
    return color * (1 + 0.14 * smooth_noise(rng, size, 72, 72) + 0.12 * smooth_noise(rng, size, 4, 2))[..., None]


def _forest(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Dark, round clumps of leaves."""
    color = random_color(rng, hue=(0.2, 0.45), saturation=(0.4, 0.9), value=(0.2, 0.5))
    clumps = np.abs(smooth_noise(rng, size, 14, 14)) + 0.3 * smooth_noise(rng, size, 40, 40)
    return color * (0.7 + 0.8 * clumps)[..., None]


def _wall(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Courses of bricks, each shifted by half a brick, with pale joints."""
    color = random_color(rng, hue=(-0.06, 0.12), saturation=(0.2, 0.7), value=(0.4, 0.8))
    height = min(size) / rng.uniform(10, 14)
    y, x = np.arange(size[0])[:, None] / height, np.arange(size[1])[None] / (2 * height)
    course = y.astype(np.int64)
    across = x + 0.5 * (course % 2)
    shade = rng.uniform(0.8, 1.15, (int(y.max()) + 1, int(across.max()) + 1)).astype(np.float32)
    bricks = color * shade[course, across.astype(np.int64)][..., None]
    joint = (y % 1 < 0.16) | (across % 1 < 0.08)
    pale = 0.5 * color + 105
    return np.where(joint[..., None], pale, bricks).astype(np.float32)


STUFF_PAINTERS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "sky": _sky,
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "forest": _forest,
    "wall": _wall,
}


def _star(points: int, inner: float, outer: float = 1.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A star with `points` corners at radius `outer` and notches at radius `inner`."""
    half = math.pi / points

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # from the nearest corner, which points up
        radius = outer * inner * math.sin(half) / (inner * np.sin(half - angle) + outer * np.sin(angle))
        return np.hypot(x, y) - radius

    return distance


def _polygon(corners: int, outer: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    # With notches on the straight lines between corners, a star is a regular polygon.
    return _star(corners, outer * math.cos(math.pi / corners), outer)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1.1, y - 0.4), np.maximum(x - 0.4, y - 1.1))


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1.1, 0.85 - np.hypot(x - 0.55, y))


def _blob(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.arctan2(y, x)
    return np.hypot(x, y) - 1 - 0.18 * np.sin(2 * angle) - 0.14 * np.sin(3 * angle + 1)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, 1.1 * y - 0.2 + 0.75 * np.sqrt(np.abs(x))) - 1.05


# Approximate signed distance from the outline, negative inside, of points x to the right and y down, in radii. The
# factors make areas similar, so that size does not give the class away.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.9,
    "triangle": _polygon(3, 1.4),
    "star": _star(5, 0.55, 1.35),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.85) - 0.3,
    "cross": _cross,
    "pentagon": _polygon(5, 1.15),
    "hexagon": _polygon(6, 1.1),
    "crescent": _crescent,
    "heart": _heart,
    UNLABELLED: _blob,
}
_SHAPE_REACH = 1.45  # radii that contain every shape


@dataclass(frozen=True)
class Thing:
    """A shape laid on an image; all arrays are (h, w), of the window of the image that contains it."""

    window: tuple[slice, slice]  # rows and columns of the image
    x: np.ndarray  # to the right of the centre, in radii
    y: np.ndarray  # below the centre
    u: np.ndarray  # the same positions along the thing's own axes, which are turned
    v: np.ndarray
    distance: np.ndarray  # from the outline in pixels, negative inside
    radius: float  # in pixels

    @property
    def inside(self) -> np.ndarray:
        """(h, w) bool mask."""
        return self.distance < 0


def place_thing(size: tuple[int, int], shape: str, center: tuple[float, float], radius: float, turn: float) -> Thing:
    """Lay one of `SHAPES` on an image of `size` (H, W): `center` (y, x) and `radius` in pixels, `turn` in radians."""
    reach = _SHAPE_REACH * radius + 2
    spans = [(max(0, int(c - reach)), min(length, int(c + reach) + 1)) for c, length in zip(center, size, strict=True)]
    y, x = (
        (np.arange(*span, dtype=np.float32) + np.float32(0.5 - c)) / np.float32(radius)
        for span, c in zip(spans, center, strict=True)
    )
    x, y = x[None] + np.zeros_like(y)[:, None], y[:, None] + np.zeros_like(x)[None]
    u = x * math.cos(turn) + y * math.sin(turn)
    v = y * math.cos(turn) - x * math.sin(turn)
    window = (slice(*spans[0]), slice(*spans[1]))
    return Thing(window, x, y, u, v, SHAPES[shape](u, v) * np.float32(radius), radius)


def paint_thing(rng: np.random.Generator, image: np.ndarray, thing: Thing, texture: str) -> None:
    """Paint a thing into an image (H, W, 3), in place: a colour that stands out, light from above left, a shadow."""
    region = image[thing.window]
    background = region[thing.inside].mean(axis=0)
    color = random_color(rng)
    for _ in range(8):
        if np.abs(color - background).max() > 70:  # grey levels; with less, the thing would be hard to see
            break
        color = random_color(rng)
    surface = _thing_texture(rng, texture, thing.u, thing.v, color)
    rim = -1.2 * max(1.0, min(image.shape[:2]) / 96)  # pixels
    light = (1 - 0.16 * (thing.x + thing.y)) * np.where(thing.distance > rim, np.float32(0.55), np.float32(1))
    shadow = 0.35 * np.clip(1 - thing.distance / (0.3 * thing.radius), 0, 1)
    opacity = np.clip(0.5 - thing.distance, 0, 1)
    region *= ((1 - shadow) * (1 - opacity))[..., None]
    region += surface * (light * opacity)[..., None]


def _thing_texture(rng: np.random.Generator, name: str, x: np.ndarray, y: np.ndarray, color: np.ndarray) -> np.ndarray:
    """(h, w, 3) colours of one of `TEXTURES` at positions x, y, in radii; `color` is the main one."""
    if name == "plain":
        return np.broadcast_to(color, (*x.shape, 3))
    if name == "speckle":
        return color * (1 + 0.25 * rng.uniform(-1, 1, x.shape).astype(np.float32))[..., None]
    # The second colour is clearly lighter or darker, so that the pattern is visible in grey too.
    second = color * 0.4 if color.mean() > 120 else color + 0.65 * (255 - color)
    u, v = (x + rng.uniform()) * np.float32(2 * np.pi), (y + rng.uniform()) * np.float32(2 * np.pi)
    pattern = {
        "dots": lambda: np.cos(1.3 * u) * np.cos(1.3 * v) > 0.35,
        "stripes": lambda: np.sin(1.5 * u) > 0,
        "checker": lambda: np.sin(u) * np.sin(v) > 0,
    }[name]()
    return np.where(pattern[..., None], second, color)
