"""Classes and training images of the published data sets of the packaged recipes.

`--explain` uses them if the data is not on this machine yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.label_tables import label_table
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
