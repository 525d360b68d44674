"""Whether a run may go on from a checkpoint: it must train the same model on the same data in the same way.

`identity` says what a run is, for its checkpoints; `refuse_other_run` compares. What does not change the result may
change: where output goes, how often it is scored, how the batch is split over processes and micro-batches. What may
have to change so that a training survives, such as its learning rate, may too, and that is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.reading import describe, metadata

_MAY_CHANGE = {
    "name", "output", "resume", "push_to_hub", "trackers", "log_every", "draw", "num_workers", "cache",
    "evaluate_every", "evaluate_limit", "keep_best", "patience", "save_every", "save_every_steps", "keep_last",
    "val_data", "val_split", "device_batch_size", "gradient_checkpointing", "compile",
}  # fmt: skip
# They change the rest of the training, which is what one wants where it diverged or where memory ran out.
_MAY_CHANGE_IF_SAID = {
    "learning_rate", "base_learning_rate", "prompt_learning_rate", "weight_decay", "warmup_steps", "max_grad_norm",
    "precision",
}  # fmt: skip
_SHOWN = 3  # classes in a message


def identity(recipe: Any, num_samples: int, total_steps: int, datasets: Sequence[Any] = ()) -> dict[str, Any]:
    """What a checkpoint is of, as plain values.

    Args:
        recipe: of the run.
        num_samples: length of the training data.
        total_steps: of the whole training.
        datasets: the training data, as `load_segmentation_dataset` reads them; nothing is decoded.
    """
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _MAY_CHANGE}
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
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    different = [name for name in different if name in found or name not in ("classes", "image_ids")]
    refused = [name for name in different if name not in _MAY_CHANGE_IF_SAID]
    if refused:
        changes = "; ".join(_difference(name, found.get(name), wanted.get(name)) for name in refused)
        reason = ""
        if {"pictures", "image_ids"} & set(refused):
            reason = " The order of the pictures follows from their number, so the data set must be the same."
        raise ValueError(
            f"{path} is of another training: {changes}.{reason} Set it back to go on, give another output= to begin "
            f"anew, or train on from the weights alone with init={path} and another output="
        )
    if not different:
        return None
    changes = ", ".join(f"{name} {json.dumps(wanted[name])} (was {json.dumps(found[name])})" for name in different)
    return f"training goes on with {changes}; the result is no longer that of an uninterrupted run"


def _hash_of_ids(datasets: Sequence[Any]) -> str:
    """A hash of the ids of all pictures, in order."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(json.dumps(list(metadata(dataset)["image_id"])).encode())
    return digest.hexdigest()


def _difference(name: str, before: Any, now: Any) -> str:
    """What changed in a field, in words."""
    if name == "image_ids":
        return "the training pictures are others, or in another order (their ids differ)"
    if name != "classes":
        return f"{name} was {before!r} and is {now!r}"
    if len(before) != len(now):
        return f"there were {len(before)} classes and are {len(now)}"
    others = [(number, *names) for number, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1]]
    shown = ", ".join(f"{number} was {one!r} and is {other!r}" for number, one, other in others[:_SHOWN])
    return f"{len(others)} classes have other names: {shown}"
