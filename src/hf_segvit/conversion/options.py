"""What a conversion may be told besides source and destination, and how the command line's words for it are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.class_lists import read_classes
from ..data.label_tables import LABEL_TABLES, label_table
from ..lookup import suggestion
from .checkpoint_files import DEFAULT_MAX_BYTES

# Settings of a conversion that are no field of the config.
EXTRA_FIELDS = ("num_labels", "native_image_size", "prompt_columns")


@dataclass(frozen=True)
class ConversionOptions:
    """What a conversion may be told.

    Attributes:
        fields: config fields that the weights do not tell, or that are to change; `native_image_size` is the size that
            the file's position embeddings are for, where that is not a square, and `prompt_columns` the order of a
            ViT-P encoder of boxes.
        base: folder or Hub id of the backbone that a delta file is to be added to.
        model: id of the released model that the file is, where its path does not say.
        labels: name of a published label table, or a file of labels.
        task: `"panoptic"`, `"instance"` or `"semantic"`.
        reset_class_head: replace the class head by a new one, for other labels.
        revision: branch, tag or commit of a Hub repository.
        max_bytes: cap on the size of files that are read.
        check: compare with a reference by a forward pass where there is one.
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
        stuff_classes: numbers of the stuff classes; `None` where it is not known which are.
        title: the published label set, or the file.
    """

    id2label: dict[int, str]
    stuff_classes: list[int] | None
    title: str


def read_labels(source: str) -> Labels:
    """Read the classes of a model.

    Args:
        source: name of a published label table; or a file that `read_classes` reads.

    Raises:
        ValueError: there is no such table and no such file, or the file is not of these forms; numbers are not 0 to
            n - 1, or a name is empty or there twice.
    """
    if source in LABEL_TABLES:
        table = label_table(source)
        return Labels(table.id2label, table.stuff_classes, table.title)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"labels {source!r} are no file and no published table; tables are {', '.join(LABEL_TABLES)}")
    classes = read_classes(path, of_model=True)
    stuff_classes = classes.stuff_classes if classes.states_things else None
    return Labels(dict(enumerate(classes.names)), stuff_classes, path.name)


def parse_fields(settings: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Read `field=value` words.

    Args:
        settings: words such as `num_attention_heads=4`, `image_size=64,96` or `layer_norm_eps=1e-5`.
        known: names of the fields there are, besides `EXTRA_FIELDS`.

    Returns:
        Fields to numbers, booleans, `None`, strings or, with commas, lists of them.

    Raises:
        ValueError: a word has no `=`, a field is given twice or does not exist; the message names the nearest.
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
            # A name that leaves out a word is no near one by its letters: num_heads for num_attention_heads.
            near = [choice for choice in choices if set(name.split("_")) <= set(choice.split("_"))]
            raise ValueError(f"--set {name}: no such field; {suggestion(name, near[:1] or choices)}")
        values = [_value(part) for part in text.split(",")]
        fields[name] = values if len(values) > 1 else values[0]
    return fields


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
