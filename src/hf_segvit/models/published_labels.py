"""Class names and stuff classes of the published EoMT checkpoints.

A foreign checkpoint lists its classes in `id2label`; these tables tell which of them are stuff. COCO panoptic: 80
things, then 53 stuff classes. ADE20K: 150 classes with the official EoMT code's stuff list, the other 100 being the
things of the instance benchmark, in the same order. Cityscapes: 19 train ids, things from "person" on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The kinds of segmentation; in this file since it imports no PyTorch, which the command line must not wait for.
TASKS = ("panoptic", "instance", "semantic")


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split("|"))


COCO_PANOPTIC_LABELS = _names(
    """
    person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign
    |parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella
    |handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard
    |surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange
    |broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop
    |mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors
    |teddy bear|hair drier|toothbrush|banner|blanket|bridge|cardboard|counter|curtain|door-stuff
    |floor-wood|flower|fruit|gravel|house|light|mirror-stuff|net|pillow|platform|playingfield|railroad
    |river|road|roof|sand|sea|shelf|snow|stairs|tent|towel|wall-brick|wall-stone|wall-tile|wall-wood
    |water-other|window-blind|window-other|tree-merged|fence-merged|ceiling-merged|sky-other-merged
    |cabinet-merged|table-merged|floor-other-merged|pavement-merged|mountain-merged|grass-merged
    |dirt-merged|paper-merged|food-other-merged|building-other-merged|rock-merged|wall-other-merged
    |rug-merged
    """
)
COCO_PANOPTIC_STUFF = tuple(range(80, 133))

ADE20K_LABELS = _names(
    """
    wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|person|earth|door
    |table|mountain|plant|curtain|chair|car|water|painting|sofa|shelf|house|sea|mirror|rug|field|armchair
    |seat|fence|desk|rock|wardrobe|lamp|bathtub|railing|cushion|base|box|column|signboard|chest of drawers
    |counter|sand|sink|skyscraper|fireplace|refrigerator|grandstand|path|stairs|runway|case|pool table
    |pillow|screen door|stairway|river|bridge|bookcase|blind|coffee table|toilet|flower|book|hill|bench
    |countertop|stove|palm|kitchen island|computer|swivel chair|boat|bar|arcade machine|hovel|bus|towel
    |light|truck|tower|chandelier|awning|streetlight|booth|television receiver|airplane|dirt track|apparel
    |pole|land|bannister|escalator|ottoman|bottle|buffet|poster|stage|van|ship|fountain|conveyer belt
    |canopy|washer|plaything|swimming pool|stool|barrel|basket|waterfall|tent|bag|minibike|cradle|oven
    |ball|food|step|tank|trade name|microwave|pot|animal|bicycle|lake|dishwasher|screen|blanket|sculpture
    |hood|sconce|vase|traffic light|tray|ashcan|fan|pier|crt screen|plate|monitor|bulletin board|shower
    |radiator|glass|clock|flag
    """
)
# fmt: off
ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)
# fmt: on

CITYSCAPES_LABELS = _names(
    """
    road|sidewalk|building|wall|fence|pole|traffic light|traffic sign|vegetation|terrain|sky|person|rider
    |car|truck|bus|train|motorcycle|bicycle
    """
)
CITYSCAPES_STUFF = tuple(range(11))

# Share of the names that must agree: published configs differ in a few synonyms ("tv", "television").
_AGREEMENT = 0.9


@dataclass(frozen=True)
class PublishedLabels:
    """A published label set."""

    name: str
    labels: tuple[str, ...]  # class names in the order of their ids
    stuff_classes: tuple[int, ...]  # ascending; none for instance segmentation


def published_label_sets() -> tuple[PublishedLabels, ...]:
    """The known label sets: three panoptic ones, and the things of each alone, for instance models."""
    panoptic = (
        PublishedLabels("COCO panoptic", COCO_PANOPTIC_LABELS, COCO_PANOPTIC_STUFF),
        PublishedLabels("ADE20K", ADE20K_LABELS, ADE20K_STUFF),
        PublishedLabels("Cityscapes", CITYSCAPES_LABELS, CITYSCAPES_STUFF),
    )
    things = tuple(
        PublishedLabels(
            f"{labels.name}, things only",
            tuple(label for index, label in enumerate(labels.labels) if index not in labels.stuff_classes),
            (),
        )
        for labels in panoptic
    )
    return panoptic + things


def find_published_labels(id2label: Mapping[Any, str]) -> PublishedLabels | None:
    """The published label set that a model was trained on, or `None`.

    It has as many classes, and at least nine in ten have the same first word, ignoring case, at the same id.
    """
    # The ids are strings in config.json.
    names = {int(index): _first_word(name) for index, name in id2label.items()}
    for labels in published_label_sets():
        if len(names) != len(labels.labels):
            continue
        agreeing = sum(names.get(index) == _first_word(label) for index, label in enumerate(labels.labels))
        if agreeing >= _AGREEMENT * len(labels.labels):
            return labels
    return None


def _first_word(name: str) -> str:
    words = re.findall(r"[a-z]+", str(name).casefold())
    return words[0] if words else ""
