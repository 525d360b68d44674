"""The model as it is trained: built by its task, with its frozen parts and adapters."""

from __future__ import annotations

from typing import Any

from .adapters import add_adapters
from .freezing import freeze
from .tasks import TrainingTask


def build_trained_model(task: TrainingTask) -> tuple[Any, Any]:
    """The model of a task and its image processor, ready for an optimiser.

    Raises:
        ValueError: recipe, data, checkpoint or adapters do not go together.
    """
    model, processor = task.build_model()
    freeze(model, task.recipe.freeze)
    if task.recipe.lora is not None:
        model = add_adapters(model, task.recipe.lora)
    return model, processor
