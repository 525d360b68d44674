"""The published label sets: names, colours, things and stuff of COCO, COCO-Stuff, ADE20K and Cityscapes.

One JSON file per label set in the folder `label_tables/`, in the order in which models number the classes. Names and
stuff classes that models are recognised by are in models/published_labels.py, and not in the files again. Colours are
those that each data set's own tools draw with (COCO-Stuff publishes none; its stuff is coloured here as in COCO
panoptic where both have the class).
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ..models.published_labels import published_label_sets

_PUBLISHED = {labels.name: labels for labels in published_label_sets()}
LABEL_TABLES = ("coco_panoptic", "coco_instance", "coco_stuff", "ade20k", "cityscapes")


@dataclass(frozen=True)
class LabelClass:
    """One class.

    Attributes:
        name: first of its published names.
        source_id: its number in the data set's own files (COCO category id, ADE20K's 1..150, Cityscapes labelId).
        is_thing: whether its objects are counted; stuff is not.
        color: red, green and blue in [0, 255].
    """

    name: str
    source_id: int
    is_thing: bool
    color: tuple[int, int, int]


@dataclass(frozen=True)
class LabelTable:
    """The classes of a data set, in the order in which models number them.

    Attributes:
        name: one of `LABEL_TABLES`.
        title: what the data set and benchmark are called.
        classes: class 0 first.
    """

    name: str
    title: str
    classes: tuple[LabelClass, ...]

    @property
    def id2label(self) -> dict[int, str]:
        """Class number to name, as a model's config holds it."""
        return {index: label.name for index, label in enumerate(self.classes)}

    @property
    def stuff_classes(self) -> list[int]:
        """Numbers of the stuff classes, ascending."""
        return [index for index, label in enumerate(self.classes) if not label.is_thing]

    @property
    def source_id_to_label(self) -> dict[int, int]:
        """Number in the data set's own files to class number."""
        return {label.source_id: index for index, label in enumerate(self.classes)}


@cache
def label_table(name: str) -> LabelTable:
    """A published label set.

    Args:
        name: one of `LABEL_TABLES`.

    Raises:
        ValueError: there is no such table; the message lists those there are.
    """
    if name not in LABEL_TABLES:
        raise ValueError(f"no label table is called {name!r}; there are {', '.join(LABEL_TABLES)}")
    text = resources.files("hf_segvit.data").joinpath("label_tables", f"{name}.json").read_text(encoding="utf-8")
    table = json.loads(text)
    rows = table["classes"]
    if published := _PUBLISHED.get(table.get("published_labels")):
        stuff = published.stuff_classes
        rows = [
            {"name": label, "is_thing": index not in stuff, **row}
            for index, (label, row) in enumerate(zip(published.labels, rows, strict=True))
        ]
    classes = tuple(LabelClass(row["name"], row["source_id"], row["is_thing"], tuple(row["color"])) for row in rows)
    return LabelTable(table["name"], table["title"], classes)
