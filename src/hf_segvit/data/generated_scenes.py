"""Generate scenes with exact panoptic ground truth, for the demo and tests.

`generate_scene` draws one image: stuff fills it (sky above, one or more kinds of ground below, with irregular
borders), and things lie on top and hide parts of one another. Shape and texture define a class; colours are random.
`GeneratedScenes` is a data set of such images. What stuff and things look like is in `scene_painting.py`. H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .scene_painting import SHAPES, STUFF_PAINTERS, TEXTURES, UNLABELLED, paint_thing, place_thing, smooth_noise

# Stuff and things alternate, as in most label tables; in this order `segment_colors` paints the sky blue and the grass
# green. Easier scenes use the first of them, so that a label id means the same at every difficulty.
_NAMES = (
    *("disc", "sky", "grass", "square", "water", "triangle"),
    *("star", "forest", "wall", "ring", "sand", "cross", "pentagon", "hexagon"),
    *("striped disc", "checkered square", "crescent", "heart"),
)
SCENE_LABELS: dict[int, str] = dict(enumerate(_NAMES))
SCENE_STUFF_CLASSES: list[int] = [label for label, name in SCENE_LABELS.items() if name in STUFF_PAINTERS]
SPLITS = ("train", "val", "test")

# Classes defined by a shape and a texture; other classes of that shape never have this texture.
_TEXTURED = {"striped disc": ("disc", "stripes"), "checkered square": ("square", "checker")}
_MIN_SIDE = 16  # pixels; things would fall between the pixels of smaller images
_MIN_STUFF = 0.004  # of the image; smaller remains of a stuff class become void: too little to recognise
_TRIES = 25  # to find a position where a thing leaves enough of the others visible


@dataclass(frozen=True)
class Difficulty:
    """What makes scenes hard."""

    num_labels: int  # classes used, the first of `SCENE_LABELS`
    num_things: tuple[int, int]  # fewest and most
    radius: tuple[float, float]  # smallest and largest, as a share of the image's short side
    min_visible: float  # share of every thing that the others must leave visible
    max_turn: float  # largest rotation of a thing, in radians
    textures: Mapping[str, Sequence[str]]  # of things by shape, besides the textures that define a class
    rare: Mapping[str, float]  # frequency of rare things, relative to the others
    unlabelled: float  # probability of an object without a class, which is void
    noise: float  # standard deviation of the camera's noise, in grey levels


# In easy scenes the texture gives the shape away: from shape alone, a model trained from scratch needs five times the
# steps, too many for a demo.
_EASY_TEXTURES = {"disc": ("plain",), "square": ("dots",), "triangle": ("stripes",)}
# In medium scenes a texture leaves two shapes to choose from.
_MEDIUM_TEXTURES = {
    "disc": ("plain", "dots"),
    "square": ("dots", "stripes"),
    "triangle": ("stripes", "checker"),
    "star": ("checker", "speckle"),
    "ring": ("speckle", "plain"),
    UNLABELLED: TEXTURES,
}
_ALL_TEXTURES = dict.fromkeys(SHAPES, TEXTURES)
_RARE_IN_MEDIUM, _RARE_IN_HARD = {"star": 0.3, "ring": 0.3}, {"crescent": 0.15, "heart": 0.15}

DIFFICULTIES = {
    "easy": Difficulty(6, (1, 3), (0.14, 0.23), 0.65, 0.5, _EASY_TEXTURES, {}, 0.0, 3.0),
    "medium": Difficulty(10, (3, 8), (0.08, 0.2), 0.4, np.pi, _MEDIUM_TEXTURES, _RARE_IN_MEDIUM, 0.1, 5.0),
    "hard": Difficulty(len(SCENE_LABELS), (5, 12), (0.045, 0.17), 0.35, np.pi, _ALL_TEXTURES, _RARE_IN_HARD, 0.3, 7.0),
}


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth."""

    image: np.ndarray  # (H, W, 3) uint8
    segment_map: np.ndarray  # (H, W) int32 ids from 0, -1 for void
    segments: list[dict[str, Any]]  # one row per id, as in all readers: stuff, then things from back to front


class GeneratedScenes(Dataset):
    """A data set of generated scenes, each drawn when it is asked for.

    Entries have the columns of all readers: `image`, `image_id`, `segment_map` and `segments`, see `Scene`. Entry i
    depends on the seed, the split and i only, not on `num_scenes` or the order of access.

    Args:
        split: one of `SPLITS`, which share no scene.
        size: (H, W) in pixels.
        difficulty: one of `DIFFICULTIES`.
        num_things: fewest and most things, instead of the difficulty's.
    """

    def __init__(
        self,
        num_scenes: int,
        split: str = "train",
        *,
        seed: int = 0,
        size: tuple[int, int] = (96, 96),
        difficulty: str = "easy",
        num_things: tuple[int, int] | None = None,
    ) -> None:
        if num_scenes < 0 or seed < 0:
            raise ValueError(f"num_scenes is {num_scenes} and seed {seed}; neither may be negative")
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        _check_options(size, difficulty, num_things)
        self.num_scenes, self.split, self.seed = num_scenes, split, seed
        self.options: dict[str, Any] = {"size": size, "difficulty": difficulty, "num_things": num_things}
        self.id2label = scene_labels(difficulty)
        self.stuff_classes = scene_stuff_classes(difficulty)

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.num_scenes <= index < self.num_scenes:
            raise IndexError(f"there is no scene {index} among {self.num_scenes}")
        index = int(index) % self.num_scenes
        # Spawn keys give independent streams, unlike seed + index, which would repeat scenes under the next seed.
        seed = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), index))
        scene = generate_scene(seed, **self.options)
        return {
            "image": scene.image,
            "image_id": index,
            "segment_map": scene.segment_map,
            "segments": scene.segments,
        }


def scene_labels(difficulty: str = "easy") -> dict[int, str]:
    """The part of `SCENE_LABELS` that scenes of a difficulty use."""
    return {label: name for label, name in SCENE_LABELS.items() if label < _difficulty(difficulty).num_labels}


def scene_stuff_classes(difficulty: str = "easy") -> list[int]:
    """The part of `SCENE_STUFF_CLASSES` that scenes of a difficulty use."""
    return [label for label in SCENE_STUFF_CLASSES if label < _difficulty(difficulty).num_labels]


def generate_scene(
    seed: int | np.random.SeedSequence,
    size: tuple[int, int] = (96, 96),
    *,
    num_things: tuple[int, int] | None = None,
    difficulty: str = "easy",
) -> Scene:
    """Draw one scene.

    Args:
        seed: the same seed gives the same scene.
        size: (H, W) in pixels, each at least 16; textures and things grow with it.
        num_things: fewest and most things, instead of the difficulty's; things that find no room are left out.
        difficulty: "easy" (few large things, 6 classes), "medium" (more and smaller things that hide one another, 10
            classes, two of them rare, every texture on two shapes) or "hard" (many small things, 18 classes, some rare,
            some alike, any texture, and objects without a class).
    """
    _check_options(size, difficulty, num_things)
    settings, rng = DIFFICULTIES[difficulty], np.random.default_rng(seed)
    low, high = num_things or settings.num_things
    names = [SCENE_LABELS[label] for label in range(settings.num_labels)]
    image, owner = _draw_stuff(rng, size, [name for name in names if name in STUFF_PAINTERS])
    labels = dict(enumerate(STUFF_PAINTERS))

    things = [name for name in names if name not in STUFF_PAINTERS]
    weights = np.array([settings.rare.get(name, 1.0) for name in things])
    areas: dict[int, int] = {}  # of things before others hid them, by their number in `owner`
    chosen = list(rng.choice(things, int(rng.integers(low, high + 1)), p=weights / weights.sum()))
    if rng.random() < settings.unlabelled:
        chosen.insert(int(rng.integers(len(chosen) + 1)), UNLABELLED)
    labels |= dict(enumerate(chosen, start=len(labels)))
    for number, name in list(labels.items())[len(STUFF_PAINTERS) :]:
        _draw_thing(rng, image, owner, name, number, settings, areas)

    # Light and camera: the exposure differs between images, and sensors are noisy.
    contrast, brightness = rng.uniform(0.85, 1.1), rng.uniform(-12, 12)
    image *= contrast
    image += 128 * (1 - contrast) + brightness + 0.5  # half a level, since the conversion to integers truncates
    image += settings.noise * rng.standard_normal(image.shape, dtype=np.float32)
    pixels = np.clip(image, 0, 255, out=image).astype(np.uint8)
    return Scene(pixels, *_number_segments(owner, labels))


def _draw_stuff(rng: np.random.Generator, size: tuple[int, int], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) float32 image and (H, W) int32 indices into `STUFF_PAINTERS`."""
    kinds = list(STUFF_PAINTERS)
    down = np.linspace(0, 1, size[0], dtype=np.float32)[:, None]
    right = np.linspace(-0.5, 0.5, size[1], dtype=np.float32)[None]
    ground = list(rng.permutation([name for name in names if name in ("grass", "water", "sand")]))
    behind = [name for name in names if name in ("forest", "wall")]

    horizon = rng.uniform(0.25, 0.5)
    owner = np.full(size, kinds.index("sky"), dtype=np.int32)
    if behind and rng.random() < 0.7:
        rise = horizon - rng.uniform(0.1, 0.22) + 0.06 * smooth_noise(rng, (1, size[1]), 1, 7)
        owner[down > rise] = kinds.index(rng.choice(behind))
    owner[down > horizon + 0.07 * smooth_noise(rng, (1, size[1]), 1, 4)] = kinds.index(ground[0])
    if rng.random() < 0.8:
        # A second kind in front, bounded by a wavy, often slanted line.
        front = rng.uniform(horizon + 0.2, 0.85) + rng.uniform(-0.5, 0.5) * right
        owner[down > front + 0.1 * smooth_noise(rng, size, 3, 4)] = kinds.index(ground[1])
    image = np.zeros((*size, 3), dtype=np.float32)
    for kind in np.unique(owner):
        np.copyto(image, STUFF_PAINTERS[kinds[kind]](rng, size), where=(owner == kind)[..., None])
    return image, owner


def _draw_thing(
    rng: np.random.Generator,
    image: np.ndarray,
    owner: np.ndarray,
    name: str,
    number: int,
    settings: Difficulty,
    areas: dict[int, int],
) -> None:
    """Draw a thing in place over `image` and `owner`, and add its area; leave it out if it would hide others."""
    shape, texture = _TEXTURED.get(name, (name, ""))
    texture = texture or str(rng.choice([t for t in settings.textures[shape] if (shape, t) not in _TEXTURED.values()]))
    smallest, largest = np.log(settings.radius)  # log-uniform sizes: small things are as frequent as large ones
    for _ in range(_TRIES):
        radius = float(np.exp(rng.uniform(smallest, largest))) * min(owner.shape)
        center_y, center_x = (rng.uniform(0.7 * radius, length - 0.7 * radius) for length in owner.shape)
        turn = rng.uniform(-settings.max_turn, settings.max_turn)
        thing = place_thing(owner.shape, shape, (center_y, center_x), radius, turn)
        hidden = np.bincount(owner[thing.window][thing.inside]).tolist()
        # In tiny images a thin shape may fall between the pixels.
        if thing.inside.any() and all(
            np.count_nonzero(owner == other) - pixels >= settings.min_visible * areas[other]
            for other, pixels in enumerate(hidden)
            if pixels and other in areas
        ):
            break
    else:
        return
    areas[number] = int(thing.inside.sum())
    owner[thing.window][thing.inside] = number
    paint_thing(rng, image, thing, texture)


def _number_segments(owner: np.ndarray, labels: dict[int, str]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segment map with consecutive ids, and the rows of segments."""
    label_ids = {name: label for label, name in SCENE_LABELS.items()}
    areas = np.bincount(owner.ravel())
    table, segments = np.full(len(areas), -1, dtype=np.int32), list[dict[str, Any]]()
    for number in np.flatnonzero(areas).tolist():
        is_sliver = number < len(STUFF_PAINTERS) and areas[number] < _MIN_STUFF * owner.size
        if labels[number] != UNLABELLED and not is_sliver:
            table[number] = len(segments)
            segments.append({"id": len(segments), "label_id": label_ids[labels[number]], "is_crowd": False})
    return table[owner], segments


def _difficulty(name: str) -> Difficulty:
    if name not in DIFFICULTIES:
        raise ValueError(f"there is no difficulty {name!r}; choose one of {', '.join(DIFFICULTIES)}")
    return DIFFICULTIES[name]


def _check_options(size: tuple[int, int], difficulty: str, num_things: tuple[int, int] | None) -> None:
    _difficulty(difficulty)
    if len(size) != 2 or min(size) < _MIN_SIDE:
        raise ValueError(f"size is {size}; give (height, width) of at least {_MIN_SIDE} pixels each")
    if num_things is not None and not (len(num_things) == 2 and 0 <= num_things[0] <= num_things[1]):
        raise ValueError(f"num_things is {num_things}; give (fewest, most), such as (2, 4)")
