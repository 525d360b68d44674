"""Options of a conversion, and how the command line's words for them are read.

`ConversionOptions` holds them; `read_labels` reads class names, `parse_fields` the words after `--set`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.class_lists import read_classes
from ..data.label_tables import LABEL_TABLES, label_table
from ..lookup import suggestion
from .checkpoint_files import DEFAULT_MAX_BYTES

# Settings of a conversion that are not config fields: the image size of the file's position embeddings if that is not
# square, and the order of columns in a ViT-P encoder of boxes.
EXTRA_FIELDS = ("num_labels", "native_image_size", "prompt_columns")


@dataclass(frozen=True)
class ConversionOptions:
    """What a conversion takes besides source and destination.

    Attributes:
        fields: config fields that the weights do not show, or that are to change, and `EXTRA_FIELDS`.
        base: folder or Hub id of the backbone that a delta file is added to.
        model: id of the released model in the file, if its path does not tell.
        labels: name of a published label table, or a file of labels.
        reset_class_head: replace the class head by a new one, for other labels.
        max_bytes: largest size of the files that are read.
        check: compare outputs with the source model's, if it can be run.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    model: str | None = None
    labels: str | None = None
    task: str | None = None
    reset_class_head: bool = False
    revision: str | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    check: bool = True


@dataclass(frozen=True)
class Labels:
    """The classes of a model.

    Attributes:
        id2label: class number to name.
        stuff_classes: numbers of the stuff classes; `None` if unknown.
        title: the published label set, or the file.
    """

    id2label: dict[int, str]
    stuff_classes: list[int] | None
    title: str


def read_labels(source: str) -> Labels:
    """Read the classes of a model from a published label table or a file that `read_classes` reads."""
    if source in LABEL_TABLES:
        table = label_table(source)
        return Labels(table.id2label, table.stuff_classes, table.title)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"labels {source!r} are neither a file nor a published table; the tables are {', '.join(LABEL_TABLES)}"
        )
    classes = read_classes(path, of_model=True)
    stuff_classes = classes.stuff_classes if classes.states_things else None
    return Labels(dict(enumerate(classes.names)), stuff_classes, path.name)


def parse_fields(settings: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Read `field=value` words into numbers, booleans, `None` and strings, or lists of them if a value has commas.

    Args:
        settings: words such as `num_attention_heads=4`, `image_size=64,96` or `layer_norm_eps=1e-5`.
        known: names of the existing fields, besides `EXTRA_FIELDS`.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not text:
            raise ValueError(f"--set {setting}: expected field=value, such as num_attention_heads=4")
        if name in fields:
            raise ValueError(f"--set {name}: given twice")
        choices = [*known, *EXTRA_FIELDS]
        if name not in choices:
            # A name that lacks a word is not near by its letters: num_heads for num_attention_heads.
            near = [choice for choice in choices if set(name.split("_")) <= set(choice.split("_"))]
            raise ValueError(f"--set {name}: no such field; {suggestion(name, near[:1] or choices)}")
        values = [_value(part) for part in text.split(",")]
        fields[name] = values if len(values) > 1 else values[0]
    return fields


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number_type in (int, float):  # int first: 4 must not become 4.0
        try:
            return number_type(text)
        except ValueError:
            continue
    return text
