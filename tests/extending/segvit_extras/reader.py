"""A reader: images with label maps saved by NumPy, as PATH/SPLIT/NAME.png and NAME.npy, and PATH/classes.txt."""

from io import BytesIO
from pathlib import Path

import numpy as np

from hf_segvit.data.archives import read_location
from hf_segvit.data.decoding import semantic_segments
from hf_segvit.data.reading import Reading

TASKS = ("semantic",)
LAYOUT = "SPLIT/NAME.png, SPLIT/NAME.npy with label ids and -1 for void, and classes.txt with a name in each line"


def splits(path, wanted=()):
    """The names of the folders."""
    return [entry.name for entry in Path(path).iterdir() if entry.is_dir()]


def read(path, split, task, problems):
    """The paths of the files, which are read once a sample is needed."""
    rows = []
    for image in sorted(Path(path, split).glob("*.png")):
        label_map = image.with_suffix(".npy")
        if not label_map.is_file():
            problems.error(str(label_map), f"image {image.stem!r}", "has no label map; save it, or delete the image")
            continue
        image_file, map_file = ({"archive": None, "member": str(file)} for file in (image, label_map))
        rows.append({"image": image_file, "image_id": image.stem, "segment_map": [map_file], "segments": None})
    names = Path(path, "classes.txt").read_text(encoding="utf-8").split("\n")
    return Reading(read_map, [name for name in names if name], stuff_classes=[], rows=rows)


def read_map(maps, segments, name):
    """The label map (H, W) of an image, and a row for each class in it."""
    label_map = np.load(BytesIO(read_location(maps[0]))).astype(np.int32)
    return label_map, semantic_segments(label_map)
