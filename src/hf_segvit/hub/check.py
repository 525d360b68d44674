"""Check that a checkpoint folder is complete and loads correctly.

`check_checkpoint` reads configuration, image processor and every tensor of the safetensors files, or the record of an
exported model, and refuses a folder that would not load or would load wrongly. It runs no code from the folder and
opens no pickles.

`published_data_name` and `published_path_name` name a data set or model without telling where it lies on this machine;
`refuse_local_details` refuses texts that tell it all the same.
"""

import contextlib
import getpass
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.checkpoint_json import json_fault
from ..models.safetensors_header import check_safetensors
from ..weight_checks import check_complete, check_finite
from .export_record import RECORD_FILE, exported_format, graph_names, read_record
from .remote_code import AUTO_CLASSES, installed_class, whole_model_class

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# Fields of a configuration that name weight files: `from_pretrained` follows them past the usual names.
_OTHER_WEIGHTS = ("transformers_weights",)
_SHARD = re.compile(r"model-\d{1,9}-of-\d{1,9}\.safetensors")  # as `save_pretrained` calls them
_GRAPH_FILE = re.compile(r"(model|generator|classifier)\.(onnx|onnx\.data|xml|bin|pt2|pte)")  # as an export calls them
_FOREIGN_TYPES = ("eomt", "eomt_dinov3")  # the model types of Transformers' own EoMT


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed all checks."""

    folder: Path
    config: Any  # of this package's class, not of one in the folder
    processor: Any
    weights: tuple[str, ...]  # names of the weight files; none of an exported model
    files: tuple[str, ...]  # names of configuration, processor, weight files and their index, or exported graphs
    num_parameters: int | None  # unknown of an exported model


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Check a folder to which a model and its image processor were saved with `save_pretrained`, or of an export.

    Raises:
        ValueError: a file is missing, damaged or contradicts another one, or a weight is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the folder that save_pretrained or training wrote")
    settings = _read_json(folder / CONFIG, "save the model there with model.save_pretrained(folder)")
    model_type = settings.get("model_type")
    if model_type not in AUTO_CLASSES:
        remedy = "give a model of this package, whose types are " + ", ".join(sorted(AUTO_CLASSES))
        if model_type in _FOREIGN_TYPES:
            remedy = "load it with EoMTForUniversalSegmentation.from_pretrained and save it, which translates it"
        raise ValueError(f"{folder / CONFIG}: model_type is {model_type!r}; {remedy}")
    for name in _OTHER_WEIGHTS:
        if settings.get(name) is not None:
            raise ValueError(
                f"{folder / CONFIG}: {name}={settings[name]!r} makes Transformers load other weights than those that "
                "are published; remove the entry"
            )
    _read_json(folder / PROCESSOR, "save the image processor there with processor.save_pretrained(folder)")

    config = _load(installed_class(model_type, "AutoConfig"), folder, CONFIG)
    processor = _load(installed_class(model_type, "AutoImageProcessor"), folder, PROCESSOR)
    stuff_classes = getattr(processor, "stuff_classes", None)  # absent from a point classifier's processor
    unknown = [label for label in stuff_classes or () if label not in config.id2label]
    if unknown:
        raise ValueError(
            f"{folder / PROCESSOR}: stuff_classes names {unknown[:5]}, but the classes of {CONFIG} are 0 to "
            f"{len(config.id2label) - 1}; save the image processor that belongs to this model"
        )
    if exported_format(settings) is not None:
        files = (CONFIG, PROCESSOR, RECORD_FILE, *graph_files(folder, settings))
        return Checkpoint(folder, config, processor, (), files, None)
    weights = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    shard_of: dict[str, str] = {}
    for name in weights:
        found = _read_weights(folder / name)
        if twice := found.keys() & tensors.keys():
            first = min(twice)
            raise ValueError(f"{folder / name}: holds {first!r}, as does {shard_of[first]}; save the model again")
        shard_of.update(dict.fromkeys(found, name))
        tensors.update(found)
    if weights != [WEIGHTS]:
        _compare_with_index(folder / WEIGHTS_INDEX, shard_of)
    _compare_with_model(folder, config, tensors, weights)
    # An index beside unsharded weights is left over from an earlier save.
    index = (WEIGHTS_INDEX,) if weights != [WEIGHTS] else ()
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    files = (CONFIG, PROCESSOR, *index, *weights)
    return Checkpoint(folder, config, processor, tuple(weights), files, num_parameters)


def graph_files(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Names of the graphs' files of an exported folder with this config.json, or a `ValueError`."""
    record = read_record(folder)
    if exported_format(settings) != record.format:
        raise ValueError(
            f"{folder / CONFIG}: says that the model is exported to {exported_format(settings)!r}, and {RECORD_FILE} "
            f"that it is {record.format}; export the model again"
        )
    expected = graph_names(settings.get("model_type"))
    if list(record.graphs) != expected:
        raise ValueError(
            f"{folder / RECORD_FILE}: has the graphs {list(record.graphs)}, not {expected}; export the model again"
        )
    names = [name for graph in record.graphs.values() for name in graph.files]
    for name in names:
        if not _GRAPH_FILE.fullmatch(name):
            raise ValueError(
                f"{folder / RECORD_FILE}: names {name!r}, which is no file of an export; export the model again"
            )
    return names


def read_text(path: Path) -> str:
    """The text of a file; a `ValueError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file in that encoding") from error


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; {remedy}")
    text = read_text(path)
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep to be real; {remedy} again") from error
    except ValueError as error:  # also of numbers with thousands of digits
        raise ValueError(f"{path}: not JSON ({json_fault(error)}); {remedy} again") from error
    if not isinstance(values, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(values), "a single value")
        raise ValueError(f"{path}: holds {kind}, not a mapping; {remedy} again")
    return values


def _load(loading_class: Any, folder: Path, name: str) -> Any:
    try:
        return loading_class.from_pretrained(folder)
    except Exception as error:  # a field of the wrong type may raise anything
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{folder / name}: does not fit ({reason}); save model and processor again") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files; a single file wins over shards, as in `from_pretrained`."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        remedy = f"; {pickled[0]} is a pickle, convert it with `hf-segvit convert`" if pickled else ""
        raise ValueError(f"{folder}: no {WEIGHTS} and no {WEIGHTS_INDEX}{remedy or '; save the model there'}")
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not _SHARD.fullmatch(name):
            raise ValueError(
                f"{index}: names {name!r}, which is not a safetensors file of this folder, such as "
                "model-00001-of-00002.safetensors; save the model again"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index}: names {name}, which is missing; copy all shards or save the model again")
    if not names:
        raise ValueError(f"{index}: names no files; save the model again")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as the index of shards says."""
    weight_map = _read_json(index, "save the model").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map does not map tensors to files; save the model again")
    return weight_map


def _compare_with_index(index: Path, shard_of: Mapping[str, str]) -> None:
    weight_map = _weight_map(index)
    for tensor in sorted(weight_map.keys() | shard_of.keys()):
        if weight_map.get(tensor) != shard_of.get(tensor):
            said, found = weight_map.get(tensor, "no file"), shard_of.get(tensor, "no file")
            raise ValueError(f"{index}: says that {tensor!r} is in {said}, and it is in {found}; save the model again")


def weights_metadata(path: Path) -> str:
    """The metadata in a safetensors file, one entry a line."""
    with safe_open(path, framework="pt") as file:
        return "\n".join(f"{name}: {value}" for name, value in (file.metadata() or {}).items())


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors on the meta device, after each has been read once and found finite."""
    tensors = {}
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                tensor = file.get_tensor(name)
                check_finite({name: tensor}, path)
                tensors[name] = tensor.to(
                    "meta"
                )  # only shapes are compared below, so memory holds one tensor at a time
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or incomplete; copy or save it again") from error
    return tensors


def _compare_with_model(folder: Path, config: Any, tensors: dict[str, Tensor], files: Sequence[str]) -> None:
    model_class = whole_model_class(config.model_type)
    if config.architectures != [model_class.__name__]:
        raise ValueError(
            f"{folder / CONFIG}: architectures is {config.architectures}; only a {model_class.__name__} is complete, "
            "save one"
        )
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    remedy = "save model and configuration together with model.save_pretrained(folder)"
    check_complete(tensors, expected, remedy, f"{folder / files[0]}: the weights do not fit {CONFIG}")


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Folder names that say nothing without the one around them, such as `runs/boxes/model`.
_GENERIC = re.compile(r"model|checkpoints?|step-\d+", re.IGNORECASE)


def published_path_name(path: str, may_be_hub_id: bool = True) -> str:
    """The last folder or file of a path on this machine; a Hub id stays as it is."""
    if may_be_hub_id and _HUB_ID.fullmatch(path) and not path.startswith(".") and not Path(path).exists():
        return path
    # Both kinds of separators, whatever this machine has: a recipe may come from another one.
    windows = "\\" in path or re.match(r"[A-Za-z]:/", path)
    pure = PureWindowsPath(path) if windows else PurePosixPath(path)
    parts = [part for part in pure.parts if part not in (pure.anchor, "~", "..")]
    if not parts:  # "." or "..", whose name is not in the text
        return Path(path).expanduser().resolve().name
    named = [part for part in parts if not _GENERIC.fullmatch(part)]
    return named[-1] if named else parts[-1]


def published_data_name(spec: str) -> str:
    """ "FORMAT:PATH?options" with the last folder of PATH, and of paths among the options."""
    name, separator, rest = str(spec).partition(":")
    if not separator or name == "generated":
        return str(spec)
    path, question, options = rest.partition("?")
    pairs = []
    for pair in options.split("&") if question else ():
        key, equals, value = pair.partition("=")
        pairs.append(key + equals + (published_path_name(value, False) if "/" in value or "\\" in value else value))
    return f"{name}:{published_path_name(path, name == 'hub')}{question}{'&'.join(pairs)}"


def published_settings(value: Any, key: str = "") -> Any:
    """Settings of a run, with data and files named as they are published."""
    if isinstance(value, Mapping):
        return {name: published_settings(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [published_settings(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    if key in ("data", "val_data"):
        return published_data_name(value)
    is_path = key in ("init", "backbone", "output", "cache", "generator") or _ABSOLUTE_PATH.search(value)
    return published_path_name(value) if is_path else value


# Of at least two parts, and not within a URL or a word; also on Windows, and beneath the home folder.
_ABSOLUTE_PATH = re.compile(
    r"(?:^|(?<=[\s\"'`(\[{<=:,|]))(?:/(?!path/to/)(?:[^\s/\"'`|<>:]+/)+[^\s/\"'`|<>)\],;]*|~/[^\s\"'`|<>)]+"
    r"|[A-Za-z]:(?:\\{1,2}|/(?!/))[^\s\"'`|<>]+|\\\\{1,2}[\w.-]+\\[^\s\"'`|<>]+)"
)
# Accounts and hosts that many machines have, and whose names are words of any text.
_COMMON_NAMES = {"root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "nobody", "app", "localhost", "host"}


def refuse_local_details(texts: Mapping[str, str], repo_id: str) -> None:
    """Refuse texts, by file name, that would publish an absolute path, or the user or host name of this machine.

    Raises:
        ValueError: naming file, line and what stands there.
    """
    names = {name: kind for kind, name in _machine_names() if not _is_public(name, repo_id)}
    for file, text in texts.items():
        for number, line in enumerate(text.splitlines(), start=1):
            if match := _ABSOLUTE_PATH.search(line):
                raise ValueError(
                    f"{file}, line {number}: holds the path {match[0]!r} of a machine; name the data set or file "
                    "without its folder, then push again"
                )
            for name, kind in names.items():
                if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", line, re.IGNORECASE):
                    raise ValueError(
                        f"{file}, line {number}: holds {name!r}, the {kind} name of this machine; remove it, then "
                        "push again"
                    )


def _machine_names() -> list[tuple[str, str]]:
    """(kind, name) of the user and of the host, with and without its domain."""
    names = []
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        names.append(("user", getpass.getuser()))
    host = socket.gethostname()
    return [*names, ("host", host), ("host", host.partition(".")[0])]


def _is_public(name: str, repo_id: str) -> bool:
    """Whether a name tells nothing: short or common ones, and that of the owner, who publishes under it."""
    return len(name) < 3 or name.lower() in _COMMON_NAMES or name.lower() in repo_id.lower().split("/")
