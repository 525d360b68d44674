"""Checkpoints that survive crashes, and the check that a run may resume from one.

A checkpoint is a folder `step-00001234` with a model ready for use (`config.json`, `model.safetensors`,
`preprocessor_config.json`) and what training needs to resume: `ema.safetensors`, `optimizer.pt`, `random_states.pt`,
`state.json`, and `adapted.safetensors` if adapters are trained. `manifest.json` lists size and SHA-256 of each file.
`Checkpoints` saves them atomically, finds the newest valid one, and deletes all but the last and the best.

`identity` describes what a run trains, and `refuse_other_run` compares it with that of a checkpoint. Every field of a
recipe declares whether it may change on resume: freely if the result does not depend on it, such as the output folder;
with a message if changing it can rescue a run, such as the learning rate; otherwise not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..atomic_files import is_disk_full, replacing_folder
from ..data.reading import describe, metadata
from .declarations import default_of
from .recipe import all_fields, flat, renamed, resume_rules
from .training_state import save_plain

MANIFEST = "manifest.json"
MODEL, ADAPTED, EMA = "model.safetensors", "adapted.safetensors", "ema.safetensors"
OPTIMIZER, RANDOM, STATE = "optimizer.pt", "random_states.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_SHOWN = 3  # classes in a message


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from its manifest."""


@dataclass
class TrainingState:
    """The content of a checkpoint."""

    step: int  # steps taken
    model: dict[str, Tensor]  # the state of the model as it is trained, adapters included
    ema: dict[str, Tensor] | None  # the moving average
    optimizer: dict[str, Any]  # states of optimiser, schedule and gradient scaler by name
    random_states: list[dict[str, Any]]  # one for each process
    progress: dict[str, Any]  # plain values for JSON: evaluations, identity, counters
    # With adapters in `model`: the weights of the equivalent ordinary model. Only written, never read: merging cannot
    # be undone to the bit.
    merged: dict[str, Tensor] | None = None


class Checkpoints:
    """The checkpoints of a run in a folder, which the first `save` creates; `report` is given lines for the log."""

    def __init__(self, folder: Path, keep_last: int = 2, report: Callable[[str], None] = print) -> None:
        self.folder, self.keep_last, self.report = folder, keep_last, report

    def steps(self) -> list[int]:
        """Steps of all checkpoints, valid or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainingState, save_settings: Callable[[Path], None], keep: int | None = None) -> Path:
        """Write a checkpoint, then delete old ones.

        Args:
            save_settings: writes `config.json` and the like into a folder.
            keep: step of the best checkpoint, which is not deleted.

        Raises:
            OSError: it cannot be written; existing checkpoints are unharmed, and the message names the newest.
        """
        target = self.path(state.step)
        try:
            # A checkpoint of this step may exist: a damaged one, which `resume` has skipped. It is replaced.
            with replacing_folder(target) as partial:
                save_settings(partial)
                _write(partial, state)
                _write_manifest(partial, state.step)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = "the disk is full" if is_disk_full(error) else reason
            steps = self.steps()
            remains = f"the checkpoint of step {steps[-1]} is unharmed" if steps else "there is no checkpoint yet"
            raise OSError(
                f"cannot save {target}: {reason}; {remains}. Make room or choose another output, and "
                "run the same command again to resume from there"
            ) from error
        self.prune(keep)  # only now: until the new one is complete, every old one may be needed
        return target

    def newest(
        self, accept: Callable[[Path, TrainingState], None] = lambda path, state: None
    ) -> tuple[Path, TrainingState] | None:
        """The newest checkpoint that is whole and unchanged, and its content; damaged ones are reported and skipped.

        Args:
            accept: raises `DamagedCheckpoint` for a content that the run cannot use.
        """
        steps = self.steps()
        while steps:
            path = self.path(steps.pop())
            try:
                state = read(path)
                accept(path, state)
            except DamagedCheckpoint as error:
                rest = f"going back to step {steps[-1]}" if steps else "there is no earlier one: starting at step 0"
                self.report(f"skipping a damaged checkpoint: {error}; {rest}")
            else:
                return path, state
        return None

    def newest_valid(self) -> Path | None:
        """The folder of `newest`."""
        found = self.newest()
        return None if found is None else found[0]

    def prune(self, keep: int | None = None) -> None:
        """Delete all but the last `keep_last` and the one of step `keep`, and the remains of interrupted saves."""
        for step in self.steps()[: -self.keep_last or None]:
            if step != keep:
                shutil.rmtree(self.path(step), ignore_errors=True)
        # Older versions called their partial folders .partial-*.
        for path in (*self.folder.glob(".step-*"), *self.folder.glob(".partial-*")):
            shutil.rmtree(path, ignore_errors=True)


def check(path: Path) -> None:
    """Check that a checkpoint is complete and unchanged.

    Raises:
        DamagedCheckpoint: naming the file and its damage.
    """
    for name, expected in _listed_files(path).items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        # The size first: it finds most damage without reading gigabytes.
        if file.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes and should have {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} has changed since it was written (its SHA-256 differs)")


def read(path: Path) -> TrainingState:
    """Read a checkpoint onto the CPU, checking each file as it is read.

    Raises:
        DamagedCheckpoint: it is incomplete, has changed, or holds something else; the message names the file.
    """
    files = _listed_files(path)
    for name in files.keys() - {MODEL, ADAPTED, EMA, OPTIMIZER, RANDOM, STATE}:
        _parsed(path, name, files, lambda content: None)
    content = _parsed(path, STATE, files, json.loads)
    if not isinstance(content, dict) or content.get("step") != int(path.name.partition("-")[2]):
        raise DamagedCheckpoint(f"{path / STATE} is not of this step")
    if not isinstance(content.get("progress"), dict):
        raise DamagedCheckpoint(f"{path / STATE} has no progress")
    state = TrainingState(
        step=content["step"],
        model=_parsed(path, ADAPTED if ADAPTED in files else MODEL, files, load),
        ema=_parsed(path, EMA, files, load) if EMA in files else None,
        optimizer=_parsed(path, OPTIMIZER, files, _unpickled),
        random_states=_parsed(path, RANDOM, files, _unpickled),
        progress=content["progress"],
    )
    if not isinstance(state.optimizer, dict):
        raise DamagedCheckpoint(f"{path / OPTIMIZER} holds something else")
    if not isinstance(state.random_states, list) or not all(isinstance(one, dict) for one in state.random_states):
        raise DamagedCheckpoint(f"{path / RANDOM} holds something else")
    return state


def _listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """`size` and `sha256` of each file in the manifest."""
    file = path / MANIFEST
    if not file.is_file():
        raise DamagedCheckpoint(f"{path} has no {MANIFEST}, so it was not finished")
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        sound = all(
            name == Path(name).name and type(facts["size"]) is int and isinstance(facts["sha256"], str)
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from error
    if not sound:
        raise DamagedCheckpoint(f"{file} cannot be read (its list of files is of another form)")
    missing = [name for name in (MODEL, OPTIMIZER, RANDOM, STATE) if name not in files]
    if missing:
        raise DamagedCheckpoint(f"{file} does not list {missing[0]}")
    return files


def _parsed(path: Path, name: str, files: Mapping[str, Any], parse: Callable[[bytes], Any]) -> Any:
    """The content of a file that is as it was written."""
    file = path / name
    if not file.is_file():
        raise DamagedCheckpoint(f"{file} is missing")
    # Read once and parsed from memory: what was checked is what is used, and a mapped file that another process cuts
    # short would end this one.
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size == files[name]["size"] else b""
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error.strerror or error})") from error
    if len(content) != files[name]["size"]:
        raise DamagedCheckpoint(f"{file} has {size} bytes and should have {files[name]['size']}")
    if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
        raise DamagedCheckpoint(f"{file} has changed since it was written (its SHA-256 differs)")
    try:
        return parse(content)
    except MemoryError:
        raise
    except Exception as error:  # of safetensors, pickle or JSON, each of which has many
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise DamagedCheckpoint(f"{file} cannot be read ({reason})") from error


def _unpickled(content: bytes) -> Any:
    # With weights_only=True, a checkpoint from somebody else cannot run code.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def check_progress(path: Path, progress: Mapping[str, Any]) -> None:
    """Raise `DamagedCheckpoint` unless everything that a run reads from `state.json` is of the right type."""
    selection, callbacks = progress.get("selection"), progress.get("callbacks", {})
    identity = progress.get("identity")
    sound = {
        "identity": isinstance(identity, dict)
        and ("classes" not in identity or _is_list(identity["classes"], str))
        and isinstance(identity.get("model"), str),
        "selection": isinstance(selection, dict)
        and _is_list(selection.get("evaluations"), dict)
        and all(is_evaluation(row) for row in selection["evaluations"])
        and (selection.get("best_step") is None or _is_count(selection["best_step"])),
        "skipped_steps": _is_count(progress.get("skipped_steps")),
        "consecutive_skips": _is_count(progress.get("consecutive_skips", 0)),  # older checkpoints lack it
        "ema_steps": _is_count(progress.get("ema_steps")),
        "seconds": is_number(progress.get("seconds")) and progress["seconds"] >= 0,
        "callbacks": are_callback_states(callbacks),
    }
    wrong = [name for name, is_right in sound.items() if not is_right]
    if wrong:
        raise DamagedCheckpoint(f"{path / STATE}: {wrong[0]} is missing or of another form")


def is_evaluation(row: Any) -> bool:
    """Whether this is a row of `Selection.evaluations`."""
    return (
        isinstance(row, dict)
        and _is_count(row.get("step"))
        and isinstance(row.get("metrics"), dict)
        and all(isinstance(value, float | int) and not isinstance(value, bool) for value in row["metrics"].values())
        and isinstance(row.get("not_comparable", 0), str | None)
    )


def are_callback_states(states: Any) -> bool:
    """Whether these are states of `Callbacks.states`, or none."""
    if states == {}:
        return True
    if not isinstance(states, dict) or states.keys() != {"noted", "asked"}:
        return False
    noted, asked = states["noted"], states["asked"]
    return (
        isinstance(noted, dict)
        and all(isinstance(values, dict) for values in noted.values())
        and all(name.isidentifier() and not name.startswith("__") for values in noted.values() for name in values)
        and isinstance(asked, dict)
        and all(isinstance(value, bool) for value in asked.values())
        and set(asked) <= {"should_training_stop", "should_evaluate", "should_save"}
    )


def is_number(value: Any) -> bool:
    """Whether this is a finite number that fits a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _write(folder: Path, state: TrainingState) -> None:
    if state.merged is not None:
        save_file(_storable(state.model), folder / ADAPTED, metadata={"format": "pt"})
    usable = state.model if state.merged is None else state.merged
    save_file(_storable(usable), folder / MODEL, metadata={"format": "pt"})  # Transformers demands the format
    if state.ema is not None:
        save_file(_storable(state.ema), folder / EMA, metadata={"format": "pt"})
    save_plain(state.optimizer, folder / OPTIMIZER)
    save_plain(state.random_states, folder / RANDOM)
    text = json.dumps({"step": state.step, "progress": state.progress}, indent=1)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def _write_manifest(folder: Path, step: int) -> None:
    # Written last: a folder without it is not complete.
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    text = json.dumps({"step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(
    recipe: Any, num_samples: int, total_steps: int, datasets: Sequence[Any] = (), task_class: str | None = None
) -> dict[str, Any]:
    """What a run trains, as plain values; of the training `datasets` only metadata is read.

    Args:
        task_class: import path of a task that was given to `train`; `None`: the task that the recipe names.
    """
    rules = resume_rules(recipe.model)
    values = {name: value for name, value in flat(recipe).items() if rules[name] != "yes"}
    values |= {"pictures": num_samples, "total_steps": total_steps, "task_class": task_class}
    if datasets:
        values["classes"] = list(describe(datasets[0]).id2label.values())
        digest = hashlib.sha256()  # of the ids of all images, in order: `StepOrder` goes by their indices
        for dataset in datasets:
            digest.update(json.dumps(list(metadata(dataset)["image_id"])).encode())
        values["image_ids"] = digest.hexdigest()
    return json.loads(json.dumps(values))  # as a checkpoint returns them: tuples become lists


def refuse_other_run(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> str | None:
    """Compare the identity of a checkpoint with that of the run.

    Returns:
        A line for the log about settings that change from here on; `None` if none do.

    Raises:
        ValueError: a difference is not allowed; the message names the fields and the remedy.
    """
    rules = resume_rules(wanted["model"])
    # An older version may lack a field, or have it under another name; it behaved as the default does now.
    found = {name: default_of(field) for name, field in all_fields(wanted["model"]).items()} | renamed(found)
    names = [name for name in found.keys() | wanted.keys() if rules.get(name) != "yes"]
    different = sorted(name for name in names if found.get(name) != wanted.get(name))
    # Older versions did not store these.
    different = [name for name in different if name in found or name not in ("classes", "image_ids", "task_class")]
    refused = [name for name in different if rules.get(name) != "told"]
    if refused:
        changes = "; ".join(_difference(name, found.get(name), wanted.get(name)) for name in refused)
        reason = ""
        if {"pictures", "image_ids"} & set(refused):
            reason = " The order of samples depends on the number of images, so the data set must be the same."
        raise ValueError(
            f"{path} is of another run: {changes}.{reason} Change it back to resume, give another output= to start "
            f"anew, or start from its weights alone with init={path} and another output="
        )
    if not different:
        return None
    changes = ", ".join(f"{name} {json.dumps(wanted[name])} (was {json.dumps(found[name])})" for name in different)
    return f"training resumes with {changes}; the result is no longer that of an uninterrupted run"


def _difference(name: str, before: Any, now: Any) -> str:
    """The change of a field, in words."""
    if name == "image_ids":
        return "the training images are different ones, or in another order (their ids differ)"
    if name == "pictures":
        return f"the number of images was {before} and is {now}"
    if name == "task_class":
        return (
            f"its task was {before or 'that of the recipe'} and is {now or 'that of the recipe'} (give model={before} "
            "in the recipe, or task= to train())"
        )
    if name != "classes":
        return f"{name} was {before!r} and is {now!r}"
    if len(before) != len(now):
        return f"there were {len(before)} classes and are {len(now)}"
    pairs = enumerate(zip(before, now, strict=True))
    changed = [f"{label_id} was {old!r} and is {new!r}" for label_id, (old, new) in pairs if old != new]
    return f"{len(changed)} classes have other names: {', '.join(changed[:_SHOWN])}"
