"""Checkpoints that survive: written beside and renamed, complete only with their manifest, and checked before use.

A checkpoint is a folder `step-00001234` with a model that can be used as it is (`config.json`, `model.safetensors`,
`preprocessor_config.json`), and what training needs to go on: `ema.safetensors`, `optimizer.pt`, `random_states.pt` and
`state.json`. Where adapters are trained, the model has them merged, which cannot be undone to the bit, so that training
goes on from `adapted.safetensors`. `manifest.json`, written last, lists sizes and SHA-256 of all of them. `Checkpoints`
saves, finds the newest valid one, and deletes what is neither among the last nor the best. Pickles are read with
`weights_only=True`.

Whether a run may go on from a checkpoint: it must train the same model on the same data in the same way.

`identity` says what a run is, for its checkpoints; `refuse_other_run` compares. Each field of a recipe declares whether
it may change: what the result does not depend on may, such as where output goes or how the batch is split; what may
have to change so that a training survives, such as its learning rate, may too, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import replacing_folder
from ..data.reading import describe, metadata
from .declarations import default_of
from .recipe import all_fields, flat, renamed, resume_rules

MANIFEST = "manifest.json"
MODEL, ADAPTED, EMA, OPTIMIZER, RANDOM, STATE = (
    "model.safetensors",
    "adapted.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "random_states.pt",
    "state.json",
)
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says."""


@dataclass
class TrainingState:
    """Everything that a checkpoint holds.

    Attributes:
        step: steps taken.
        model: state of the model as it is trained.
        ema: moving average, or `None`.
        optimizer: states of optimiser, schedule and gradient scaler by name.
        random_states: of each process.
        progress: plain values for JSON: history, best score, what is trained on.
        merged: where `model` has adapters, the weights of the ordinary model that it amounts to; only written.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    random_states: list[dict[str, Any]]
    progress: dict[str, Any]
    merged: dict[str, Tensor] | None = None


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: that holds them; it is made when the first is saved.
        keep_last: newest ones that are kept.
        report: takes a line of text for people, about damaged checkpoints.
    """

    def __init__(self, folder: Path, keep_last: int = 2, report: Callable[[str], None] = print) -> None:
        self.folder, self.keep_last, self.report = folder, keep_last, report

    def steps(self) -> list[int]:
        """Steps of all checkpoints there are, valid or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainingState, save_settings: Callable[[Path], None], keep: int | None = None) -> Path:
        """Write a checkpoint; on an error, those that were there stay as they are.

        Args:
            state: to write.
            save_settings: writes `config.json` and the like into a folder.
            keep: step of the best checkpoint, which is not deleted.

        Raises:
            OSError: it cannot be written, as where the disk is full; the message says which checkpoint remains.
        """
        target = self.path(state.step)
        try:
            # What may be there already is of an earlier run that was at the same step, or damaged.
            with replacing_folder(target) as partial:
                save_settings(partial)
                _write(partial, state)
                _write_manifest(partial, state.step)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OSError(
                f"cannot save {target}: {reason}; {self._what_remains()}. Make room or choose another output, and "
                "start again: training goes on from there"
            ) from error
        self.prune(keep)
        return target

    def newest_valid(self) -> Path | None:
        """The newest checkpoint that is complete and unchanged; those that are not are reported and passed over."""
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                check(path)
            except DamagedCheckpoint as error:
                self.report(f"skipping a damaged checkpoint: {error}")
            else:
                return path
        return None

    def prune(self, keep: int | None = None) -> None:
        """Delete all but the last `keep_last` and the one of step `keep`, and what interrupted saves left."""
        steps = self.steps()
        for step in steps[: -self.keep_last or None]:
            if step != keep:
                shutil.rmtree(self.path(step), ignore_errors=True)
        for path in (*self.folder.glob(".step-*"), *self.folder.glob(".partial-*")):  # the latter of older versions
            shutil.rmtree(path, ignore_errors=True)

    def _what_remains(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is unharmed" if steps else "there is no checkpoint yet"


def check(path: Path) -> None:
    """See that a checkpoint is complete and unchanged.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} has no {MANIFEST}, so it was not finished") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} cannot be read ({error})") from error
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != facts["size"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes and should have {facts['size']}")
        if _sha256(file) != facts["sha256"]:
            raise DamagedCheckpoint(f"{file} has changed since it was written (its SHA-256 differs)")


def read(path: Path) -> TrainingState:
    """Read a checkpoint that `check` has found valid, onto the CPU."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return TrainingState(
        step=state["step"],
        model=load_file(path / (ADAPTED if (path / ADAPTED).is_file() else MODEL)),
        ema=load_file(path / EMA) if (path / EMA).is_file() else None,
        optimizer=torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
        random_states=torch.load(path / RANDOM, map_location="cpu", weights_only=True),
        progress=state["progress"],
    )


def _write(folder: Path, state: TrainingState) -> None:
    if state.merged is not None:
        save_file(_storable(state.model), folder / ADAPTED, metadata={"format": "pt"})
    usable = state.model if state.merged is None else state.merged
    save_file(_storable(usable), folder / MODEL, metadata={"format": "pt"})
    if state.ema is not None:
        save_file(_storable(state.ema), folder / EMA, metadata={"format": "pt"})
    torch.save(state.optimizer, folder / OPTIMIZER)
    torch.save(state.random_states, folder / RANDOM)
    text = json.dumps({"step": state.step, "progress": state.progress}, indent=1)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def _write_manifest(folder: Path, step: int) -> None:
    """Sizes and hashes of all files; they and it are on the disk before the folder gets its name."""
    paths = sorted(folder.iterdir())
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    text = json.dumps({"step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_SHOWN = 3  # classes in a message


def identity(recipe: Any, num_samples: int, total_steps: int, datasets: Sequence[Any] = ()) -> dict[str, Any]:
    """What a checkpoint is of, as plain values.

    Args:
        recipe: of the run.
        num_samples: length of the training data.
        total_steps: of the whole training.
        datasets: the training data, as `load_segmentation_dataset` reads them; nothing is decoded.
    """
    rules = resume_rules(recipe.model)
    fields = {name: value for name, value in flat(recipe).items() if rules[name] != "yes"}
    facts: dict[str, Any] = {"pictures": num_samples, "total_steps": total_steps}
    if datasets:
        facts["classes"] = list(describe(datasets[0]).id2label.values())
        facts["image_ids"] = _hash_of_ids(datasets)
    return json.loads(json.dumps({**fields, **facts}))


def refuse_other_run(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> str | None:
    """Compare what a checkpoint is of with what is to be trained.

    Args:
        found: identity of the checkpoint; what an older version did not note yet is not compared.
        wanted: identity of the run.
        path: of the checkpoint.

    Returns:
        A line for people about settings that change from here on; `None` where all stay.

    Raises:
        ValueError: they differ; the message names the fields and the remedy.
    """
    rules = resume_rules(wanted["model"])
    # An older version did not know every field, or knew it by another name; what it did was what the default is now.
    found = {name: default_of(field) for name, field in all_fields(wanted["model"]).items()} | renamed(found)
    names = [name for name in found.keys() | wanted.keys() if rules.get(name) != "yes"]
    different = sorted(name for name in names if found.get(name) != wanted.get(name))
    different = [name for name in different if name in found or name not in ("classes", "image_ids")]
    refused = [name for name in different if rules.get(name) != "told"]
    if refused:
        changes = "; ".join(_difference(name, found.get(name), wanted.get(name)) for name in refused)
        reason = ""
        if {"pictures", "image_ids"} & set(refused):
            reason = " The order of the images follows from their number, so the data set must be the same."
        raise ValueError(
            f"{path} is of another training: {changes}.{reason} Set it back to go on, give another output= to begin "
            f"anew, or train on from the weights alone with init={path} and another output="
        )
    if not different:
        return None
    changes = ", ".join(f"{name} {json.dumps(wanted[name])} (was {json.dumps(found[name])})" for name in different)
    return f"training goes on with {changes}; the result is no longer that of an uninterrupted run"


def _hash_of_ids(datasets: Sequence[Any]) -> str:
    """A hash of the ids of all images, in order."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(json.dumps(list(metadata(dataset)["image_id"])).encode())
    return digest.hexdigest()


def _difference(name: str, before: Any, now: Any) -> str:
    """What changed in a field, in words."""
    if name == "image_ids":
        return "the training images are others, or in another order (their ids differ)"
    if name == "pictures":  # the key of the file format
        name = "images"
    if name != "classes":
        return f"{name} was {before!r} and is {now!r}"
    if len(before) != len(now):
        return f"there were {len(before)} classes and are {len(now)}"
    others = [(number, *names) for number, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1]]
    shown = ", ".join(f"{number} was {one!r} and is {other!r}" for number, one, other in others[:_SHOWN])
    return f"{len(others)} classes have other names: {shown}"
