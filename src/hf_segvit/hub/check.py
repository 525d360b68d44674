"""Check that a checkpoint folder is complete and loads correctly.

`check_checkpoint` reads configuration, image processor and every tensor of the safetensors files, and refuses a folder
that would not load or would load wrongly. It runs no code from the folder and opens no pickles.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..weight_checks import check_complete, check_finite
from .remote_code import AUTO_CLASSES, installed_class, whole_model_class

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_FOREIGN_TYPES = ("eomt", "eomt_dinov3")  # the model types of Transformers' own EoMT


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed all checks."""

    folder: Path
    config: Any  # of this package's class, not of one in the folder
    processor: Any
    files: tuple[str, ...]  # names of configuration, processor and weight files
    num_parameters: int


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Check a folder to which a model and its image processor were saved with `save_pretrained`.

    Raises:
        ValueError: a file is missing, damaged or contradicts another one, or a weight is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name the folder that save_pretrained or training wrote")
    settings = _read_json(folder / CONFIG, "save the model there with model.save_pretrained(folder)")
    model_type = settings.get("model_type")
    if model_type not in AUTO_CLASSES:
        remedy = "this package's types are " + ", ".join(sorted(AUTO_CLASSES))
        if model_type in _FOREIGN_TYPES:
            remedy = "load it with EoMTForUniversalSegmentation.from_pretrained and save it, which translates it"
        raise ValueError(f"{folder / CONFIG}: model_type is {model_type!r}; {remedy}")
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
    weights = _weight_files(folder)
    tensors = {}
    for name in weights:
        tensors.update(_read_weights(folder / name))
    _compare_with_model(folder, config, tensors)
    # An index beside unsharded weights is left over from an earlier save.
    index = (WEIGHTS_INDEX,) if weights != [WEIGHTS] else ()
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    return Checkpoint(folder, config, processor, (CONFIG, PROCESSOR, *index, *weights), num_parameters)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; {remedy}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy} again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a mapping; {remedy} again")
    return values


def _load(loading_class: Any, folder: Path, name: str) -> Any:
    try:
        return loading_class.from_pretrained(folder)
    except Exception as error:  # a field of the wrong type may raise anything
        raise ValueError(f"{folder / name}: {' '.join(str(error).split())}") from error


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files; a single file wins over shards, as in `from_pretrained`."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        remedy = f"; {pickled[0]} is a pickle, convert it with `hf-segvit convert`" if pickled else ""
        raise ValueError(f"{folder}: no {WEIGHTS} and no {WEIGHTS_INDEX}{remedy or '; save the model there'}")
    names = sorted(set(_read_json(index, "save the model").get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name!r}, which is not a safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: names {name}, which is missing; copy all shards or save the model again")
    if not names:
        raise ValueError(f"{index}: names no files; save the model again")
    return names


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors on the meta device, after each has been read once and found finite."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                tensor = file.get_tensor(name)
                check_finite({name: tensor}, path)
                tensors[name] = tensor.to(
                    "meta"
                )  # only shapes are compared below, so memory holds one tensor at a time
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or incomplete ({error}); copy or save it again") from error
    return tensors


def _compare_with_model(folder: Path, config: Any, tensors: dict[str, Tensor]) -> None:
    model_class = whole_model_class(config.model_type)
    if config.architectures != [model_class.__name__]:
        raise ValueError(
            f"{folder / CONFIG}: architectures is {config.architectures}; only a {model_class.__name__} is complete, "
            "save one"
        )
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    remedy = "save model and configuration together with model.save_pretrained(folder)"
    check_complete(tensors, expected, remedy, f"{folder}: the weights do not fit {CONFIG}")
