"""Counts on disk, so that an interrupted evaluation goes on where it stopped.

`PartialResults` is a folder of small files, one for each chunk of pictures that was counted. A file is written whole or
not at all and never changed, so that any number of processes may write at once, and the next run may have another
number of them. A file tells what was evaluated; those of another model, data set or setting are an error.
"""

from __future__ import annotations

import json
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import replacing

_PATTERN = "counts-*.npz"


class PartialResults:
    """The chunks of one evaluation.

    Args:
        folder: where they are; it is made if need be.
        about: what is evaluated, and how.

    Raises:
        ValueError: the folder holds chunks of something else; the message names what differs.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._paths():
            found = _read(path)[0]["about"]
            different = sorted(key for key in {*found, *self.about} if found.get(key) != self.about.get(key))
            if different:
                changes = ", ".join(f"{key} {found.get(key)!r} != {self.about.get(key)!r}" for key in different)
                raise ValueError(
                    f"{folder} holds parts of another evaluation ({changes}); choose another --output, or delete it"
                )

    def read(self) -> list[dict[str, Any]]:
        """The states that were saved."""
        return [_read(path)[1] for path in self._paths()]

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a state: nested dictionaries with string keys, of arrays and of what JSON can hold."""
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps({"about": self.about, "state": _without_arrays(state, "", arrays)})
        with replacing(self.folder / f"counts-{uuid.uuid4().hex}.npz") as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **{"json": np.array(text)}, **arrays)  # type: ignore[arg-type]

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN))


def delete_partial_results(folder: Path) -> None:
    """Delete all chunks, once the result is written."""
    for path in folder.glob(_PATTERN):
        path.unlink()
    folder.rmdir()


def _without_arrays(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with arrays moved to `arrays` under their paths."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(entry, f"{path}/{key}", arrays) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        arrays[f"array{path}"] = value
        return {"array": f"array{path}"}
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if list(value) == ["array"]:
        return arrays[value["array"]]
    return {key: _with_arrays(entry, arrays) for key, entry in value.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON part of a file, and its state."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = json.loads(str(arrays["json"]))
            return content, _with_arrays(content["state"], arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and its pictures are evaluated again") from error
