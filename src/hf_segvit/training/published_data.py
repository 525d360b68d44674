"""The published data sets that the packaged recipes name, as far as a plan needs them: classes, and how many images.

`--explain` takes them where the data is not on this machine yet. The counts are those of the readers in
`data/readers/`: every image of the training split, also those without objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.label_tables import label_table
from ..data.reading import DataDescription

# format and task: label table, images to train on
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
    """What is published about a data set that is not there.

    Args:
        spec: "FORMAT:PATH", as `load_segmentation_dataset` takes it.
        tasks: to read it for, the one to prefer first.

    Returns:
        Its description and its number of training images; `None` where its folder exists, or nothing is known of it.
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
