"""Read segmentation data sets of any format into `datasets.Dataset`.

`load_segmentation_dataset("FORMAT:PATH")`, where FORMAT is one of `FORMATS` (readers/; "auto" recognises it), the name
of a reader that another package offers, or the import path of one. `describe` returns class names and task.

Columns: `image` (Pillow, RGB), `image_id`, `segment_map` ((H, W) int32 ids, void -1; `None` if segments have `rle`)
and `segments` (rows of `id`, `label_id`, `is_crowd`; if masks may overlap also `rle`, and `area` if the annotation
states one). In semantic data each class is one segment, whose id is the label id. Images and masks are decoded on
access; the table itself holds the paths of the files, which `metadata` shows.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import pyarrow as pa
from transformers.utils import logging

from ..lookup import entry_points, suggestion
from ..models.image_values import AS_STORED, ImageSettings, checked_bands, checked_range
from .archives import noted_paths
from .decoding import MaskReader, SampleDecoder
from .folders import data_path, path_exists
from .problems import ProblemList
from .readers import FORMATS, NOT_OPTIONS, READER_GROUP
from .table_cache import cached_table, store_table
from .table_cache import table_key as cache_key

logger = logging.get_logger(__name__)

_READER_NAMES = ("TASKS", "LAYOUT", "splits", "read")
IMAGE_OPTIONS = ("range", "bands")  # options of every format, see `ImageSettings`
CACHE_OPTION = "cache"  # of every format: whether the table of large annotations is kept, see table_cache.py
_RESERVED = (*NOT_OPTIONS, "spec", "wanted")
_VALIDATION_SPLITS = ("val", "validation", "valid", "test")  # by preference


@dataclass
class Reading:
    """The result of a reader: the rows of the table and how to decode them."""

    read_masks: MaskReader | None
    labels: list[str]  # class names by label id
    stuff_classes: list[int]  # label ids
    # `image` (location), `image_id`, `segment_map` (list of locations), and `segments` or `None`
    rows: list[dict[str, Any]] = field(default_factory=list)
    outlines: bool = False  # rows of segments have `polygons` and `rle`, and perhaps `area`
    dataset: datasets.Dataset | None = None  # instead of rows, an existing table
    decoder: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]] | None = None  # `None`: a `SampleDecoder`
    remarks: list[str] = field(default_factory=list)  # what the reader decided about labels, in sentences for users


@dataclass(frozen=True)
class DataDescription:
    """Origin, task and classes of a data set."""

    format: str  # one of `FORMATS`, or the name or import path of another reader
    path: str
    split: str
    task: str  # "semantic", "instance" or "panoptic"
    id2label: dict[int, str]
    stuff_classes: list[int]  # label ids
    remarks: list[str] = field(default_factory=list)  # what the reader decided about labels, for `check-data`


def load_segmentation_dataset(
    spec: str,
    *,
    split: str | None = None,
    task: str | None = None,
    problems: ProblemList | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Read a data set; see the module for its columns.

    Args:
        spec: "FORMAT:PATH", such as "coco:/data/coco". Options of the format may follow, as in
            "mask_folder:streets?classes=streets.json" or "generated:hard?num_scenes=50&size=64".
        split: such as "train" or "val"; by default train, or else the first.
        task: "semantic", "instance" or "panoptic"; by default the format's first.
        problems: collects what is wrong instead of raising an error; damaged parts are left out.
        options: of the format; see the modules in `readers/`. Every format has `range`, the values of black and white
            in images of more than 8 bits ("0-4095"), and `bands`, the bands to read, from 1 ("4,3,2"); and `cache`,
            false to read large annotations anew instead of from the cache of table_cache.py.

    Raises:
        ValueError: format, path, split, task or option do not exist, or an annotation is wrong and `problems` is not
            given.
    """
    format_name, path, module, stated = _reader(spec)
    options = {**stated, **options}
    image_options = {name: options.pop(name) for name in IMAGE_OPTIONS if name in options}
    settings = ImageSettings(
        value_range=checked_range(image_options.get("range"), f"{spec}: range"),
        bands=checked_bands(image_options.get("bands"), f"{spec}: bands"),
    )
    _refuse_unknown_options(options, format_name, module)
    if task is not None and task not in module.TASKS:
        raise ValueError(f"{format_name} has no task {task!r}; {suggestion(task, module.TASKS)}")
    task = task or module.TASKS[0]
    is_cached = _checked_cache(options.pop(CACHE_OPTION, True), spec) if _has_cache(module) else False
    key = None
    # A check of the data reads them, and the cache has no problems to report.
    if is_cached and problems is None:
        key = cache_key(_version(), format_name, path, {**options, "": [split, task]})
    if key is not None and (cached := _from_cache(key)) is not None:
        return with_image_settings(cached, settings)
    with noted_paths() as states, _without_collection():
        reading, description = _read(spec, format_name, path, module, split, task, problems, options)
        dataset = _dataset(reading, description)
    if key is not None and reading.dataset is None and reading.decoder is None:
        content = {
            "description": dataset.info.description,
            "labels": reading.labels,
            "outlines": reading.outlines,
            "numbered": dataset.features["image_id"].dtype == "int64",
        }
        store_table(key, dataset.data.table, reading.read_masks, content, states)
    return with_image_settings(dataset, settings)


def _read(
    spec: str,
    format_name: str,
    path: str,
    module: Any,
    split: str | None,
    task: str,
    problems: ProblemList | None,
    options: Mapping[str, Any],
) -> tuple[Reading, DataDescription]:
    """What the reader makes of the files."""
    splits = available_splits(spec, wanted=[split] if split else [], **options)
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"{spec}: there is no split {split!r}; choose one of {', '.join(splits)}")
    collected = ProblemList() if problems is None else problems
    reading = module.read(path, split=split, task=task, problems=collected, **options)
    if not reading.rows and reading.dataset is None:
        message = f"there are no images for {task} segmentation; expected {module.LAYOUT}; check the path"
        collected.error(path, f"split {split!r}", message)
    if problems is None:
        collected.raise_errors()
    return reading, DataDescription(format_name, path, split, task, {}, reading.stuff_classes, list(reading.remarks))


def _from_cache(key: str) -> datasets.Dataset | None:
    """The data set of a cached table."""
    found = cached_table(key)
    if found is None:
        return None
    table, content = found
    try:
        features = _features(content["labels"], content["outlines"], content["numbered"])
        description = json.dumps(json.loads(content["description"]))
    except (KeyError, TypeError, ValueError):
        return None
    if not table.schema.equals(features.arrow_schema, check_metadata=True):
        return None  # of another version of `datasets`
    dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    dataset.info.description = description
    return dataset.with_transform(SampleDecoder(content["read_masks"]))


def _has_cache(module: Any) -> bool:
    """Whether `cache` is ours: a reader of another package may have an option of this name."""
    return CACHE_OPTION not in inspect.signature(module.read).parameters


def _checked_cache(value: Any, spec: str) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError(f"{spec}: cache={value} is neither true nor false")
    return text == "true"


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the search for cyclic garbage, which goes through all of a million entries again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def image_settings_of(dataset: Any) -> ImageSettings:
    """How the files of a data set become images; the default where they are none of its reader's."""
    transform = dataset.format["format_kwargs"].get("transform") if isinstance(dataset, datasets.Dataset) else None
    return getattr(transform, "image_settings", AS_STORED)


def has_image_settings(dataset: Any) -> bool:
    """Whether the images of a data set are read from files, by a decoder that has settings for it."""
    return isinstance(dataset, datasets.Dataset) and hasattr(
        dataset.format["format_kwargs"].get("transform"), "image_settings"
    )


def with_image_settings(dataset: datasets.Dataset, settings: ImageSettings) -> datasets.Dataset:
    """The same data set with its images read in another way.

    Raises:
        ValueError: its images are not files, so that there is nothing to set.
    """
    decoder = dataset.format["format_kwargs"].get("transform")
    if settings == image_settings_of(dataset):
        return dataset
    if not hasattr(decoder, "image_settings"):
        raise ValueError(f"images of this format are not read from files; {' and '.join(IMAGE_OPTIONS)} mean nothing")
    return dataset.with_transform(replace(decoder, image_settings=settings))


def available_splits(spec: str, *, wanted: Sequence[str] = (), **options: Any) -> list[str]:
    """The splits of a data set, train first.

    Args:
        wanted: names to look for besides those that are usual in the format, such as "train2017".

    Raises:
        ValueError: there is none.
    """
    format_name, path, module, stated = _reader(spec)
    # Most options concern `read` alone.
    known = inspect.signature(module.splits).parameters
    chosen = {key: value for key, value in {**stated, **options}.items() if key in known}
    splits = set(module.splits(path, wanted=wanted, **chosen))
    if not splits:
        raise ValueError(
            f"{path}: no split of a {format_name} data set is there; expected {module.LAYOUT}; check the path"
        )
    rank = {"train": 0, "training": 0, "val": 1, "validation": 1, "valid": 1}
    return sorted(splits, key=lambda name: (rank.get(name, 2), name))


def validation_split(spec: str, remedy: str) -> str:
    """The split to score on if the user names none; `remedy` ends the error if no split has one of the usual names."""
    splits = available_splits(spec)
    for name in _VALIDATION_SPLITS:
        if name in splits:
            return name
    raise ValueError(f"{spec} has no split to score on, only {', '.join(splits)}; {remedy}")


def available_tasks(spec: str) -> tuple[str, ...]:
    """The tasks for which a data set can be read."""
    return tuple(_reader(spec)[2].TASKS)


def describe(dataset: datasets.Dataset) -> DataDescription:
    """Classes, task and origin of a data set, even after `map`, `filter` or `select`.

    Raises:
        ValueError: the data set was not read by `load_segmentation_dataset`.
    """
    try:
        fields = json.loads(dataset.info.description)
        names = dataset.features["segments"].feature["label_id"].names
        return DataDescription(**fields, id2label=dict(enumerate(names)))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            "the data set does not say what its classes are; read it with load_segmentation_dataset, and keep its "
            "column `segments`"
        ) from error


def metadata(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows undecoded, with paths and annotated segments: fast to map and filter."""
    return dataset.with_format(None)


def decoder_of(dataset: datasets.Dataset) -> Any:
    """The function that decodes a data set's rows."""
    transform = dataset.format["format_kwargs"].get("transform")
    if transform is None:
        raise ValueError("the data set has no decoder; read it with load_segmentation_dataset")
    return transform


def _reader(spec: str) -> tuple[str, str, Any, dict[str, Any]]:
    """Format, path, reader module, and the options in the spec and of the format."""
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
    if "?" in path and not path_exists(path):  # a file name may contain a question mark
        path, _, text = path.partition("?")
        given = set[str]()
        for pair in text.split("&"):
            key, separator, value = pair.partition("=")
            if not separator:
                raise ValueError(f"{spec!r}: {pair!r} is no option; give PATH?option=value&option=value")
            if key in given:
                raise ValueError(f"{spec!r}: the option {key} occurs twice; give it once")
            given.add(key)
            # More digits are no number that an option takes, and `int` refuses thousands of them.
            options[key] = int(value) if _WHOLE.fullmatch(value) else value
        if format_name != "auto":
            _refuse_unknown_options(options, format_name, module)
    if format_name == "auto":
        format_name, path, reason = _recognised(path, module)
        logger.warning_once(f"auto: {path} is read as {format_name}: {reason}")
        module = importlib.import_module(FORMATS[format_name].module)
        options = {**FORMATS[format_name].preset, **options}
        _refuse_unknown_options(options, format_name, module)
    return format_name, path, module, options


_WHOLE = re.compile(r"-?[0-9]{1,18}")


def _recognised(path: str, module: Any) -> tuple[str, str, str]:
    place = data_path(path)
    # Files of many megabytes are looked at, and several times in each run. A file that is added changes the folder.
    stamp = place.stat().st_mtime_ns if place.exists() else 0
    if (path, stamp) not in _known:
        _known[path, stamp] = module.recognise(path)
    return _known[path, stamp]


_known: dict[tuple[str, int], tuple[str, str, str]] = {}


def _foreign_reader(name: str) -> Any:
    """The reader of another package, by the name that it offers or by import path."""
    offered = entry_points(READER_GROUP)
    unknown = f"there is no format {name!r}; {suggestion(name, [*FORMATS, *offered])}"
    try:
        if name in offered:
            module = offered[name].load()
        elif all(part.isidentifier() for part in name.split(".")):
            module = importlib.import_module(name)
        else:
            raise ImportError(f"{name!r} is no import path")
    except Exception as error:  # the module is not ours: whatever it raises is reported under its name
        # A name without a dot is more likely a misspelt format than a missing module.
        if isinstance(error, ImportError) and "." not in name and name not in offered:
            raise ValueError(f"{unknown}, or give the import path of a reader") from error
        raise ValueError(
            f"the reader {name} cannot be imported ({type(error).__name__}: {error}); install its package, or add its "
            "folder to PYTHONPATH"
        ) from error
    missing = [required for required in _READER_NAMES if not hasattr(module, required)]
    if missing == list(_READER_NAMES) and "." not in name:  # an unrelated module that happens to have this name
        raise ValueError(f"{unknown}, or give the import path of a reader")
    if missing:
        raise ValueError(
            f"{name} is not a reader: it has no {' and no '.join(missing)}; add what hf_segvit.data.readers lists"
        )
    return module


def _refuse_unknown_options(options: Mapping[str, Any], format_name: str, module: Any) -> None:
    # These are arguments of the functions above, not of the format, whatever a reader of another package takes.
    for name in options:
        if name in _RESERVED:
            raise ValueError(
                f"format {format_name} has no option {name!r}; give it as an argument of the command instead"
            )
    parameters = inspect.signature(module.read).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in NOT_OPTIONS] + [*IMAGE_OPTIONS, CACHE_OPTION]
    for name in options:
        if name not in known:
            raise ValueError(f"format {format_name} has no option {name!r}; {suggestion(name, known)}")


def _dataset(reading: Reading, description: DataDescription) -> datasets.Dataset:
    dataset = reading.dataset
    if dataset is None:
        numbered = all(isinstance(row["image_id"], int) for row in reading.rows)
        features = _features(reading.labels, reading.outlines, numbered)
        columns = {name: [row[name] for row in reading.rows] for name in features}
        if features["image_id"].dtype == "string":
            columns["image_id"] = [str(image_id) for image_id in columns["image_id"]]
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    # The description survives `map` and `filter`, and so do the class names, in the features.
    fields = {key: value for key, value in vars(description).items() if key != "id2label"}
    dataset.info.description = json.dumps(fields)
    decoder = reading.decoder
    if decoder is None and reading.read_masks is not None:
        decoder = SampleDecoder(reading.read_masks)
    return dataset.with_transform(decoder)


def _features(labels: Sequence[str], outlines: bool, numbered: bool) -> datasets.Features:
    text = datasets.Value("string")
    location = {"archive": text, "member": text}
    segment: dict[str, Any] = {
        "id": datasets.Value("int64"),
        "label_id": datasets.ClassLabel(names=list(labels)),
        "is_crowd": datasets.Value("bool"),
    }
    if outlines:
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


def _version() -> str:
    """The version of the package, without importing it: its names lead back here."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)
