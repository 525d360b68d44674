"""Data sets for segmentation: `load_segmentation_dataset("FORMAT:PATH")` reads any of `FORMATS` to `datasets.Dataset`.

Columns: `image` (Pillow, RGB), `image_id`, `segment_map` ((H, W) int32 ids, void -1; `None` where segments have `rle`)
and `segments` (rows of `id`, `label_id`, `is_crowd`; where masks may overlap also `rle`, and `area` if the annotation
states one, which average precision goes by). In semantic data a segment is a class, and its id the label id. Images
and masks are decoded when a sample is asked for. The table itself holds where files are: `metadata(dataset)` shows it,
so that filters need not decode, and `describe` tells names and task.

The formats of data sets as text for people: `format_list` says of each what it is, its layout and its options.
"""

from __future__ import annotations

import importlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from .class_lists import CLASS_FILES, CLASS_FORMS
from .decoding import MaskReader, SampleDecoder
from .problems import ProblemList

FORMATS = {
    "coco": "COCO in its official layout: panoptic or instance",
    "coco_stuff": "COCO-Stuff-164K: semantic",
    "coco_folder": "any data set in COCO's instance or panoptic format",
    "ade20k": "ADE20K scene parsing: semantic, panoptic or instance",
    "cityscapes": "Cityscapes with gtFine: semantic, panoptic or instance",
    "cityscapes_coarse": "Cityscapes with gtCoarse",
    "mask_folder": "images and mask PNGs: semantic, or panoptic with instance PNGs",
    "labelme": "labelme's JSON files beside images",
    "yolo": "YOLO segmentation labels and data.yaml",
    "hub": "a data set of the Hub, or saved by `datasets`",
    "generated": "drawn scenes: panoptic, semantic or instance; PATH is the difficulty, such as easy or hard",
}
_VALIDATION_SPLITS = ("val", "validation", "valid", "test")


@dataclass
class Reading:
    """What a reader found.

    Attributes:
        read_masks: how masks are decoded.
        labels: class names by label id, 0 first.
        stuff_classes: label ids that are stuff.
        rows: of the table: `image` and `segment_map` (lists of) locations, `image_id`, `segments` or `None`.
        outlines: rows of segments have `polygons` and `rle`, and perhaps `area`.
        dataset: instead of rows, a table that exists already.
        decoder: instead of `SampleDecoder(read_masks)`.
    """

    read_masks: MaskReader | None
    labels: list[str]
    stuff_classes: list[int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    outlines: bool = False
    dataset: datasets.Dataset | None = None
    decoder: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]] | None = None


@dataclass(frozen=True)
class DataDescription:
    """What a data set of ours is about.

    Attributes:
        format: one of `FORMATS`.
        path: where it was read from.
        split: of the data set.
        task: "semantic", "instance" or "panoptic".
        id2label: class names, as a model's config holds them.
        stuff_classes: label ids that are stuff.
    """

    format: str
    path: str
    split: str
    task: str
    id2label: dict[int, str]
    stuff_classes: list[int]


def load_segmentation_dataset(
    spec: str,
    *,
    split: str | None = None,
    task: str | None = None,
    problems: ProblemList | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Read a data set.

    Args:
        spec: "FORMAT:PATH", such as "coco:/data/coco"; the formats are `FORMATS`. Options of the format may follow, as
            in "mask_folder:streets?classes=streets.json" or "generated:hard?num_scenes=50&size=64".
        split: such as "train" or "val"; by default the first there is, train first.
        task: "semantic", "instance" or "panoptic"; by default the first that the format has.
        problems: collects what is wrong, instead of an error; damaged parts are left out.
        options: of the format; see the modules in `readers/`.

    Returns:
        The data set; see the module for its columns.

    Raises:
        ValueError: format, path, split, task or option do not exist, or an annotation is wrong and `problems` is not
            given; the message names the file, the id and the remedy.
    """
    format_name, path, module, stated = _reader(spec)
    options = {**stated, **options}
    if task is not None and task not in module.TASKS:
        raise ValueError(f"{format_name} has no task {task!r}; choose one of {', '.join(module.TASKS)}")
    task = task or module.TASKS[0]
    splits = available_splits(spec, wanted=[split] if split else [], **options)
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"{spec}: there is no split {split!r}; choose one of {', '.join(splits)}")
    found = ProblemList() if problems is None else problems
    try:
        reading = module.read(path, split=split, task=task, problems=found, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise ValueError(f"format {format_name}: {error}; see the module of the format for its options") from error
        raise
    if not reading.rows and reading.dataset is None:
        found.error(path, f"split {split!r}", f"there are no images for {task} segmentation; expected {module.LAYOUT}")
    if problems is None:
        found.raise_errors()
    return _dataset(reading, DataDescription(format_name, path, split, task, {}, reading.stuff_classes))


def available_splits(spec: str, *, wanted: Sequence[str] = (), **options: Any) -> list[str]:
    """The splits that a data set has, train first.

    Args:
        spec: "FORMAT:PATH".
        wanted: names to look for beside those that are usual in the format, such as "train2017".
        options: of the format.

    Raises:
        ValueError: there is none; the message says what the format's layout is.
    """
    format_name, path, module, stated = _reader(spec)
    known = inspect.signature(module.splits).parameters
    chosen = {key: value for key, value in {**stated, **options}.items() if key in known}
    found = set(module.splits(path, wanted=wanted, **chosen))
    if not found:
        raise ValueError(f"{path}: no split of a {format_name} data set is there; expected {module.LAYOUT}")
    rank = {"train": 0, "training": 0, "val": 1, "validation": 1, "valid": 1}
    return sorted(found, key=lambda name: (rank.get(name, 2), name))


def validation_split(spec: str, remedy: str) -> str:
    """The split of "FORMAT:PATH" to score on where none is named.

    Args:
        spec: "FORMAT:PATH".
        remedy: how to name one, for the error.

    Raises:
        ValueError: it has none of the usual names.
    """
    splits = available_splits(spec)
    for name in _VALIDATION_SPLITS:
        if name in splits:
            return name
    raise ValueError(f"{spec} has no split to score on, only {', '.join(splits)}; {remedy}")


def available_tasks(spec: str) -> tuple[str, ...]:
    """The tasks that a data set can be read for.

    Raises:
        ValueError: there is no such format.
    """
    return tuple(_reader(spec)[2].TASKS)


def describe(dataset: datasets.Dataset) -> DataDescription:
    """Names, task and origin of a data set of ours, also after `map`, `filter`, `select` and the like.

    Raises:
        ValueError: the data set was not read by `load_segmentation_dataset`.
    """
    try:
        facts = json.loads(dataset.info.description)
        names = dataset.features["segments"].feature["label_id"].names
        return DataDescription(**facts, id2label=dict(enumerate(names)))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            "the data set does not say what its classes are; read it with load_segmentation_dataset, and keep its "
            "column `segments`"
        ) from error


def metadata(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows undecoded: where files are, and the segments that annotations list. Quick to map and filter."""
    return dataset.with_format(None)


def filter_metadata(dataset: datasets.Dataset, keep: Callable[[dict[str, Any]], bool]) -> datasets.Dataset:
    """The samples whose undecoded rows satisfy a condition; nothing is decoded for it."""
    return metadata(dataset).filter(keep, keep_in_memory=True).with_transform(decoder_of(dataset))


def decoder_of(dataset: datasets.Dataset) -> Any:
    """The function that decodes a data set's rows.

    Raises:
        ValueError: its rows are not decoded.
    """
    transform = dataset.format["format_kwargs"].get("transform")
    if transform is None:
        raise ValueError("the data set has no decoder; read it with load_segmentation_dataset")
    return transform


def _reader(spec: str) -> tuple[str, str, Any, dict[str, Any]]:
    """Format, path, the format's module, and options that the text holds."""
    name, separator, path = str(spec).partition(":")
    format_name = name.strip().lower().replace("-", "_")
    if not separator or format_name not in FORMATS:
        raise ValueError(f"{spec!r}: give FORMAT:PATH, where FORMAT is one of {', '.join(FORMATS)}")
    if not path:
        raise ValueError(f"{spec!r} has no path; give {name}:PATH")
    options: dict[str, Any] = {}
    if "?" in path and not Path(path).exists():
        path, _, text = path.partition("?")
        for pair in text.split("&"):
            key, separator, value = pair.partition("=")
            if not separator:
                raise ValueError(f"{spec!r}: {pair!r} is no option; give PATH?option=value&option=value")
            options[key] = int(value) if value.isdecimal() else value
    return format_name, path, importlib.import_module(f".readers.{format_name}", __package__), options


def _dataset(reading: Reading, description: DataDescription) -> datasets.Dataset:
    facts = {key: value for key, value in vars(description).items() if key != "id2label"}
    dataset = reading.dataset
    if dataset is None:
        features = _features(reading)
        columns = {name: [row[name] for row in reading.rows] for name in features}
        if features["image_id"].dtype == "string":
            columns["image_id"] = [str(image_id) for image_id in columns["image_id"]]
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        info = datasets.DatasetInfo(features=features)
        dataset = datasets.Dataset(table, info=info)
    dataset.info.description = json.dumps(facts)
    decoder = reading.decoder
    if decoder is None and reading.read_masks is not None:
        decoder = SampleDecoder(reading.read_masks)
    return dataset.with_transform(decoder)


def _features(reading: Reading) -> datasets.Features:
    text = datasets.Value("string")
    location = {"archive": text, "member": text}
    numbered = all(isinstance(row["image_id"], int) for row in reading.rows)
    segment: dict[str, Any] = {
        "id": datasets.Value("int64"),
        "label_id": datasets.ClassLabel(names=reading.labels),
        "is_crowd": datasets.Value("bool"),
    }
    if reading.outlines:
        segment["polygons"] = datasets.List(datasets.List(datasets.Value("float64")))
        segment["rle"] = {"size": datasets.List(datasets.Value("int32")), "counts": text}
        segment["area"] = datasets.Value("float64")
    return datasets.Features(
        {
            "image": location,
            "image_id": datasets.Value("int64") if numbered else text,
            "segment_map": datasets.List(location),
            "segments": datasets.List(segment),
        }
    )


_ALWAYS = ("path", "split", "task", "problems")


def format_list(width: int = 100) -> str:
    """What FORMAT:PATH may be.

    Args:
        width: of the text, in characters.
    """
    lines = ["FORMAT:PATH, with the files at PATH:"]
    for name, about in FORMATS.items():
        module = importlib.import_module(f".readers.{name}", __package__)
        lines += _wrapped(f"{name}: {about}", 2, width)
        lines += _wrapped(module.LAYOUT, 6, width)
        if options := [option for option in inspect.signature(module.read).parameters if option not in _ALWAYS]:
            lines += _wrapped(f"options: {', '.join(options)}", 6, width)
    lines += _wrapped(f"{' or '.join(CLASS_FILES)}, or classes=FILE: {CLASS_FORMS}", 0, width)
    lines += [
        "Options follow a `?`: 'mask_folder:streets?classes=streets.json', 'generated:hard?num_scenes=50&size=64'"
    ]
    return "\n".join(lines)


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
