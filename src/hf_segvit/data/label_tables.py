"""Classes and colours of COCO, COCO-Stuff, ADE20K and Cityscapes.

One JSON file per label set in `label_tables/`, in the order in which models number the classes. Colours are those of
each data set's own tools; COCO-Stuff publishes none, so its stuff has the colours of COCO panoptic where both have the
class.
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
    """One class."""

    name: str  # the first of its published names
    source_id: int  # in the data set's own files: COCO category id, ADE20K's 1 to 150, Cityscapes labelId
    is_thing: bool
    color: tuple[int, int, int]  # red, green and blue in [0, 255]


@dataclass(frozen=True)
class LabelTable:
    """The classes of a data set, in the order in which models number them."""

    name: str  # one of `LABEL_TABLES`
    title: str  # name of the data set and benchmark, for people
    classes: tuple[LabelClass, ...]

    @property
    def id2label(self) -> dict[int, str]:
        """Label id to name, as in a model's config."""
        return {index: label.name for index, label in enumerate(self.classes)}

    @property
    def stuff_classes(self) -> list[int]:
        """Label ids of the stuff classes, ascending."""
        return [index for index, label in enumerate(self.classes) if not label.is_thing]

    @property
    def source_id_to_label(self) -> dict[int, int]:
        """Id in the data set's own files to label id."""
        return {label.source_id: index for index, label in enumerate(self.classes)}


@cache
def label_table(name: str) -> LabelTable:
    """The published label set with this name, one of `LABEL_TABLES`."""
    if name not in LABEL_TABLES:
        raise ValueError(f"no label table is called {name!r}; there are {', '.join(LABEL_TABLES)}")
    text = resources.files("hf_segvit.data").joinpath("label_tables", f"{name}.json").read_text(encoding="utf-8")
    table = json.loads(text)
    rows = table["classes"]
    # Names and stuff by which models are recognised stand once, in models/published_labels.py, and not in the JSON.
    if published := _PUBLISHED.get(table.get("published_labels")):
        stuff = published.stuff_classes
        rows = [
            {"name": label, "is_thing": index not in stuff, **row}
            for index, (label, row) in enumerate(zip(published.labels, rows, strict=True))
        ]
    classes = tuple(LabelClass(row["name"], row["source_id"], row["is_thing"], tuple(row["color"])) for row in rows)
    return LabelTable(table["name"], table["title"], classes)
