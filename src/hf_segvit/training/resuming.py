"""Whether a run may go on from a checkpoint: it must train the same model on the same data in the same way.

`identity` says what a run is, for its checkpoints; `refuse_other_run` compares. What does not change the result may
change: where output goes, how often it is scored, how the batch is split over processes and micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAY_CHANGE = {
    "name", "output", "resume", "push_to_hub", "trackers", "log_every", "draw", "num_workers", "cache",
    "evaluate_every", "evaluate_limit", "keep_best", "patience", "save_every", "save_every_steps", "keep_last",
    "val_data", "val_split", "device_batch_size", "gradient_checkpointing", "compile",
}  # fmt: skip


def identity(recipe: Any, num_samples: int, total_steps: int) -> dict[str, Any]:
    """What a checkpoint is of, as plain values.

    Args:
        recipe: of the run.
        num_samples: length of the training data.
        total_steps: of the whole training.
    """
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _MAY_CHANGE}
    return json.loads(json.dumps({**fields, "pictures": num_samples, "total_steps": total_steps}))


def refuse_other_run(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Compare what a checkpoint is of with what is to be trained.

    Raises:
        ValueError: they differ; the message names the fields and the remedy.
    """
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if not different:
        return
    changes = ", ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in different)
    reason = ""
    if "pictures" in different:
        reason = " The order of the pictures follows from their number, so the data set must be the same."
    raise ValueError(
        f"{path} is of another training: {changes}.{reason} Set it back to go on, or give another output= to begin anew"
    )
