"""What `--explain` takes for data and weights that are not on this machine yet.

Classes and training images of the published data sets of the packaged recipes (`published_data`), stand-ins for data of
one's own (`assumed_data`), and the architecture that the name of weights tells (`named_architecture`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.label_tables import label_table
from ..data.readers import FORMATS
from ..data.reading import DataDescription

# (format, task): (label table, training images). Images without objects count, as the readers keep them.
_PUBLISHED = {
    ("coco", "panoptic"): ("coco_panoptic", 118_287),
    ("coco", "instance"): ("coco_instance", 118_287),
    ("coco_stuff", "semantic"): ("coco_stuff", 118_287),
    ("ade20k", "semantic"): ("ade20k", 20_210),
    ("ade20k", "panoptic"): ("ade20k", 20_210),
    ("cityscapes", "semantic"): ("cityscapes", 2_975),
    ("cityscapes", "panoptic"): ("cityscapes", 2_975),
}


def published_data(spec: str | None, tasks: Sequence[str]) -> tuple[DataDescription, int] | None:
    """Description and number of training images of a data set that does not exist here, if it is published.

    Args:
        spec: "FORMAT:PATH".
        tasks: tasks to read it for, the preferred one first.
    """
    name, _, path = str(spec).partition(":")
    name = name.strip().lower().replace("-", "_")
    if not path or Path(path).exists():
        return None
    for task in tasks:
        if (name, task) in _PUBLISHED:
            table_name, num_images = _PUBLISHED[name, task]
            table = label_table(table_name)
            return DataDescription(name, path, "train", task, table.id2label, table.stuff_classes), num_images
    return None


ASSUMED_IMAGES, ASSUMED_CLASSES = 100, 2


def assumed_data(spec: str | None, tasks: Sequence[str]) -> tuple[DataDescription, int] | None:
    """A description and a size to explain a recipe with whose data is in files that do not exist here."""
    name, _, path = str(spec or "").partition(":")
    name = name.strip().lower().replace("-", "_")
    path = path.partition("?")[0]
    # Names of generated data and of the Hub are no paths.
    if name not in (*FORMATS, "auto") or name in ("generated", "hub") or not path or Path(path).exists():
        return None
    names = {label: f"class {label}" for label in range(ASSUMED_CLASSES)}
    return DataDescription(name, path, "train", tasks[0], names, []), ASSUMED_IMAGES


# Width, blocks and heads of the published ViTs, by the words and letters that names have for them.
_SIZES = {
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant": (1536, 40, 24),
}
_LETTERS = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def are_weights_here(source: str) -> bool:
    """Whether a folder or Hub id can be loaded without the network."""
    from huggingface_hub import try_to_load_from_cache  # here, as published data needs no Hub
    from huggingface_hub.errors import HFValidationError

    if Path(source).exists():
        return True
    try:
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    except HFValidationError:  # no Hub id either: whoever loads it says so
        return True


def named_architecture(source: str) -> dict[str, Any]:
    """Sizes of a model's configuration that the name of its weights tells, otherwise those of a ViT-L."""
    words = re.findall(r"[a-z]+", source.lower().rpartition("/")[2])
    size = next((word for word in words if word in _SIZES), None)
    size = size or next((_LETTERS[word[3]] for word in words if re.fullmatch(r"vit[sblg]", word)), "large")
    width, depth, heads = _SIZES[size]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * width}
