"""Generated scenes with exact ground truth, see ../generated_scenes.py.

PATH is the difficulty. For the instance task the things are the only classes, and everything else is void.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..annotation_values import shown, whole_number
from ..archives import Location
from ..class_lists import VOID
from ..decoding import semantic_segments
from ..generated_scenes import DIFFICULTIES, SPLITS, GeneratedScenes
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "drawn scenes: panoptic, semantic or instance; PATH is the difficulty, such as easy or hard"
TASKS = ("panoptic", "semantic", "instance")
LAYOUT = "PATH is one of easy, medium, hard"

_MOST = {"num_scenes": 1_000_000, "seed": 2**63 - 1}  # a row takes half a kilobyte while the table is made
_LONGEST_SIDE = 8192


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """All splits."""
    return list(SPLITS)


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    num_scenes: int = 200,
    size: int | tuple[int, int] = (96, 96),
    seed: int = 0,
) -> Reading:
    """List scenes of difficulty `path`, each drawn when it is decoded; `size` is (H, W) or one number for both."""
    if path not in DIFFICULTIES:
        raise ValueError(f"generated:{path}: choose generated:{' or generated:'.join(DIFFICULTIES)}")
    for name, value in (("num_scenes", num_scenes), ("seed", seed)):
        if type(value) is not int or not 0 <= value <= _MOST[name]:
            raise ValueError(f"generated:{path}: {name}={shown(value)}; give a whole number from 0 to {_MOST[name]:,}")
    height, width = _size(size, path)
    scenes = GeneratedScenes(num_scenes, split, seed=seed, size=(height, width), difficulty=path)
    nowhere: Location = {"archive": None, "member": f"generated:{path}"}
    rows: list[dict[str, Any]] = [
        {"image": nowhere, "image_id": index, "segment_map": [], "segments": None} for index in range(num_scenes)
    ]
    names, things = list(scenes.id2label.values()), None
    if task == "instance":
        things = {label: index for index, label in enumerate(sorted(set(scenes.id2label) - set(scenes.stuff_classes)))}
        names = [names[label] for label in things]
    decoder = SceneDecoder(scenes, task == "semantic", things)
    return Reading(None, names, [] if things else scenes.stuff_classes, rows, decoder=decoder)


def _size(size: Any, path: str) -> tuple[int, int]:
    """(H, W) of one number, or two with a comma or `x` between them."""
    sides = re.split("[,x]", size) if isinstance(size, str) else size
    sides = [sides, sides] if isinstance(sides, int) else list(sides)
    numbers = [whole_number(side) for side in sides]
    if len(numbers) != 2 or not all(number is not None and 0 < number <= _LONGEST_SIDE for number in numbers):
        raise ValueError(f"generated:{path}: size={shown(size)}; give a number of pixels up to {_LONGEST_SIDE}, or HxW")
    return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class SceneDecoder:
    """Draws the scenes of a batch of rows."""

    scenes: GeneratedScenes
    semantic: bool = False  # merge the segments of each class
    # New label ids by label id in the scenes; all other segments become void. None keeps all as they are.
    things: Mapping[int, int] | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode a batch; one without `image_id` stays as it is."""
        rows: list[dict[str, Any]] = [self.decode({"image_id": image_id}) for image_id in batch.get("image_id", [])]
        return {key: [row[key] for row in rows] if rows else values for key, values in batch.items()}

    def decode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the scene of one row."""
        scene = dict(self.scenes[row["image_id"]])
        scene["image"] = Image.fromarray(scene["image"])
        segments = scene["segments"]
        if self.semantic:
            # Void, -1 in the segment map, picks the last entry of the table, here and below.
            table = np.array([*(segment["label_id"] for segment in segments), VOID], dtype=np.int32)
            scene["segment_map"] = table[scene["segment_map"]]
            scene["segments"] = semantic_segments(scene["segment_map"])
        elif self.things is not None:
            kept = [segment for segment in segments if segment["label_id"] in self.things]
            table = np.full(len(segments) + 1, VOID, dtype=np.int32)
            for segment in kept:
                table[segment["id"]] = segment["id"]
            scene["segment_map"] = table[scene["segment_map"]]
            scene["segments"] = [{**segment, "label_id": self.things[segment["label_id"]]} for segment in kept]
        return scene
