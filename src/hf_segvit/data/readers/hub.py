"""A data set from the Hub or disk, with columns of images and masks.

PATH is a name on the Hub, a folder that `load_dataset` reads, or one that `save_to_disk` wrote. For the semantic task
masks have one channel of class values. For panoptic they hold the class in red and the object number in green, as in
Transformers' instance segmentation examples. `classes=` names the values, see ../class_lists.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ...models.image_values import AS_STORED, ImageSettings
from ..archives import MAX_IMAGE_BYTES, read_location
from ..class_lists import ClassList, read_classes
from ..decoding import image_in_frame, semantic_segments
from ..label_maps import numbered_segments
from ..mask_files import color_ids, index_map, relabel
from ..problems import ProblemList
from ..reading import Reading

DESCRIPTION = "a data set of the Hub, or saved by `datasets`"
TASKS = ("semantic", "panoptic")
LAYOUT = "a data set with columns `image` and `annotation`"

# Column names that data sets on the Hub use; the first one present is taken.
_IMAGES = ("image", "pixel_values", "img")
_MASKS = (
    "annotation",
    "label",
    "mask",
    "labels",
    "segmentation",
    "segmentation_mask",
    "semantic_segmentation",
    "masks",
)


def splits(path: str, wanted: Sequence[str] = ()) -> list[str]:
    """Splits of the data set; the wanted ones are not looked up unless `save_to_disk` wrote it."""
    if _saved(path):
        try:
            saved = datasets.load_from_disk(path)
        except Exception as error:  # the library raises anything about a damaged data set
            raise ValueError(f"hub:{path}: cannot be loaded ({error}); save it again") from error
        return list(saved) if isinstance(saved, datasets.DatasetDict) else ["train"]
    if wanted:  # `_load` finds out: a look-up would need the network even if the data set is cached
        return list(wanted)
    try:
        return datasets.get_dataset_split_names(path)
    except Exception as error:  # the library raises anything about a damaged data set
        raise ValueError(f"hub:{path}: cannot be found ({error}); check the name, or the connection") from error


def read(
    path: str,
    split: str,
    task: str,
    problems: ProblemList,
    classes: Any = None,
    image_column: str | None = None,
    annotation_column: str | None = None,
    revision: str | None = None,
    void: Any = (),
) -> Reading:
    """Read one split.

    Args:
        path: name on the Hub, or a folder.
        problems: stays empty, as files are not opened before they are decoded.
        classes: file or value for `read_classes`.
        image_column: None tries the usual names, also for `annotation_column`.
        revision: branch, tag or commit on the Hub.
        void: further void classes, or values of masks.
    """
    if classes is None:
        raise ValueError(
            f'hub:{path}: give classes=, the names by value in the masks, such as {{"0": "background", "1": "road"}}'
        )
    class_list = read_classes(classes, void=void)
    table = _load(path, split, revision)
    image = _column(table, image_column, _IMAGES, path)
    mask = _column(table, annotation_column, _MASKS, path)
    # Undecoded, so that our own decoding applies: its limits, its orientation, and errors that name the row.
    undecoded = datasets.Image(decode=False)
    table = table.cast_column(image, undecoded).cast_column(mask, undecoded)
    table = table.select_columns([image, mask]).rename_columns({image: "image", mask: "segment_map"})
    table = table.add_column("image_id", list(range(len(table))))
    row = {
        "id": datasets.Value("int64"),
        "label_id": datasets.ClassLabel(names=list(class_list.names)),
        "is_crowd": datasets.Value("bool"),
    }
    table = table.add_column("segments", [None] * len(table), feature=datasets.List(row))
    decoder = ColumnDecoder(f"hub:{path}, split {split}", class_list, task == "panoptic")
    return Reading(
        None,
        list(class_list.names),
        class_list.stuff_classes,
        dataset=table,
        decoder=decoder,
        remarks=class_list.remarks,
    )


@dataclass(frozen=True)
class ColumnDecoder:
    """Decodes rows whose images and masks are files held by `datasets`."""

    name: str  # of the data set, for errors
    classes: ClassList
    numbered: bool  # whether masks hold object numbers in green
    image_settings: ImageSettings = AS_STORED

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode a batch, whichever columns it has."""
        length = len(next(iter(batch.values()), []))
        rows = [self.decode({key: values[index] for key, values in batch.items()}) for index in range(length)]
        return {key: [row[key] for row in rows] for key in batch}

    def decode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Decode one row."""
        decoded, size = dict(row), None
        name = f"{self.name}, row {row.get('image_id', '?')}"
        if "segment_map" in row:
            decoded["segment_map"], segments = self._segments(_content(row["segment_map"], name), f"{name}, mask")
            size = decoded["segment_map"].shape
            if "segments" in row:
                decoded["segments"] = segments
        if "image" in row:
            decoded["image"] = image_in_frame(_content(row["image"], name), name, size, self.image_settings)
        return decoded

    def _segments(self, content: bytes, name: str) -> tuple[Any, list[dict[str, Any]]]:
        remedy = "list the value in classes=, as a class or as void"
        if self.numbered:
            colors = color_ids(content, name)
            labels = relabel((colors % 256).astype("uint8"), self.classes.labels, name, remedy)
            return numbered_segments(labels, colors // 256 % 256, self.classes)
        labels = relabel(index_map(content, name), self.classes.labels, name, remedy)
        return labels, semantic_segments(labels)


def _content(file: Mapping[str, Any] | None, name: str) -> bytes:
    if not file or not (file.get("bytes") or file.get("path")):
        raise ValueError(f"{name}: the image or mask is missing; remove the row")
    return file["bytes"] or read_location({"archive": None, "member": file["path"]}, MAX_IMAGE_BYTES)


def _saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load(path: str, split: str, revision: str | None) -> datasets.Dataset:
    try:
        if _saved(path):
            saved = datasets.load_from_disk(path)
            table = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            table = datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # the library raises anything about a damaged data set
        raise ValueError(f"hub:{path}: split {split!r} cannot be loaded ({error}); check name and network") from error
    return table.with_format(None)


def _column(table: datasets.Dataset, name: str | None, usual: tuple[str, ...], path: str) -> str:
    images = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    for column in (name,) if name else usual:
        if column in images:
            return column
    raise ValueError(
        f"hub:{path}: there is no column of images {name or ' or '.join(usual)}; the columns of images are "
        f"{', '.join(images) or 'none'}: name them with image_column= and annotation_column="
    )
