"""What an evaluation is about: hashes of the weights, the settings and the data.

Counts of an interrupted evaluation are resumed only where all of them are the same: a model or masks that were
exchanged under the same names would otherwise be mixed with the old ones. `model_identity` hashes what was loaded and
not the files, so that it serves Hub ids and fused models, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..data.archives import NESTED, read_location
from ..data.reading import describe
from ..inference.quantization import plain_tensors

_DIGITS = 16  # of a hash that is stored and shown: 64 bits, as nobody is to be outwitted
_ROWS = 256  # of the data set's table to read at a time


def model_identity(model: Any, processor: Any, name: str = "") -> dict[str, str]:
    """Hashes of a model's weights and of its configuration and image processor; `name` says which of several it is."""
    weights = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_tensors(tensor):
            weights.update(_content(part))
    for module in model.modules():  # an exported model has a graph instead of weights
        weights.update(getattr(module, "graph_digest", "").encode())
    settings = [_settings(model.config), _settings(processor)]
    prefix = f"{name} " if name else ""
    return {f"{prefix}weights": weights.hexdigest()[:_DIGITS], f"{prefix}configuration": _hash(settings)}


def data_identity(dataset: Any) -> dict[str, str]:
    """Hashes of annotations and images of a data set that `load_segmentation_dataset` has read.

    Annotations are rows of the table and content of mask files. Images, whose content would take as long to read as to
    evaluate, count by id, path, size and time of change, as do archives.
    """
    description = describe(dataset)
    annotations, images = hashlib.sha256(), hashlib.sha256()
    annotations.update(_text([sorted(description.id2label.items()), description.stuff_classes]))
    seen: dict[str, str] = {}  # archives hold thousands of files
    for table in dataset.with_format("arrow").iter(_ROWS):  # undecoded
        for row in table.to_pylist():
            images.update(_text([row.get("image_id"), row.get("image"), *_changes(row.get("image"), seen)]))
            annotations.update(_text([row.get("image_id"), row.get("segments"), row.get("segment_map")]))
            for location in row.get("segment_map") or () if isinstance(row.get("segment_map"), list) else ():
                annotations.update(_mask(location, seen))
    return {"annotations": annotations.hexdigest()[:_DIGITS], "images": images.hexdigest()[:_DIGITS]}


def program_identity() -> dict[str, str]:
    """The version of this package: another may count otherwise."""
    return {"hf_segvit": __version__}


def _content(tensor: Tensor) -> Any:
    # As bytes, since NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _settings(part: Any) -> dict[str, Any]:
    """Settings of a configuration or processor, without what says only where and by which version it was saved."""
    settings = part.to_dict() if hasattr(part, "to_dict") else vars(part)
    left_out = ("transformers_version", "name_or_path")
    return {key: value for key, value in settings.items() if key not in left_out and not str(key).startswith("_")}


def _changes(location: Any, seen: dict[str, str]) -> Iterator[str]:
    """Size and time of change of the file that a location names, if it names one."""
    if not isinstance(location, Mapping):
        return
    path = location.get("archive") or location.get("member") or location.get("path")
    if not path:
        return
    path = str(path).partition(NESTED)[0]
    if location.get("archive") and path in seen:
        yield seen[path]
        return
    try:
        status = os.stat(path)
        text = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        text = "unreadable"  # whoever evaluates it says why
    if location.get("archive"):
        seen[path] = text
    yield text


def _mask(location: Any, seen: dict[str, str]) -> bytes:
    if location.get("archive"):
        return _text(list(_changes(location, seen)))
    try:
        return hashlib.sha256(read_location(location)).digest()
    except ValueError:
        return b"unreadable"


def _hash(value: Any) -> str:
    return hashlib.sha256(_text(value)).hexdigest()[:_DIGITS]


def _text(value: Any) -> bytes:
    def plain(other: Any) -> str:
        # Bytes of images that a table holds; others are types and numbers of libraries, whose text says all.
        return hashlib.sha256(other).hexdigest() if isinstance(other, bytes) else str(other)

    return json.dumps(value, default=plain).encode()
