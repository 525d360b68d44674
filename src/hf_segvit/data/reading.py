"""Data sets for segmentation: `load_segmentation_dataset("FORMAT:PATH")` reads any format to `datasets.Dataset`.

FORMAT is one of `FORMATS` (readers/), the name of a reader that another package offers, or the import path of one.

Columns: `image` (Pillow, RGB), `image_id`, `segment_map` ((H, W) int32 ids, void -1; `None` where segments have `rle`)
and `segments` (rows of `id`, `label_id`, `is_crowd`; where masks may overlap also `rle`, and `area` if the annotation
states one, which average precision goes by). In semantic data a segment is a class, and its id the label id. Images
and masks are decoded when a sample is asked for. The table itself holds where files are: `metadata(dataset)` shows it,
so that filters need not decode, and `describe` tells names and task.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ..lookup import entry_points, suggestion
from .decoding import MaskReader, SampleDecoder
from .problems import ProblemList
from .readers import FORMATS, NOT_OPTIONS, READER_GROUP

_READER_PARTS = ("TASKS", "LAYOUT", "splits", "read")
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
        format: one of `FORMATS`, or the name or import path of another reader.
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
        spec: "FORMAT:PATH", such as "coco:/data/coco", see the module. Options of the format may follow, as
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
    _refuse_unknown_options(options, format_name, module)
    if task is not None and task not in module.TASKS:
        raise ValueError(f"{format_name} has no task {task!r}; {suggestion(task, module.TASKS)}")
    task = task or module.TASKS[0]
    splits = available_splits(spec, wanted=[split] if split else [], **options)
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"{spec}: there is no split {split!r}; choose one of {', '.join(splits)}")
    found = ProblemList() if problems is None else problems
    reading = module.read(path, split=split, task=task, problems=found, **options)
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
    """Format, path, the reader, and the options that the text and the format's name stand for."""
    name, separator, path = str(spec).partition(":")
    name = name.strip()
    format_name = name.lower().replace("-", "_")
    if not separator:
        raise ValueError(f"{spec!r}: give FORMAT:PATH, where FORMAT is one of {', '.join(FORMATS)}")
    if format_name in FORMATS:
        module, options = importlib.import_module(FORMATS[format_name].module), dict(FORMATS[format_name].preset)
    else:
        format_name, module, options = name, _foreign_reader(name), {}
    if not path:
        raise ValueError(f"{spec!r} has no path; give {name}:PATH")
    if "?" in path and not Path(path).exists():
        path, _, text = path.partition("?")
        for pair in text.split("&"):
            key, separator, value = pair.partition("=")
            if not separator:
                raise ValueError(f"{spec!r}: {pair!r} is no option; give PATH?option=value&option=value")
            options[key] = int(value) if value.isdecimal() else value
    return format_name, path, module, options


def _foreign_reader(name: str) -> Any:
    """A reader that an installed package offers by this name, or that the name is the import path of."""
    offered = entry_points(READER_GROUP)
    unknown = f"there is no format {name!r}; {suggestion(name, [*FORMATS, *offered])}"
    try:
        if name in offered:
            module = offered[name].load()
        elif all(part.isidentifier() for part in name.split(".")):
            module = importlib.import_module(name)
        else:
            raise ImportError(f"{name!r} is no import path")
    except Exception as error:  # whatever a stranger's module raises is said with its name
        # Without a dot it is a misspelt format rather than a module that is missing.
        if isinstance(error, ImportError) and "." not in name and name not in offered:
            raise ValueError(f"{unknown}, or give the import path of a reader") from error
        raise ValueError(
            f"the reader {name} cannot be imported ({type(error).__name__}: {error}); install its package, or add its "
            "folder to PYTHONPATH"
        ) from error
    missing = [part for part in _READER_PARTS if not hasattr(module, part)]
    if missing == list(_READER_PARTS) and "." not in name:  # some module of that name, but no reader
        raise ValueError(f"{unknown}, or give the import path of a reader")
    if missing:
        raise ValueError(
            f"{name} is no reader, as it has no {' and no '.join(missing)}; hf_segvit.data.readers says what one needs"
        )
    return module


def _refuse_unknown_options(options: Mapping[str, Any], format_name: str, module: Any) -> None:
    parameters = inspect.signature(module.read).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in NOT_OPTIONS]
    for name in options:
        if name not in known:
            remedy = suggestion(name, known) if known else "it has none"
            raise ValueError(f"format {format_name} has no option {name!r}; {remedy}")


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
